// Rows on their way in and out: norms, the two forms in which products read them, and the last pass over their gradients (see simd.h).
#pragma once

#include "elements.h"
#include "product.h"

namespace fastsupcon::cpu::FASTSUPCON_UNIT {
namespace {

FASTSUPCON_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FASTSUPCON_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Σ_d over the lanes of f(d, how many elements from d on there are); four sums in flight, for an addition's latency is not one cycle.
template <class Sum, class F>
FASTSUPCON_INLINE Sum sum_along(std::int64_t depth, const F& f) {
  constexpr int W = kLanes<Sum>;
  Vector<Sum> sums[4] = {};
  std::int64_t d = 0;
  for (; d + 4 * W <= depth; d += 4 * W) {
    unroll<4>([&](auto u) __attribute__((always_inline)) { sums[u] += f(d + u * W, W); });
  }
  for (; d < depth; d += W) sums[0] += f(d, depth - d);
  return sum_of_lanes<Sum>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// 1 / |x| of a row whose squares leave the range of Sum, by dividing out its largest entry first. A row of zeros stays as it is; so does
// one below the normal range. A NaN or an inf makes it NaN.
template <class Sum, class Source>
Sum careful_inverse_norm(const Source* x, std::int64_t depth) {
  constexpr Sum smallest_normal = sizeof(Sum) == 4 ? Sum(0x1p-126) : Sum(0x1p-1022);
  Sum largest = 0, square = 0;
  for (std::int64_t d = 0; d < depth; ++d) {
    const Sum magnitude = to_sum(x[d]) < 0 ? -to_sum(x[d]) : to_sum(x[d]);
    if (magnitude > largest) largest = magnitude;
  }
  if (largest < smallest_normal) largest = 1;
  for (std::int64_t d = 0; d < depth; ++d) square += to_sum(x[d]) / largest * (to_sum(x[d]) / largest);
  return square < 1 ? 1 : 1 / largest / square_root(square);  // below 1 only where the row has no normal number
}

// Returns max |x_i|², NaN if any is NaN. inverse_norms [count], or null: 1 / |x_i|.
template <class Sum, class Source>
double measure(const void* rows, std::int64_t count, std::int64_t depth, Sum* inverse_norms) {
  constexpr Sum low = sizeof(Sum) == 4 ? Sum(0x1p-80) : Sum(0x1p-900), high = sizeof(Sum) == 4 ? Sum(0x1p80) : Sum(0x1p900);
  Sum largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Source* const x = static_cast<const Source*>(rows) + i * depth;
    const Sum square = sum_along<Sum>(depth, [&](std::int64_t d, std::int64_t available) __attribute__((always_inline)) {
      const Vector<Sum> v = load_elements(x + d, available);
      return v * v;
    });
    if (square > largest || square != square) largest = square;  // and a NaN, once there, stays
    if (inverse_norms) inverse_norms[i] = square > low && square < high ? 1 / square_root(square) : careful_inverse_norm<Sum>(x, depth);
  }
  return double(largest);
}

// W vectors of W lanes, transposed by log2 W rounds of perfect shuffles.
template <class T, int kOffset, int... I>
FASTSUPCON_INLINE Vector<T> interleave(Vector<T> a, Vector<T> b, Constants<I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, (kOffset + I / 2 + (I % 2) * lanes)...);
}

template <class T>
FASTSUPCON_INLINE void transpose(Vector<T> (&rows)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  for (int round = 1; round < lanes; round *= 2) {
    Vector<T> mixed[lanes];
    unroll<lanes / 2>([&](auto i) __attribute__((always_inline)) {
      mixed[2 * i] = interleave<T, 0>(rows[i], rows[i + lanes / 2], First<lanes>{});
      mixed[2 * i + 1] = interleave<T, lanes / 2>(rows[i], rows[i + lanes / 2], First<lanes>{});
    });
    unroll<lanes>([&](auto i) __attribute__((always_inline)) { rows[i] = mixed[i]; });
  }
}

// Rows times their factors as [⌈count / kPanel⌉][depth][kPanel]; missing rows are 0.
template <class Sum, class Source, class Factor>
FASTSUPCON_INLINE void pack_panels(const Source* rows, std::int64_t count, std::int64_t depth, const Factor& factor, Sum* panels) {
  constexpr int W = kLanes<Sum>;
  const auto pack_rows = [&](std::int64_t first, std::int64_t existing, Sum* to) __attribute__((always_inline)) {
    const auto square = [&](std::int64_t k, std::int64_t available) __attribute__((always_inline)) {
      Vector<Sum> block[W];
      unroll<W>([&](auto l) __attribute__((always_inline)) {
        block[l] = l < existing ? load_elements(rows + (first + l) * depth + k, available) * factor(first + l) : Vector<Sum>{};
      });
      transpose<Sum>(block);
      unroll<W>([&](auto l) __attribute__((always_inline)) {
        if (l < available) store(to + (k + l) * kPanel<Sum>, block[l]);
      });
    };
    std::int64_t k = 0;
    for (; k + W <= depth; k += W) square(k, W);
    if (k < depth) square(k, depth - k);
  };
  for (std::int64_t first = 0; first < count; first += kPanel<Sum>, panels += kPanel<Sum> * depth) {
    for (int v = 0; v < kVectors; ++v) {
      const std::int64_t row = first + v * W;
      row + W <= count ? pack_rows(row, W, panels + v * W) : pack_rows(row, count - row, panels + v * W);
    }
  }
}

// Rows times their factors as [groups of vectors of the depth (product.h)][count][vectors of the group]; elements past the depth are 0.
template <class Sum, class Source, class Factor>
FASTSUPCON_INLINE void pack_elements(const Source* rows, std::int64_t count, std::int64_t depth, const Factor& factor, Sum* elements) {
  each_group<Sum>(depth, [&](auto v, std::int64_t first) __attribute__((always_inline)) {
    const auto pack_rows = [&](std::int64_t available) __attribute__((always_inline)) {
      for (std::int64_t i = 0; i < count; ++i) {
        unroll<v.value>([&](auto u) __attribute__((always_inline)) {
          store(elements, load_elements(rows + i * depth + first + u * kLanes<Sum>, available - u * kLanes<Sum>) * factor(i));
          elements += kLanes<Sum>;
        });
      }
    };
    constexpr int width = v.value * kLanes<Sum>;
    depth - first >= width ? pack_rows(width) : pack_rows(depth - first);
  });
}

// Either form, or both; each row times its inverse norm, if there are any.
template <class Sum, class Source>
void pack(const void* rows_, std::int64_t count, std::int64_t depth, const Sum* inverse_norms, Sum* panels, Sum* elements) {
  const Source* const rows = static_cast<const Source*>(rows_);
  const auto with = [&](const auto& factor) __attribute__((always_inline)) {
    if (panels) pack_panels<Sum>(rows, count, depth, factor, panels);
    if (elements) pack_elements<Sum>(rows, count, depth, factor, elements);
  };
  inverse_norms ? with([&](std::int64_t i) __attribute__((always_inline)) { return inverse_norms[i]; })
                : with([](std::int64_t) __attribute__((always_inline)) { return Sum(1); });
}

// From ∂x̂_i = sums_i the gradient of x_i, (∂x̂_i − x̂_i (x̂_i·∂x̂_i)) / |x_i|, times both factors; without inverse_norms x̂ is x. Returns
// Σ_i x̂_i·∂x̂_i, or 0 where neither that is asked for nor there are norms. elements may be sums, or null.
template <class Sum, class Source>
double finish(const void* rows_, std::int64_t count, std::int64_t depth, const Sum* inverse_norms, bool along_wanted, const Sum* sums,
              Sum factor, Sum last_factor, void* elements_) {
  double total = 0;
  for (std::int64_t i = 0; i < count; ++i, sums += depth) {
    const Source* const x = static_cast<const Source*>(rows_) + i * depth;
    const Sum inverse = inverse_norms ? inverse_norms[i] : Sum(1);
    Sum along = 0;
    if (along_wanted || inverse_norms) {
      along = sum_along<Sum>(depth, [&](std::int64_t d, std::int64_t available) __attribute__((always_inline)) {
        return load_elements(x + d, available) * inverse * load_elements(sums + d, available);
      });
      total += double(along);
    }
    if (!elements_) continue;
    Source* const elements = static_cast<Source*>(elements_) + i * depth;
    const Sum scaled = factor * inverse;
    const auto give = [&](std::int64_t d, std::int64_t available) __attribute__((always_inline)) {
      Vector<Sum> gradient = load_elements(sums + d, available);
      if (inverse_norms) gradient -= load_elements(x + d, available) * inverse * along;
      store_elements<Sum>(elements + d, gradient * scaled * last_factor, available);
    };
    std::int64_t d = 0;
    for (; d + kLanes<Sum> <= depth; d += kLanes<Sum>) give(d, kLanes<Sum>);
    if (d < depth) give(d, depth - d);
  }
  return total;
}

}  // namespace
}  // namespace fastsupcon::cpu::FASTSUPCON_UNIT
