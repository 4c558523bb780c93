// The forward for depths of 257 to 1024 on Hopper: 2N²D flops. Two consumers own 64 rows each, so that 128 flops come of each byte of y.
// Each holds the first panels of its rows in registers, as the A operand of their products: this halves what these read of shared memory,
// and leaves the room of these panels to the ring. The first slabs of the next tile run under this one's exps.
#pragma once

#include "wgmma_deep.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT, bool APART, int COLUMNS>
__global__ void __launch_bounds__(DeepShape<false, APART, COLUMNS>::threads, 1)
    wgmma_deep_forward(const __grid_constant__ Work work, const __grid_constant__ DeepLayout layout,
                       const __grid_constant__ Maps maps) {
  using Block = DeepBlock<PRODUCT, false, APART, COLUMNS>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns;
  const Block block(work, layout);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    block.produce(maps);
    block.finish();
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const int lane = ptx::lane();
  const Pass& pass = block.pass;
  const int row = block.block.first_row + consumer * 64 + warp % 4 * 16 + accumulator_row(lane, 0);
  const Row rows[2] = {load_row<false>(pass.x, row), load_row<false>(pass.x, row + 8)};
  const bool ambiguous = ptx::any(is_ambiguous(rows[0]) || is_ambiguous(rows[1]));
  RowSums sums[2];
  float s[columns / 8][4], next[columns / 8][4];
  Place at{0, 0}, read{0, 0};  // the slab that is issued next, and that is given back next
  std::uint32_t x[Shape::held][4][4];
  // From global memory: all of x at once has no room in shared memory at depth 1024.
#pragma unroll
  for (int p = 0; p < Shape::held; ++p) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int of_row = row + 8 * (i % 2), column = p * kPanelDepth + 16 * step + 8 * (i / 2) + accumulator_column(lane, 0);
        const auto* words = static_cast<const std::uint32_t*>(pass.x.rows) + (of_row * work.depth + column) / 2;
        x[p][step][i] = of_row < pass.x.count && column < work.depth ? *words : 0;
      }
    }
    ptx::hold(x[p]);  // read once
  }

  const auto issue_held_slab = [&](int slab) {
    block.wait_for(at);
    ptx::wgmma_fence();
    block.issue_logits_of_slab(next, x[slab], at, slab > 0);
    at = block.after(at, 1);
  };
  const auto issue_slab = [&](int slab) {
    block.wait_for(at);
    ptx::wgmma_fence();
    block.issue_logits_of_slab(next, consumer * 64, slab, at, true);
    at = block.after(at, 1);
  };
  const auto release_slab = [&] {
    block.release(read);
    read = block.after(read, 1);
  };
  constexpr int first_slabs = 4;  // half of the least that the ring holds
  const auto issue_first_slabs = [&] {
#pragma unroll
    for (int slab = 0; slab < first_slabs; ++slab) issue_held_slab(slab);
  };
  const auto finish = [&] {
#pragma unroll
    for (int slab = first_slabs; slab < Shape::held; ++slab) {
      ptx::wgmma_wait<first_slabs - 1>();
      release_slab();
      issue_held_slab(slab);
    }
#pragma unroll 1
    for (int slab = Shape::held; slab < layout.slabs; ++slab) {
      ptx::wgmma_wait<first_slabs - 1>();
      release_slab();
      issue_slab(slab);
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < first_slabs; ++i) release_slab();
    ptx::hold(next);
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = next[j][e];
    }
  };
  const auto add = [&](int tile) {
    block.with_columns(tile, [&](const Columns& of_tile) {
      const bool is_special = ambiguous || block.needs_mask(row, tile);
      const Special what = block.special(is_special, rows, row, tile, of_tile);
      with_special(is_special, [&](auto special) {
        add_tile<false, special, APART, columns>(sums, s, rows, block.scale, of_tile, what, lane);
      });
    });
  };

  ptx::barrier_wait(block.x_full(), 0);
  issue_first_slabs();
  finish();
  for (int tile = block.block.first_tile; tile < block.block.last_tile - 1; ++tile) {
    issue_first_slabs();
    add(tile);
    finish();
  }
  add(block.block.last_tile - 1);
#pragma unroll
  for (int r = 0; r < 2; ++r) store_sums(pass, block.block, sums[r], row + 8 * r, true, lane);
  const int thread = ptx::thread() - 128;
  const auto sync = [&] { ptx::sync_named(1, 128 * Shape::consumers); };
  sync();
  if (is_last_split(pass, block.block, thread, sync) && thread < Shape::rows) combine_splits(pass, block.block.first_row + thread);
  block.finish();
}

}  // namespace fastsupcon::cuda
