// The forward for depths of 257 to 1024 on Hopper: 2N²D flops. Two consumers own 64 rows each, so that 128 flops come of each byte of y;
// at depth > 768 shared memory holds x of 64 rows only, and there is one. The first panels of the next tile run under this one's exps.
#pragma once

#include "wgmma_deep.cuh"

namespace fastsupcon::cuda {

template <Product PRODUCT, bool APART>
__global__ void __launch_bounds__(DeepShape<false, APART>::most_threads, 1)
    wgmma_deep_forward(const __grid_constant__ Work work, const __grid_constant__ DeepLayout layout,
                       const __grid_constant__ Maps maps) {
  using Block = DeepBlock<PRODUCT, false, APART>;
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
  Place at{0, 0}, read{0, 0};  // the panel that is issued next, and that is given back next

  const auto issue_panel = [&](int panel) {
    block.wait_for(at);
    ptx::wgmma_fence();
    block.issue_logits_of_panel(next, consumer * 64, panel, at, panel > 0);
    at = block.after(at, 1);
  };
  const auto release_panel = [&] {
    block.release(read);
    read = block.after(read, 1);
  };
  const auto issue_first_panels = [&] {  // two: the least that the ring holds
    issue_panel(0);
    issue_panel(1);
  };
  const auto finish = [&] {
#pragma unroll 1
    for (int panel = 2; panel < layout.panels; ++panel) {
      ptx::wgmma_wait<1>();
      release_panel();
      issue_panel(panel);
    }
    ptx::wgmma_wait<0>();
    release_panel();
    release_panel();
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
      const Special what = block.special(is_special, rows, row, tile);
      with_special(is_special, [&](auto special) {
        add_tile<false, special, APART, columns>(sums, s, rows, block.scale, of_tile, what, lane);
      });
    });
  };

  ptx::barrier_wait(block.x_full(), 0);
  issue_first_panels();
  finish();
  for (int tile = block.block.first_tile; tile < block.block.last_tile - 1; ++tile) {
    issue_first_panels();
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
