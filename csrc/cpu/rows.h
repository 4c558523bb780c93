// What the losses need of rows beside the log-sum-exp, each in O(N·D) and without temporaries: unit length, sums by id, dots with a gathered row.
// "Sum" is float, or double for f64 rows. Any number of threads gives the same bits.
#pragma once

#include <cstdint>

#include "../lse_problem.h"

namespace fastsupcon::cpu {

struct Rows {
  Scalar scalar;
  const void* data;  // [count, depth], row-major, contiguous
  std::int64_t count;
  std::int64_t depth;
};

// unit_i = x_i / |x_i|, norm_i = |x_i| [N] Sum. A row of zeros stays zero, with norm 1.
void unit_rows(const Rows& x, void* unit, void* norm, int threads);
// dx_i = (grad_i − unit_i (unit_i·grad_i)) / norm_i
void unit_rows_backward(const Rows& unit, const void* norm, const void* grad, void* dx, int threads);

// Numbers the labels from 0 in the order they first appear: ids [N]. Returns how many labels there are.
// share [N] Sum of `scalar`: 1 / (number of other rows with the row's label), 0 where there is none.
std::int64_t number_labels(Scalar scalar, const std::int64_t* labels, std::int64_t count, std::int64_t* ids, void* share);

// Below, ids [N] in [0, K), or std::out_of_range; a table and sums are [K, D] Sum. A result may take the place of `start`, where they have one type.

// sums_k = start_k + Σ over ids_i = k of weight_i x_i, the rows in order: weight [N] Sum, or null for 1; start [K, D] like x, or null for 0.
void sum_rows(const Rows& x, const std::int64_t* ids, const void* weight, std::int64_t classes, const void* start, void* sums, int threads);

// dots_i = z_i·table_{ids_i}, or with `others`, where the table's rows are sums that z_i is in, z_i·(table_{ids_i} − z_i). dots [N] Sum.
void row_dots(const Rows& z, const void* table, std::int64_t classes, const std::int64_t* ids, bool others, void* dots, int threads);
// dz_i = grad_i table_{ids_i}, or where grad_sums = Σ over ids_i = k of grad_i z_i is given, that of `others`:
// dz_i = grad_i (table_{ids_i} − 2 z_i) + grad_sums_{ids_i}; either is added to start_i, [N, D] like z, or null for 0. grad [N] Sum.
void row_dots_backward(const Rows& z, const void* table, std::int64_t classes, const std::int64_t* ids, const void* grad, const void* grad_sums,
                       const void* start, void* dz, int threads);

}  // namespace fastsupcon::cpu
