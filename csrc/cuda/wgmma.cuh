// The kernels for Hopper: half rows, depth up to 256, TMA and wgmma, one producer and up to four consumer warpgroups.
//
// A block owns 64 rows x per consumer, fetched once; where rows are few, a block has fewer consumers, so that there are more blocks. One
// thread of the producer keeps a ring of tiles of y and of their fields filled.
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

template <int PANELS, bool BACKWARD, bool APART>
struct WgmmaShape {
  static constexpr int consumers = BACKWARD ? 2 : 4;  // at most
  static constexpr int rows = 64 * consumers;
  // A tile of 128 columns at a depth of 256 would need 64 accumulators beside the backward's result, 128, and W, 32: it does not fit 240
  // registers; and 64 KiB for each stage beside the forward's 128 KiB of x.
  static constexpr int columns = PANELS == 4 ? 64 : 128;
  static constexpr int stages = PANELS == 4 && !BACKWARD ? 3 : 4;
  static constexpr int threads = 128 * (consumers + 1);
  static constexpr int producer_registers = BACKWARD ? 24 : 32;
  static constexpr int consumer_registers = BACKWARD ? 240 : 112;
  static_assert(producer_registers + consumers * consumer_registers <= (consumers + 1) * (65536 / threads / 8 * 8),
                "setmaxnreg hands out what the block was launched with, and waits forever for more");
  static constexpr int slots = cuda::slots(BACKWARD, false, APART);
  static constexpr int x_panel_bytes = rows * kPanelBytes, y_panel_bytes = columns * kPanelBytes;
  static constexpr int x_bytes = PANELS * x_panel_bytes, y_bytes = PANELS * y_panel_bytes;
  static constexpr int slots_at = x_bytes + stages * y_bytes, slots_bytes = slots * columns * kFieldBytes;
  static constexpr int barriers_at = slots_at + stages * slots_bytes;
  static constexpr int shared_bytes = barriers_at + 8 * (2 * stages + 1);
  static_assert(shared_bytes <= kBlockSharedBytes);
};

template <Product PRODUCT, int PANELS, bool BACKWARD, bool APART>
struct WgmmaBlock {
  using Shape = WgmmaShape<PANELS, BACKWARD, APART>;
  static constexpr int tile_columns = Shape::columns;

  const Work& work;
  int consumers;
  BlockWork block;
  const Pass& pass;
  float scale = scale_of(work.scale) * logit_unit(true);  // of logits, in their unit
  unsigned char* shared = ptx::shared_memory();
  ptx::Address x_at = ptx::address(shared), y_at = x_at + Shape::x_bytes, barriers = x_at + Shape::barriers_at;

  FASTSUPCON_DEVICE WgmmaBlock(const Work& work, int consumers)
      : work(work),
        consumers(consumers),
        block(block_work(work, 64 * consumers, tile_columns)),
        pass(work.passes[block.pass]) {
    if (ptx::thread() == 0) {
      ptx::barrier_init(x_full(), 1);
      for (int stage = 0; stage < Shape::stages; ++stage) {
        ptx::barrier_init(full(stage), 1);
        ptx::barrier_init(empty(stage), 4 * consumers);
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

  FASTSUPCON_DEVICE Columns columns(int tile) const {
    return {shared + Shape::slots_at + stage_of(tile) * Shape::slots_bytes, tile_columns};
  }

  // By one thread.
  FASTSUPCON_DEVICE void produce(const Maps& maps) const {
    ptx::barrier_arrive_expecting(x_full(), PANELS * 64 * consumers * kPanelBytes);
    for (int p = 0; p < PANELS; ++p) {
      ptx::copy_box_async(x_at + p * Shape::x_panel_bytes, maps.x[block.pass], 64 * p, block.first_row, x_full());
    }
#pragma unroll 1  // the producer has few registers
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      const int stage = stage_of(tile);
      ptx::barrier_wait(empty(stage), (round_of(tile) + 1) % 2);
      ptx::barrier_arrive_expecting(full(stage), Shape::y_bytes + Shape::slots_bytes);
      for (int p = 0; p < PANELS; ++p) {
        ptx::copy_box_async(y_at + stage * Shape::y_bytes + p * Shape::y_panel_bytes, maps.y[block.pass], 64 * p, tile * tile_columns,
                            full(stage));
      }
      fetch_slots(x_at + Shape::slots_at + stage * Shape::slots_bytes, pass.y, tile * tile_columns, tile_columns, Shape::slots, BACKWARD,
                  false, full(stage));
    }
  }

  FASTSUPCON_DEVICE void wait_for(int tile) const { ptx::barrier_wait(full(stage_of(tile)), round_of(tile) % 2); }
  FASTSUPCON_DEVICE void release(int tile) const {
    ptx::sync_warp();
    if (ptx::lane() == 0) ptx::barrier_arrive(empty(stage_of(tile)));
  }

  // For the 16 rows of a warp, of which the lane holds `row` and row + 8.
  FASTSUPCON_DEVICE bool needs_mask(int row, int tile) const {
    return cuda::needs_mask(work, pass, row - accumulator_row(ptx::lane(), 0), 16, tile * tile_columns, tile_columns);
  }
  FASTSUPCON_DEVICE Special special(bool is_special, const Row (&rows)[2], int row, int tile) const {
    return is_special ? special_of<tile_columns>(work, pass, rows, row, tile * tile_columns, columns(tile), ptx::lane()) : Special{};
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
      ptx::Wgmma<PRODUCT == Product::bf16, PANELS * 64>::registers_row_major(out, w[step], row_major_descriptor(y, step, Shape::y_panel_bytes));
    }
    ptx::wgmma_commit();
  }
};

template <Product PRODUCT, int PANELS, bool APART>
__global__ void __launch_bounds__(WgmmaShape<PANELS, false, APART>::threads, 1)
    wgmma_forward(const __grid_constant__ Work work, int consumers, const __grid_constant__ Maps maps) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  using Block = WgmmaBlock<PRODUCT, PANELS, false, APART>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns;
  constexpr int finished = 1;  // named barrier
  const Block block(work, consumers);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    if (ptx::thread() == 0) block.produce(maps);
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const int lane = ptx::lane();
  const Pass& pass = block.pass;
  const int row = block.block.first_row + consumer * 64 + warp % 4 * 16 + accumulator_row(lane, 0);
  const Row rows[2] = {load_row<false>(pass.x, row), load_row<false>(pass.x, row + 8)};
  const bool ambiguous = ptx::any(is_ambiguous(rows[0]) || is_ambiguous(rows[1]));
  RowSums sums[2];
  float s[columns / 8][4] = {};
  ptx::barrier_wait(block.x_full(), 0);
  for (int tile = block.block.first_tile; tile < block.block.last_tile; ++tile) {
    block.wait_for(tile);
    ptx::wgmma_fence();
    block.issue_logits(s, consumer, tile);
    const bool is_special = ambiguous || block.needs_mask(row, tile);
    const Special what = block.special(is_special, rows, row, tile);
    ptx::wgmma_wait<0>();
    ptx::hold(s);
    with_special(is_special, [&](auto special) {
      add_tile<false, special, APART, columns>(sums, s, rows, block.scale, block.columns(tile), what, lane);
    });
    block.release(tile);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) store_sums(pass, block.block, sums[r], row + 8 * r, true, lane);
  const int thread = ptx::thread() - 128;
  const auto sync = [&] { ptx::sync_named(finished, 128 * consumers); };
  sync();
  if (is_last_split(pass, block.block, thread, sync) && thread < 64 * consumers) combine_splits(pass, block.block.first_row + thread);
}

// SUMMED: the gradient of the scale is wanted too.
template <Product PRODUCT, int PANELS, bool APART, bool SUMMED>
__global__ void __launch_bounds__(WgmmaShape<PANELS, true, APART>::threads, 1)
    wgmma_backward(const __grid_constant__ Work work, int consumers, const __grid_constant__ Maps maps) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  using Block = WgmmaBlock<PRODUCT, PANELS, true, APART>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns;
  constexpr int turn = 1;  // named barriers turn, turn + 1: whose turn it is to issue
  const Block block(work, consumers);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    if (ptx::thread() == 0) block.produce(maps);
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const Pass& pass = block.pass;
  const int lane = ptx::lane();
  const int row = block.block.first_row + consumer * 64 + warp % 4 * 16 + accumulator_row(lane, 0);
  const Row rows[2] = {load_row<true>(pass.x, row), load_row<true>(pass.x, row + 8)};
  const bool ambiguous = ptx::any(is_ambiguous(rows[0]) || is_ambiguous(rows[1]));
  const float unit = weight_unit<PRODUCT>(pass), per_unit = 1.0f / unit;
  const int turns = 128 * consumers;  // threads; one consumer alone finds its turn has always come
  PairSums sums[2];
  float out[PANELS * 8][4] = {};
  float s[columns / 8][4];
  std::uint32_t packed[columns / 16][4];
  const auto weigh = [&](int tile) {
    const bool is_special = ambiguous || block.needs_mask(row, tile);
    const Special what = block.special(is_special, rows, row, tile);
    with_special(is_special, [&](auto special) {
      weigh_tile<false, special, APART, columns>(sums, s, rows, block.scale, unit, SUMMED, block.columns(tile), what, lane);
    });
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
  if (consumer == 1) ptx::arrive_named(turn, turns);
  for (++tile; tile < block.block.last_tile; ++tile) {
    block.wait_for(tile);
    ptx::sync_named(turn + consumer, turns);
    ptx::wgmma_fence();
    block.issue_logits(s, consumer, tile);
    block.issue_weighted(out, packed, tile - 1);
    ptx::arrive_named(turn + 1 - consumer, turns);
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
    if constexpr (SUMMED) store_pair_sums(pass, block.block, sums[r], rows[r].factor * per_unit, row + 8 * r, lane);
    if (row + 8 * r >= pass.x.count) continue;
    float* to = pass.out + block.block.place(pass, row + 8 * r) * work.depth;
#pragma unroll
    for (int n = 0; n < PANELS * 8; ++n) {
      store_pair(to, work.depth, 8 * n + accumulator_column(lane, 0), out[n][2 * r] * per_unit, out[n][2 * r + 1] * per_unit);
    }
  }
}

}  // namespace fastsupcon::cuda
