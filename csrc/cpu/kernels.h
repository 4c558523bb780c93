// What one instruction set offers to the driver (pairs.cpp). Each unit (unit_*.cpp) fills one table per element type from the templates in
// tiles.h and pack.h. Everything here is plain data, so that no inline function is compiled twice with different instructions.
//
// Rows are cut into blocks of at most kMaxBlock; a tile is a block of rows against a block of columns. "Sum" is float, or double for f64
// rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace fastsupcon::cpu {

constexpr int kMaxBlock = 192;  // rows: a tile of 192 × 192 fp32 weights is 144 KiB, so it stays in L2 beside the rows it is made of

// An integer as wide as Sum, so that a mask of lanes made of it fits: keys, renumbered, and numbers of columns.
template <class Sum>
using Integer = std::conditional_t<sizeof(Sum) == 8, std::int64_t, std::int32_t>;

// Which pairs a sum of exponentials is over.
enum Over { kAll, kDifferent, kEqual, kOvers };

// The same for all tiles of a call.
struct Call {
  std::int64_t depth;
  double scale;
  bool bounded;    // E_ij = 2^(t_ij log2 e − shift), one for all sums that a pair is in. Otherwise every sum has its own running maximum.
  int shift;       // base-2 exponent ≥ every t_ij log2 e; bounded only
  Over first;      // forward: what the first sum of exponentials is over; where it is kDifferent there may be a second, over kEqual
  bool both;
  bool similarity; // forward: the sum of similarities is wanted
  bool keyed;      // backward: weights differ between different and equal keys
};

// A block of rows or columns, as a tile sees it: arrays begin with the block, and have room for a whole one. In a diagonal tile both are
// one.
template <class Sum>
struct Face {
  std::int64_t first, count;   // of the problem's rows, or columns
  const Sum* panels;           // packed for dot products; null in the backward where those are kept
  const Integer<Sum>* keys;
  const Integer<Sum>* own;     // rows' own columns, −1 for none; or null
  const Sum* bias;             // columns'; null with one shift

  // Forward, added to: Σ exp(t − maximum), or Σ E, and the running maxima, from −inf on, of the first and the second sum; Σ s / scale.
  Sum *total[2], *maximum[2], *similarity;

  // Backward. With one shift, w_ij = (E_ij (weight_i + weight_j) + linear_i + linear_j) with the weight of the pair's keys; otherwise
  // w_ij = Σ grad_i exp(t_ij − log_sum_i) + … + linear_i + linear_j, over the log-sums that are there. linear is for equal keys alone.
  const Sum* elements;         // packed for weighted products
  const Sum* weight[kOvers];   // of kDifferent and kEqual
  const Sum *log_sum[kOvers], *grad[kOvers];
  const Sum* linear;
  Sum* gradient;               // [count, depth], added to: Σ w times the other side's rows; or null
  bool fresh;                  // nothing has been added to gradient yet, and what it holds is not to be read
  Sum* bias_gradient;          // columns', added to; or null
};

// What the next tile reads, fetched into L2 while this one's dot products run: part s during strip s, as many bytes as a block's packed
// rows have. Where there is less to fetch a part stands several times; what lies past its end, or is never used, is harmless.
struct Ahead {
  const void* part[6];
};

template <class Sum>
struct Tile {
  const Call& call;
  Face<Sum> rows, columns;
  bool diagonal;  // self shape: each pair once, and no row with itself
  Sum* kept;      // [strips of the columns][row_pitch][panel], or null: the forward leaves E (bounded) or â·b̂ there for the backward
  std::int64_t row_pitch;
  Ahead ahead;
};

template <class Sum>
struct Kernels {
  int panel;                  // rows per packed panel, columns per strip
  std::size_t scratch_bytes;  // one thread's working memory, aligned to 64
  std::int64_t (*packed_depth)(std::int64_t depth);  // numbers of a row in `elements`

  // pack.h
  double (*measure)(const void* rows, std::int64_t count, std::int64_t depth, Sum* inverse_norms);
  void (*pack)(const void* rows, std::int64_t count, std::int64_t depth, const Sum* inverse_norms, Sum* panels, Sum* elements);
  double (*finish)(const void* rows, std::int64_t count, std::int64_t depth, const Sum* inverse_norms, bool along_wanted, const Sum* sums,
                   Sum factor, Sum last_factor, void* elements);

  // tiles.h
  void (*forward)(const Tile<Sum>&, void* scratch);
  void (*backward)(const Tile<Sum>&, void* scratch);
  double (*micro_kernel)(std::int64_t times, void* scratch);  // all in L1: no product here can be faster. Returns its multiply-adds.
};

// One instruction set.
struct Unit {
  const char* name;
  bool (*supported)();  // by this processor
  const Kernels<float>*f32, *f16, *bf16;
  const Kernels<double>* f64;
};

}  // namespace fastsupcon::cpu
