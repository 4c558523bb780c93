// The contract between Python and every compiled backend: the terms of the losses over pairs of rows, and their gradients.
//
// Rows a [N, D] (anchors) meet columns b [M, D]; in the self shape b is a. With x̂ = x / |x| where `unit` asks for it, else x:
//
//   s_ij = scale · â_i·b̂_j        t_ij = s_ij + bias_j
//
// A row is never a pair with itself: in the self shape the diagonal is no pair, elsewhere column own_column[i] is none of row i. Keys split the
// pairs into equal ones (the row's key is the column's) and different ones; without keys all pairs are different.
//
// Plain pointers and sizes: nothing here knows torch. Python (fastsupcon/problem.py, backends/) checks shapes, dtypes and contiguity before it
// fills this in. "Sum" is the type that sums, quantities, bias and incoming gradients have: double for f64 rows, else float.
#pragma once

#include <cstdint>

namespace fastsupcon {

enum class Scalar { f32, f64, f16, bf16 };

struct Problem {
  Scalar scalar;                    // element type of a and b
  std::int64_t rows;                // N ≥ 1
  std::int64_t columns;             // M ≥ 1; equal to rows in the self shape
  std::int64_t depth;               // D ≥ 1
  const void* a;                    // [N, D], row-major, contiguous
  const void* b;                    // [M, D], row-major, contiguous; null: the self shape
  const void* bias;                 // [M] Sum, or null
  const std::int64_t* row_keys;     // [N], or null
  const std::int64_t* column_keys;  // [M]; null without keys, and in the self shape
  const std::int64_t* own_column;   // [N], −1 for none; or null
  double scale;                     // 1/τ, unless
  const void* scale_address;        // a Sum on the rows' device that holds it; or null
  bool unit;                        // rows and columns are brought to unit length; a row of zeros stays as it is
};

// Of the rows [N], or of the columns [M], each Sum; null where it is not asked for. log Σ exp t over no pair is −inf.
template <class Pointer>
struct Quantities {
  Pointer all, different, equal;  // log Σ exp(t_ij) over all pairs, those of different keys, those of equal keys
  Pointer similarity;             // Σ s_ij over the pairs of equal keys
  Pointer count;                  // how many those are
};

template <class T>
Quantities<const T*> constant(const Quantities<T*>& q) {
  return {q.all, q.different, q.equal, q.similarity, q.count};
}

// Incoming gradients of one side's quantities, with the log-sums they belong to. count has no gradient.
struct Incoming {
  Quantities<const void*> values;
  Quantities<const void*> grads;
};

// Null where it is not asked for. rows [N, D], columns [M, D] in the rows' element type, bias [M] and scale [1] Sum.
struct Outgoing {
  void *rows, *columns, *bias, *scale;
};

// A loss linear in the quantities of its row, fastsupcon/problem.py's Line.
struct Line {
  double all, different, equal, similarity, log_count, factor;
  double lone;     // what a row without a pair of equal keys contributes, and is given as its gradient: 0 or NaN
  bool skip_lone;  // such a row leaves the mean
  enum class Reduction { mean, sum, none } reduction;
};

}  // namespace fastsupcon
