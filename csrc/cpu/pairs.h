// The terms of the losses over pairs of rows, and their gradients, on the CPU. See ../problem.h for the problem and the meaning of Sum.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"

namespace fastsupcon::cpu {

std::vector<std::string> instruction_sets();
std::string instruction_set();

// How many exponentials (Sum) the forward can keep for the backward: 0 where they are more numbers than the rows and columns.
std::int64_t kept_size(std::int64_t rows, std::int64_t columns, std::int64_t depth, bool self);

// Columns' quantities are for the cross shape. norms [rows], cross [rows + columns] Sum where problem.unit, written for the backward.
// kept [kept_size] Sum or null, the same.
void forward(const Problem& problem, const Quantities<void*>& rows, const Quantities<void*>& columns, void* norms, void* kept, int threads);

// With g, u the incoming gradients of the rows' log-sums and similarities, and h, v those of the columns':
//   w_ij = Σ over the log-sums q that (i, j) is in of (g_i exp(t_ij − q_i) + h_j exp(t_ij − q'_j)) + [equal keys] (u_i + v_j)
//   ∂â_i = scale Σ_j w_ij b̂_j    ∂b̂_j = scale Σ_i w_ij â_i    ∂bias_j = Σ_i (w_ij without its last term)    ∂scale = Σ_ij w_ij â_i·b̂_j
// and through the unit length to the rows. Self shape: the gradient of a row from both of its places.
void backward(const Problem& problem, const Incoming& rows, const Incoming& columns, const void* norms, const void* kept,
              const Outgoing& out, int threads);

// A loss from the quantities of `rows` rows: one Sum (f32 or f64), or [rows] without reduction. And back, from its gradient.
void line(const Line& line, Scalar sum, std::int64_t rows, const Quantities<const void*>& values, void* loss);
void line_backward(const Line& line, Scalar sum, std::int64_t rows, const Quantities<const void*>& values, const void* grad,
                   const Quantities<void*>& grads);

// For benchmarks: `times` rounds of the micro-kernel in each thread, its operands in L1. Returns the multiply-adds of all.
double micro_kernel(Scalar scalar, std::int64_t times, int threads);

}  // namespace fastsupcon::cpu
