// Kernels of one block that reduce over all rows in a fixed order, and those of a loss's line alone.
#pragma once

#include "tile.cuh"

namespace fastsupcon::cuda {

constexpr int kBlockThreads = 1024;

// over_warp of all threads; each of them gets it.
template <class OverWarp>
FASTSUPCON_DEVICE float over_block(float value, OverWarp over_warp) {
  float* of_warps = reinterpret_cast<float*>(ptx::shared_memory());
  const int warp = ptx::warp();  // a shuffle: of all lanes, so not under a condition
  value = over_warp(value);
  ptx::sync_block();  // those of an earlier call have been read
  if (ptx::lane() == 0) of_warps[warp] = value;
  ptx::sync_block();
  return over_warp(of_warps[ptx::lane()]);
}
FASTSUPCON_DEVICE float block_sum(float value) {
  return over_block(value, [](float of) { return warp_sum(of); });
}
FASTSUPCON_DEVICE float block_largest(float value) {
  return over_block(value, [](float of) { return warp_largest(of); });
}
constexpr int kBlockSumBytes = kBlockThreads / 32 * static_cast<int>(sizeof(float));

// The lengths of rows as they are, of either side of a problem, and what comes of them.
struct LengthsWork {
  const float* lengths;  // not negative: of the first side `first`, of the second the rest; in the self shape there is no second
  std::int64_t first, count;
  Scale scale;
  float* bounded;        // 1 or 0
};
__global__ void __launch_bounds__(kBlockThreads) decide_bounded(const __grid_constant__ LengthsWork work) {
  ptx::begin_kernel();
  const auto largest_of = [&](std::int64_t first, std::int64_t end) {
    float largest = 1e-18f;  // so that a scale which overflows in another unit is not bounded by rows of any length
    load_ahead<8, std::int64_t>(
        first + ptx::thread(), end, kBlockThreads, [&](std::int64_t i) { return work.lengths[i]; },
        [&](float length) { largest = fmaxf(largest, length); });
    return block_largest(largest);
  };
  const float of_first = largest_of(0, work.first);
  const float of_second = work.first < work.count ? largest_of(work.first, work.count) : of_first;
  const bool bounded = work.scale.may_bound && in_bounds(scale_of(work.scale) * of_first * of_second);
  if (ptx::thread() == 0) *work.bounded = bounded ? 1.0f : 0.0f;
}

// Many blocks without reduction, else one, which adds up in the order of add_to_loss.
__global__ void __launch_bounds__(kBlockThreads) line_forward(const __grid_constant__ LineWork line) {
  ptx::begin_kernel();
  const int warp = ptx::warp(), lane = ptx::lane();
  const auto load = [&](std::int64_t group) {
    const std::int64_t row = 32 * group + lane;
    return row < line.rows ? LineRow{true, quantities_of(line.values, row)} : LineRow{};
  };
  if (line.reduction == Line::Reduction::none) {
    const std::int64_t group = ptx::block_x() * (kBlockThreads / 32) + warp;
    add_to_loss(line, load(group), 32 * group + lane);
    return;
  }
  LineSum sum{0.0f, 0.0f};
  load_ahead<4, std::int64_t>(warp, ceil_div(line.rows, 32), kBlockThreads / 32, load, [&](const LineRow& found) {
    const LineSum of_rows = line_sum(line, found);
    sum.losses += of_rows.losses;
    sum.paired += of_rows.paired;
  });
  const LineSum total{block_sum(lane == 0 ? sum.losses : 0.0f), block_sum(lane == 0 ? sum.paired : 0.0f)};
  if (ptx::thread() == 0) store_loss(line, total);
}

__global__ void __launch_bounds__(kBlockThreads) line_gradients(const __grid_constant__ LineWork line) {
  ptx::begin_kernel();
  const float* counts = line.values.count;
  float paired = 0.0f;
  if (line.skip_lone) {
    load_ahead<8, std::int64_t>(
        ptx::thread(), line.rows, kBlockThreads, [=](std::int64_t row) { return counts[row]; },
        [&](float pairs) { paired += pairs > 0.0f ? 1.0f : 0.0f; });
    paired = block_sum(paired);
  }
  const std::int64_t row = ptx::block_x() * kBlockThreads + ptx::thread();
  if (row >= line.rows) return;
  const auto grads = line_gradient(line, row, paired);
  const auto& out = line.grads;
  if (out.all) out.all[row] = grads.all;
  if (out.different) out.different[row] = grads.different;
  if (out.equal) out.equal[row] = grads.equal;
  if (out.similarity) out.similarity[row] = grads.similarity;
  if (out.count) out.count[row] = grads.count;
}

}  // namespace fastsupcon::cuda
