// Kernels of one block that reduce over all rows in a fixed order, and a loss that is linear in the rows' quantities.
#pragma once

#include "rows.cuh"

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

// out = factor Σ values.
__global__ void __launch_bounds__(kBlockThreads) sum_rows(const float* values, std::int64_t count, float factor, float* out) {
  float sum = 0.0f;
  for (std::int64_t i = ptx::thread(); i < count; i += kBlockThreads) sum += values[i];
  sum = block_sum(sum);
  if (ptx::thread() == 0) *out = factor * sum;
}

struct LineWork {
  float all, different, equal, similarity, log_count, factor, lone;
  bool skip_lone;
  Line::Reduction reduction;
  std::int64_t rows;
  Quantities<const float*> values;
  float* loss;                // forward: [1], [rows] without reduction
  const float* grad;          // backward: the same
  Quantities<float*> grads;
};

FASTSUPCON_DEVICE float line_of(const LineWork& line, std::int64_t row) {
  const auto& q = line.values;
  const float pairs = q.count[row], count = fmaxf(pairs, 1.0f);
  float loss = line.log_count * log(count);
  if (q.all) loss += line.all * q.all[row];
  if (q.different) loss += line.different * q.different[row];
  if (q.equal) loss += line.equal * q.equal[row];
  if (q.similarity) loss += line.similarity * (q.similarity[row] / count);
  loss *= line.factor;
  const bool infinite = (q.all && q.all[row] == INFINITY) || (q.different && q.different[row] == INFINITY);
  return pairs > 0.0f || loss != loss || infinite ? loss : line.lone;
}

FASTSUPCON_DEVICE float line_divisor(const LineWork& line) {  // by all threads of a block
  if (line.reduction != Line::Reduction::mean) return 1.0f;
  if (!line.skip_lone) return static_cast<float>(line.rows);
  float paired = 0.0f;
  for (std::int64_t row = ptx::thread(); row < line.rows; row += kBlockThreads) paired += line.values.count[row] > 0.0f ? 1.0f : 0.0f;
  return fmaxf(block_sum(paired), 1.0f);
}

// Many blocks without reduction, else one.
__global__ void __launch_bounds__(kBlockThreads) line_forward(const __grid_constant__ LineWork line) {
  if (line.reduction == Line::Reduction::none) {
    const std::int64_t row = ptx::block_x() * kBlockThreads + ptx::thread();
    if (row < line.rows) line.loss[row] = line_of(line, row);
    return;
  }
  float sum = 0.0f;
  for (std::int64_t row = ptx::thread(); row < line.rows; row += kBlockThreads) sum += line_of(line, row);
  sum = block_sum(sum) / line_divisor(line);
  if (ptx::thread() == 0) *line.loss = sum;
}

__global__ void __launch_bounds__(kBlockThreads) line_gradients(const __grid_constant__ LineWork line) {
  const float divisor = line_divisor(line);
  const std::int64_t row = ptx::block_x() * kBlockThreads + ptx::thread();
  if (row >= line.rows) return;
  const float pairs = line.values.count[row];
  const float grad = pairs > 0.0f ? line.grad[line.reduction == Line::Reduction::none ? row : 0] * line.factor / divisor : line.lone;
  const auto& out = line.grads;
  if (out.all) out.all[row] = grad * line.all;
  if (out.different) out.different[row] = grad * line.different;
  if (out.equal) out.equal[row] = grad * line.equal;
  if (out.similarity) out.similarity[row] = grad * line.similarity / fmaxf(pairs, 1.0f);
  if (out.count) out.count[row] = 0.0f;
}

}  // namespace fastsupcon::cuda
