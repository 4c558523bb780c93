// The small kernels beside the large ones: max|g|, and the sums over splits in their fixed order.
#pragma once

#include "pairs.cuh"

namespace fastsupcon::cuda {

constexpr int kReduceThreads = 256;
constexpr int kLargestThreads = 1024;

// One block: at 65,536 rows it reads 256 KiB. NaN wins over every number.
__global__ void __launch_bounds__(kLargestThreads) largest_magnitude(const float* values, std::int64_t count, float* largest) {
  const auto larger = [](float a, float b) { return b <= a ? a : (a != a ? a : b); };
  float mine = 0.0f;
  for (std::int64_t i = ptx::thread(); i < count; i += kLargestThreads) mine = larger(mine, fabsf(values[i]));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) mine = larger(mine, ptx::shuffle_xor(mine, mask));
  float* of_warps = reinterpret_cast<float*>(ptx::shared_memory());
  const int warp = ptx::warp();  // a shuffle: of all lanes, so not under a condition
  if (ptx::lane() == 0) of_warps[warp] = mine;
  ptx::sync_block();
  if (ptx::thread() >= 32) return;
  mine = of_warps[ptx::thread()];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) mine = larger(mine, ptx::shuffle_xor(mine, mask));
  if (ptx::thread() == 0) *largest = mine;
}

__global__ void __launch_bounds__(kReduceThreads) combine_logsums(const float* partial, int splits, std::int64_t rows, float* lse) {
  const std::int64_t row = ptx::block_x() * kReduceThreads + ptx::thread();
  if (row >= rows) return;
  LogSum total;
  for (int split = 0; split < splits; ++split) {
    const float* of_split = partial + 2 * (split * rows + row);
    merge(total, {of_split[0], of_split[1]});
  }
  lse[row] = log_of(total);
}

template <Product PRODUCT>
__global__ void __launch_bounds__(kReduceThreads) combine_sums(const float* partial, int splits, std::int64_t count, void* out) {
  const std::int64_t index = ptx::block_x() * kReduceThreads + ptx::thread();
  if (index >= count) return;
  float total = 0.0f;
  for (int split = 0; split < splits; ++split) total += partial[split * count + index];
  store_element<PRODUCT>(out, index, total);
}

}  // namespace fastsupcon::cuda
