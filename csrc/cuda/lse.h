// Log-sum-exp over pairs of rows on NVIDIA GPUs. See ../lse_problem.h for the problem, ../cpu/lse.h for what the outputs are.
//
// All pointers are to device memory. Each function returns the bytes of scratch memory it needs; given less (`scratch_bytes`), it has
// launched nothing, and is called again with that much.
#pragma once

#include <cstddef>
#include <string>

#include "../lse_problem.h"
#include "where.h"

namespace pybind11 {
class module_;
}

namespace fastsupcon::cuda {

// Why no kernel here can run on a device of capability 8.0 or newer, or "".
std::string unusable(int device);

struct Scratch {
  void* memory;
  std::size_t bytes;
};

std::size_t forward(const LseProblem& problem, bool self, bool allow_tf32, float* lse, Scratch scratch, const Where& where);

// Self: da = scale Σ_j (g_i P_ij + g_j P_ji) a_j, and db, dbias are null. Cross: a null output is not computed.
std::size_t backward(const LseProblem& problem, bool self, bool allow_tf32, const float* lse, const float* grad, void* da, void* db,
                     float* dbias, Scratch scratch, const Where& where);

void bind(pybind11::module_ module);

}  // namespace fastsupcon::cuda
