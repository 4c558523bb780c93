// The forward for depths of 257 to 1024 on Hopper: 2N²D flops. Two consumers own 64 rows each, so that 128 flops come of each byte of y;
// at depth > 768 shared memory holds x of 64 rows only, and there is one. At depth 513 to 768 the ring holds two panels of 128 columns, too
// few to fetch ahead, or four of 64. The first slabs of the next tile run under this one's exps.
#pragma once

#include "wgmma_deep.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT, bool APART, int COLUMNS>
__global__ void __launch_bounds__(DeepShape<false, APART, COLUMNS>::most_threads, 1)
    wgmma_deep_forward(const __grid_constant__ Work work, const __grid_constant__ DeepLayout layout,
                       const __grid_constant__ Maps maps) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  using Block = DeepBlock<PRODUCT, false, APART, COLUMNS>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns;
  const Block block(work, layout);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    block.produce(maps);
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

  const auto issue_slab = [&](int slab) {
    block.ring.wait_for(at);
    ptx::wgmma_fence();
    block.ring.issue_logits(next, consumer * 64, slab, at, slab > 0);
    at = block.ring.after(at, 1);
  };
  const auto release_slab = [&] {
    block.ring.release(read);
    read = block.ring.after(read, 1);
  };
  const auto issue_first_slabs = [&] {  // two: the least that the ring holds
    issue_slab(0);
    issue_slab(1);
  };
  const auto finish = [&] {
#pragma unroll 1
    for (int slab = 2; slab < layout.slabs; ++slab) {
      ptx::wgmma_wait<1>();
      release_slab();
      issue_slab(slab);
    }
    ptx::wgmma_wait<0>();
    release_slab();
    release_slab();
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
  const auto sync = [&] { ptx::sync_named(1, 128 * layout.consumers); };
  sync();
  if (is_last_split(pass, block.block, thread, sync) && thread < block.rows) combine_splits(pass, block.block.first_row + thread);
}

}  // namespace fastsupcon::cuda
