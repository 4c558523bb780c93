// From logits to what the second product or the sums need: the formulas of work.h on accumulator fragments.
// A fragment is 16 rows × COLUMNS: s[j][e] is row accumulator_row(lane, e), column 8j + accumulator_column(lane, e).
#pragma once

#include <cmath>

#include "layout.h"
#include "work.h"

namespace fastsupcon::cuda {

constexpr float kInfinity = __builtin_huge_valf();

template <Product PRODUCT>
constexpr int kElementBytes = PRODUCT == Product::f16 || PRODUCT == Product::bf16 ? 2 : 4;

// What one row, owned or streamed, brings to its pairs: W uses exp2(s + exponent) and the factor.
struct Terms {
  float exponent, factor;
};

// What incoming gradients are measured in: max|g| where that was asked for. NaN stays.
FASTSUPCON_DEVICE float gradient_unit(const Work& work) {
  constexpr float smallest = 1e-30f;  // its reciprocal is finite
  const float largest = work.largest ? *work.largest : 1.0f;
  return largest < smallest ? smallest : largest;
}

FASTSUPCON_DEVICE Terms terms_of(const Work& work, const Side& side, std::int64_t row, float per_unit) {
  if (row >= side.count) return {-kInfinity, 0.0f};
  Terms terms{0.0f, 1.0f};
  if (side.bias) terms.exponent = side.bias[row] * kLog2e;
  if (side.lse) {
    const float lse = side.lse[row];
    terms.exponent = lse == -kInfinity ? -kInfinity : work.shift - lse * kLog2e;  // a row that allows no column passes no gradient
  }
  if (side.grad) terms.factor = side.grad[row] * per_unit;
  if (work.form == Form::sum) terms.factor *= ptx::exp2(terms.exponent);
  return terms;
}

FASTSUPCON_DEVICE std::int64_t key_of(const Side& side, std::int64_t row) {
  return side.keys ? (row < side.count ? side.keys[row] : -1) : row;
}

// An owned row's key. Without exclusions no column has it: then columns' keys are their indices.
FASTSUPCON_DEVICE std::int64_t row_key_of(const Work& work, std::int64_t row) {
  return work.exclusion == Exclusion::none ? -1 : key_of(work.x, row);
}

// What the columns of a tile bring, in shared memory.
struct ColumnTerms {
  const Terms* terms;
  const std::int64_t* keys;
  std::int64_t first;  // the tile's first column
};

// Whether a tile of `columns` from `first_column` on holds pairs with `rows` from `first_row` on that `mask` would change.
FASTSUPCON_DEVICE bool needs_mask(const Work& work, std::int64_t first_row, int rows, std::int64_t first_column, int columns) {
  return work.exclusion == Exclusion::keys || first_column + columns > work.y.count ||
         (work.exclusion == Exclusion::diagonal && first_column < first_row + rows && first_row < first_column + columns);
}

// Sets the logits of excluded pairs, and of columns past the last, to −inf.
template <int COLUMNS>
FASTSUPCON_DEVICE void mask(float (&s)[COLUMNS / 8][4], const std::int64_t (&row_keys)[2], const ColumnTerms& columns, std::int64_t count,
                            int lane) {
  const std::int64_t left = count - columns.first;
  const int valid = left < COLUMNS ? static_cast<int>(left) : COLUMNS;
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = 8 * j + accumulator_column(lane, e);
      if (columns.keys[column] == row_keys[e / 2] || column >= valid) s[j][e] = -kInfinity;
    }
  }
}

// s becomes W.
template <Form FORM, int COLUMNS>
FASTSUPCON_DEVICE void weigh(float (&s)[COLUMNS / 8][4], const Terms (&rows)[2], const ColumnTerms& columns, float scale_log2, int lane) {
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
    const Terms* pair = columns.terms + 8 * j + accumulator_column(lane, 0);
    const Terms column[2] = {pair[0], pair[1]};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Terms& x = rows[e / 2];
      const Terms& y = column[e % 2];
      if constexpr (FORM == Form::sum) {
        s[j][e] = ptx::exp2(s[j][e] * scale_log2) * (x.factor + y.factor);
      } else if constexpr (FORM == Form::one) {
        s[j][e] = y.factor * ptx::exp2(fmaf(s[j][e], scale_log2, x.exponent + y.exponent));
      } else {
        s[j][e] = x.factor * ptx::exp2(fmaf(s[j][e], scale_log2, x.exponent)) + y.factor * ptx::exp2(fmaf(s[j][e], scale_log2, y.exponent));
      }
    }
  }
}

template <int COLUMNS>
FASTSUPCON_DEVICE void weigh(Form form, float (&s)[COLUMNS / 8][4], const Terms (&rows)[2], const ColumnTerms& columns, float scale_log2,
                             int lane) {
  switch (form) {  // uniform over the grid; the products around it are compiled once
    case Form::sum: return weigh<Form::sum, COLUMNS>(s, rows, columns, scale_log2, lane);
    case Form::one: return weigh<Form::one, COLUMNS>(s, rows, columns, scale_log2, lane);
    case Form::two: return weigh<Form::two, COLUMNS>(s, rows, columns, scale_log2, lane);
  }
}

// Half: W as the A fragments of the second product, 16 columns of the tile each.
template <Product PRODUCT, int COLUMNS>
FASTSUPCON_DEVICE void pack_weights(std::uint32_t (&packed)[COLUMNS / 16][4], const float (&w)[COLUMNS / 8][4]) {
#pragma unroll
  for (int k = 0; k < COLUMNS / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = w[2 * k + i / 2][2 * (i % 2)], high = w[2 * k + i / 2][2 * (i % 2) + 1];
      packed[k][i] = PRODUCT == Product::f16 ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
    }
  }
}

// A running log2 Σ exp2(t): `sum` is relative to 2^finite(maximum), so that a maximum of ±inf needs no branch where it is used.
struct LogSum {
  float maximum = -kInfinity, sum = 0.0f;
};

FASTSUPCON_DEVICE float finite(float maximum) { return fabsf(maximum) == kInfinity ? 0.0f : maximum; }

FASTSUPCON_DEVICE void merge(LogSum& into, const LogSum& other) {
  const float maximum = fmaxf(into.maximum, other.maximum);
  const float origin = finite(maximum);
  const float first = into.sum == 0.0f ? 0.0f : into.sum * ptx::exp2(finite(into.maximum) - origin);
  const float second = other.sum == 0.0f ? 0.0f : other.sum * ptx::exp2(finite(other.maximum) - origin);
  into = {maximum, first + second};
}

FASTSUPCON_DEVICE float log_of(const LogSum& total) { return (finite(total.maximum) + ptx::log2(total.sum)) * kLn2; }

// Adds a tile's logits to each lane's own sums of its two rows; lanes meet only at the end (no shuffles here).
template <bool ONLINE, int COLUMNS>
FASTSUPCON_DEVICE void add_logits(LogSum (&rows)[2], float (&s)[COLUMNS / 8][4], const ColumnTerms& columns, bool has_bias, float scale_log2,
                                  int lane) {
  if constexpr (!ONLINE) {  // unit rows: |s| is small enough for exp2 as it is
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) rows[e / 2].sum += ptx::exp2(s[j][e] * scale_log2);
    }
    return;
  }
  float maximum[2] = {rows[0].maximum, rows[1].maximum};
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; ++j) {
    const Terms* pair = columns.terms + 8 * j + accumulator_column(lane, 0);
    const float bias[2] = {has_bias ? pair[0].exponent : 0.0f, has_bias ? pair[1].exponent : 0.0f};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = fmaf(s[j][e], scale_log2, bias[e % 2]);
      maximum[e / 2] = fmaxf(maximum[e / 2], s[j][e]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float origin = finite(maximum[r]);
    rows[r].sum = rows[r].sum == 0.0f ? 0.0f : rows[r].sum * ptx::exp2(finite(rows[r].maximum) - origin);
    rows[r].maximum = maximum[r];
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
      rows[r].sum += ptx::exp2(s[j][2 * r] - origin);
      rows[r].sum += ptx::exp2(s[j][2 * r + 1] - origin);
    }
  }
}

// The four lanes that share a row put their sums together.
FASTSUPCON_DEVICE void merge_lanes(LogSum& row) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) merge(row, {ptx::shuffle_xor(row.maximum, mask), ptx::shuffle_xor(row.sum, mask)});
}

FASTSUPCON_DEVICE void store_logsum(const Work& work, const LogSum& total, std::int64_t row) {
  if (row >= work.x.count) return;
  if (work.lse) {
    work.lse[row] = log_of(total);
  } else {
    float* partial = work.partial + 2 * (ptx::block_y() * work.x.count + row);
    partial[0] = total.maximum;
    partial[1] = total.sum;
  }
}

// What the sum of weighted rows is multiplied by in the end: the incoming gradient, the scale, and the shift taken back.
FASTSUPCON_DEVICE float gradient_factor(const Work& work, std::int64_t row) {
  return (work.out_grad ? work.out_grad[row] : gradient_unit(work)) * ptx::exp2(-work.shift);
}

template <Product PRODUCT>
FASTSUPCON_DEVICE void store_element(void* out, std::int64_t index, float value) {
  if constexpr (PRODUCT == Product::f16) {
    static_cast<std::uint16_t*>(out)[index] = static_cast<std::uint16_t>(ptx::pack_f16(value, 0.0f));
  } else if constexpr (PRODUCT == Product::bf16) {
    static_cast<std::uint16_t*>(out)[index] = static_cast<std::uint16_t>(ptx::pack_bf16(value, 0.0f));
  } else {
    static_cast<float*>(out)[index] = value;
  }
}

// Two neighbours of the result, half, where the depth is even: what wgmma serves. store_pair's other cases would be most of those kernels' code.
template <Product PRODUCT>
FASTSUPCON_DEVICE void store_whole_pair(const Work& work, std::int64_t row, std::int64_t column, float first, float second) {
  if (column >= work.depth) return;
  if (work.out_is_partial) {
    float* out = static_cast<float*>(work.out) + (ptx::block_y() * work.x.count + row) * work.depth + column;
    out[0] = first;
    out[1] = second;
  } else {
    const std::uint32_t pair = PRODUCT == Product::f16 ? ptx::pack_f16(first, second) : ptx::pack_bf16(first, second);
    *reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(work.out) + row * work.depth + column) = pair;
  }
}

template <Product PRODUCT>
FASTSUPCON_DEVICE void store_pair(const Work& work, std::int64_t row, std::int64_t column, float first, float second) {
  const bool whole = column + 1 < work.depth;
  if (column >= work.depth) return;
  if (work.out_is_partial) {
    float* out = static_cast<float*>(work.out) + (ptx::block_y() * work.x.count + row) * work.depth + column;
    out[0] = first;
    if (whole) out[1] = second;
    return;
  }
  const std::int64_t index = row * work.depth + column;
  if constexpr (PRODUCT == Product::f16 || PRODUCT == Product::bf16) {
    if (whole && work.depth % 2 == 0) {
      const std::uint32_t pair = PRODUCT == Product::f16 ? ptx::pack_f16(first, second) : ptx::pack_bf16(first, second);
      *reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(work.out) + index) = pair;
      return;
    }
  }
  store_element<PRODUCT>(work.out, index, first);
  if (whole) store_element<PRODUCT>(work.out, index + 1, second);
}

}  // namespace fastsupcon::cuda
