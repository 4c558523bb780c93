// The forward of triangle.h for Hopper: half rows, depth 257 to 1024.
//
// Consumers own 64 rows each. The products of a tile come slab by slab, and one slab of the next tile runs under the exps of each fourth of
// this one, so that the ring goes round meanwhile. All that a tile needs comes with its slabs: x of a row block with those of its first
// tile, panel by panel in the place of the row block before, whose last product with a panel is as many slabs ago as a tile has; the slots
// with a tile's last, in the place of those of two tiles ago, read before the tile before gave its first slabs back. So where the ring has
// no more places than a tile has slabs, nothing but a place is waited for, and the ring goes on from a row block to the next.
#pragma once

#include <algorithm>

#include "triangle_chunk.cuh"
#include "wgmma_slabs.cuh"

namespace fastsupcon::cuda {

template <int COLUMNS>
struct DeepTriangleShape {
  static constexpr int steps = 4, step_groups = COLUMNS / 64;  // of a tile's exps, each of so many groups of 16 columns
  static constexpr int most_places = 12, most_threads = 3 * 128;
  static constexpr int producer_registers = 40, consumer_registers = 232;
  static_assert(producer_registers + 2 * consumer_registers <= 3 * (65536 / most_threads / 8 * 8));
  // Panels of x that consumers hold in registers, the last of the depth, so that the ring has more places. They come by the ring, 64 rows in
  // a place, before a row block's first tile.
  static constexpr int held = COLUMNS == 64 ? 2 : 0;
  using Sums = ColumnSums<COLUMNS, 4, 2, 64>;  // a consumer's four warps fill a place: with two consumers each has its own
  static constexpr int slots = cuda::slots(false, false, false), slots_bytes = slots * COLUMNS * kFieldBytes;
  // Shared memory: slots of two tiles; sums; barriers; x; the ring.
  static constexpr int sums_at = 2 * slots_bytes, barriers_at = sums_at + Sums::bytes;
  static constexpr int ring_barriers_at = barriers_at + Sums::barriers_bytes;
  static constexpr int x_at = (ring_barriers_at + 16 * most_places + 1023) / 1024 * 1024;

  static constexpr int consumers(std::int64_t depth) { return depth <= 12 * kPanelDepth ? 2 : 1; }  // what shared memory holds the rows of
  __host__ __device__ static constexpr int rows(int consumers) { return 64 * consumers; }
  __host__ __device__ static constexpr int ring_at(int slabs, int consumers) {
    return x_at + (slabs - held) * rows(consumers) * kPanelBytes;
  }
  static DeepLayout layout(std::int64_t depth) {
    const int slabs = static_cast<int>(ceil_div(depth, kPanelDepth)), of = consumers(depth);
    const int fitting = (kBlockSharedBytes - ring_at(slabs, of)) / SlabShape<COLUMNS>::slab_bytes;
    return {slabs, 0, of, std::min({fitting, most_places, slabs})};
  }
  static int shared_bytes(const DeepLayout& layout) {
    return ring_at(layout.slabs, layout.consumers) + layout.places * SlabShape<COLUMNS>::slab_bytes;
  }
};

template <Product PRODUCT, int COLUMNS>
struct DeepTriangleBlock {
  using Shape = DeepTriangleShape<COLUMNS>;

  const Work& work;
  const DeepLayout& layout;
  const Side& side = work.passes[0].x;
  int rows = Shape::rows(layout.consumers);
  TriangleChunk chunk{work.triangle, rows / COLUMNS};
  unsigned char* shared = ptx::shared_memory();
  ptx::Address slots_at = ptx::address(shared);
  typename Shape::Sums sums{shared + Shape::sums_at, slots_at + Shape::barriers_at};
  Slabs<PRODUCT, COLUMNS> ring{layout, rows, slots_at + Shape::x_at, slots_at + Shape::ring_at(layout.slabs, layout.consumers),
                               slots_at + Shape::ring_barriers_at};

  FASTSUPCON_DEVICE DeepTriangleBlock(const Work& work, const DeepLayout& layout) : work(work), layout(layout) {
    if (chunk.last_tile == 0) return;
    if (ptx::thread() == 0) {
      sums.init();
      ring.init(4 * layout.consumers);
      ptx::barrier_init_done();
    }
    ptx::sync_block();
  }

  // The slots of the block's number-th tile.
  static FASTSUPCON_DEVICE int slots_of(unsigned number) { return static_cast<int>(number % 2) * Shape::slots_bytes; }
  FASTSUPCON_DEVICE Columns columns_of(unsigned number) const { return {shared + slots_of(number), COLUMNS}; }

  // By one thread.
  FASTSUPCON_DEVICE void produce(const ptx::TensorMap& x_map, const ptx::TensorMap& y_map) const {
    Place at{0, 0};
    unsigned number = 0;
#pragma unroll 1
    for (int row_block = chunk.first_row_block(); row_block < chunk.last_row_block(); ++row_block) {
      const int first = chunk.first_of(row_block);
#pragma unroll 1
      for (int tile = first; tile < chunk.last_tile; ++tile, ++number) {
        const bool is_first = tile == first;
        if (is_first) {
          for (int i = 0; i < Shape::held * layout.consumers; ++i) {
            ring.fetch(y_map, row_block * layout.consumers + i % layout.consumers, layout.slabs - Shape::held + i / layout.consumers, at);
            at = ring.after(at, 1);
          }
        }
#pragma unroll 1
        for (int slab = 0; slab < layout.slabs; ++slab) {
          const bool is_last = slab + 1 == layout.slabs, with_x = is_first && slab < layout.slabs - Shape::held;
          const ptx::Address full = ring.full(at.index);
          ring.fetch(y_map, tile, slab, at, (with_x ? rows * kPanelBytes : 0) + (is_last ? Shape::slots_bytes : 0));
          if (with_x) ptx::copy_box_async(ring.x_panel(slab), x_map, kPanelDepth * slab, row_block * rows, full);
          if (is_last) fetch_slots(slots_at + slots_of(number), side, tile * COLUMNS, COLUMNS, Shape::slots, false, false, full);
          at = ring.after(at, 1);
        }
      }
    }
  }

  // Whether the chunk ends with this tile of the row block.
  FASTSUPCON_DEVICE bool is_last(int row_block, int tile) const {
    const bool has_more = row_block + 1 < chunk.last_row_block() && chunk.first_of(row_block + 1) < chunk.last_tile;
    return tile + 1 == chunk.last_tile && !has_more;
  }
};

template <Product PRODUCT, int COLUMNS>
__global__ void __launch_bounds__(DeepTriangleShape<COLUMNS>::most_threads, 1)
    wgmma_deep_triangle(const __grid_constant__ Work work, const __grid_constant__ DeepLayout layout,
                        const __grid_constant__ ptx::TensorMap x_map, const __grid_constant__ ptx::TensorMap y_map) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  using Block = DeepTriangleBlock<PRODUCT, COLUMNS>;
  using Shape = typename Block::Shape;
  constexpr int steps = Shape::steps;
  const Block block(work, layout);
  const TriangleChunk& chunk = block.chunk;
  const auto& ring = block.ring;
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (chunk.last_tile == 0) return;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    if (ptx::thread() == 0) block.produce(x_map, y_map);
    else if (warp >= 2) block.sums.reduce(chunk, layout.consumers, ptx::thread() - 64);
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const int lane = ptx::lane();
  const Pass& pass = work.passes[0];
  const float scale = scale_of(work.scale) * logit_unit(true);
  float s[1][COLUMNS / 8][4], next[COLUMNS / 8][4];
  Place at{0, 0}, read{0, 0};  // the slab that is issued next, and that is given back next
  unsigned tiles = 0, turn = consumer;

  const auto issue_slab = [&](int slab) {
    ring.wait_for(at);
    ptx::wgmma_fence();
    ring.issue_logits(next, consumer * 64, slab, at, slab > 0);
    at = ring.after(at, 1);
  };
  const auto release_slab = [&] {
    ring.release(read);
    read = ring.after(read, 1);
  };
  // Before a row block's first tile, nothing being under way.
  std::uint32_t held[Shape::held > 0 ? Shape::held : 1][4][4];
  const auto take_held = [&] {
#pragma unroll
    for (int panel = 0; panel < Shape::held; ++panel) {
      for (int of = 0; of < layout.consumers; ++of) {
        ring.wait_for(at);
        if (of == consumer) ring.take_x(held[panel], at);
        ptx::sync_warp();
        at = ring.after(at, 1);
        release_slab();
      }
    }
  };
  const auto finish = [&](int slab) {  // the first that is not issued
#pragma unroll 1
    for (; slab < layout.slabs - Shape::held; ++slab) {
      issue_slab(slab);
      ptx::wgmma_wait<1>();
      release_slab();
    }
#pragma unroll
    for (int panel = 0; panel < Shape::held; ++panel) {
      ring.wait_for(at);
      ptx::wgmma_fence();
      ring.issue_logits(next, held[panel], at);
      at = ring.after(at, 1);
      ptx::wgmma_wait<1>();
      release_slab();
    }
    ptx::wgmma_wait<0>();
    release_slab();
    ptx::hold(next);
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][j][e] = next[j][e];
    }
  };

  take_held();
  issue_slab(0);
  finish(1);
#pragma unroll 1
  for (int row_block = chunk.first_row_block(); row_block < chunk.last_row_block(); ++row_block) {
    const int row = row_block * block.rows + consumer * 64 + warp % 4 * 16 + accumulator_row(lane, 0);
    TriangleRows<1> of(pass.x, row);
    const int beyond = chunk.beyond(row_block), whole_tiles = pass.y.count / COLUMNS;
    // before(step) and after() stand around the step's exps.
    const auto add = [&](int tile, auto before, auto after) {
      const Columns fields = block.columns_of(tiles++);
      const bool is_beyond = tile >= beyond, is_special = !is_beyond || of.ambiguous || tile >= whole_tiles;
      Special special[1];
      if (is_special) special[0] = special_of<COLUMNS>(work, pass, of.rows[0], row, tile * COLUMNS, fields, lane);
      TileSums<1, COLUMNS> sums;
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        before(step);
        with_tile_form(is_beyond, is_special, [&](auto beyond, auto special_form) {
#pragma unroll
          for (int group = step * Shape::step_groups; group < (step + 1) * Shape::step_groups; ++group) {
            add_group<beyond, special_form, 1, COLUMNS>(of, sums, s, group, scale, fields, special, lane);
          }
        });
        ptx::sync_warp();  // with the slab go the slots: all lanes have read theirs
        after();
      }
      if (is_beyond) {
        float* const to = block.sums.of(turn, warp % 4);
        block.sums.wait_for_place(turn);
#pragma unroll
        for (int part = 0; part < COLUMNS / 32; ++part) sums.store_columns(to, part, lane);
        sums.store_counts(to, lane);
        ptx::sync_warp();
        if (lane == 0) block.sums.publish(turn);
        turn += layout.consumers;
      }
    };
#pragma unroll 1
    for (int tile = chunk.first_of(row_block); tile < chunk.last_tile; ++tile) {
      if (block.is_last(row_block, tile)) {
        add(tile, [](int) {}, [] {});
      } else {
        if (tile + 1 == chunk.last_tile) take_held();
        issue_slab(0);
        add(
            tile, [&](int step) { issue_slab(step + 1); },
            [&] {
              ptx::wgmma_wait<1>();
              release_slab();
            });
        finish(steps + 1);
      }
    }
    of.store(chunk.row_sums(), work.triangle.group_rows(), row - chunk.first_row_block() * block.rows, lane);
  }
}

}  // namespace fastsupcon::cuda
