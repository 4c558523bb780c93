// The terms of the losses over pairs of rows, and their gradients, on the CPU. See ../problem.h for the problem and the meaning of Sum.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"

namespace fastsupcon::cpu {

// Calls f with a Sum of the scalar's sum type.
template <class F>
auto with_sum(Scalar scalar, const F& f) {
  return scalar == Scalar::f64 ? f(double()) : f(float());
}

std::vector<std::string> instruction_sets();
std::string instruction_set();

// How many exponentials (Sum) the forward can keep for the backward: 0 where they are more than twice as many numbers as
// the rows, and in a cross shape the columns, have, and a million. To make them anew would take a product in four.
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

// A loss, one Sum or [rows] without reduction, in one call, and its gradients in another. values: the quantities it needs and the count;
// norms and kept as above.
void loss(const Problem& problem, const Line& line, const Quantities<void*>& values, void* norms, void* kept, void* loss, int threads);
void loss_backward(const Problem& problem, const Line& line, const Quantities<const void*>& values, const void* norms, const void* kept,
                   const void* grad, const Outgoing& out, int threads);

// For benchmarks: `times` rounds of the micro-kernel in each thread, its operands in L1. Returns the multiply-adds of all.
double micro_kernel(Scalar scalar, std::int64_t times, int threads);

}  // namespace fastsupcon::cpu
