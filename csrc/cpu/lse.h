// Log-sum-exp over pairs of rows on the CPU. See ../lse_problem.h for the problem and the meaning of Sum.
#pragma once

#include <string>
#include <vector>

#include "../lse_problem.h"

namespace fastsupcon::cpu {

std::vector<std::string> instruction_sets();
std::string instruction_set();

// lse [N] Sum. A row with no allowed column gets −inf.
void self_forward(const LseProblem& problem, void* lse, int threads);
void cross_forward(const LseProblem& problem, void* lse, int threads);

// From lse and grad = ∂L/∂lse, both [N] Sum, with P_ij = exp(s_ij − lse_i):
//   da_i = scale Σ_j g_i P_ij b_j      (self: scale Σ_j (g_i P_ij + g_j P_ji) a_j)
//   db_j = scale Σ_i g_i P_ij a_i      dbias_j = Σ_i g_i P_ij
// da [N, D] and db [M, D] have the rows' element type, dbias [M] is Sum; in the cross shape a null output is not computed.
void self_backward(const LseProblem& problem, const void* lse, const void* grad, void* da, int threads);
void cross_backward(const LseProblem& problem, const void* lse, const void* grad, void* da, void* db, void* dbias, int threads);

// For benchmarks: `times` rounds of the micro-kernel in each thread, its operands in L1. Returns the multiply-adds of all.
double micro_kernel(Scalar scalar, std::int64_t times, int threads);

}  // namespace fastsupcon::cpu
