// The tile functions of kernels.h, written once for every instruction set. Included by a unit (see simd.h).
//
// A tile is block I of rows against block J of columns: first its dot products, then, in their place, exponentials (forward) or the weights of
// the two further products (backward). It is worked on in strips of kPanel columns, which are still in L1 when the exponentials read them.

constexpr double kLog2E = 1.4426950408889634;

struct Block {
  std::int64_t first, count;
  Block(std::int64_t index, std::int64_t block, std::int64_t total) : first(index * block), count(smaller(block, total - first)) {}
};

// ---- Weights as the operand of a product --------------------------------------------------------------------------------------------
// w_ij with its cells along the columns (for Σ_j w_ij b_j) and along the rows (for Σ_i w_ij a_i). Where a cell is one element the tile is both.
template <class A>
struct Weights {
  static constexpr int kRowStride = kStride<A>;
  template <int V>
  FASTSUPCON_INLINE void take(const typename A::Sum*, std::int64_t, std::int64_t) {}
  static const typename A::Cell* along_columns(const Weights&, const typename A::Sum* tile) { return tile; }
  static const typename A::Cell* along_rows(const Weights&, const typename A::Sum* tile) { return tile; }
};
#ifdef __AVX512BF16__
template <>
struct Weights<BfloatPairs> {
  static constexpr int kRowStride = kMaxBlock / 2 + 16;
  std::uint32_t columns[kMaxBlock * kRowStride];
  std::uint32_t rows[kMaxBlock / 2 * kStride<BfloatPairs>];

  // Rounds V vectors of columns, from column c on, of `count` rows of the tile.
  template <int V>
  FASTSUPCON_INLINE void take(const float* tile, std::int64_t count, std::int64_t c) {
    for (std::int64_t i = 0; i < count; i += 2) {
      unroll<V>([&](auto v) __attribute__((always_inline)) {
        const float* from = tile + i * kStride<BfloatPairs> + c + v * 16;
        const __m256i even = (__m256i)_mm512_cvtneps_pbh((__m512)load(from));
        const __m256i odd = i + 1 < count ? (__m256i)_mm512_cvtneps_pbh((__m512)load(from + kStride<BfloatPairs>)) : __m256i{};
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + i * kRowStride + c / 2 + v * 8), even);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(columns + (i + 1) * kRowStride + c / 2 + v * 8), odd);
        const __m512i pair = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        store(rows + i / 2 * kStride<BfloatPairs> + c + v * 16, (Vector<std::uint32_t>)pair);
      });
    }
  }
  static const std::uint32_t* along_columns(const Weights& w, const float*) { return w.columns; }
  static const std::uint32_t* along_rows(const Weights& w, const float*) { return w.rows; }
};
#endif

// One thread's working memory.
template <class A>
struct alignas(64) Scratch {
  using Sum = typename A::Sum;
  Sum tile[kMaxBlock * kStride<A>];
  typename A::Cell panel[kMaxBlock / A::kPerCell * kPanel<A>];
  Weights<A> weights;
  Vector<Sum> row_sums[kMaxBlock];
  // Of the rows and the columns of a tile; what is past its edge is harmless.
  struct Side {
    Sum maximum[kMaxBlock], total[kMaxBlock], best[kMaxBlock];
  } row, column;
  Sum bias[kMaxBlock];
  Int<Sum> skip[kMaxBlock];
  Int<Sum> row_label[2][kMaxBlock], column_label[2][kMaxBlock];  // low and high halves
};

// ---- Which pairs count --------------------------------------------------------------------------------------------------------------
// A rule tells for row i of the tile which lanes from column c on are allowed.
template <class Sum>
FASTSUPCON_INLINE IntVector<Sum> column_numbers(std::int64_t c) {
  IntVector<Sum> numbers;
  for (int l = 0; l < kLanes<Sum>; ++l) numbers[l] = l;
  return numbers + Int<Sum>(c);
}

template <class Sum>
struct Everything {
  static constexpr bool kAll = true;
};
template <class Sum>
struct Existing {  // columns past the last one are packed as zeros
  static constexpr bool kAll = false;
  std::int64_t columns;
  FASTSUPCON_INLINE IntVector<Sum> operator()(std::int64_t, std::int64_t c) const { return column_numbers<Sum>(c) < Int<Sum>(columns); }
};
template <class Sum>
struct AboveDiagonal {  // each pair of a diagonal tile once, and no self pair
  static constexpr bool kAll = false;
  std::int64_t columns;
  FASTSUPCON_INLINE IntVector<Sum> operator()(std::int64_t i, std::int64_t c) const {
    const IntVector<Sum> column = column_numbers<Sum>(c);
    return (column > Int<Sum>(i)) & (column < Int<Sum>(columns));
  }
};
template <class Sum>
struct NotSkipped {
  static constexpr bool kAll = false;
  std::int64_t columns;
  const Int<Sum>* skip;
  FASTSUPCON_INLINE IntVector<Sum> operator()(std::int64_t i, std::int64_t c) const {
    const IntVector<Sum> column = column_numbers<Sum>(c);
    return (column != skip[i]) & (column < Int<Sum>(columns));
  }
};
template <class Sum>
struct OtherLabel {
  static constexpr bool kAll = false;
  std::int64_t columns;
  const Int<Sum> (*row)[kMaxBlock];
  const Int<Sum> (*column)[kMaxBlock];
  FASTSUPCON_INLINE IntVector<Sum> operator()(std::int64_t i, std::int64_t c) const {
    return ((load(column[0] + c) != row[0][i]) | (load(column[1] + c) != row[1][i])) & (column_numbers<Sum>(c) < Int<Sum>(columns));
  }
};

// x where the pair is allowed, else `otherwise`.
template <class Sum, class Rule>
FASTSUPCON_INLINE Vector<Sum> allowed_or(const Rule& rule, std::int64_t i, std::int64_t c, Vector<Sum> x, Sum otherwise) {
  if constexpr (Rule::kAll) {
    return x;
  } else {
    return rule(i, c) ? x : broadcast(otherwise);
  }
}

// ---- Sums over rows and columns -----------------------------------------------------------------------------------------------------
template <class T>
constexpr T kInfinity = T(__builtin_inf());

// to[l] += v[l] for as many of the V vectors' lanes as are valid.
template <class Sum, int V>
FASTSUPCON_INLINE void add_lanes(Sum* to, const Vector<Sum> (&v)[V], std::int64_t valid) {
  Sum lanes[V * kLanes<Sum>];
  unroll<V>([&](auto i) __attribute__((always_inline)) { store(lanes + i * kLanes<Sum>, v[i]); });
  for (std::int64_t l = 0; l < smaller<std::int64_t>(V * kLanes<Sum>, valid); ++l) to[l] += lanes[l];
}

// The shift a sum of exponentials is taken with: its maximum, or 0 while there is none, or when it is inf (the sum is inf then, not NaN).
template <class Sum>
FASTSUPCON_INLINE Vector<Sum> shift_of(Vector<Sum> maximum) {
  return (maximum < kInfinity<Sum>) & (maximum > -kInfinity<Sum>) ? maximum : Vector<Sum>{};
}

// 2^((x − shift) log2 e) = exp(x − shift)
template <class Sum>
FASTSUPCON_INLINE Vector<Sum> exp_of(Vector<Sum> difference) {
  return power_of_two<Sum>(difference * Sum(kLog2E));
}

// Raises the running maxima of `count` rows to `best` and rescales their totals.
template <class Sum>
FASTSUPCON_INLINE void raise_maximum(Sum* maxima, Sum* totals, const Sum* best, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes<Sum>) {
    const Vector<Sum> before = load(maxima + i), after = maximum(load(best + i), before);
    const Vector<Sum> factor = before == -kInfinity<Sum> ? Vector<Sum>{} : exp_of<Sum>(shift_of<Sum>(before) - shift_of<Sum>(after));
    store(totals + i, load(totals + i) * factor);
    store(maxima + i, after);
  }
}

template <class T>
FASTSUPCON_INLINE void copy(const T* from, std::int64_t count, T* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class T>
FASTSUPCON_INLINE void fill(T* to, std::int64_t count, T value) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

// What is fetched during the strip that begins with column c of a tile.
template <class A>
FASTSUPCON_INLINE const void* part_during(std::int64_t c, const Ahead& ahead) {
  return ahead.part[c / kPanel<A> % (sizeof(ahead.part) / sizeof(*ahead.part))];
}

// ---- Self shape ---------------------------------------------------------------------------------------------------------------------
template <class A>
struct SelfTile {
  using Sum = typename A::Sum;
  using Cell = typename A::Cell;

  const SelfProblem& problem;
  const Ahead& ahead;
  Scratch<A>& scratch;
  const Block rows, columns;
  const bool diagonal;

  SelfTile(const SelfProblem& problem_, std::int64_t i, std::int64_t j, const Ahead& ahead_, void* memory)
      : problem(problem_),
        ahead(ahead_),
        scratch(*static_cast<Scratch<A>*>(memory)),
        rows(i, problem.block, problem.count),
        columns(j, problem.block, problem.count),
        diagonal(i == j) {}

  const Cell* panels(const Block& block) const {
    return static_cast<const Cell*>(problem.panels) + block.first * cells<A>(problem.depth);  // blocks start at a panel
  }
  const Sum* of(const void* array, const Block& block) const { return static_cast<const Sum*>(array) + block.first; }
  Sum* of(void* array, const Block& block) const { return static_cast<Sum*>(array) + block.first; }

  // For every strip: its dot products, then f(vectors, rule, rows of the strip, its first column).
  template <class F>
  FASTSUPCON_INLINE void strips(const F& f) {
    for (std::int64_t c = 0; c < columns.count; c += kPanel<A>) {
      with_vectors<A>(columns.count - c, [&](auto v) __attribute__((always_inline)) {
        const std::int64_t count = diagonal ? smaller<std::int64_t>(rows.count, c + kPanel<A>) : rows.count;
        dot_products<A, v.value>(panels(rows), count, panels(columns) + c * cells<A>(problem.depth), problem.depth, scratch.tile + c,
                                 part_during<A>(c, ahead));
        if (diagonal) {
          f(v, AboveDiagonal<Sum>{columns.count}, count, c);
        } else if (columns.count - c < kPanel<A>) {
          f(v, Existing<Sum>{columns.count}, count, c);
        } else {
          f(v, Everything<Sum>{}, count, c);
        }
      });
    }
  }

  // total_i += Σ_j E_ij and total_j += Σ_i E_ij
  void forward_fixed() {
    const FixedPower<Sum> power(problem.scale * kLog2E, problem.shift);
    fill(scratch.row_sums, rows.count, Vector<Sum>{});
    strips([&](auto v, auto rule, std::int64_t count, std::int64_t c) __attribute__((always_inline)) {
      constexpr int V = decltype(v)::value;
      Vector<Sum> column_sums[V] = {};
      for (std::int64_t i = 0; i < count; ++i) {
        Vector<Sum> row_sum = scratch.row_sums[i];
        unroll<V>([&](auto u) __attribute__((always_inline)) {
          const std::int64_t column = c + u * kWidth<A>;
          const Vector<Sum> e = allowed_or<Sum>(rule, i, column, power(load(scratch.tile + i * kStride<A> + column)), Sum(0));
          row_sum += e;
          column_sums[u] += e;
        });
        scratch.row_sums[i] = row_sum;
      }
      add_lanes<Sum, V>(of(problem.total, columns) + c, column_sums, columns.count - c);
    });
    for (std::int64_t i = 0; i < rows.count; ++i) of(problem.total, rows)[i] += sum_of_lanes<Sum>(scratch.row_sums[i]);
  }

  // The same with a running maximum for each row and for each column: two exponentials per pair.
  void forward_careful() {
    strips([](auto, auto, std::int64_t, std::int64_t) {});
    auto& row = scratch.row;
    auto& column = diagonal ? scratch.row : scratch.column;
    const Sum scale = Sum(problem.scale);
    auto begin = [&](std::int64_t i) { return diagonal ? i / kPanel<A> * kPanel<A> : 0; };  // the strips below the diagonal are not computed
    auto allowed = [&](std::int64_t i, std::int64_t c, Vector<Sum> x) __attribute__((always_inline)) {
      return diagonal ? allowed_or<Sum>(AboveDiagonal<Sum>{columns.count}, i, c, x, -kInfinity<Sum>)
                      : allowed_or<Sum>(Existing<Sum>{columns.count}, i, c, x, -kInfinity<Sum>);
    };

    Sum* const best = scratch.column.best;
    fill(best, kMaxBlock, -kInfinity<Sum>);
    for (std::int64_t i = 0; i < rows.count; ++i) {
      Vector<Sum> highest = broadcast(-kInfinity<Sum>);
      for (std::int64_t c = begin(i); c < columns.count; c += kWidth<A>) {
        Sum* const x = scratch.tile + i * kStride<A> + c;
        const Vector<Sum> logits = allowed(i, c, load(x) * scale);
        store(x, logits);
        highest = maximum(logits, highest);
        store(best + c, maximum(logits, load(best + c)));
      }
      row.best[i] = maximum_of_lanes<Sum>(highest);
    }
    auto take = [&](auto& side, const Block& block) {
      copy(of(problem.maximum, block), block.count, side.maximum);
      copy(of(problem.total, block), block.count, side.total);
    };
    auto give = [&](auto& side, const Block& block) {
      copy(side.maximum, block.count, of(problem.maximum, block));
      copy(side.total, block.count, of(problem.total, block));
    };
    take(row, rows);
    if (!diagonal) take(column, columns);
    raise_maximum(row.maximum, row.total, row.best, rows.count);
    raise_maximum(column.maximum, column.total, best, columns.count);

    for (std::int64_t i = 0; i < rows.count; ++i) {
      const Vector<Sum> row_shift = shift_of<Sum>(broadcast(row.maximum[i]));
      Vector<Sum> sum = {};
      for (std::int64_t c = begin(i); c < columns.count; c += kWidth<A>) {
        const Vector<Sum> logits = load(scratch.tile + i * kStride<A> + c);
        sum += exp_of<Sum>(logits - row_shift);
        store(column.total + c, load(column.total + c) + exp_of<Sum>(logits - shift_of<Sum>(load(column.maximum + c))));
      }
      row.total[i] += sum_of_lanes<Sum>(sum);
    }
    give(row, rows);
    if (!diagonal) give(column, columns);
  }

  // dz_i += Σ_j w_ij z_j and dz_j += Σ_i w_ij z_i, with w_ij = E_ij (a_i + a_j) when fixed, else g_i exp(s_ij − lse_i) + g_j exp(s_ij − lse_j)
  template <class Source>
  void backward() {
    const Sum* const row_weight = of(problem.weight, rows);
    const Sum* const column_weight = of(problem.weight, columns);
    const FixedPower<Sum> power(problem.scale * kLog2E, problem.shift);
    const Sum scale = Sum(problem.scale);
    strips([&](auto v, auto rule, std::int64_t count, std::int64_t c) __attribute__((always_inline)) {
      constexpr int V = decltype(v)::value;
      Vector<Sum> weight[V], lse[V];
      unroll<V>([&](auto u) __attribute__((always_inline)) {
        const std::int64_t column = c + u * kWidth<A>;
        weight[u] = load_elements(column_weight + column, columns.count - column);
        lse[u] = problem.fixed ? Vector<Sum>{} : load_elements(of(problem.lse, columns) + column, columns.count - column);
      });
      auto replace = [&](auto weights) __attribute__((always_inline)) {
        for (std::int64_t i = 0; i < count; ++i) {
          unroll<V>([&](auto u) __attribute__((always_inline)) {
            const std::int64_t column = c + u * kWidth<A>;
            Sum* const w = scratch.tile + i * kStride<A> + column;
            store(w, allowed_or<Sum>(rule, i, column, weights(i, u, load(w)), Sum(0)));
          });
        }
      };
      if (problem.fixed) {
        replace([&](std::int64_t i, auto u, Vector<Sum> s) __attribute__((always_inline)) { return power(s) * (row_weight[i] + weight[u]); });
      } else {
        const Sum* const row_lse = of(problem.lse, rows);
        replace([&](std::int64_t i, auto u, Vector<Sum> s) __attribute__((always_inline)) {
          const Vector<Sum> x = rounded(s * scale);  // as in the forward, so that a P_ij of 1 is exactly 1
          return row_weight[i] * exp_of<Sum>(x - row_lse[i]) + weight[u] * exp_of<Sum>(x - lse[u]);
        });
      }
      scratch.weights.template take<V>(scratch.tile, count, c);
    });
    const Extent extent = diagonal ? Extent::triangle : Extent::full;
    const auto source = [&](const Block& block) { return static_cast<const Source*>(problem.rows) + block.first * problem.depth; };
    const auto gradient = [&](const Block& block) { return static_cast<Sum*>(problem.gradient) + block.first * problem.depth; };
    add_weighted<A, Weights<A>::kRowStride, 1>(Weights<A>::along_columns(scratch.weights, scratch.tile), rows.count, source(columns),
                                               columns.count, problem.depth, extent, scratch.panel, gradient(rows));
    add_weighted<A, 1, kStride<A>>(Weights<A>::along_rows(scratch.weights, scratch.tile), columns.count, source(rows), rows.count,
                                   problem.depth, extent, scratch.panel, gradient(columns));
  }
};

template <class A>
void self_forward(const SelfProblem& problem, std::int64_t i, std::int64_t j, const Ahead& ahead, void* scratch) {
  SelfTile<A> tile(problem, i, j, ahead, scratch);
  problem.fixed ? tile.forward_fixed() : tile.forward_careful();
}

template <class A, class Source>
void self_backward(const SelfProblem& problem, std::int64_t i, std::int64_t j, const Ahead& ahead, void* scratch) {
  SelfTile<A>(problem, i, j, ahead, scratch).template backward<Source>();
}

// ---- Cross shape --------------------------------------------------------------------------------------------------------------------
template <class A>
struct CrossTile {
  using Sum = typename A::Sum;
  using Cell = typename A::Cell;

  const CrossProblem& problem;
  const Cell* const row_panels;
  const Cell* const column_panels;
  const Ahead& ahead;
  Scratch<A>& scratch;
  const Block rows, columns;

  CrossTile(const CrossProblem& problem_, std::int64_t i, std::int64_t j, const void* row_panels_, const void* column_panels_,
            const Ahead& ahead_, void* memory)
      : problem(problem_),
        row_panels(static_cast<const Cell*>(row_panels_)),
        column_panels(static_cast<const Cell*>(column_panels_)),
        ahead(ahead_),
        scratch(*static_cast<Scratch<A>*>(memory)),
        rows(i, problem.row_block, problem.rows),
        columns(j, problem.column_block, problem.columns) {}

  static void take_labels(const std::int64_t* labels, std::int64_t count, Int<Sum> (*halves)[kMaxBlock]) {
    for (std::int64_t i = 0; i < count; ++i) {
      halves[0][i] = Int<Sum>(labels[i]);
      halves[1][i] = Int<Sum>(labels[i] >> 32);
    }
  }

  // Calls f with the rule for this tile.
  template <class F>
  FASTSUPCON_INLINE void with_rule(const F& f) {
    if (problem.skip) {
      for (std::int64_t i = 0; i < rows.count; ++i) {
        const std::int64_t skip = problem.skip[rows.first + i] - columns.first;
        scratch.skip[i] = skip >= 0 && skip < columns.count ? Int<Sum>(skip) : -1;
      }
      f(NotSkipped<Sum>{columns.count, scratch.skip});
    } else if (problem.row_labels) {
      take_labels(problem.row_labels + rows.first, rows.count, scratch.row_label);
      take_labels(problem.column_labels + columns.first, columns.count, scratch.column_label);
      f(OtherLabel<Sum>{columns.count, scratch.row_label, scratch.column_label});
    } else if (columns.count % kPanel<A>) {
      f(Existing<Sum>{columns.count});
    } else {
      f(Everything<Sum>{});
    }
  }

  // For every strip: its dot products, then f(vectors, its first column).
  template <class F>
  FASTSUPCON_INLINE void strips(const F& f) {
    for (std::int64_t c = 0; c < columns.count; c += kPanel<A>) {
      with_vectors<A>(columns.count - c, [&](auto v) __attribute__((always_inline)) {
        dot_products<A, v.value>(row_panels, rows.count, column_panels + c * cells<A>(problem.depth), problem.depth, scratch.tile + c,
                                 part_during<A>(c, ahead));
        f(v, c);
      });
    }
  }

  void take_bias() {
    if (problem.bias) {
      copy(static_cast<const Sum*>(problem.bias) + columns.first, columns.count, scratch.bias);
    } else {
      fill(scratch.bias, columns.count, Sum(0));
    }
  }

  // total_i += Σ_j E_ij
  void forward_fixed(Sum* totals) {
    const FixedPower<Sum> power(problem.scale * kLog2E, problem.shift);
    fill(scratch.row_sums, rows.count, Vector<Sum>{});
    with_rule([&](auto rule) __attribute__((always_inline)) {
      strips([&](auto v, std::int64_t c) __attribute__((always_inline)) {
        for (std::int64_t i = 0; i < rows.count; ++i) {
          Vector<Sum> row_sum = scratch.row_sums[i];
          unroll<decltype(v)::value>([&](auto u) __attribute__((always_inline)) {
            const std::int64_t column = c + u * kWidth<A>;
            row_sum += allowed_or<Sum>(rule, i, column, power(load(scratch.tile + i * kStride<A> + column)), Sum(0));
          });
          scratch.row_sums[i] = row_sum;
        }
      });
    });
    for (std::int64_t i = 0; i < rows.count; ++i) totals[rows.first + i] += sum_of_lanes<Sum>(scratch.row_sums[i]);
  }

  // total_i = Σ_j exp(s_ij − maximum_i), both carried along the columns
  void forward_careful(Sum* totals, Sum* maxima) {
    take_bias();
    strips([](auto, std::int64_t) {});
    with_rule([&](auto rule) __attribute__((always_inline)) {
      for (std::int64_t i = 0; i < rows.count; ++i) add_row(rule, i, totals[rows.first + i], maxima[rows.first + i]);
    });
  }

  template <class Rule>
  FASTSUPCON_INLINE void add_row(const Rule& rule, std::int64_t i, Sum& total, Sum& highest) {
    Sum* const x = scratch.tile + i * kStride<A>;
    const Sum scale = Sum(problem.scale);
    Vector<Sum> best = broadcast(-kInfinity<Sum>);
    for (std::int64_t c = 0; c < columns.count; c += kWidth<A>) {
      const Vector<Sum> logits = allowed_or<Sum>(rule, i, c, load(x + c) * scale + load(scratch.bias + c), -kInfinity<Sum>);
      store(x + c, logits);
      best = maximum(logits, best);
    }
    const Sum raised = maximum_of_lanes<Sum>(best);
    if (raised > highest) {
      const Vector<Sum> factor = exp_of<Sum>(shift_of<Sum>(broadcast(highest)) - shift_of<Sum>(broadcast(raised)));
      total *= highest == -kInfinity<Sum> ? Sum(0) : factor[0];
      highest = raised;
    }
    const Vector<Sum> shift = shift_of<Sum>(broadcast(highest));
    Vector<Sum> sum = {};
    for (std::int64_t c = 0; c < columns.count; c += kWidth<A>) sum += exp_of<Sum>(load(x + c) - shift);
    total += sum_of_lanes<Sum>(sum);
  }

  // da_i += Σ_j w_ij b_j, db_j += Σ_i w_ij a_i, dbias_j += Σ_i w_ij, with w_ij = g_i exp(s_ij − lse_i), when fixed as weight_i E_ij
  template <class Source>
  void backward(Sum* da, Sum* db, Sum* dbias) {
    const Sum* const weight = static_cast<const Sum*>(problem.weight) + rows.first;
    const auto replace = [&](auto weights) __attribute__((always_inline)) {
      strips([&](auto v, std::int64_t c) __attribute__((always_inline)) {
        constexpr int V = decltype(v)::value;
        Vector<Sum> column_sums[V] = {};
        for (std::int64_t i = 0; i < rows.count; ++i) {
          unroll<V>([&](auto u) __attribute__((always_inline)) {
            const std::int64_t column = c + u * kWidth<A>;
            Sum* const x = scratch.tile + i * kStride<A> + column;
            const Vector<Sum> w = weights(i, column, load(x));
            store(x, w);
            column_sums[u] += w;
          });
        }
        if (dbias) add_lanes<Sum, V>(dbias + columns.first + c, column_sums, columns.count - c);
        scratch.weights.template take<V>(scratch.tile, rows.count, c);
      });
    };
    with_rule([&](auto rule) __attribute__((always_inline)) {
      if (problem.fixed) {
        const FixedPower<Sum> power(problem.scale * kLog2E, problem.shift);
        replace([&](std::int64_t i, std::int64_t column, Vector<Sum> s) __attribute__((always_inline)) {
          return allowed_or<Sum>(rule, i, column, power(s) * weight[i], Sum(0));
        });
      } else {
        const Sum* const lse = static_cast<const Sum*>(problem.lse) + rows.first;
        const Sum scale = Sum(problem.scale);
        take_bias();
        replace([&](std::int64_t i, std::int64_t column, Vector<Sum> s) __attribute__((always_inline)) {
          const Vector<Sum> logits = allowed_or<Sum>(rule, i, column, s * scale + load(scratch.bias + column), -kInfinity<Sum>);
          // a pair that is not allowed passes nothing, also in a row that allows none (its lse is −inf)
          return logits == -kInfinity<Sum> ? Vector<Sum>{} : weight[i] * exp_of<Sum>(logits - lse[i]);
        });
      }
    });
    const Source* const row_elements = static_cast<const Source*>(problem.a) + rows.first * problem.depth;
    const Source* const column_elements = static_cast<const Source*>(problem.b) + columns.first * problem.depth;
    if (da) {
      add_weighted<A, Weights<A>::kRowStride, 1>(Weights<A>::along_columns(scratch.weights, scratch.tile), rows.count, column_elements,
                                                 columns.count, problem.depth, Extent::full, scratch.panel, da + rows.first * problem.depth);
    }
    if (db) {
      add_weighted<A, 1, kStride<A>>(Weights<A>::along_rows(scratch.weights, scratch.tile), columns.count, row_elements, rows.count,
                                     problem.depth, Extent::full, scratch.panel, db + columns.first * problem.depth);
    }
  }
};

template <class A>
void cross_forward(const CrossProblem& problem, std::int64_t i, std::int64_t j, const void* row_panels, const void* column_panels,
                   const Ahead& ahead, void* total, void* maximum, void* scratch) {
  using Sum = typename A::Sum;
  CrossTile<A> tile(problem, i, j, row_panels, column_panels, ahead, scratch);
  problem.fixed ? tile.forward_fixed(static_cast<Sum*>(total)) : tile.forward_careful(static_cast<Sum*>(total), static_cast<Sum*>(maximum));
}

template <class A, class Source>
void cross_backward(const CrossProblem& problem, std::int64_t i, std::int64_t j, const void* row_panels, const void* column_panels,
                    const Ahead& ahead, void* da, void* db, void* dbias, void* scratch) {
  using Sum = typename A::Sum;
  CrossTile<A>(problem, i, j, row_panels, column_panels, ahead, scratch)
      .template backward<Source>(static_cast<Sum*>(da), static_cast<Sum*>(db), static_cast<Sum*>(dbias));
}

// ---- Whole arrays -------------------------------------------------------------------------------------------------------------------
template <class A, class Source>
double largest_square(const void* rows, std::int64_t count, std::int64_t depth) {
  using Sum = typename A::Sum;
  Sum largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Source* row = static_cast<const Source*>(rows) + i * depth;
    Vector<Sum> squares = {};
    for (std::int64_t d = 0; d < depth; d += kWidth<A>) {
      const Vector<Sum> x = load_elements(row + d, depth - d);
      squares += x * x;
    }
    const Sum square = sum_of_lanes<Sum>(squares);
    if (square > largest || square != square) largest = square;  // and a NaN, once there, stays
  }
  return double(largest);
}

template <class Sum, class Source>
void finish(const void* sums, std::int64_t count, double factor, void* elements) {
  // in double: the factor may be beyond float where the product is not
  for (std::int64_t k = 0; k < count; ++k) from_sum(Sum(static_cast<const Sum*>(sums)[k] * factor), static_cast<Source*>(elements)[k]);
}

template <class A>
double micro_kernel(std::int64_t times, void* memory) {
  constexpr std::int64_t terms = kMaxBlock / 2;
  Scratch<A>& scratch = *static_cast<Scratch<A>*>(memory);
  auto* const rows = reinterpret_cast<typename A::Cell*>(scratch.tile);
  __builtin_memset(rows, 0x3f, terms * kPanel<A> * sizeof(*rows));  // each element a number below 1
  __builtin_memset(scratch.panel, 0x3f, sizeof(scratch.panel));
  for (std::int64_t t = 0; t < times; ++t) {
    Vector<typename A::Sum> sum[kRows][kVectors];
    multiply<A, kVectors, 1, kPanel<A>>(rows + t % (kPanel<A> / kRows) * kRows, scratch.panel, terms, sum, [] {});
    unroll<kRows>([&](auto r) __attribute__((always_inline)) {
      unroll<kVectors>([&](auto v) __attribute__((always_inline)) { scratch.row_sums[r * kVectors + v] = sum[r][v]; });
    });
    __asm__ volatile("" ::: "memory");  // every time anew
  }
  return double(times) * kRows * kPanel<A> * terms * A::kPerCell;
}

template <class A, class Source>
constexpr Kernels make_kernels() {
  using Sum = typename A::Sum;
  static_assert(kMaxBlock % kPanel<A> == 0 && kPanel<A> % kRows == 0 && kRows % A::kPerCell == 0);
  return {
      kPanel<A>,
      sizeof(Scratch<A>),
      [](std::int64_t depth) { return std::size_t(cells<A>(depth)) * kPanel<A> * sizeof(typename A::Cell); },
      [](const void* rows, std::int64_t count, std::int64_t depth, void* panels) {
        pack_panels<A>(static_cast<const Source*>(rows), count, depth, static_cast<typename A::Cell*>(panels));
      },
      largest_square<A, Source>,
      self_forward<A>,
      self_backward<A, Source>,
      cross_forward<A>,
      cross_backward<A, Source>,
      finish<Sum, Source>,
      micro_kernel<A>,
      unit_rows<Sum, Source>,
      unit_rows_backward<Sum, Source>,
      sum_rows<Sum, Source>,
      row_dots<Sum, Source>,
      row_dots_backward<Sum, Source>,
  };
}
