// The terms of the losses over pairs of rows, and their gradients, on NVIDIA GPUs. See ../problem.h for the problem. All pointers are to
// device memory, but for those of Where.
//
// A call is planned, then run: the plan says how many bytes of scratch memory its launches share, and holds them in their order.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "../problem.h"
#include "where.h"

namespace fastsupcon::cuda {

struct Plan {
  using Launch = std::function<void(char* scratch, const Where& where)>;
  std::size_t bytes = 0;
  std::vector<Launch> launches;
};

// norms: where problem.unit inverse lengths, [rows], cross [rows + columns]; else whether sums are bounded, [1]. Written by the forward, read
// by the backward.
Plan forward(const Problem& problem, const Quantities<void*>& rows, const Quantities<void*>& columns, void* norms, bool allow_tf32,
             int device);
Plan backward(const Problem& problem, const Incoming& rows, const Incoming& columns, const void* norms, const Outgoing& out,
              bool allow_tf32, int device);
void run(const Plan& plan, void* scratch, const Where& where);

// The same with a loss's line: from the problem to the loss, and from the loss's gradient to the rows'.
// paired: how many rows have a pair of equal keys, [1]: written by the first, read by the second.
Plan loss(const Problem& problem, const Line& line, const Quantities<void*>& values, void* norms, void* paired, void* loss, bool allow_tf32,
          int device);
Plan loss_backward(const Problem& problem, const Line& line, const Quantities<const void*>& values, const void* norms, void* paired,
                   const void* grad, const Outgoing& out, bool allow_tf32, int device);

// A loss of `rows` rows from their quantities, one launch; and the quantities' gradients from the loss's, one launch.
void line(const Line& line, std::int64_t rows, const Quantities<const void*>& values, void* loss, const Where& where);
void line_backward(const Line& line, std::int64_t rows, const Quantities<const void*>& values, const void* grad,
                   const Quantities<void*>& grads, const Where& where);

// Why no kernel here can run on a device of capability 8.0 or newer, or "".
std::string unusable(int device);

}  // namespace fastsupcon::cuda
