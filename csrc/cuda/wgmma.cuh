// The kernels for Hopper: half rows, depth up to 256, TMA and wgmma, one producer and two or four consumer warpgroups.
//
// A block owns 64 rows x per consumer, fetched once. The producer keeps a ring of tiles of y filled: thread 0 asks TMA for the panels, thread
// c computes the terms of column c. Consumers never meet but in the order of their products:
//   forward   four consumers of one set of accumulators each: while some sum exps, others' products run. (A second set per consumer, the next
//             tile's product under this tile's exps: ptxas serialises it, C7514, as a wgmma would be in flight across the loop's end.)
//   backward  the shape of FlashAttention-3's forward with K = V = y: issue the logits of tile j, then the product of tile j − 1's W with its
//             own y (the same panels, read row-major); while that runs, weigh the logits of tile j. W goes from accumulators to the A operand
//             in registers. The two consumers take turns in issuing, so that one's exps run under the other's products.
#pragma once

#include "pairs.cuh"

namespace fastsupcon::cuda {

template <int PANELS, bool BACKWARD>
struct WgmmaShape {
  static constexpr int consumers = BACKWARD ? 2 : 4;
  static constexpr int rows = 64 * consumers;
  // A tile of 128 columns at a depth of 256 would need 64 accumulators beside the result's 128 and W's 32: it does not fit 232 registers.
  static constexpr int columns = PANELS == 4 ? 64 : 128;
  static constexpr int stages = PANELS == 4 && !BACKWARD ? 2 : 4;
  static constexpr int threads = 128 * (consumers + 1);
  static constexpr int producer_registers = BACKWARD ? 40 : 32;
  static constexpr int consumer_registers = BACKWARD ? 232 : 112;
  static_assert(producer_registers + consumers * consumer_registers <= (consumers + 1) * (65536 / threads / 8 * 8),
                "setmaxnreg hands out what the block was launched with, and waits forever for more");
  static constexpr int x_panel_bytes = rows * kPanelBytes, y_panel_bytes = columns * kPanelBytes;
  static constexpr int x_bytes = PANELS * x_panel_bytes, y_bytes = PANELS * y_panel_bytes;
  static constexpr int keys_at = x_bytes + stages * y_bytes;
  static constexpr int terms_at = keys_at + stages * columns * static_cast<int>(sizeof(std::int64_t));
  static constexpr int barriers_at = terms_at + stages * columns * static_cast<int>(sizeof(Terms));
  static constexpr int shared_bytes = barriers_at + 8 * (2 * stages + 1);
  static_assert(shared_bytes <= kBlockSharedBytes);
};

template <Product PRODUCT, int PANELS, bool BACKWARD>
struct WgmmaBlock {
  using Shape = WgmmaShape<PANELS, BACKWARD>;
  static constexpr int columns = Shape::columns;

  const Work& work;
  std::int64_t first_row;
  int first_tile, last_tile;
  unsigned char* shared = ptx::shared_memory();
  ptx::Address x_at = ptx::address(shared), y_at = x_at + Shape::x_bytes, barriers = x_at + Shape::barriers_at;

  FASTSUPCON_DEVICE explicit WgmmaBlock(const Work& work)
      : work(work),
        first_row(ptx::block_x() * Shape::rows),
        first_tile(static_cast<int>(ptx::block_y() * work.tiles_per_split)),
        last_tile(first_tile + static_cast<int>(work.tiles_per_split)) {
    const int tiles = static_cast<int>(ceil_div(work.y.count, columns));
    if (last_tile > tiles) last_tile = tiles;
    if (ptx::thread() == 0) {
      ptx::barrier_init(x_full(), 1);
      for (int stage = 0; stage < Shape::stages; ++stage) {
        ptx::barrier_init(full(stage), 128);
        ptx::barrier_init(empty(stage), 4 * Shape::consumers);
      }
      ptx::barrier_init_done();
    }
    ptx::sync_block();
  }

  FASTSUPCON_DEVICE ptx::Address full(int stage) const { return barriers + 8 * stage; }
  FASTSUPCON_DEVICE ptx::Address empty(int stage) const { return barriers + 8 * (Shape::stages + stage); }
  FASTSUPCON_DEVICE ptx::Address x_full() const { return barriers + 8 * 2 * Shape::stages; }
  FASTSUPCON_DEVICE Terms* terms(int stage) const { return reinterpret_cast<Terms*>(shared + Shape::terms_at) + stage * columns; }
  FASTSUPCON_DEVICE std::int64_t* keys(int stage) const {
    return reinterpret_cast<std::int64_t*>(shared + Shape::keys_at) + stage * columns;
  }

  // Tile number t of this block uses stage t % stages for the (t / stages)-th time.
  FASTSUPCON_DEVICE int stage_of(int tile) const { return (tile - first_tile) % Shape::stages; }
  FASTSUPCON_DEVICE int round_of(int tile) const { return (tile - first_tile) / Shape::stages; }

  FASTSUPCON_DEVICE void produce(const ptx::TensorMap& x_map, const ptx::TensorMap& y_map) const {
    const int thread = ptx::thread();
    if (thread == 0) {
      ptx::barrier_arrive_expecting(x_full(), Shape::x_bytes);
      for (int p = 0; p < PANELS; ++p) {
        ptx::copy_box_async(x_at + p * Shape::x_panel_bytes, x_map, 64 * p, static_cast<int>(first_row), x_full());
      }
    }
    const float per_unit = 1.0f / gradient_unit(work);
#pragma unroll 1  // the producer has few registers
    for (int tile = first_tile; tile < last_tile; ++tile) {
      const int stage = stage_of(tile);
      const std::int64_t column = std::int64_t{tile} * columns + thread;
      Terms of_column{};
      std::int64_t key = 0;
      if (thread < columns) {
        of_column = terms_of(work, work.y, column, per_unit);
        key = key_of(work.y, column);
      }
      ptx::barrier_wait(empty(stage), (round_of(tile) + 1) % 2);
      if (thread < columns) {
        terms(stage)[thread] = of_column;
        keys(stage)[thread] = key;
      }
      if (thread == 0) {
        ptx::barrier_arrive_expecting(full(stage), Shape::y_bytes);
        for (int p = 0; p < PANELS; ++p) {
          ptx::copy_box_async(y_at + stage * Shape::y_bytes + p * Shape::y_panel_bytes, y_map, 64 * p, tile * columns, full(stage));
        }
      } else {
        ptx::barrier_arrive(full(stage));
      }
    }
  }

  FASTSUPCON_DEVICE void wait_for(int tile) const { ptx::barrier_wait(full(stage_of(tile)), round_of(tile) % 2); }
  FASTSUPCON_DEVICE void release(int tile) const {
    ptx::sync_warp();
    if (ptx::lane() == 0) ptx::barrier_arrive(empty(stage_of(tile)));
  }

  FASTSUPCON_DEVICE ColumnTerms column_terms(int tile) const {
    return {terms(stage_of(tile)), keys(stage_of(tile)), std::int64_t{tile} * columns};
  }
  FASTSUPCON_DEVICE bool needs_mask(int tile) const {
    return cuda::needs_mask(work, first_row, Shape::rows, std::int64_t{tile} * columns, columns);
  }

  // s = x yᵀ of this consumer's 64 rows, under way on return.
  FASTSUPCON_DEVICE void issue_logits(float (&s)[columns / 8][4], int consumer, int tile) const {
    const ptx::Address x = x_at + consumer * 64 * kPanelBytes, y = y_at + stage_of(tile) * Shape::y_bytes;
#pragma unroll
    for (int p = 0; p < PANELS; ++p) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::Wgmma<PRODUCT == Product::bf16, columns>::shared(s, depth_major_descriptor(x + p * Shape::x_panel_bytes, step),
                                                              depth_major_descriptor(y + p * Shape::y_panel_bytes, step), p + step > 0);
      }
    }
    ptx::wgmma_commit();
  }
  // out += W y, under way on return.
  FASTSUPCON_DEVICE void issue_weighted(float (&out)[PANELS * 8][4], const std::uint32_t (&w)[columns / 16][4], int tile) const {
    const ptx::Address y = y_at + stage_of(tile) * Shape::y_bytes;
#pragma unroll
    for (int step = 0; step < columns / 16; ++step) {
      ptx::Wgmma<PRODUCT == Product::bf16, PANELS * 64>::registers(out, w[step], row_major_descriptor(y, step, Shape::y_panel_bytes));
    }
    ptx::wgmma_commit();
  }
};

template <Product PRODUCT, int PANELS>
__global__ void __launch_bounds__(WgmmaShape<PANELS, false>::threads, 1)
    wgmma_forward(const __grid_constant__ Work work, const __grid_constant__ ptx::TensorMap x_map, const __grid_constant__ ptx::TensorMap y_map) {
  using Block = WgmmaBlock<PRODUCT, PANELS, false>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns;
  const Block block(work);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    block.produce(x_map, y_map);
  } else {
    ptx::raise_registers<Shape::consumer_registers>();
    const int lane = ptx::lane();
    const std::int64_t first = block.first_row + consumer * 64 + warp % 4 * 16 + accumulator_row(lane, 0);
    const std::int64_t keys[2] = {row_key_of(work, first), row_key_of(work, first + 8)};
    LogSum sums[2];
    if (!work.online) sums[0].maximum = sums[1].maximum = 0.0f;
    float s[columns / 8][4] = {};
    ptx::barrier_wait(block.x_full(), 0);
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      block.wait_for(tile);
      ptx::wgmma_fence();
      block.issue_logits(s, consumer, tile);
      ptx::wgmma_wait<0>();
      ptx::hold(s);
      const ColumnTerms terms = block.column_terms(tile);
      if (block.needs_mask(tile)) mask<columns>(s, keys, terms, work.y.count, lane);
      if (work.online) add_logits<true, columns>(sums, s, terms, work.y.bias != nullptr, work.scale_log2, lane);
      else add_logits<false, columns>(sums, s, terms, false, work.scale_log2, lane);
      block.release(tile);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      merge_lanes(sums[r]);
      if (lane % 4 == 0) store_logsum(work, sums[r], first + 8 * r);
    }
  }
}

// By form, as the three in one kernel spilled 64 to 104 bytes.
template <Product PRODUCT, int PANELS, Form FORM>
__global__ void __launch_bounds__(WgmmaShape<PANELS, true>::threads, 1)
    wgmma_backward(const __grid_constant__ Work work, const __grid_constant__ ptx::TensorMap x_map, const __grid_constant__ ptx::TensorMap y_map) {
  using Block = WgmmaBlock<PRODUCT, PANELS, true>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns;
  constexpr int turn = 1;  // named barriers turn, turn + 1: whose turn it is to issue
  const Block block(work);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    block.produce(x_map, y_map);
  } else {
    ptx::raise_registers<Shape::consumer_registers>();
    const int lane = ptx::lane();
    const std::int64_t first = block.first_row + consumer * 64 + warp % 4 * 16 + accumulator_row(lane, 0);
    const float per_unit = 1.0f / gradient_unit(work);
    const Terms rows[2] = {terms_of(work, work.x, first, per_unit), terms_of(work, work.x, first + 8, per_unit)};
    const std::int64_t keys[2] = {row_key_of(work, first), row_key_of(work, first + 8)};
    float weight_sums[2] = {};
    float out[PANELS * 8][4] = {};
    float s[columns / 8][4];
    std::uint32_t packed[columns / 16][4];
    const auto weigh_tile = [&](int tile) {
      const ColumnTerms terms = block.column_terms(tile);
      if (block.needs_mask(tile)) mask<columns>(s, keys, terms, work.y.count, lane);
      weigh<FORM, columns>(s, rows, terms, work.scale_log2, lane);
      if constexpr (FORM == Form::one) {
#pragma unroll
        for (int j = 0; j < columns / 8; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) weight_sums[e / 2] += s[j][e];
        }
      }
    };
    // The first tile stands apart: no condition may stand between an issue and its wait, or ptxas serialises the wgmmas (C7514).
    ptx::barrier_wait(block.x_full(), 0);
    int tile = block.first_tile;
    block.wait_for(tile);
    ptx::wgmma_fence();
    block.issue_logits(s, consumer, tile);
    ptx::wgmma_wait<0>();
    ptx::hold(s);
    weigh_tile(tile);
    pack_weights<PRODUCT, columns>(packed, s);
    if (consumer == 1) ptx::arrive_named(turn, 256);
    for (++tile; tile < block.last_tile; ++tile) {
      block.wait_for(tile);
      ptx::sync_named(turn + consumer, 256);
      ptx::wgmma_fence();
      block.issue_logits(s, consumer, tile);
      block.issue_weighted(out, packed, tile - 1);
      ptx::arrive_named(turn + 1 - consumer, 256);
      ptx::wgmma_wait<1>();
      ptx::hold(s);  // read no sooner
      weigh_tile(tile);
      ptx::wgmma_wait<0>();
      block.release(tile - 1);
      pack_weights<PRODUCT, columns>(packed, s);
    }
    ptx::wgmma_fence();
    block.issue_weighted(out, packed, block.last_tile - 1);
    ptx::wgmma_wait<0>();
    ptx::hold(out);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const std::int64_t row = first + 8 * r;
      if constexpr (FORM == Form::one) {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) weight_sums[r] += ptx::shuffle_xor(weight_sums[r], lanes);
      }
      if (row >= work.x.count) continue;
      const float factor = gradient_factor(work, row);
      if (work.weight_sums && lane % 4 == 0) work.weight_sums[ptx::block_y() * work.x.count + row] = weight_sums[r] * factor;
      if (!work.out) continue;
#pragma unroll
      for (int n = 0; n < PANELS * 8; ++n) {
        const float scale = factor * work.scale;
        store_whole_pair<PRODUCT>(work, row, 8 * n + accumulator_column(lane, 0), out[n][2 * r] * scale, out[n][2 * r + 1] * scale);
      }
    }
  }
}

}  // namespace fastsupcon::cuda
