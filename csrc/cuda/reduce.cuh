// Kernels of one block that reduce over all rows in a fixed order, and a loss that is linear in the rows' quantities.
#pragma once

#include "tile.cuh"

namespace fastsupcon::cuda {

constexpr int kBlockThreads = 1024;

// use(load(i)) for every `step`-th i from `first` to `end`, in order, where AHEAD loads are in flight together.
template <int AHEAD, class Index, class Load, class Use>
FASTSUPCON_DEVICE void load_ahead(Index first, Index end, Index step, Load load, Use use) {
  for (Index i = first; i < end; i += AHEAD * step) {
    decltype(load(i)) found[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (i + k * step < end) found[k] = load(i + k * step);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (i + k * step < end) use(found[k]);
    }
  }
}

FASTSUPCON_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += ptx::shuffle_xor(value, mask);
  return value;
}
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
  load_ahead<8, std::int64_t>(
      ptx::thread(), count, kBlockThreads, [&](std::int64_t i) { return values[i]; }, [&](float value) { sum += value; });
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
  float* paired;              // how many rows have a pair of equal keys: from a loss to its backward where lone rows are skipped; or null
  Quantities<float*> grads;
};

// Zero what there is not.
FASTSUPCON_DEVICE Quantities<float> quantities_of(const Quantities<const float*>& q, std::int64_t row) {
  const auto of = [=](const float* there) { return there ? there[row] : 0.0f; };
  return {of(q.all), of(q.different), of(q.equal), of(q.similarity), of(q.count)};
}

FASTSUPCON_DEVICE float line_of(const LineWork& line, const Quantities<float>& q) {
  const float count = fmaxf(q.count, 1.0f);
  const float loss = (line.log_count * log(count) + line.all * q.all + line.different * q.different + line.equal * q.equal +
                      line.similarity * (q.similarity / count)) * line.factor;
  const bool infinite = q.all == INFINITY || q.different == INFINITY;
  return q.count > 0.0f || loss != loss || infinite ? loss : line.lone;
}

FASTSUPCON_DEVICE float line_divisor(const LineWork& line, float paired) {
  return line.reduction != Line::Reduction::mean ? 1.0f : line.skip_lone ? fmaxf(paired, 1.0f) : static_cast<float>(line.rows);
}

// Many blocks without reduction, else one.
__global__ void __launch_bounds__(kBlockThreads) line_forward(const __grid_constant__ LineWork line) {
  const std::int64_t thread = ptx::thread();
  const auto load = [&](std::int64_t row) { return quantities_of(line.values, row); };
  if (line.reduction == Line::Reduction::none) {
    const std::int64_t row = ptx::block_x() * kBlockThreads + thread;
    if (row < line.rows) line.loss[row] = line_of(line, load(row));
    return;
  }
  float sum = 0.0f, paired = 0.0f;
  load_ahead<4, std::int64_t>(thread, line.rows, kBlockThreads, load, [&](const Quantities<float>& q) {
    sum += line_of(line, q);
    paired += q.count > 0.0f ? 1.0f : 0.0f;
  });
  sum = block_sum(sum);
  paired = block_sum(paired);
  if (thread != 0) return;
  *line.loss = sum / line_divisor(line, paired);
  if (line.paired) *line.paired = paired;
}

FASTSUPCON_DEVICE Quantities<float> line_gradient(const LineWork& line, std::int64_t row, float paired) {
  const float pairs = line.values.count[row], of_loss = line.grad[line.reduction == Line::Reduction::none ? row : 0];
  const float grad = pairs > 0.0f ? of_loss * line.factor / line_divisor(line, paired) : line.lone;
  return {grad * line.all, grad * line.different, grad * line.equal, grad * line.similarity / fmaxf(pairs, 1.0f), 0.0f};
}

__global__ void __launch_bounds__(kBlockThreads) line_gradients(const __grid_constant__ LineWork line) {
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
