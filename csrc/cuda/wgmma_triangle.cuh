// The forward of triangle.h for Hopper: half rows, depth up to 256.
//
// A consumer owns two blocks of 64 rows, and takes a tile with both at once: what the columns bring is loaded once for the two, and a lane
// adds up four rows of a column before lanes meet. Nothing waits for the columns' sums on their way to memory: there are two places for
// them.
#pragma once

#include "triangle_chunk.cuh"

namespace fastsupcon::cuda {

template <int PANELS>
struct TriangleShape {
  static constexpr int blocks = 2;                         // of 64 rows, of a consumer
  static constexpr int consumers = PANELS == 4 ? 2 : 3;    // what shared memory holds the rows of
  static constexpr int warps = 4 * consumers, rows = 64 * blocks * consumers;
  static constexpr int columns = PANELS == 4 ? 64 : 96;    // more ask less of shared memory for a product, fewer leave room for the ring
  static constexpr int stages = PANELS == 4 ? 2 : 4;
  static constexpr int threads = 128 * (consumers + 1);
  static constexpr int producer_registers = PANELS == 4 ? 40 : 32;
  static constexpr int consumer_registers = PANELS == 4 ? 232 : 160;
  static_assert(producer_registers + consumers * consumer_registers <= (consumers + 1) * (65536 / threads / 8 * 8));
  static constexpr int slots = cuda::slots(false, false, false);
  static constexpr int x_panel_bytes = rows * kPanelBytes, y_panel_bytes = columns * kPanelBytes;
  static constexpr int x_bytes = PANELS * x_panel_bytes, y_bytes = PANELS * y_panel_bytes;
  static constexpr int slots_at = x_bytes + stages * y_bytes, slots_bytes = slots * columns * kFieldBytes;
  using Sums = ColumnSums<columns, warps, 2, columns>;
  static constexpr int sums_at = slots_at + stages * slots_bytes, barriers_at = sums_at + Sums::bytes;
  static constexpr int shared_bytes = barriers_at + 8 * (2 * stages + 2 * consumers) + Sums::barriers_bytes;
  static_assert(shared_bytes <= kBlockSharedBytes);
};

// Adds a tile to the sums of the lane's rows and, beyond the diagonal, writes the warp's sums of its columns to `to`.
template <bool BEYOND, bool SPECIAL, int BLOCKS, int COLUMNS>
FASTSUPCON_DEVICE void add_pairs(TriangleRows<BLOCKS>& of, const float (&s)[BLOCKS][COLUMNS / 8][4], float scale, const Columns& columns,
                                 const Special (&special)[BLOCKS], float* to, int lane) {
  TileSums<BLOCKS, COLUMNS> sums;
#pragma unroll
  for (int group = 0; group < COLUMNS / 16; ++group) {
    add_group<BEYOND, SPECIAL, BLOCKS, COLUMNS>(of, sums, s, group, scale, columns, special, lane);
    if (BEYOND && group % 2) sums.store_columns(to, group / 2, lane);
  }
  if (BEYOND) sums.store_counts(to, lane);
}

template <Product PRODUCT, int PANELS>
struct TriangleBlock {
  using Shape = TriangleShape<PANELS>;
  static constexpr int columns = Shape::columns;

  const Work& work;
  const Side& side = work.passes[0].x;
  TriangleChunk chunk;
  unsigned char* shared = ptx::shared_memory();
  ptx::Address x_at = ptx::address(shared), y_at = x_at + Shape::x_bytes, barriers = x_at + Shape::barriers_at;
  typename Shape::Sums sums{shared + Shape::sums_at, x_full(2 * Shape::consumers)};

  FASTSUPCON_DEVICE explicit TriangleBlock(const Work& work) : work(work), chunk(work.triangle, Shape::rows / columns) {
    if (chunk.last_tile == 0) return;
    if (ptx::thread() == 0) {
      for (int stage = 0; stage < Shape::stages; ++stage) {
        ptx::barrier_init(full(stage), 1);
        ptx::barrier_init(empty(stage), Shape::warps);
      }
      for (int consumer = 0; consumer < Shape::consumers; ++consumer) {
        ptx::barrier_init(x_full(consumer), 1);
        ptx::barrier_init(x_empty(consumer), 4);
      }
      sums.init();
      ptx::barrier_init_done();
    }
    ptx::sync_block();
  }

  FASTSUPCON_DEVICE ptx::Address full(int stage) const { return barriers + 8 * stage; }
  FASTSUPCON_DEVICE ptx::Address empty(int stage) const { return barriers + 8 * (Shape::stages + stage); }
  FASTSUPCON_DEVICE ptx::Address x_full(int consumer) const { return barriers + 8 * (2 * Shape::stages + consumer); }
  FASTSUPCON_DEVICE ptx::Address x_empty(int consumer) const { return x_full(Shape::consumers + consumer); }

  FASTSUPCON_DEVICE Columns columns_in(int stage) const { return {shared + Shape::slots_at + stage * Shape::slots_bytes, columns}; }

  // By one thread.
  FASTSUPCON_DEVICE void produce(const ptx::TensorMap& x_map, const ptx::TensorMap& y_map) const {
    int step = 0;
#pragma unroll 1
    for (int row_block = chunk.first_row_block(); row_block < chunk.last_row_block(); ++row_block) {
#pragma unroll 1
      for (int consumer = 0; consumer < Shape::consumers; ++consumer) {
        ptx::barrier_wait(x_empty(consumer), (row_block - chunk.first_row_block() + 1) % 2);
        ptx::barrier_arrive_expecting(x_full(consumer), PANELS * 64 * Shape::blocks * kPanelBytes);
#pragma unroll 1
        for (int block = Shape::blocks * consumer; block < Shape::blocks * (consumer + 1); ++block) {
          for (int p = 0; p < PANELS; ++p) {
            ptx::copy_box_async(x_at + p * Shape::x_panel_bytes + block * 64 * kPanelBytes, x_map, 64 * p,
                                row_block * Shape::rows + 64 * block, x_full(consumer));
          }
        }
      }
#pragma unroll 1
      for (int tile = chunk.first_of(row_block); tile < chunk.last_tile; ++tile, ++step) {
        const int stage = step % Shape::stages;
        ptx::barrier_wait(empty(stage), (step / Shape::stages + 1) % 2);
        ptx::barrier_arrive_expecting(full(stage), Shape::y_bytes + Shape::slots_bytes);
        for (int p = 0; p < PANELS; ++p) {
          ptx::copy_box_async(y_at + stage * Shape::y_bytes + p * Shape::y_panel_bytes, y_map, 64 * p, tile * columns, full(stage));
        }
        fetch_slots(x_at + Shape::slots_at + stage * Shape::slots_bytes, side, tile * columns, columns, Shape::slots, false, false,
                    full(stage));
      }
    }
  }

  // x yᵀ of a consumer's rows, under way on return.
  FASTSUPCON_DEVICE void issue_logits(float (&s)[Shape::blocks][columns / 8][4], int consumer, int stage) const {
    const ptx::Address x = x_at + consumer * Shape::blocks * 64 * kPanelBytes, y = y_at + stage * Shape::y_bytes;
#pragma unroll
    for (int p = 0; p < PANELS; ++p) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const auto of_y = depth_major_descriptor(y + p * Shape::y_panel_bytes, step);
#pragma unroll
        for (int block = 0; block < Shape::blocks; ++block) {
          const auto of_x = depth_major_descriptor(x + p * Shape::x_panel_bytes, step) + (block * 64 * kPanelBytes >> 4);
          ptx::Wgmma<PRODUCT == Product::bf16, columns>::shared(s[block], of_x, of_y, p + step > 0);
        }
      }
    }
    ptx::wgmma_commit();
  }
};

template <Product PRODUCT, int PANELS>
__global__ void __launch_bounds__(TriangleShape<PANELS>::threads, 1)
    wgmma_triangle(const __grid_constant__ Work work, const __grid_constant__ ptx::TensorMap x_map,
                   const __grid_constant__ ptx::TensorMap y_map) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  using Block = TriangleBlock<PRODUCT, PANELS>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns, blocks = Shape::blocks;
  const Block block(work);
  const TriangleChunk& chunk = block.chunk;
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (chunk.last_tile == 0) return;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    if (ptx::thread() == 0) block.produce(x_map, y_map);
    else if (warp > 0 && warp <= columns / 32) block.sums.reduce(chunk, 1, ptx::thread() - 32);
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const int lane = ptx::lane();
  const Pass& pass = work.passes[0];
  const float scale = scale_of(work.scale) * logit_unit(true);
  float s[blocks][columns / 8][4];
  unsigned step = 0, turn = 0;
#pragma unroll 1
  for (int row_block = chunk.first_row_block(); row_block < chunk.last_row_block(); ++row_block) {
    const int row = row_block * Shape::rows + consumer * 64 * blocks + warp % 4 * 16 + accumulator_row(lane, 0);
    TriangleRows<blocks> of(pass.x, row);
    ptx::barrier_wait(block.x_full(consumer), (row_block - chunk.first_row_block()) % 2);
    const int beyond = chunk.beyond(row_block), whole_tiles = pass.y.count / columns;
#pragma unroll 1
    for (int tile = chunk.first_of(row_block); tile < chunk.last_tile; ++tile, ++step) {
      const int stage = static_cast<int>(step % Shape::stages);
      ptx::barrier_wait(block.full(stage), static_cast<int>(step / Shape::stages % 2));
      ptx::wgmma_fence();
      block.issue_logits(s, consumer, stage);
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int b = 0; b < blocks; ++b) ptx::hold(s[b]);
      const Columns fields = block.columns_in(stage);
      const bool is_beyond = tile >= beyond;
      Special special[blocks];
      const bool is_special = !is_beyond || of.ambiguous || tile >= whole_tiles;
      if (is_special) {
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
          special[b] = special_of<columns>(work, pass, of.rows[b], row + 64 * b, tile * columns, fields, lane);
        }
      }
      float* const to = block.sums.of(turn, warp - 4);
      if (is_beyond) block.sums.wait_for_place(turn);
      with_tile_form(is_beyond, is_special, [&](auto beyond, auto special_form) {
        add_pairs<beyond, special_form, blocks, columns>(of, s, scale, fields, special, to, lane);
      });
      ptx::sync_warp();
      if (lane == 0) {
        ptx::barrier_arrive(block.empty(stage));
        if (is_beyond) block.sums.publish(turn);
      }
      turn += is_beyond;
    }
    ptx::sync_warp();  // where there was no tile, a lane may still wait for x, and would wait for good once it is fetched anew
    if (lane == 0) ptx::barrier_arrive(block.x_empty(consumer));
    of.store(chunk.row_sums(), work.triangle.group_rows(), row - chunk.first_row_block() * Shape::rows, lane);
  }
}

}  // namespace fastsupcon::cuda
