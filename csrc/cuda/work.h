// What a kernel is asked to do, for the forward and the backward of both shapes.
//
// Every kernel owns rows x and streams over rows y; the logits of a pair are s = x·y·scale (+ bias), in units of log 2 inside.
//   forward           lse_x = log Σ_y exp(s)
//   backward          out_x = factor · Σ_y W(x, y) y, and for the bias Σ_y W(x, y), with W by Form:
//     rows of cross     x = a, y = b:  W = exp(s − lse_x),                              times g_x
//     columns of cross  x = b, y = a:  W = g_y exp(s − lse_y)
//     self              x = y = z:     W = g_x exp(s − lse_x) + g_y exp(s − lse_y);  unit rows: exp(s) (g_x e^{−lse_x} + g_y e^{−lse_y})
//
// Range. 16-bit floats hold W as an operand of the second product. Half: W is at most 2 once g is divided by max|g|, and is shifted up by
// 2^14, so that probabilities down to 2^−29 keep full precision; the factor shifts back. bfloat16 and single need neither.
#pragma once

#include <cstdint>

namespace fastsupcon::cuda {

enum class Product { f16, bf16, tf32, f32 };  // how elements are multiplied; f32 is three tf32 products of halves: single precision
enum class Exclusion { none, diagonal, keys };
enum class Form { one, two, sum };

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct Side {
  const void* rows;          // [count, depth]
  std::int64_t count;
  const float* lse;          // [count] or null
  const float* grad;         // [count] or null: 1
  const float* bias;         // [count] or null: 0
  const std::int64_t* keys;  // [count] or null: the row's own index. A pair of equal keys is excluded
};

struct Work {
  Side x, y;
  std::int64_t depth;
  bool aligned;              // rows start at multiples of 16 bytes
  Exclusion exclusion;
  float scale_log2;          // scale · log2 e
  std::int64_t tiles_per_split;  // tiles of y that one block visits

  // Forward. `online` looks for the row maximum; else |s| is known to be small enough for none.
  bool online;
  float* lse;                // [x], or null: partial maximum and sum of each split instead
  float* partial;            // [splits, x, 2]

  // Backward
  Form form;
  float shift;               // log2 of what W is multiplied by
  const float* largest;      // max|g| on the device, or null: g is used as it is
  const float* out_grad;     // [x]: out is multiplied by it; or null
  float scale;
  void* out;                 // [x, depth] of the rows' type; or [splits, x, depth] float
  float* weight_sums;        // [splits, x] or null
  bool out_is_partial;
};

}  // namespace fastsupcon::cuda
