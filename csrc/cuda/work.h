// What a tile kernel is asked to do, for the forward and the backward of all shapes.
//
// A pass owns rows x and streams over rows y. What a row brings to its pairs is made once, by a small kernel (rows.cuh), as fields of one
// word each, which the tile kernels fetch as they fetch the rows. For the pair of x_i and y_j
//
//   v = x_i·y_j · factor_i · factor_j · scale      t = v + bias_i + bias_j
//
// with factor 1 / |x| where rows are brought to unit length, else 1; only the columns of a problem have a bias.
//   forward   of each x: log Σ exp(t) over the pairs of different keys and over those of equal ones, Σ v over the latter, and their number
//   backward  out_i = Σ_j w factor_j y_j, and for the bias Σ_j (w without its linear terms), with
//             w = weight_i exp(t + shift_i) + weight_j exp(t + shift_j) + [equal keys] (linear_i + linear_j)
//             whose weight and shift are those of pairs of equal, or of different keys
// A problem's columns as x take the same pass with the two sides swapped, in the same launch. In the self shape x and y are the same rows
// with the same fields, so that w_ij + w_ji comes of one pass.
//
// Bounded: every |t| is known to be so small that exp(t) can be summed as it is. Then a weight is weight · exp(shift), a pair takes one
// exp, and factor_j w = exp(t) (weight_i factor_j + weight_j factor_j) + … is two fused multiply-adds from the products in fields of y.
// Where only the device knows whether sums are bounded, a family of kernels that needs to have them so is launched, and so is one that does
// not: the blocks of the one whose turn it is not end at once, and the two share their scratch memory.
// Apart: pairs of different and of equal keys are summed, and weighed, apart; else the sums over `different` and the weights are all
// pairs'.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "triangle.h"

namespace fastsupcon::cuda {

enum class Product { f16, bf16, tf32, f32 };  // how elements are multiplied; f32 is three tf32 products of halves: single precision
enum class Exclusion { none, diagonal, own };  // no pair: none; x and y of equal index; what `own` names

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

enum Field : int {
  kFactor,
  kCode,  // of the key: equal codes below 2^31 are equal keys, see rows.cuh
  kBias,
  // The backward's
  kLinear,
  kDifferent,  // weights
  kEqual,
  kShiftDifferent,  // for sums that are not bounded
  kShiftEqual,
  kScaledLinear,  // times the factor
  kScaledDifferent,
  kScaledEqual,
};
constexpr int kForwardFields = kBias + 1, kBackwardFields = kScaledEqual + 1, kFieldBytes = 4;

// Where a row's word lies in its field: the four of 16 columns that a lane holds of an accumulator fragment (layout.h) lie together.
__host__ __device__ constexpr int field_place(int row) { return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2; }

// Fields are there for a multiple of so many rows, and so of every block's and tile's; without weight past the last.
constexpr int kFieldRows = 768;
constexpr int kLargestRows = 256;  // that one of `largest` is of

struct Side {
  const void* rows;          // [count, depth]
  int count;                 // fits 31 bits, with room for a block
  int field_rows;            // count, rounded up to kFieldRows
  const char* fields;        // [kForwardFields or kBackwardFields, field_rows] words
  const std::int64_t* own;   // [count], the index of the other side that is no pair; null: the row's own index
  const std::int64_t* keys;  // [count], or null
  const float* largest;      // f16, backward: for each kLargestRows rows the largest |weight| + |linear| and the largest factor
};

// A loss from its rows' quantities, or their gradients from its.
struct LineWork {
  float all, different, equal, similarity, log_count, factor, lone;
  bool skip_lone;
  Line::Reduction reduction;
  std::int64_t rows;
  Quantities<const float*> values;
  float* loss;                // forward: [1], [rows] without reduction
  const float* grad;          // backward: the same
  float* paired;              // how many rows have a pair of equal keys: from a loss to its backward where lone rows are skipped; or null
  Quantities<float*> grads;

  // Of a tile kernel that ends with the loss: its warps' sums, put together by the last of them that is done.
  float* sums;                // [2, ceil(rows / 32)], losses and paired rows
  int* done;                  // [1], 0 at first
};

struct Scale {
  double value;
  const float* address;  // on the device; or null
  bool may_bound;        // no bias, and more than one pair for a row
  const float* bounded;  // of rows as they are, whether their lengths bound sums, 1 or 0, on the device; null: of unit rows the scale tells
};

enum class Turn { always, bounded, running };  // for which sums a launch is

// How many blocks share out y, by the sums that there turn out to be: the same number where only one family is launched.
struct Splits {
  int bounded, running;
};

// A block of a launch is given by its place in the list: of the first pass, then of the second; in each, split by split.
struct Pass {
  Side x, y;
  int row_blocks;                // blocks that share out x
  int splits;                    // blocks that share out y
  int tiles_per_split;           // tiles of y that one block visits

  // Forward: sums of each split, put together by the last of them that is done.
  float* partial;                // [splits, x, kPartials]
  int* done;                     // [row_blocks], 0 at first
  Quantities<float*> quantities; // [x] each, or null
  LineWork line;                 // without a loss none is wanted

  // Backward
  float* out;                    // [splits, x, depth]
  float* weight_sums;            // [splits, x] Σ_j of w without its linear terms, for the bias; or null
  float* products;               // [splits, x] Σ_j w x̂·ŷ, for the scale; or null
};
constexpr int kPartials = 6;     // maximum and sum over different keys, over equal keys; similarity, count

struct Work {
  Pass passes[2];
  int count;                     // of passes
  std::int64_t depth;
  bool aligned;                  // rows start at multiples of 16 bytes
  bool apart;                    // see above
  Exclusion exclusion;
  Scale scale;
  Turn turn;
  Triangle triangle;             // forward: of one pass; without row blocks in a group the pass is visited as it stands
};

}  // namespace fastsupcon::cuda
