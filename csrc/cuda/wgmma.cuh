// The kernels for Hopper: half rows, depth up to 256, TMA and wgmma, one producer and two or four consumer warpgroups.
//
// A block owns 64 rows x per consumer, fetched once. One thread of the producer keeps a ring of tiles of y and of their records filled.
// Consumers never meet but in the order of their products:
//   forward   four consumers of one set of accumulators each: while some sum exps, others' products run. (A second set per consumer, the
//             next tile's product under this tile's exps: ptxas serialises it, C7514, as a wgmma would be in flight across the loop's end.)
//   backward  the shape of FlashAttention-3's forward with K = V = y: issue the logits of tile j, then the product of tile j − 1's W with
//             its own y (the same panels, read row-major); while that runs, weigh the logits of tile j. W goes from accumulators to the A
//             operand in registers. The two consumers take turns in issuing, so that one's exps run under the other's products.
#pragma once

#include "tile.cuh"

namespace fastsupcon::cuda {

// Of the rows of each pass, as boxes of one block's x and of one tile's y.
struct Maps {
  ptx::TensorMap x[2], y[2];
};

template <int PANELS, bool BACKWARD>
struct WgmmaShape {
  static constexpr int consumers = BACKWARD ? 2 : 4;
  static constexpr int rows = 64 * consumers;
  // A tile of 128 columns at a depth of 256 would need 64 accumulators beside the result's 128 and W's 32: it does not fit 232 registers.
  static constexpr int columns = PANELS == 4 ? 64 : 128;
  static constexpr int stages = PANELS == 4 && !BACKWARD ? 2 : 4;
  static constexpr int threads = 128 * (consumers + 1);
  static constexpr int producer_registers = BACKWARD ? 24 : 32;
  static constexpr int consumer_registers = BACKWARD ? 240 : 112;
  static_assert(producer_registers + consumers * consumer_registers <= (consumers + 1) * (65536 / threads / 8 * 8),
                "setmaxnreg hands out what the block was launched with, and waits forever for more");
  static constexpr int kinds = record_kinds(BACKWARD, true);
  static constexpr int x_panel_bytes = rows * kPanelBytes, y_panel_bytes = columns * kPanelBytes;
  static constexpr int x_bytes = PANELS * x_panel_bytes, y_bytes = PANELS * y_panel_bytes;
  static constexpr int x_records_at = x_bytes + stages * y_bytes;
  static constexpr int y_records_bytes = kinds * columns * kRecordBytes;
  static constexpr int y_records_at = x_records_at + kinds * rows * kRecordBytes;
  static constexpr int barriers_at = y_records_at + stages * y_records_bytes;
  static constexpr int shared_bytes = barriers_at + 8 * (2 * stages + 1);
  static_assert(shared_bytes <= kBlockSharedBytes);
};

template <Product PRODUCT, int PANELS, bool BACKWARD>
struct WgmmaBlock {
  using Shape = WgmmaShape<PANELS, BACKWARD>;
  static constexpr int tile_columns = Shape::columns;

  const Work& work;
  BlockWork block;
  const Pass& pass;
  float scale = static_cast<float>(work.scale.value) * logit_unit(true);  // of logits, in their unit
  unsigned char* shared = ptx::shared_memory();
  ptx::Address x_at = ptx::address(shared), y_at = x_at + Shape::x_bytes, barriers = x_at + Shape::barriers_at;

  FASTSUPCON_DEVICE explicit WgmmaBlock(const Work& work)
      : work(work),
        block(block_work(work, Shape::rows, tile_columns)),
        pass(work.passes[block.pass]) {
    if (ptx::thread() == 0) {
      ptx::barrier_init(x_full(), 1);
      for (int stage = 0; stage < Shape::stages; ++stage) {
        ptx::barrier_init(full(stage), 1);
        ptx::barrier_init(empty(stage), 4 * Shape::consumers);
      }
      ptx::barrier_init_done();
    }
    ptx::sync_block();
  }

  FASTSUPCON_DEVICE ptx::Address full(int stage) const { return barriers + 8 * stage; }
  FASTSUPCON_DEVICE ptx::Address empty(int stage) const { return barriers + 8 * (Shape::stages + stage); }
  FASTSUPCON_DEVICE ptx::Address x_full() const { return barriers + 8 * 2 * Shape::stages; }

  // Tile number t of this block uses stage t % stages for the (t / stages)-th time.
  FASTSUPCON_DEVICE int stage_of(int tile) const { return (tile - block.first_tile) % Shape::stages; }
  FASTSUPCON_DEVICE int round_of(int tile) const { return (tile - block.first_tile) / Shape::stages; }

  FASTSUPCON_DEVICE Records rows() const { return {shared + Shape::x_records_at, Shape::rows}; }
  FASTSUPCON_DEVICE Records columns(int tile) const {
    return {shared + Shape::y_records_at + stage_of(tile) * Shape::y_records_bytes, tile_columns};
  }

  // By one thread.
  FASTSUPCON_DEVICE void produce(const Maps& maps) const {
    ptx::barrier_arrive_expecting(x_full(), Shape::x_bytes + Shape::kinds * Shape::rows * kRecordBytes);
    for (int p = 0; p < PANELS; ++p) {
      ptx::copy_box_async(x_at + p * Shape::x_panel_bytes, maps.x[block.pass], 64 * p, block.first_row, x_full());
    }
    fetch_records(x_at + Shape::x_records_at, pass.x, block.first_row, Shape::rows, Shape::kinds, x_full());
#pragma unroll 1  // the producer has few registers
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      const int stage = stage_of(tile);
      ptx::barrier_wait(empty(stage), (round_of(tile) + 1) % 2);
      ptx::barrier_arrive_expecting(full(stage), Shape::y_bytes + Shape::kinds * tile_columns * kRecordBytes);
      for (int p = 0; p < PANELS; ++p) {
        ptx::copy_box_async(y_at + stage * Shape::y_bytes + p * Shape::y_panel_bytes, maps.y[block.pass], 64 * p, tile * tile_columns,
                            full(stage));
      }
      fetch_records(x_at + Shape::y_records_at + stage * Shape::y_records_bytes, pass.y, tile * tile_columns, tile_columns,
                    Shape::kinds, full(stage));
    }
  }

  FASTSUPCON_DEVICE void wait_for(int tile) const { ptx::barrier_wait(full(stage_of(tile)), round_of(tile) % 2); }
  FASTSUPCON_DEVICE void release(int tile) const {
    ptx::sync_warp();
    if (ptx::lane() == 0) ptx::barrier_arrive(empty(stage_of(tile)));
  }

  FASTSUPCON_DEVICE bool needs_mask(int tile) const {
    return cuda::needs_mask(work, pass, block.first_row, Shape::rows, tile * tile_columns, tile_columns);
  }
  FASTSUPCON_DEVICE std::uint64_t excluded(bool masked, int row, int tile, int lane) const {
    return masked ? excluded_pairs<tile_columns>(work, pass, block.first_row + row, tile * tile_columns, lane) : 0;
  }

  // s = x yᵀ of this consumer's 64 rows, under way on return.
  FASTSUPCON_DEVICE void issue_logits(float (&s)[tile_columns / 8][4], int consumer, int tile) const {
    const ptx::Address x = x_at + consumer * 64 * kPanelBytes, y = y_at + stage_of(tile) * Shape::y_bytes;
#pragma unroll
    for (int p = 0; p < PANELS; ++p) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const auto of_x = depth_major_descriptor(x + p * Shape::x_panel_bytes, step);
        const auto of_y = depth_major_descriptor(y + p * Shape::y_panel_bytes, step);
        ptx::Wgmma<PRODUCT == Product::bf16, tile_columns>::shared(s, of_x, of_y, p + step > 0);
      }
    }
    ptx::wgmma_commit();
  }
  // out += W y, under way on return.
  FASTSUPCON_DEVICE void issue_weighted(float (&out)[PANELS * 8][4], const std::uint32_t (&w)[tile_columns / 16][4], int tile) const {
    const ptx::Address y = y_at + stage_of(tile) * Shape::y_bytes;
#pragma unroll
    for (int step = 0; step < tile_columns / 16; ++step) {
      ptx::Wgmma<PRODUCT == Product::bf16, PANELS * 64>::registers(out, w[step], row_major_descriptor(y, step, Shape::y_panel_bytes));
    }
    ptx::wgmma_commit();
  }
};

template <Product PRODUCT, int PANELS>
__global__ void __launch_bounds__(WgmmaShape<PANELS, false>::threads, 1)
    wgmma_forward(const __grid_constant__ Work work, const __grid_constant__ Maps maps) {
  using Block = WgmmaBlock<PRODUCT, PANELS, false>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns;
  constexpr int finished = 1;  // named barrier
  const Block block(work);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    if (ptx::thread() == 0) block.produce(maps);
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const int lane = ptx::lane();
  const int first = consumer * 64 + warp % 4 * 16 + accumulator_row(lane, 0);  // in the block
  RowSums sums[2];
  start(sums[0], true);
  start(sums[1], true);
  float s[columns / 8][4] = {};
  ptx::barrier_wait(block.x_full(), 0);
  for (int tile = block.block.first_tile; tile < block.block.last_tile; ++tile) {
    block.wait_for(tile);
    ptx::wgmma_fence();
    block.issue_logits(s, consumer, tile);
    const bool is_masked = block.needs_mask(tile);
    ptx::wgmma_wait<0>();
    ptx::hold(s);
    with_mask(is_masked, [&](auto masked) {
      const Logit rows[2] = {block.rows().logit(first), block.rows().logit(first + 8)};
      const std::uint64_t excluded = block.excluded(is_masked, first, tile, lane);
      add_tile<false, masked, columns>(sums, s, rows, block.scale, block.columns(tile), excluded, lane);
    });
    block.release(tile);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) store_sums(block.pass, block.block, sums[r], block.block.first_row + first + 8 * r, true, lane);
  const int thread = ptx::thread() - 128;
  const auto sync = [] { ptx::sync_named(finished, 128 * Shape::consumers); };
  sync();
  if (is_last_split(block.pass, block.block, thread, sync) && thread < Shape::rows) {
    combine_splits(block.pass, block.block.first_row + thread);
  }
}

template <Product PRODUCT, int PANELS>
__global__ void __launch_bounds__(WgmmaShape<PANELS, true>::threads, 1)
    wgmma_backward(const __grid_constant__ Work work, const __grid_constant__ Maps maps) {
  using Block = WgmmaBlock<PRODUCT, PANELS, true>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns;
  constexpr int turn = 1;  // named barriers turn, turn + 1: whose turn it is to issue
  const Block block(work);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    if (ptx::thread() == 0) block.produce(maps);
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const Pass& pass = block.pass;
  const int lane = ptx::lane();
  const int first = consumer * 64 + warp % 4 * 16 + accumulator_row(lane, 0);
  const float unit = weight_unit<PRODUCT>(pass), per_unit = 1.0f / unit;
  PairSums unused[2];
  float out[PANELS * 8][4] = {};
  float s[columns / 8][4];
  std::uint32_t packed[columns / 16][4];
  const auto weigh = [&](int tile) {
    weigh_tile<false, false, columns>(unused, s, block.rows(), first, block.scale, unit, false, block.columns(tile), 0, lane);
    if (block.needs_mask(tile)) clear_excluded<columns>(s, block.excluded(true, first, tile, lane));
  };
  // The first tile stands apart: no condition may stand between an issue and its wait, or ptxas serialises the wgmmas (C7514).
  ptx::barrier_wait(block.x_full(), 0);
  int tile = block.block.first_tile;
  block.wait_for(tile);
  ptx::wgmma_fence();
  block.issue_logits(s, consumer, tile);
  ptx::wgmma_wait<0>();
  ptx::hold(s);
  weigh(tile);
  pack_weights<PRODUCT, columns>(packed, s);
  if (consumer == 1) ptx::arrive_named(turn, 256);
  for (++tile; tile < block.block.last_tile; ++tile) {
    block.wait_for(tile);
    ptx::sync_named(turn + consumer, 256);
    ptx::wgmma_fence();
    block.issue_logits(s, consumer, tile);
    block.issue_weighted(out, packed, tile - 1);
    ptx::arrive_named(turn + 1 - consumer, 256);
    ptx::wgmma_wait<1>();
    ptx::hold(s);  // read no sooner
    weigh(tile);
    ptx::wgmma_wait<0>();
    block.release(tile - 1);
    pack_weights<PRODUCT, columns>(packed, s);
  }
  ptx::wgmma_fence();
  block.issue_weighted(out, packed, block.block.last_tile - 1);
  ptx::wgmma_wait<0>();
  ptx::hold(out);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = block.block.first_row + first + 8 * r;
    if (row >= pass.x.count) continue;
#pragma unroll
    for (int n = 0; n < PANELS * 8; ++n) {
      store_pair(work, pass, block.block, row, 8 * n + accumulator_column(lane, 0), out[n][2 * r] * per_unit, out[n][2 * r + 1] * per_unit);
    }
  }
}

}  // namespace fastsupcon::cuda
