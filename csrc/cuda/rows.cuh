// The small kernels before and after the tiles: the fields of rows, and gradients from the sums of splits. One or two sides a launch.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "tile.cuh"

namespace fastsupcon::cuda {

constexpr int kRowsThreads = 256;
constexpr int kRowsWarps = kRowsThreads / 32;
static_assert(kRowsThreads == kLargestRows);


// Whether every four of a row's elements lie at a multiple of their size.
template <Product PRODUCT>
bool is_wide(std::int64_t depth, std::initializer_list<const void*> rows) {
  const auto starts_well = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at) % (4 * kElementBytes<PRODUCT>) == 0; };
  return depth % 4 == 0 && std::all_of(rows.begin(), rows.end(), starts_well);
}

template <Product PRODUCT>
FASTSUPCON_DEVICE float load_element(const void* rows, std::int64_t index) {
  if constexpr (PRODUCT == Product::f16) return ptx::from_f16(static_cast<const std::uint16_t*>(rows)[index]);
  else if constexpr (PRODUCT == Product::bf16) return ptx::from_bf16(static_cast<const std::uint16_t*>(rows)[index]);
  else return static_cast<const float*>(rows)[index];
}
template <Product PRODUCT>
FASTSUPCON_DEVICE std::uint32_t pack(float low, float high) {
  return PRODUCT == Product::f16 ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
}
template <Product PRODUCT>
FASTSUPCON_DEVICE void store_element(void* rows, std::int64_t index, float value) {
  if constexpr (kIsHalf<PRODUCT>) static_cast<std::uint16_t*>(rows)[index] = static_cast<std::uint16_t>(pack<PRODUCT>(value, 0.0f));
  else static_cast<float*>(rows)[index] = value;
}

// Four neighbours of a row from `at` on, zeros past its `left`. WIDE: as one, see is_wide.
template <Product PRODUCT, bool WIDE>
FASTSUPCON_DEVICE Four<float> load_four(const void* rows, std::int64_t at, std::int64_t left) {
  Four<float> found;
  if constexpr (WIDE && kIsHalf<PRODUCT>) {
    std::uint32_t words[2];
    ptx::load_two_words(words, static_cast<const std::uint16_t*>(rows) + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto half = static_cast<std::uint16_t>(words[i / 2] >> i % 2 * 16);
      found.of[i] = load_element<PRODUCT>(&half, 0);
    }
  } else if constexpr (WIDE) {
    ptx::load_four(found.of, static_cast<const float*>(rows) + at);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) found.of[i] = i < left ? load_element<PRODUCT>(rows, at + i) : 0.0f;
  }
  return found;
}
template <Product PRODUCT, bool WIDE>
FASTSUPCON_DEVICE void store_four(void* rows, std::int64_t at, std::int64_t left, const Four<float>& four) {
  const auto& of = four.of;
  if constexpr (WIDE && kIsHalf<PRODUCT>) {
    ptx::store_two_words(static_cast<std::uint16_t*>(rows) + at, pack<PRODUCT>(of[0], of[1]), pack<PRODUCT>(of[2], of[3]));
  } else if constexpr (WIDE) {
    ptx::store_four(static_cast<float*>(rows) + at, of);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) store_element<PRODUCT>(rows, at + i, of[i]);
    }
  }
}

// Of one side of a problem: what its fields are made from.
struct Rows {
  const void* rows;
  std::int64_t count, field_rows;
  const float* bias;         // or null
  const std::int64_t* keys;  // or null
  float* norms;              // [count] inverse lengths; null: rows are not brought to unit length
  char* fields;
  Quantities<const float*> values, grads;  // backward
  float* largest;            // backward, f16: see Side
};
struct RowsWork {
  Rows sides[2];
  int count;
  std::int64_t depth;
  bool self;
  bool wide;      // all rows
  int row_lanes;  // forward: that share a row
  Scale scale;
  int* done;  // forward: set to 0
  std::int64_t done_count;
  float* lengths;  // forward, of rows as they are: for each warp the largest of its rows' lengths
  LineWork line;  // backward: what the gradients of the first side are made from; without a gradient they are given
};

// The side that a block works on, and its place among that side's blocks of `rows` rows.
struct SideBlock {
  int side;
  std::int64_t first_row;
};
FASTSUPCON_DEVICE SideBlock side_block(std::int64_t rows_of_first, int rows, std::int64_t block = ptx::block_x()) {
  const std::int64_t of_first = ceil_div(rows_of_first, rows);
  return block < of_first ? SideBlock{0, block * rows} : SideBlock{1, (block - of_first) * rows};
}

// A key of 31 bits with its sign is its own code, below 2^31. Any other's has the highest bit, and may stand for more keys than one: rows
// with such a code look at the keys too. Without keys no two rows have the same.
FASTSUPCON_DEVICE std::uint32_t code_of(const RowsWork& work, int side, std::int64_t row) {
  const std::int64_t* keys = work.sides[side].keys;
  if (!keys) return static_cast<std::uint32_t>(work.self ? row : side);
  const std::int64_t key = keys[row], limit = std::int64_t{1} << 30;
  return (static_cast<std::uint32_t>(key) & 0x7fffffffu) | (key < -limit || key >= limit ? 0x80000000u : 0u);
}

struct Fields {
  std::uint32_t* words;
  std::int64_t rows;

  FASTSUPCON_DEVICE void store(Field field, std::uint32_t word) const { words[std::int64_t{field} * rows] = word; }
  FASTSUPCON_DEVICE void store(Field field, float number) const { store(field, ptx::bits(number)); }
};
FASTSUPCON_DEVICE Fields fields_of(const Rows& side, std::int64_t row) {
  return {reinterpret_cast<std::uint32_t*>(side.fields) + row / 16 * 16 + field_place(static_cast<int>(row % 16)), side.field_rows};
}

// 1 / |x|, and 1 for a row of zeros, or of numbers below the normal range. In double, where squares stay in range, and as a factor of a
// logit near 1000 it must be right to the last bit. By the `lanes` neighbours that share a row.
template <Product PRODUCT, bool WIDE>
FASTSUPCON_DEVICE float inverse_norm(const void* rows, std::int64_t of_row, std::int64_t depth, int lanes) {
  double sum = 0.0;
  load_ahead<4, std::int64_t>(
      ptx::lane() % lanes * 4, depth, 4 * lanes, [&](std::int64_t d) { return load_four<PRODUCT, WIDE>(rows, of_row + d, depth - d); },
      [&](const Four<float>& four) {
#pragma unroll
        for (const double x : four.of) sum += x * x;
      });
  for (int mask = lanes / 2; mask > 0; mask /= 2) sum += ptx::shuffle_xor(sum, mask);
  constexpr double tiny = 1.17549435e-38;
  return sum < tiny * tiny ? 1.0f : static_cast<float>(ptx::reciprocal_root(sum));
}

// Lanes that share a row: 16 elements each, which they load at once; fewer would leave no warps, more would take most roots in vain.
inline int row_lanes(std::int64_t depth) {
  int lanes = 8;
  while (lanes < 32 && lanes * 16 < depth) lanes *= 2;
  return lanes;
}

template <Product PRODUCT>
__global__ void __launch_bounds__(kRowsThreads) prepare_forward(const __grid_constant__ RowsWork work) {
  ptx::begin_kernel();
  const SideBlock at = side_block(work.sides[0].field_rows, kRowsThreads / work.row_lanes);
  const Rows& side = work.sides[at.side];
  const std::int64_t row = at.first_row + ptx::thread() / work.row_lanes;
  const bool is_row = row < side.count;
  const std::uint32_t code = is_row ? code_of(work, at.side, row) : 0u;
  const float bias = is_row && side.bias ? side.bias[row] : 0.0f;
  float factor = 1.0f;
  if (side.norms || work.lengths) {
    const std::int64_t depth = is_row ? work.depth : 0, of_row = row * work.depth;
    factor = work.wide ? inverse_norm<PRODUCT, true>(side.rows, of_row, depth, work.row_lanes)
                       : inverse_norm<PRODUCT, false>(side.rows, of_row, depth, work.row_lanes);
  }
  if (work.lengths) {  // a row of zeros counts as one of unit length, one that is not finite as longer than all
    const float largest = warp_largest(!is_row ? 0.0f : factor > 0.0f ? 1.0f / factor : kInfinity);
    const int warp = ptx::warp();  // a shuffle: of all lanes
    if (ptx::lane() == 0) work.lengths[ptx::block_x() * kRowsWarps + warp] = largest;
    factor = 1.0f;
  }
  if (ptx::lane() % work.row_lanes == 0) {
    const Fields fields = fields_of(side, row);
    fields.store(kFactor, is_row ? factor : 0.0f);
    fields.store(kCode, code);
    fields.store(kBias, bias);
    if (is_row && side.norms) side.norms[row] = factor;
  }
  const std::int64_t place = ptx::block_x() * kRowsThreads + ptx::thread();
  if (place < work.done_count) work.done[place] = 0;
}

// Of one row.
struct TriangleTotal {
  float of[kTriangleSums];
};

// A block for 32 rows, once the blocks of triangle.h have written their sums of them: of the group's chunks as rows, and of the groups up to
// its own as columns. Its warps share these out, a lane for each row: one thread for a row would wait for half of a launch of 8,192 rows'
// time. Sums over all pairs alone, bounded.
__global__ void __launch_bounds__(kRowsThreads) combine_triangle(const __grid_constant__ Work work) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  const Triangle& triangle = work.triangle;
  const Pass& pass = work.passes[0];
  const int row = static_cast<int>(ptx::block_x()) * 32 + ptx::lane(), warp = ptx::warp();
  auto* const of_warps = reinterpret_cast<TriangleTotal*>(ptx::shared_memory());  // [kRowsWarps, 32]
  LineRow found{row < triangle.count, {}};
  TriangleTotal total{};
  const auto add = [&](const TriangleTotal& more) {
#pragma unroll
    for (int i = 0; i < kTriangleSums; ++i) total.of[i] += more.of[i];
  };
  if (found.is_row) {
    const int group_rows = triangle.group_rows(), group = row / group_rows, in_group = row - group * group_rows;
    load_ahead<4>(
        warp, triangle.chunks(group), kRowsWarps,
        [&](int chunk) {
          const float* from = triangle.row_sums + triangle.place(group, chunk) * kTriangleSums * group_rows + in_group;
          return TriangleTotal{from[0], from[group_rows], from[2 * group_rows]};
        },
        add);
    // The first row block of a group has columns in the groups before alone.
    load_ahead<8>(
        warp, group + (in_group >= triangle.rows), kRowsWarps,
        [&](int other) {
          const std::int64_t columns = triangle.columns_of(other);
          const float* from = triangle.column_sums + kTriangleSums * triangle.columns_before(other) + row - other * group_rows;
          return TriangleTotal{from[0], from[columns], from[2 * columns]};
        },
        add);
  }
  of_warps[32 * warp + ptx::lane()] = total;
  ptx::sync_block();
  if (warp > 0) return;
  for (int other = 1; other < kRowsWarps; ++other) add(of_warps[32 * other + ptx::lane()]);
  if (found.is_row) {
    const auto& out = pass.quantities;
    if (out.all) out.all[row] = found.q.all = log(total.of[0]);
    if (out.similarity) out.similarity[row] = found.q.similarity = total.of[1] * kLn2;
    if (out.count) out.count[row] = found.q.count = total.of[2];
  }
  if (pass.line.loss) add_to_loss(pass.line, found, row);
}
constexpr int kCombineBytes = 32 * kRowsWarps * static_cast<int>(sizeof(TriangleTotal));

// weight · exp(shift + t) is the gradient that a pair of one kind takes from the log-sums that it is in: over that kind, and over all.
struct PairWeight {
  float weight = 0.0f, shift = -kInfinity;
};
FASTSUPCON_DEVICE PairWeight pair_weight(const float* values, float grad, const float* all_values, float all_grad, std::int64_t row) {
  PairWeight found;
  const auto is_over_pairs = [&](const float* of) { return of && of[row] != -kInfinity; };  // else it passes no gradient
  if (is_over_pairs(values)) found = {grad, -values[row]};
  if (is_over_pairs(all_values)) {
    if (found.shift == -kInfinity) found = {all_grad, -all_values[row]};
    else found.weight += all_grad * exp(-found.shift - all_values[row]);
  }
  return found;
}

constexpr int kPrepareBytes = 2 * kRowsWarps * static_cast<int>(sizeof(float));  // of shared memory

// One thread for each row.
__global__ void __launch_bounds__(kRowsThreads) prepare_backward(const __grid_constant__ RowsWork work) {
  ptx::begin_kernel();
  const SideBlock at = side_block(work.sides[0].field_rows, kRowsThreads);
  const Rows& side = work.sides[at.side];
  const std::int64_t row = at.first_row + ptx::thread();
  float factor = 0.0f, bias = 0.0f, linear = 0.0f, magnitude = 0.0f;
  std::uint32_t code = 0;
  PairWeight different, equal;
  if (row < side.count) {
    const auto& values = side.values;
    const LineWork& line = work.line;
    const bool is_of_line = line.grad && at.side == 0;
    const auto grads = is_of_line ? line_gradient(line, row, line.skip_lone ? *line.paired : 0.0f) : quantities_of(side.grads, row);
    factor = side.norms ? side.norms[row] : 1.0f;
    code = code_of(work, at.side, row);
    bias = side.bias ? side.bias[row] : 0.0f;
    different = pair_weight(values.different, grads.different, values.all, grads.all, row);
    equal = pair_weight(values.equal, grads.equal, values.all, grads.all, row);
    linear = values.similarity ? grads.similarity : 0.0f;
    magnitude = fmaxf(fabsf(different.weight), fabsf(equal.weight)) + fabsf(linear);
    if (is_bounded(work.scale)) {
      different.weight *= exp(different.shift);
      equal.weight *= exp(equal.shift);
    }
  }
  const Fields fields = fields_of(side, row);
  fields.store(kFactor, factor);
  fields.store(kCode, code);
  fields.store(kBias, bias);
  fields.store(kLinear, linear);
  fields.store(kDifferent, different.weight);
  fields.store(kEqual, equal.weight);
  fields.store(kShiftDifferent, different.shift);
  fields.store(kShiftEqual, equal.shift);
  fields.store(kScaledLinear, linear * factor);
  fields.store(kScaledDifferent, different.weight * factor);
  fields.store(kScaledEqual, equal.weight * factor);
  if (!side.largest) return;
  float* of_warps = reinterpret_cast<float*>(ptx::shared_memory());
  const int warp = ptx::warp();
  magnitude = warp_largest(magnitude);
  factor = warp_largest(factor);
  if (ptx::lane() == 0) {
    of_warps[warp] = magnitude;
    of_warps[kRowsWarps + warp] = factor;
  }
  ptx::sync_block();
  if (ptx::thread() >= 2) return;
  float largest = 0.0f;
  for (int i = 0; i < kRowsWarps; ++i) largest = fmaxf(largest, of_warps[ptx::thread() * kRowsWarps + i]);
  side.largest[2 * (at.first_row / kLargestRows) + ptx::thread()] = largest;
}

// From the sums of splits, ∂â up to the scale, to the gradients of one side.
struct Finish {
  const void* rows;
  std::int64_t count;
  const float* norms;        // or null
  float* sums;               // [splits, count, depth]; the first split is used up
  Splits splits;
  void* out;                 // [count, depth]; null: only the bias is wanted
  const float* weight_sums;  // [weight_splits, count], or null
  int weight_splits;
  float* bias;               // [count], or null
};
// Of the scale, from the tiles' sums of w x̂·ŷ.
struct FinishScale {
  const float* products;  // [splits, count]
  std::int64_t count;
  Splits splits;
  float factor;
  float* out;             // null where it is not wanted
};
struct FinishWork {
  Finish sides[2];
  int count;
  FinishScale gradient;
  std::int64_t depth;
  bool wide;                 // all rows, in and out
  int row_warps;             // that share a row
  Scale scale;
};
constexpr int kWarpColumns = 4 * 32;  // four of each lane

// The sums of a row's warps, of which `warp` is one, in order; by all threads of a block.
FASTSUPCON_DEVICE float row_sum(float value, int warp, int row_warps) {
  value = warp_sum(value);
  if (row_warps == 1) return value;
  float* of_warps = reinterpret_cast<float*>(ptx::shared_memory());
  if (ptx::lane() == 0) of_warps[warp] = value;
  ptx::sync_block();
  value = 0.0f;
#pragma unroll 1
  for (int i = 0; i < row_warps; ++i) value += of_warps[warp / row_warps * row_warps + i];
  return value;
}
constexpr int kRowSumBytes = kRowsWarps * static_cast<int>(sizeof(float));

// ∂x = scale (∂â − â (â·∂â)) / |x|, â·∂â once the splits are added up. The sums of a row that its warps hold at one go stay in registers,
// those of a deeper one go by way of the first split.
template <Product PRODUCT, bool WIDE>
FASTSUPCON_DEVICE void finish_row(const FinishWork& work, const Finish& side, std::int64_t row, int warp) {
  const bool is_row = row < side.count;
  const std::int64_t depth = work.depth, end = is_row ? depth : 0, of_row = row * depth, of_split = side.count * depth;
  const int step = work.row_warps * kWarpColumns, first = warp % work.row_warps * kWarpColumns + 4 * ptx::lane();
  const bool is_held = depth <= step;
  const int splits = splits_of(side.splits, work.scale);
  const float factor = is_row && side.norms ? side.norms[row] : 1.0f, scale = scale_of(work.scale) * factor;
  const auto unit_four = [&](std::int64_t d) {
    Four<float> x = load_four<PRODUCT, WIDE>(side.rows, of_row + d, depth - d);
    for (float& element : x.of) element *= factor;
    return x;
  };
  Four<float> sum, x;
  float product = 0.0f;
  for (std::int64_t d = first; d < end; d += step) {
    x = unit_four(d);
    sum = {};
    load_ahead<WIDE ? 8 : 2>(
        0, splits, 1,
        [&](int split) { return load_four<Product::f32, WIDE>(side.sums, split * of_split + of_row + d, depth - d); },
        [&](const Four<float>& found) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum.of[i] += found.of[i];
        });
    if (!is_held) store_four<Product::f32, WIDE>(side.sums, of_row + d, depth - d, sum);
#pragma unroll
    for (int i = 0; i < 4; ++i) product += sum.of[i] * x.of[i];
  }
  product = side.norms ? row_sum(product, warp, work.row_warps) : 0.0f;
  for (std::int64_t d = first; d < end; d += step) {
    if (!is_held) {
      x = unit_four(d);
      sum = load_four<Product::f32, WIDE>(side.sums, of_row + d, depth - d);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.of[i] = scale * (sum.of[i] - product * x.of[i]);
    store_four<PRODUCT, WIDE>(side.out, of_row + d, depth - d, sum);
  }
}

// By one block.
FASTSUPCON_DEVICE void finish_scale(const FinishScale& of, const Scale& scale) {
  const std::int64_t count = splits_of(of.splits, scale) * of.count;
  float sum = 0.0f;
  load_ahead<8, std::int64_t>(
      ptx::thread(), count, kRowsThreads, [&](std::int64_t i) { return of.products[i]; }, [&](float found) { sum += found; });
  sum = row_sum(sum, ptx::warp(), kRowsWarps);
  if (ptx::thread() == 0) *of.out = of.factor * sum;
}

// The first block makes the scale's gradient where that is wanted. As many warps for each row as its columns keep busy. Four blocks to a multiprocessor, as loads in flight are all that counts here: the
// bound keeps ptxas from taking registers that leave room for fewer.
template <Product PRODUCT>
__global__ void __launch_bounds__(kRowsThreads, 4) finish_gradients(const __grid_constant__ FinishWork work) {
  ptx::begin_kernel();
  const std::int64_t block = ptx::block_x() - (work.gradient.out ? 1 : 0);
  if (block < 0) return finish_scale(work.gradient, work.scale);
  const SideBlock at = side_block(work.sides[0].count, kRowsWarps / work.row_warps, block);
  const Finish& side = work.sides[at.side];
  const int warp = ptx::warp();
  const std::int64_t row = at.first_row + warp / work.row_warps;
  if (side.bias && row < side.count && warp % work.row_warps == 0 && ptx::lane() == 0) {
    float sum = 0.0f;
    load_ahead<8>(
        0, side.weight_splits, 1, [&](int split) { return side.weight_sums[split * side.count + row]; },
        [&](float found) { sum += found; });
    side.bias[row] = sum;
  }
  if (!side.out) return;
  if (work.wide) finish_row<PRODUCT, true>(work, side, row, warp);
  else finish_row<PRODUCT, false>(work, side, row, warp);
}

}  // namespace fastsupcon::cuda
