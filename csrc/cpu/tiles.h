// The arithmetic of a tile, written once for every instruction set (see simd.h).
//
// A tile is worked on in strips of kPanel columns: dot products first, then, while they are in L1, sums of their exponentials (forward) or
// the weights of the two further products (backward).
#pragma once

#include "kernels.h"
#include "pack.h"
#include "product.h"

namespace fastsupcon::cpu::FASTSUPCON_UNIT {
namespace {

template <class T>
using Lanes = IntVector<T>;  // as a mask: all bits of a lane, or none

// One thread's working memory.
template <class Sum>
struct alignas(64) Scratch {
  Sum strips[kMaxBlock * kMaxBlock];
  Sum weights[kMaxBlock * kStride<Sum>];
  Vector<Sum> row_sums[3][kMaxBlock];
  Sum best[2][kMaxBlock];
  Integer<Sum> own[kMaxBlock];
};

template <class T>
FASTSUPCON_INLINE void fill(T* to, std::int64_t count, T value) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

// ---- Which pairs count --------------------------------------------------------------------------------------------------------------
template <class Sum>
FASTSUPCON_INLINE Lanes<Sum> column_numbers(std::int64_t c) {
  Lanes<Sum> numbers;
  for (int l = 0; l < kLanes<Sum>; ++l) numbers[l] = l;
  return numbers + Integer<Sum>(c);
}

// Tells which of the pairs of row i with a vector of columns, from c on, exist.
struct EveryPair {
  static constexpr bool kEvery = true;
};
template <class Sum>
struct SomePairs {
  static constexpr bool kEvery = false;
  std::int64_t columns;  // those past the last one are packed as zeros
  bool diagonal;         // each pair once, and none of a row with itself
  const Integer<Sum>* own;
  FASTSUPCON_INLINE Lanes<Sum> operator()(std::int64_t i, std::int64_t c) const {
    const Lanes<Sum> column = column_numbers<Sum>(c);
    return (column > Integer<Sum>(diagonal ? i : -1)) & (column < Integer<Sum>(columns)) & (column != own[i]);
  }
};

// x where the pair exists, else `otherwise`.
template <class Sum, class Rule>
FASTSUPCON_INLINE Vector<Sum> existing(const Rule& rule, std::int64_t i, std::int64_t c, Vector<Sum> x, Sum otherwise) {
  if constexpr (Rule::kEvery) {
    return x;
  } else {
    return rule(i, c) ? x : broadcast(otherwise);
  }
}

// ---- The walk over a tile -----------------------------------------------------------------------------------------------------------
template <class Sum>
struct Walk {
  const Tile<Sum>& tile;
  Scratch<Sum>& scratch;
  bool every;  // row has a pair with every column of the tile, but for those past its edge

  Walk(const Tile<Sum>& tile_, void* memory) : tile(tile_), scratch(*static_cast<Scratch<Sum>*>(memory)), every(!tile_.diagonal) {
    fill(scratch.own, tile.rows.count, Integer<Sum>(-1));
    for (std::int64_t i = 0; tile.rows.own && i < tile.rows.count; ++i) {
      const std::int64_t own = tile.rows.own[i] - tile.columns.first;
      if (own < 0 || own >= tile.columns.count) continue;
      scratch.own[i] = Integer<Sum>(own);
      every = false;
    }
  }

  // How many rows have pairs in the strip that begins with column c.
  std::int64_t rows_of(std::int64_t c) const {
    return tile.diagonal ? smaller<std::int64_t>(tile.rows.count, c + kPanel<Sum>) : tile.rows.count;
  }
  Sum* strip(std::int64_t c) const { return (tile.kept ? tile.kept : scratch.strips) + c * tile.row_pitch; }

  void make_dot_products(std::int64_t c, Sum* to) const {
    const void* const ahead = tile.ahead.part[c / kPanel<Sum> % (sizeof(tile.ahead.part) / sizeof(*tile.ahead.part))];
    with_vectors<Sum>(tile.columns.count - c, [&](auto v) {
      dot_products<Sum, v.value>(tile.rows.panels, rows_of(c), tile.columns.panels + c * tile.call.depth, tile.call.depth, to, ahead);
    });
  }

  // f(rule, first column) for every strip.
  template <class F>
  FASTSUPCON_INLINE void strips(const F& f) const {
    for (std::int64_t c = 0; c < tile.columns.count; c += kPanel<Sum>) {
      if (every && tile.columns.count - c >= kPanel<Sum>) {
        f(EveryPair{}, c);
      } else {
        f(SomePairs<Sum>{tile.columns.count, tile.diagonal, scratch.own}, c);
      }
    }
  }
};

// ---- Forward ------------------------------------------------------------------------------------------------------------------------
// What goes into each sum, for one shift: total[k] of rows and columns += Σ E over the pairs of sum k, similarity += Σ of those of equal
// keys.
template <class Sum, Over kFirst, bool kBoth, bool kSimilarity>
void forward_bounded(const Walk<Sum>& walk) {
  constexpr int kSums = 1 + kBoth + kSimilarity;
  constexpr bool kKeyed = kFirst != kAll || kSimilarity;
  const Tile<Sum>& tile = walk.tile;
  auto& row_sums = walk.scratch.row_sums;
  const Integer<Sum>*const row_keys = tile.rows.keys, *const column_keys = tile.columns.keys;  // or they are loaded after every store
  const BoundedPower<Sum> power(tile.call.scale * kLog2E, tile.call.shift);
  const auto targets = [](const Face<Sum>& face, int k) { return kSimilarity && k == kSums - 1 ? face.similarity : face.total[k]; };
  for (int k = 0; k < kSums; ++k) fill(row_sums[k], tile.rows.count, Vector<Sum>{});
  walk.strips([&](auto rule, std::int64_t c) __attribute__((always_inline)) {
    Sum* const strip = tile.kept ? walk.strip(c) : walk.scratch.strips;  // one for all stays in L1
    walk.make_dot_products(c, strip);
    Vector<Sum> column_sums[kSums][kVectors] = {};
    const std::int64_t count = walk.rows_of(c);
    for (std::int64_t i = 0; i < count; ++i) {
      const Lanes<Sum> row_key = broadcast<Integer<Sum>>(kKeyed ? row_keys[i] : 0);
      Vector<Sum> sums[kSums];
      unroll<kSums>([&](auto k) __attribute__((always_inline)) { sums[k] = row_sums[k][i]; });
      unroll<kVectors>([&](auto u) __attribute__((always_inline)) {
        const std::int64_t column = c + u * kLanes<Sum>;
        Sum* const x = strip + i * kPanel<Sum> + u * kLanes<Sum>;
        const Vector<Sum> s = load(x);
        const Vector<Sum> e = existing<Sum>(rule, i, column, power(s), Sum(0));
        store(x, e);
        const auto add = [&](auto k, Vector<Sum> y) __attribute__((always_inline)) {
          sums[k] += y;
          column_sums[k][u] += y;
        };
        if constexpr (!kKeyed) {
          add(Constant<0>{}, e);
        } else {
          const Lanes<Sum> equal = load(column_keys + column) == row_key;
          add(Constant<0>{}, kFirst == kAll ? e : kFirst == kDifferent ? (equal ? Vector<Sum>{} : e) : (equal ? e : Vector<Sum>{}));
          if constexpr (kBoth) add(Constant<1>{}, equal ? e : Vector<Sum>{});
          if constexpr (kSimilarity) add(Constant<kSums - 1>{}, existing<Sum>(rule, i, column, equal ? s : Vector<Sum>{}, Sum(0)));
        }
      });
      unroll<kSums>([&](auto k) __attribute__((always_inline)) { row_sums[k][i] = sums[k]; });
    }
    unroll<kSums>([&](auto k) __attribute__((always_inline)) {
      Sum* const to = targets(tile.columns, k) + c;
      unroll<kVectors>([&](auto u) __attribute__((always_inline)) {
        store(to + u * kLanes<Sum>, load(to + u * kLanes<Sum>) + column_sums[k][u]);
      });
    });
  });
  for (int k = 0; k < kSums; ++k) {
    for (std::int64_t i = 0; i < tile.rows.count; ++i) targets(tile.rows, k)[i] += sum_of_lanes<Sum>(row_sums[k][i]);
  }
}

// The shift a sum of exponentials is taken with: its maximum, or 0 while there is none, or when it is inf (the sum is inf then, not NaN).
template <class Sum>
FASTSUPCON_INLINE Vector<Sum> shift_of(Vector<Sum> maximum) {
  return (maximum < kInfinity<Sum>) & (maximum > -kInfinity<Sum>) ? maximum : Vector<Sum>{};
}

// Raises the running maxima of a whole block to `best` and rescales their totals.
template <class Sum>
void raise_maximum(Sum* maxima, Sum* totals, const Sum* best, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes<Sum>) {
    const Vector<Sum> before = load(maxima + i), after = maximum(load(best + i), before);
    const Vector<Sum> factor = before == -kInfinity<Sum> ? Vector<Sum>{} : exp_of<Sum>(shift_of<Sum>(before) - shift_of<Sum>(after));
    store(totals + i, load(totals + i) * factor);
    store(maxima + i, after);
  }
}

template <class Sum>
FASTSUPCON_INLINE Lanes<Sum> in(Over over, Lanes<Sum> equal) {
  return over == kAll ? ~Lanes<Sum>{} : over == kEqual ? equal : ~equal;
}

// t = scale · x + bias, rounded alike in the forward and the backward, so that an exp(t − q) of 1 is exactly 1.
template <class Sum>
FASTSUPCON_INLINE Vector<Sum> logits(Vector<Sum> x, Sum scale, const Sum* bias) {
  const Vector<Sum> s = rounded(x * scale);
  return bias ? s + load(bias) : s;
}

// The same sums with a running maximum for each row and for each column.
template <class Sum>
void forward_running(const Walk<Sum>& walk) {
  const Tile<Sum>& tile = walk.tile;
  auto& scratch = walk.scratch;
  const Sum scale = Sum(tile.call.scale);
  for (std::int64_t c = 0; c < tile.columns.count; c += kPanel<Sum>) walk.make_dot_products(c, walk.strip(c));

  // f(row, column, place in the strip, place of its columns, which pairs exist, which keys are equal) for every vector; strip_done(c) after
  // each strip
  const auto each = [&](const auto& f, const auto& strip_done) __attribute__((always_inline)) {
    walk.strips([&](auto rule, std::int64_t c) __attribute__((always_inline)) {
      const std::int64_t count = walk.rows_of(c);
      for (std::int64_t i = 0; i < count; ++i) {
        unroll<kVectors>([&](auto u) __attribute__((always_inline)) {
          const std::int64_t column = c + u * kLanes<Sum>;
          const Lanes<Sum> equal = load(tile.columns.keys + column) == tile.rows.keys[i];
          Lanes<Sum> exists = ~Lanes<Sum>{};
          if constexpr (!decltype(rule)::kEvery) exists = rule(i, column);
          f(i, column, u, load(walk.strip(c) + i * kPanel<Sum> + u * kLanes<Sum>), exists, equal);
        });
      }
      strip_done(c);
    });
  };
  const auto add_to = [&](Sum* to, Vector<Sum> (&sums)[kVectors]) __attribute__((always_inline)) {
    unroll<kVectors>([&](auto u) __attribute__((always_inline)) {
      store(to + u * kLanes<Sum>, load(to + u * kLanes<Sum>) + sums[u]);
      sums[u] = Vector<Sum>{};
    });
  };
  const auto add_rows = [&](Sum* to) {
    for (std::int64_t i = 0; i < tile.rows.count; ++i) to[i] += sum_of_lanes<Sum>(scratch.row_sums[0][i]);
  };
  Vector<Sum> column_sums[kVectors] = {};

  if (tile.call.similarity) {
    fill(scratch.row_sums[0], tile.rows.count, Vector<Sum>{});
    each(
        [&](std::int64_t i, std::int64_t, auto u, Vector<Sum> x, Lanes<Sum> exists, Lanes<Sum> equal) __attribute__((always_inline)) {
          const Vector<Sum> s = exists & equal ? x : Vector<Sum>{};
          scratch.row_sums[0][i] += s;
          column_sums[u] += s;
        },
        [&](std::int64_t c) __attribute__((always_inline)) { add_to(tile.columns.similarity + c, column_sums); });
    add_rows(tile.rows.similarity);
  }
  for (int k = 0; k <= int(tile.call.both); ++k) {
    const Over over = k ? kEqual : tile.call.first;
    const auto masked = [&](Vector<Sum> x, std::int64_t column, Lanes<Sum> exists, Lanes<Sum> equal) __attribute__((always_inline)) {
      const Vector<Sum> t = logits<Sum>(x, scale, tile.columns.bias ? tile.columns.bias + column : nullptr);
      return exists & in<Sum>(over, equal) ? t : broadcast(-kInfinity<Sum>);
    };
    fill(scratch.row_sums[0], tile.rows.count, broadcast(-kInfinity<Sum>));
    fill(scratch.best[0], kMaxBlock, -kInfinity<Sum>);
    fill(scratch.best[1], kMaxBlock, -kInfinity<Sum>);
    each(
        [&](std::int64_t i, std::int64_t column, auto, Vector<Sum> x, Lanes<Sum> exists, Lanes<Sum> equal) __attribute__((always_inline)) {
          const Vector<Sum> t = masked(x, column, exists, equal);
          scratch.row_sums[0][i] = maximum(t, scratch.row_sums[0][i]);
          store(scratch.best[1] + column, maximum(t, load(scratch.best[1] + column)));
        },
        [](std::int64_t) {});
    for (std::int64_t i = 0; i < tile.rows.count; ++i) scratch.best[0][i] = maximum_of_lanes<Sum>(scratch.row_sums[0][i]);
    raise_maximum(tile.rows.maximum[k], tile.rows.total[k], scratch.best[0], tile.rows.count);
    raise_maximum(tile.columns.maximum[k], tile.columns.total[k], scratch.best[1], tile.columns.count);

    fill(scratch.row_sums[0], tile.rows.count, Vector<Sum>{});
    each(
        [&](std::int64_t i, std::int64_t column, auto u, Vector<Sum> x, Lanes<Sum> exists, Lanes<Sum> equal)
            __attribute__((always_inline)) {
          const Vector<Sum> t = masked(x, column, exists, equal);
          scratch.row_sums[0][i] += exp_of<Sum>(t - shift_of<Sum>(broadcast(tile.rows.maximum[k][i])));
          column_sums[u] += exp_of<Sum>(t - shift_of<Sum>(load(tile.columns.maximum[k] + column)));
        },
        [&](std::int64_t c) __attribute__((always_inline)) { add_to(tile.columns.total[k] + c, column_sums); });
    add_rows(tile.rows.total[k]);
  }
}

template <class Sum>
void forward(const Tile<Sum>& tile, void* memory) {
  const Walk<Sum> walk(tile, memory);
  const Call& call = tile.call;
  if (!call.bounded) return forward_running(walk);
  const auto with = [&](auto similarity) {
    constexpr bool kSimilarity = decltype(similarity)::value;
    if (call.both) return forward_bounded<Sum, kDifferent, true, kSimilarity>(walk);
    if (call.first == kAll) return forward_bounded<Sum, kAll, false, kSimilarity>(walk);
    if (call.first == kDifferent) return forward_bounded<Sum, kDifferent, false, kSimilarity>(walk);
    forward_bounded<Sum, kEqual, false, kSimilarity>(walk);
  };
  call.similarity ? with(Constant<1>{}) : with(Constant<0>{});
}

// ---- Backward -----------------------------------------------------------------------------------------------------------------------
template <class Sum, bool kKeyed, bool kKept>
void weigh_bounded(const Walk<Sum>& walk) {
  const Tile<Sum>& tile = walk.tile;
  const Face<Sum> rows = tile.rows, columns = tile.columns;  // copies: pointers of the originals are loaded again after every store
  const BoundedPower<Sum> power(tile.call.scale * kLog2E, tile.call.shift);
  Sum* const weights = walk.scratch.weights;
  walk.strips([&](auto rule, std::int64_t c) __attribute__((always_inline)) {
    Sum* const strip = kKept ? walk.strip(c) : walk.scratch.strips;
    if constexpr (!kKept) walk.make_dot_products(c, strip);
    const std::int64_t count = walk.rows_of(c);
    for (std::int64_t i = 0; i < count; ++i) {
      const Lanes<Sum> row_key = broadcast<Integer<Sum>>(kKeyed ? rows.keys[i] : 0);
      const Vector<Sum> row_different = broadcast(rows.weight[kDifferent][i]), row_equal = broadcast(rows.weight[kEqual][i]);
      const Vector<Sum> row_linear = broadcast(rows.linear[i]);
      unroll<kVectors>([&](auto u) __attribute__((always_inline)) {
        const std::int64_t column = c + u * kLanes<Sum>;
        const Vector<Sum> x = load(strip + i * kPanel<Sum> + u * kLanes<Sum>), e = kKept ? x : power(x);
        Vector<Sum> weight = row_different + load(columns.weight[kDifferent] + column), w = e * weight;
        if constexpr (kKeyed) {
          const Lanes<Sum> equal = load(columns.keys + column) == row_key;
          weight = equal ? row_equal + load(columns.weight[kEqual] + column) : weight;
          w = e * weight + (equal ? row_linear + load(columns.linear + column) : Vector<Sum>{});
        }
        store(weights + i * kStride<Sum> + column, existing<Sum>(rule, i, column, w, Sum(0)));
      });
    }
  });
}

template <class Sum>
void weigh_running(const Walk<Sum>& walk) {
  const Tile<Sum>& tile = walk.tile;
  const Face<Sum>&rows = tile.rows, &columns = tile.columns;
  const Sum scale = Sum(tile.call.scale);
  walk.strips([&](auto rule, std::int64_t c) __attribute__((always_inline)) {
    Sum* const strip = tile.kept ? walk.strip(c) : walk.scratch.strips;
    if (!tile.kept) walk.make_dot_products(c, strip);
    Vector<Sum> column_sums[kVectors] = {};
    const std::int64_t count = walk.rows_of(c);
    for (std::int64_t i = 0; i < count; ++i) {
      unroll<kVectors>([&](auto u) __attribute__((always_inline)) {
        const std::int64_t column = c + u * kLanes<Sum>;
        const Vector<Sum> x = load(strip + i * kPanel<Sum> + u * kLanes<Sum>);
        const Lanes<Sum> equal = load(columns.keys + column) == rows.keys[i];
        const Vector<Sum> t = logits<Sum>(x, scale, columns.bias ? columns.bias + column : nullptr);
        Vector<Sum> w = {};
        for (int over = kAll; over < kOvers; ++over) {
          if (!rows.log_sum[over] && !columns.log_sum[over]) continue;
          Vector<Sum> term = {};
          if (rows.log_sum[over]) term += rows.grad[over][i] * exp_of<Sum>(t - rows.log_sum[over][i]);
          if (columns.log_sum[over]) term += load(columns.grad[over] + column) * exp_of<Sum>(t - load(columns.log_sum[over] + column));
          w += in<Sum>(Over(over), equal) ? term : Vector<Sum>{};
        }
        w = existing<Sum>(rule, i, column, w, Sum(0));
        column_sums[u] += w;
        w += existing<Sum>(rule, i, column, equal ? rows.linear[i] + load(columns.linear + column) : Vector<Sum>{}, Sum(0));
        store(walk.scratch.weights + i * kStride<Sum> + column, w);
      });
    }
    unroll<kVectors>([&](auto u) __attribute__((always_inline)) {
      Sum* const to = columns.bias_gradient + c + u * kLanes<Sum>;
      if (columns.bias_gradient) store(to, load(to) + column_sums[u]);
    });
  });
}

template <class Sum>
void backward(const Tile<Sum>& tile, void* memory) {
  const Walk<Sum> walk(tile, memory);
  if (!tile.call.bounded) {
    weigh_running(walk);
  } else if (tile.call.keyed) {
    tile.kept ? weigh_bounded<Sum, true, true>(walk) : weigh_bounded<Sum, true, false>(walk);
  } else {
    tile.kept ? weigh_bounded<Sum, false, true>(walk) : weigh_bounded<Sum, false, false>(walk);
  }
  const Face<Sum>&rows = tile.rows, &columns = tile.columns;
  const Extent extent = tile.diagonal ? Extent::triangle : Extent::full;
  if (rows.gradient) {
    add_weighted<Sum, kStride<Sum>, 1>(walk.scratch.weights, rows.count, columns.elements, columns.count, tile.call.depth, extent,
                                       rows.fresh, rows.gradient);
  }
  if (columns.gradient) {
    add_weighted<Sum, 1, kStride<Sum>>(walk.scratch.weights, columns.count, rows.elements, rows.count, tile.call.depth, extent,
                                       columns.fresh && !tile.diagonal, columns.gradient);
  }
}

// ---- Tables -------------------------------------------------------------------------------------------------------------------------
template <class Sum>
double micro_kernel(std::int64_t times, void* memory) {
  constexpr std::int64_t terms = kMaxBlock / 2;
  Scratch<Sum>& scratch = *static_cast<Scratch<Sum>*>(memory);
  Sum *const rows = scratch.weights, *const panel = scratch.strips;
  fill(rows, terms * kPanel<Sum>, Sum(0.5));
  fill(panel, terms * kPanel<Sum>, Sum(0.5));
  for (std::int64_t t = 0; t < times; ++t) {
    Vector<Sum> sum[kRows][kVectors];
    multiply<Sum, kVectors, 1, kPanel<Sum>, kPanel<Sum>>(rows + t % (kPanel<Sum> / kRows) * kRows, panel, terms, sum, [] {});
    unroll<kRows>([&](auto r) __attribute__((always_inline)) {
      unroll<kVectors>([&](auto v) __attribute__((always_inline)) { scratch.row_sums[0][r * kVectors + v] = sum[r][v]; });
    });
    __asm__ volatile("" ::: "memory");  // every time anew
  }
  return double(times) * kRows * kPanel<Sum> * terms;
}

template <class Sum, class Source>
constexpr Kernels<Sum> make_kernels() {
  static_assert(kMaxBlock % kPanel<Sum> == 0 && kPanel<Sum> % kRows == 0);
  return {
      kPanel<Sum>,
      sizeof(Scratch<Sum>),
      [](std::int64_t depth) { return (depth + kLanes<Sum> - 1) / kLanes<Sum> * kLanes<Sum>; },
      measure<Sum, Source>,
      pack<Sum, Source>,
      finish<Sum, Source>,
      forward<Sum>,
      backward<Sum>,
      micro_kernel<Sum>,
  };
}

}  // namespace
}  // namespace fastsupcon::cpu::FASTSUPCON_UNIT
