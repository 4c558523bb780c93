// Kernels of one block that reduce over all rows in a fixed order, and those of a loss's line alone.
#pragma once

#include "line.cuh"

namespace fastsupcon::cuda {

constexpr int kBlockThreads = 1024;

// Of all threads; each of them gets it.
FASTSUPCON_DEVICE float block_sum(float value) {
  float* of_warps = reinterpret_cast<float*>(ptx::shared_memory());
  const int warp = ptx::warp();  // a shuffle: of all lanes, so not under a condition
  value = warp_sum(value);
  ptx::sync_block();  // those of an earlier sum have been read
  if (ptx::lane() == 0) of_warps[warp] = value;
  ptx::sync_block();
  return warp_sum(of_warps[ptx::lane()]);
}
constexpr int kBlockSumBytes = kBlockThreads / 32 * static_cast<int>(sizeof(float));

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
