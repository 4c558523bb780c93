// What one instruction set offers to the driver (lse.cpp): tiles of the log-sum-exp over pairs of rows, and of its gradient.
//
// Rows are cut into blocks of at most kMaxBlock; a tile is a pair of blocks. A unit (unit_*.cpp) fills one table per element type from
// the template in tiles.h. Everything here is plain data, so that no inline function is compiled twice with different instructions.
// "Sum" is float, or double for f64 rows (lse_problem.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../lse_problem.h"

namespace fastsupcon::cpu {

constexpr int kMaxBlock = 192;  // rows: a tile of 192 × 192 fp32 logits is 144 KiB, so it stays in L2 beside the rows it is made of

// Self shape. Fixed: E_ij = 2^(s_ij log2 e − shift), one for both rows of a pair. Otherwise each row has its own running maximum.
struct SelfProblem {
  const void* rows;       // [count, depth] elements
  const void* panels;     // the same rows, packed
  std::int64_t count;
  std::int64_t depth;
  std::int64_t block;     // rows per block, a multiple of Kernels::panel
  double scale;
  bool fixed;
  int shift;              // base-2 exponent ≥ every s_ij log2 e; fixed only
  void* total;            // forward: [count] Sum, Σ_j exp(s_ij − maximum_i), or Σ_j E_ij when fixed
  void* maximum;          // forward, not fixed: [count] Sum, starts at −inf
  const void* weight;     // backward: [count] Sum, g_i times a common factor, or a_i = that times 2^(shift − lse_i log2 e) when fixed
  const void* lse;        // backward, not fixed: [count] Sum
  void* gradient;         // backward: [count, depth] Sum, Σ over the pairs of their weights times the other row
};

// Fixed as above, which it only is without a bias: E_ij = 2^(s_ij log2 e − shift). Otherwise each row has its own running maximum.
struct CrossProblem {
  const void* a;  // [rows, depth] elements
  const void* b;  // [columns, depth] elements
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t depth;
  std::int64_t row_block;     // both multiples of Kernels::panel
  std::int64_t column_block;
  double scale;
  bool fixed;
  int shift;
  const void* bias;                   // [columns] Sum, or null
  const std::int64_t* skip;           // [rows], or null
  const std::int64_t* row_labels;     // [rows], or null
  const std::int64_t* column_labels;  // [columns], or null
  const void* weight;                 // backward: [rows] Sum, g_i times a common factor, times 2^(shift − lse_i log2 e) when fixed
  const void* lse;                    // backward, not fixed: [rows] Sum
};

// What the next tile reads, fetched into L2 while this one's dot products run: part s during the strip s of kPanel columns, as many bytes as a
// block's packed rows have. Where there is less to fetch a part stands several times; what lies past its end, or is never used, is harmless.
struct Ahead {
  const void* part[6];
};

struct Kernels {
  int panel;                   // rows per packed panel
  std::size_t scratch_bytes;   // one thread's working memory, aligned to 64
  std::size_t (*panel_bytes)(std::int64_t depth);  // of one packed panel
  void (*pack)(const void* rows, std::int64_t count, std::int64_t depth, void* panels);
  double (*largest_square)(const void* rows, std::int64_t count, std::int64_t depth);  // max |z_i|²; NaN if any is NaN

  // Block pair i ≤ j: adds to total (and maximum) of both blocks, or to the gradient of both.
  void (*self_forward)(const SelfProblem&, std::int64_t i, std::int64_t j, const Ahead&, void* scratch);
  void (*self_backward)(const SelfProblem&, std::int64_t i, std::int64_t j, const Ahead&, void* scratch);

  // The pair of row block i and column block j, each given packed: adds to total (and maximum, which starts at −inf), or to da, db (without the
  // factor scale) and dbias, all times the weights' common factor. All of these start at row 0 of the problem; gradients that are null are left out.
  void (*cross_forward)(const CrossProblem&, std::int64_t i, std::int64_t j, const void* row_panels, const void* column_panels, const Ahead&,
                        void* total, void* maximum, void* scratch);
  void (*cross_backward)(const CrossProblem&, std::int64_t i, std::int64_t j, const void* row_panels, const void* column_panels, const Ahead&,
                         void* da, void* db, void* dbias, void* scratch);

  void (*finish)(const void* sums, std::int64_t count, double factor, void* elements);  // elements = factor · sums; in place is allowed

  // `times` products of kRows rows with one panel, all in L1, at which no other product here can be faster. Returns its multiply-adds.
  double (*micro_kernel)(std::int64_t times, void* scratch);

  // What rows.h describes, for the first `count` rows; sum_rows for the columns [first, last) of all rows.
  void (*unit_rows)(const void* x, std::int64_t count, std::int64_t depth, void* unit, void* norm);
  void (*unit_rows_backward)(const void* unit, const void* norm, const void* grad, std::int64_t count, std::int64_t depth, void* dx);
  void (*sum_rows)(const void* x, const std::int64_t* ids, const void* weight, const void* start, std::int64_t count, std::int64_t classes,
                   std::int64_t depth, std::int64_t first, std::int64_t last, void* sums);
  void (*row_dots)(const void* z, const void* table, const std::int64_t* ids, bool others, std::int64_t count, std::int64_t depth, void* dots);
  void (*row_dots_backward)(const void* z, const void* table, const std::int64_t* ids, const void* grad, const void* grad_sums,
                            const void* start, std::int64_t count, std::int64_t depth, void* dz);
};

// One instruction set. Kernels are indexed by Scalar; sets may share them.
struct Unit {
  const char* name;
  bool (*supported)();  // by this processor
  const Kernels* kernels[4];
};

}  // namespace fastsupcon::cpu
