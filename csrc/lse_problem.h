// The contract between Python and every compiled backend: one log-sum-exp over pairs of rows.
//
//   lse_i = log Σ_{j allowed for i} exp(a_i·b_j · scale + bias_j)        i < rows, j < columns
//
// Two shapes. Self: b is a, and the pair j = i is not allowed. Cross: a and b are different, and `skip` (one column per row) or the two
// label arrays (all columns of the row's own label) say what is not allowed; at most one of the two rules is given.
//
// Plain pointers and sizes: nothing here knows torch. Python (fastsupcon/backends/cpu.py, cuda.py) checks shapes, dtypes and
// contiguity before it fills this in. "Sum" is the type that sums, lse, bias and incoming gradients have: double for f64 rows, else float.
#pragma once

#include <cstdint>

namespace fastsupcon {

enum class Scalar { f32, f64, f16, bf16 };

struct LseProblem {
  Scalar scalar;                 // element type of a and b
  std::int64_t rows;             // N ≥ 1
  std::int64_t columns;          // M ≥ 1; equal to rows in the self shape
  std::int64_t depth;            // D ≥ 1
  const void* a;                 // [N, D], row-major, contiguous
  const void* b;                 // [M, D], row-major, contiguous; equal to a in the self shape
  const void* bias;              // [M] Sum, or null
  const std::int64_t* skip;      // [N], the excluded column of each row, −1 for none; or null
  const std::int64_t* row_labels;     // [N], or null
  const std::int64_t* column_labels;  // [M], or null: columns with column_labels[j] == row_labels[i] are excluded
  double scale;                  // 1/τ
  bool unit_rows;                // self shape: the caller has normalised the rows, so |a_i| ≤ 1 up to rounding
};

}  // namespace fastsupcon
