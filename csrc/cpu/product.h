// Register-blocked products (see simd.h). For each step of its sum the micro-kernel broadcasts kRows numbers of one operand, reads kVectors
// vectors of the other, and adds to kRows × kVectors vectors.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace fastsupcon::cpu::FASTSUPCON_UNIT {
namespace {

#if FASTSUPCON_VECTOR_BYTES == 64
constexpr int kRows = 8, kVectors = 2;
#elif FASTSUPCON_VECTOR_BYTES == 32
constexpr int kRows = 4, kVectors = 3;  // 12 sums, 3 columns and a broadcast fill the 16 registers; 7 loads feed 12 FMAs (6 × 2: 8 loads)
#else
constexpr int kRows = 4, kVectors = 2;  // 8 sums, 2 columns, a broadcast and a product fit x86-64's 16 registers
#endif

template <class Sum>
constexpr int kPanel = kVectors * kLanes<Sum>;  // columns of a strip: rows side by side in a packed panel
template <class Sum>
constexpr int kStride = kMaxBlock + 64 / sizeof(Sum);  // of a row of weights: an odd number of cache lines, so columns spread over the sets

// sum[r][v] = Σ_k a[r·kRowStep + k·kTermStep] · b[k·kPitch + v·lanes], and fetch() at each step.
template <class Sum, int V, int kRowStep, int kTermStep, int kPitch, class Fetch>
FASTSUPCON_INLINE void multiply(const Sum* a, const Sum* b, std::int64_t terms, Vector<Sum> (&sum)[kRows][V], const Fetch& fetch) {
  unroll<kRows>([&](auto r) __attribute__((always_inline)) {
    unroll<V>([&](auto v) __attribute__((always_inline)) { sum[r][v] = Vector<Sum>{}; });
  });
  for (std::int64_t k = 0; k < terms; ++k) {
    fetch();
    if constexpr (kRowStep == 1) __builtin_prefetch(a + 16 * kTermStep);  // one line of each step is used: more than the hardware foresees
    Vector<Sum> columns[V];
    unroll<V>([&](auto v) __attribute__((always_inline)) { columns[v] = load(b + v * kLanes<Sum>); });
    unroll<kRows>([&](auto r) __attribute__((always_inline)) {
      const Vector<Sum> row = broadcast(a[r * kRowStep]);
      unroll<V>([&](auto v) __attribute__((always_inline)) { sum[r][v] += row * columns[v]; });
    });
    a += kTermStep;
    b += kPitch;
  }
}

// Calls f with the number of vectors, as a constant, that hold `width` lanes.
template <class Sum, int V = kVectors, class F>
FASTSUPCON_INLINE void with_vectors(std::int64_t width, const F& f) {
  if constexpr (V > 1) {
    if (width <= (V - 1) * kLanes<Sum>) return with_vectors<Sum, V - 1>(width, f);
  }
  f(Constant<V>{});
}

// Calls f(vectors, first element) for the depth cut into groups of at most kVectors vectors, as equal as can be: 16 vectors by threes as 3
// 3 3 3 2 2, for a last group of one vector is bound by the FMA's latency.
template <class Sum, class F>
FASTSUPCON_INLINE void each_group(std::int64_t depth, const F& f) {
  const std::int64_t vectors = (depth + kLanes<Sum> - 1) / kLanes<Sum>, groups = (vectors + kVectors - 1) / kVectors;
  for (std::int64_t p = 0; p < groups; ++p) {
    const std::int64_t first = (vectors * p + groups - 1) / groups, last = (vectors * (p + 1) + groups - 1) / groups;
    with_vectors<Sum>((last - first) * kLanes<Sum>, [&](auto v) __attribute__((always_inline)) { f(v, first * kLanes<Sum>); });
  }
}

// kTermsInL1 steps of the sum at a time: those of kPanel columns and of a panel of rows, 12 KiB each, stay in L1.
constexpr std::int64_t kTermsInL1 = 128;

// strip[i·kPanel + v] = a_i·b_v for `count` rows i and the V vectors of columns of one panel. Writes whole groups of kRows rows. Fetches
// into L2, at an even pace, as many bytes from `ahead` on as the packed rows have.
template <class Sum, int V>
void dot_products(const Sum* row_panels, std::int64_t count, const Sum* column_panel, std::int64_t depth, Sum* strip, const void* ahead) {
  for (std::int64_t k = 0; k < depth; k += kTermsInL1) {
    for (std::int64_t i = 0; i < count; i += kRows) {
      const Sum* const rows = row_panels + i / kPanel<Sum> * kPanel<Sum> * depth + i % kPanel<Sum>;
      const char* next = static_cast<const char*>(ahead) + (i * depth + k * kRows) * sizeof(Sum);
      Vector<Sum> sum[kRows][V];
      const auto fetch = [&]() __attribute__((always_inline)) {
        __builtin_prefetch(next, 0, 2);
        next += kRows * sizeof(Sum);
      };
      multiply<Sum, V, 1, kPanel<Sum>, kPanel<Sum>>(rows + k * kPanel<Sum>, column_panel + k * kPanel<Sum>, smaller(kTermsInL1, depth - k),
                                                    sum, fetch);
      unroll<kRows>([&](auto r) __attribute__((always_inline)) {
        unroll<V>([&](auto v) __attribute__((always_inline)) {
          Sum* const to = strip + (i + r) * kPanel<Sum> + v * kLanes<Sum>;
          store(to, k == 0 ? sum[r][v] : load(to) + sum[r][v]);
        });
      });
    }
  }
}

// Where the weights of a tile are not 0: everywhere, or only above the diagonal of the tile.
enum class Extent { full, triangle };

// out_r (+)= Σ_k w_rk x_k, with w_rk = weights[r·kRowStep + k·kTermStep]. A tile read by rows has kTermStep 1, by columns kRowStep 1. The
// rows x are those of pack_elements (pack.h), `count` of them. What out [outputs, depth] held is not read where it is `fresh`.
template <class Sum, int kRowStep, int kTermStep>
void add_weighted(const Sum* weights, std::int64_t outputs, const Sum* elements, std::int64_t count, std::int64_t depth, Extent extent,
                  bool fresh, Sum* out) {
  constexpr int W = kLanes<Sum>;
  each_group<Sum>(depth, [&](auto vectors, std::int64_t first) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    const Sum* const x = elements + first * count;
    const std::int64_t valid = depth - first;
    for (std::int64_t r0 = 0; r0 < outputs; r0 += kRows) {
      std::int64_t begin = 0, end = count;
      if (extent == Extent::triangle) {  // w_rk ≠ 0 only for k > r, or for k < r where the tile is read by columns
        if (kTermStep == 1) {
          begin = smaller(r0, count);
        } else {
          end = smaller(end, r0 + kRows);
        }
      }
      // The sums come from L3 or memory, too late for out-of-order execution to hide: fetch them while the product runs.
      Sum* const to = out + r0 * depth + first;
      unroll<kRows>([&](auto r) __attribute__((always_inline)) {
        if (r < outputs - r0) unroll<V>([&](auto v) __attribute__((always_inline)) { __builtin_prefetch(to + r * depth + v * W, 1); });
      });
      Vector<Sum> sum[kRows][V];
      multiply<Sum, V, kRowStep, kTermStep, V * W>(weights + r0 * kRowStep + begin * kTermStep, x + begin * V * W, end - begin, sum, [] {});
      if (outputs - r0 >= kRows && valid >= V * W) {
        unroll<kRows>([&](auto r) __attribute__((always_inline)) {
          unroll<V>([&](auto v) __attribute__((always_inline)) {
            Sum* const p = to + r * depth + v * W;
            store(p, fresh ? sum[r][v] : load(p) + sum[r][v]);
          });
        });
      } else {
        Sum edge[kRows][V * W];
        unroll<kRows>([&](auto r) __attribute__((always_inline)) {
          unroll<V>([&](auto v) __attribute__((always_inline)) { store(&edge[r][v * W], sum[r][v]); });
        });
        for (std::int64_t r = 0; r < smaller<std::int64_t>(kRows, outputs - r0); ++r) {
          for (std::int64_t d = 0; d < smaller<std::int64_t>(V * W, valid); ++d) {
            to[r * depth + d] = edge[r][d] + (fresh ? Sum(0) : to[r * depth + d]);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastsupcon::cpu::FASTSUPCON_UNIT
