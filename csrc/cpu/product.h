// Register-blocked products, and the packing that feeds them. Included by a unit (see simd.h).
//
// A product's operands are cells: one element, or for bf16 dot products the two of a pair along the sum. For each step of its sum the
// micro-kernel broadcasts kRows cells of one operand, reads kVectors vectors of cells of the other, and adds to kRows × kVectors vectors.

struct Float32 {
  using Sum = float;
  using Cell = float;
  static constexpr int kPerCell = 1;
  static FASTSUPCON_INLINE void multiply_add(Vector<float>& sum, Vector<float> a, Vector<float> b) { sum += a * b; }
};
struct Float64 {
  using Sum = double;
  using Cell = double;
  static constexpr int kPerCell = 1;
  static FASTSUPCON_INLINE void multiply_add(Vector<double>& sum, Vector<double> a, Vector<double> b) { sum += a * b; }
};
#ifdef __AVX512BF16__
struct BfloatPairs {
  using Sum = float;
  using Cell = std::uint32_t;
  static constexpr int kPerCell = 2;
  static FASTSUPCON_INLINE void multiply_add(Vector<float>& sum, Vector<std::uint32_t> a, Vector<std::uint32_t> b) {
    sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

constexpr int kRows = FASTSUPCON_ROWS, kVectors = FASTSUPCON_VECTORS;

template <class A>
constexpr int kWidth = kLanes<typename A::Sum>;
template <class A>
constexpr int kPanel = kVectors * kWidth<A>;  // rows of z, or elements of a row, side by side in a packed panel
template <class A>
constexpr int kStride = kMaxBlock + 64 / sizeof(typename A::Sum);  // of a row of a tile: an odd number of cache lines, so columns spread over the sets

template <class A>
FASTSUPCON_INLINE std::int64_t cells(std::int64_t elements) {
  return (elements + A::kPerCell - 1) / A::kPerCell;
}

// kTermsInL1 steps of the sum at a time: kPanel columns of them and kRows rows stay in L1.
constexpr std::int64_t kTermsInL1 = 256;

// sum[r][v] = Σ_k a[r·kRowStep + k·kTermStep] · b[k·kPanel + v·lanes], and fetch() at each step.
template <class A, int V, int kRowStep, int kTermStep, class Fetch>
FASTSUPCON_INLINE void multiply(const typename A::Cell* a, const typename A::Cell* b, std::int64_t terms,
                                Vector<typename A::Sum> (&sum)[kRows][V], const Fetch& fetch) {
  using Cell = typename A::Cell;
  unroll<kRows>([&](auto r) __attribute__((always_inline)) { unroll<V>([&](auto v) __attribute__((always_inline)) { sum[r][v] = Vector<typename A::Sum>{}; }); });
  for (std::int64_t k = 0; k < terms; ++k) {
    fetch();
    if constexpr (kRowStep == 1) __builtin_prefetch(a + 16 * kTermStep);  // one line of each step is used: more than the hardware foresees
    Vector<Cell> columns[V];
    unroll<V>([&](auto v) __attribute__((always_inline)) { columns[v] = load(b + v * kWidth<A>); });
    unroll<kRows>([&](auto r) __attribute__((always_inline)) {
      const Vector<Cell> row = broadcast(a[r * kRowStep]);
      unroll<V>([&](auto v) __attribute__((always_inline)) { A::multiply_add(sum[r][v], row, columns[v]); });
    });
    a += kTermStep;
    b += kPanel<A>;
  }
}

// ---- Packing ----------------------------------------------------------------------------------------------------------------------
// W vectors of W cells, transposed by log2 W rounds of perfect shuffles.
template <class Cell, int kOffset, int... I>
FASTSUPCON_INLINE Vector<Cell> interleave(Vector<Cell> a, Vector<Cell> b, Constants<I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, (kOffset + I / 2 + (I % 2) * lanes)...);
}

template <class Cell>
FASTSUPCON_INLINE void transpose(Vector<Cell> (&rows)[kLanes<Cell>]) {
  constexpr int lanes = kLanes<Cell>;
  for (int round = 1; round < lanes; round *= 2) {
    Vector<Cell> mixed[lanes];
    unroll<lanes / 2>([&](auto i) __attribute__((always_inline)) {
      mixed[2 * i] = interleave<Cell, 0>(rows[i], rows[i + lanes / 2], First<lanes>{});
      mixed[2 * i + 1] = interleave<Cell, lanes / 2>(rows[i], rows[i + lanes / 2], First<lanes>{});
    });
    unroll<lanes>([&](auto i) __attribute__((always_inline)) { rows[i] = mixed[i]; });
  }
}

// A vector of consecutive cells of a row, of which `available` elements exist; the rest are 0.
template <class A, class Source>
FASTSUPCON_INLINE Vector<typename A::Cell> load_cells(const Source* p, std::int64_t available) {
  if constexpr (A::kPerCell == 1) {
    return load_elements(p, available);
  } else {
    constexpr int elements = 2 * kWidth<A>;
    if (available >= elements) return load<typename A::Cell>(reinterpret_cast<const typename A::Cell*>(p));
    Source padded[elements] = {};
    for (std::int64_t l = 0; l < available; ++l) padded[l] = p[l];
    return load<typename A::Cell>(reinterpret_cast<const typename A::Cell*>(padded));
  }
}

// Rows [count, depth] into panels [⌈count / kPanel⌉][cells of depth][kPanel]; missing rows are 0.
template <class A, class Source>
void pack_panels(const Source* rows, std::int64_t count, std::int64_t depth, typename A::Cell* panels) {
  using Cell = typename A::Cell;
  constexpr int W = kWidth<A>;
  const std::int64_t terms = cells<A>(depth);
  for (std::int64_t first = 0; first < count; first += kPanel<A>, panels += kPanel<A> * terms) {
    for (int v = 0; v < kVectors; ++v) {
      for (std::int64_t k = 0; k < terms; k += W) {
        Vector<Cell> block[W];
        for (int l = 0; l < W; ++l) {
          const std::int64_t row = first + v * W + l, element = k * A::kPerCell;
          block[l] = row < count ? load_cells<A>(rows + row * depth + element, depth - element) : Vector<Cell>{};
        }
        transpose<Cell>(block);
        Cell* to = panels + k * kPanel<A> + v * W;
        if (terms - k >= W) {
          unroll<W>([&](auto l) __attribute__((always_inline)) { store(to + l * kPanel<A>, block[l]); });
        } else {
          for (int l = 0; l < terms - k; ++l) store(to + l * kPanel<A>, block[l]);
        }
      }
    }
  }
}

// Elements [first, first + V vectors) of `count` rows into one panel [cells of count][kPanel]; elements past the depth are 0.
template <class A, int V, class Source>
FASTSUPCON_INLINE void pack_elements(const Source* rows, std::int64_t count, std::int64_t depth, std::int64_t first, typename A::Cell* panel) {
  using Cell = typename A::Cell;
  for (std::int64_t k = 0; k < cells<A>(count); ++k, panel += kPanel<A>) {
    const Source* row = rows + k * A::kPerCell * depth;
    unroll<V>([&](auto v) __attribute__((always_inline)) {
      const std::int64_t element = first + v * kWidth<A>;
      if constexpr (A::kPerCell == 1) {
        store(panel + v * kWidth<A>, load_elements(row + element, depth - element));
      } else {
        auto bits = [&](const Source* p) __attribute__((always_inline)) {  // in the high half of each cell
          return reinterpret_cast<Vector<Cell>>(load_elements(p, depth - element));
        };
        const Vector<Cell> low = bits(row + element) >> 16;
        const Vector<Cell> high = 2 * k + 1 < count ? bits(row + depth + element) : Vector<Cell>{};
        store(panel + v * kWidth<A>, low | high);
      }
    });
  }
}

// ---- The two products of a tile -----------------------------------------------------------------------------------------------------
// tile[i][v] = z_i · z_j for `count` rows i and the V vectors of columns j of one panel. Writes whole groups of kRows rows. Fetches into L2, at an
// even pace, as many bytes from `ahead` on as the packed rows have.
template <class A, int V>
void dot_products(const typename A::Cell* row_panels, std::int64_t count, const typename A::Cell* column_panel, std::int64_t depth,
                  typename A::Sum* tile, const void* ahead) {
  const std::int64_t terms = cells<A>(depth);
  for (std::int64_t k = 0; k < terms; k += kTermsInL1) {
    for (std::int64_t i = 0; i < count; i += kRows) {
      const typename A::Cell* rows = row_panels + i / kPanel<A> * kPanel<A> * terms + i % kPanel<A>;
      const char* next = static_cast<const char*>(ahead) + (i * terms + k * kRows) * sizeof(typename A::Cell);
      Vector<typename A::Sum> sum[kRows][V];
      multiply<A, V, 1, kPanel<A>>(rows + k * kPanel<A>, column_panel + k * kPanel<A>, smaller(kTermsInL1, terms - k), sum,
                                   [&]() __attribute__((always_inline)) {
                                     __builtin_prefetch(next, 0, 2);
                                     next += kRows * sizeof(typename A::Cell);
                                   });
      unroll<kRows>([&](auto r) __attribute__((always_inline)) {
        unroll<V>([&](auto v) __attribute__((always_inline)) {
          typename A::Sum* to = tile + (i + r) * kStride<A> + v * kWidth<A>;
          store(to, k == 0 ? sum[r][v] : load(to) + sum[r][v]);
        });
      });
    }
  }
}

// Where the weights of a tile are not 0: everywhere, or only above the diagonal of the tile.
enum class Extent { full, triangle };

// out_r += Σ_k w_rk z_k over V vectors of elements from `first` on, with w_rk = weights[r·kRowStep + k·kTermStep] in cells.
template <class A, int V, int kRowStep, int kTermStep, class Source>
void add_elements(const typename A::Cell* weights, std::int64_t outputs, const Source* rows, std::int64_t count, std::int64_t depth,
                  std::int64_t first, Extent extent, typename A::Cell* panel, typename A::Sum* out) {
  using Sum = typename A::Sum;
  constexpr int W = kWidth<A>;
  pack_elements<A, V>(rows, count, depth, first, panel);
  for (std::int64_t r0 = 0; r0 < outputs; r0 += kRows) {
    std::int64_t begin = 0, end = cells<A>(count);
    if (extent == Extent::triangle) {  // w_rk ≠ 0 only for k > r, or for k < r where the tile is read by columns
      if (kTermStep == 1) {
        begin = r0 / A::kPerCell;
      } else {
        end = smaller(end, cells<A>(r0 + kRows));
      }
    }
    // The sums come from L3 or memory, too late for out-of-order execution to hide: fetch them while the product runs.
    Sum* to = out + r0 * depth + first;
    unroll<kRows>([&](auto r) __attribute__((always_inline)) {
      if (r < outputs - r0) unroll<V>([&](auto v) __attribute__((always_inline)) { __builtin_prefetch(to + r * depth + v * W, 1); });
    });
    Vector<Sum> sum[kRows][V];
    multiply<A, V, kRowStep, kTermStep>(weights + r0 * kRowStep + begin * kTermStep, panel + begin * kPanel<A>, end - begin, sum, [] {});
    const std::int64_t valid = depth - first;
    if (outputs - r0 >= kRows && valid >= V * W) {
      unroll<kRows>([&](auto r) __attribute__((always_inline)) {
        unroll<V>([&](auto v) __attribute__((always_inline)) {
          Sum* p = to + r * depth + v * W;
          store(p, load(p) + sum[r][v]);
        });
      });
    } else {
      Sum edge[kRows][V * W];
      unroll<kRows>([&](auto r) __attribute__((always_inline)) {
        unroll<V>([&](auto v) __attribute__((always_inline)) { store(&edge[r][v * W], sum[r][v]); });
      });
      for (std::int64_t r = 0; r < smaller<std::int64_t>(kRows, outputs - r0); ++r) {
        for (std::int64_t d = 0; d < smaller<std::int64_t>(V * W, valid); ++d) to[r * depth + d] += edge[r][d];
      }
    }
  }
}

// Calls f with the number of vectors, as a constant, that hold `width` lanes.
template <class A, int V = kVectors, class F>
FASTSUPCON_INLINE void with_vectors(std::int64_t width, const F& f) {
  if constexpr (V > 1) {
    if (width <= (V - 1) * kWidth<A>) return with_vectors<A, V - 1>(width, f);
  }
  f(Constant<V>{});
}

// out_r += Σ_k w_rk z_k for all elements. A tile read by rows has its cells along columns (kTermStep 1), by columns along rows.
// The depth is cut into panels as equal as can be: 16 vectors by threes as 3 3 3 3 2 2, for a last panel of one vector is bound by the FMA's latency.
template <class A, int kRowStep, int kTermStep, class Source>
void add_weighted(const typename A::Cell* weights, std::int64_t outputs, const Source* rows, std::int64_t count, std::int64_t depth, Extent extent,
                  typename A::Cell* panel, typename A::Sum* out) {
  const std::int64_t vectors = (depth + kWidth<A> - 1) / kWidth<A>, panels = (vectors + kVectors - 1) / kVectors;
  for (std::int64_t p = 0; p < panels; ++p) {
    const std::int64_t first = (vectors * p + panels - 1) / panels, last = (vectors * (p + 1) + panels - 1) / panels;
    with_vectors<A>((last - first) * kWidth<A>, [&](auto v) {
      add_elements<A, v.value, kRowStep, kTermStep>(weights, outputs, rows, count, depth, first * kWidth<A>, extent, panel, out);
    });
  }
}
