// The backward for depths of 257 to 1024 on Hopper: 4N²D flops up to 768; above, two blocks share the result's columns and each computes
// the logits, 6N²D.
//
// The result of 64 rows fills the registers of two consumers: each owns a slice of OUT_PANELS · 64 columns. They take turns with the tiles
// (narrow, so that the ring holds several): the owner of tile j computes its logits and weights W, publishes W through shared memory,
// and both multiply it with their own slabs of y. In steady state one consumer's exps run under the other's products:
//   consumer 0   logits 2   W₁y₁   exps 2 → W₂   W₂y₂             logits 4   W₃y₃   exps 4 → W₄ …
//   consumer 1              logits 3      W₂y₂   exps 3 → W₃   W₃y₃            logits 5   W₄y₄ …
// One named barrier per consumer says "W of my tile is written, and I have read yours before it". (With the other's W after the own product
// no tile's exps wait for another's, but the ring gets its slabs back later: H200, depth 768, 41 ms instead of 33, 1024 99 instead of 87.)
#pragma once

#include "wgmma_deep.cuh"

namespace fastsupcon::cuda {

// What a consumer does beside the logits: its slice of the result.
template <Product PRODUCT, int OUT_PANELS, bool APART, int COLUMNS>
struct DeepSlice {
  using Block = DeepBlock<PRODUCT, true, APART, COLUMNS>;
  using Product64 = ptx::Wgmma<PRODUCT == Product::bf16, 64>;
  static constexpr int own_written = 4;  // named barriers own_written + consumer: all four warps have written W, which each product reads
  static constexpr int steps = Block::columns / 16;  // of the second product, 16 columns of the tile each
  static constexpr int slab_panels = Block::Shape::slab_panels, slabs = OUT_PANELS / slab_panels;

  const Block& block;
  int consumer;

  FASTSUPCON_DEVICE int first_slab() const { return (ptx::block_z() * 2 + consumer) * slabs; }
  // A slice may reach past the depth: it then multiplies the last slab again, and stores nothing of that.
  FASTSUPCON_DEVICE Place place_of(int tile, Place tile_at, int i) const {
    const int slab = first_slab() + i, last = block.layout.slabs - 1;
    return block.place_of(tile, tile_at, slab < last ? slab : last);
  }

  FASTSUPCON_DEVICE void wait_for(int tile, Place tile_at) const {
#pragma unroll
    for (int i = 0; i < slabs; ++i) block.ring.wait_for(place_of(tile, tile_at, i));
  }
  FASTSUPCON_DEVICE void release(int tile, Place tile_at) const {
#pragma unroll
    for (int i = 0; i < slabs; ++i) {
      if (first_slab() + i < block.layout.slabs) block.ring.release(place_of(tile, tile_at, i));
    }
  }

  // use(panel of the result, panel of y, step) for all products of a tile.
  template <class Use>
  FASTSUPCON_DEVICE void for_each_product(int tile, Place tile_at, Use use) const {
#pragma unroll
    for (int i = 0; i < slabs; ++i) {
      const ptx::Address slab = block.ring.y_slab(place_of(tile, tile_at, i));
#pragma unroll
      for (int h = 0; h < slab_panels; ++h) {
#pragma unroll
        for (int k = 0; k < steps; ++k) use(i * slab_panels + h, slab + h * Block::Shape::panel_bytes, k);
      }
    }
  }
  // out += W y with W published by the tile's owner, under way on return.
  FASTSUPCON_DEVICE void issue_published(float (&out)[OUT_PANELS][8][4], int tile, Place tile_at) const {
    const int first_step = block.owner(tile) * steps;
    const ptx::Address w = block.weights + first_step / 4 * 64 * kPanelBytes;
    for_each_product(tile, tile_at, [&](int p, ptx::Address y, int k) {
      Product64::shared_row_major(out[p], depth_major_descriptor(w, first_step % 4 + k), row_major_descriptor(y, k, 0));
    });
    ptx::wgmma_commit();
  }
  // The same with W of this consumer's own tile: from registers, which spares shared memory a sixth of its reads, where there are enough.
  FASTSUPCON_DEVICE void issue_own(float (&out)[OUT_PANELS][8][4], const std::uint32_t (&w)[steps][4], int tile, Place tile_at) const {
    if constexpr (OUT_PANELS > 4) {
      ptx::sync_named(own_written + consumer, 128);
      ptx::wgmma_fence();
      issue_published(out, tile, tile_at);
    } else {
      ptx::wgmma_fence();
      for_each_product(tile, tile_at,
                       [&](int p, ptx::Address y, int k) { Product64::registers_row_major(out[p], w[k], row_major_descriptor(y, k, 0)); });
      ptx::wgmma_commit();
    }
  }
  // Writes the A fragments of this warp's 16 rows into this consumer's part of the weights, and makes them visible to wgmma.
  FASTSUPCON_DEVICE void publish(const std::uint32_t (&w)[steps][4]) const {
    const int lane = ptx::lane(), row = ptx::warp() % 4 * 16 + accumulator_row(lane, 0);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int step = consumer * steps + k, panel = step / 4 * 64 * kPanelBytes, chunk = 2 * (step % 4) + i / 2;
        ptx::store_word(block.weights + panel + panel_offset(row + 8 * (i % 2), chunk) + 2 * accumulator_column(lane, 0), w[k][i]);
      }
    }
    ptx::fence_async_proxy();
  }
};

// SUMMED: the gradient of the scale is wanted too.
template <Product PRODUCT, int OUT_PANELS, bool APART, int COLUMNS, bool SUMMED>
__global__ void __launch_bounds__(DeepShape<true, APART, COLUMNS>::most_threads, 1)
    wgmma_deep_backward(const __grid_constant__ Work work, const __grid_constant__ DeepLayout layout,
                        const __grid_constant__ Maps maps) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  using Block = DeepBlock<PRODUCT, true, APART, COLUMNS>;
  using Shape = typename Block::Shape;
  using Slice = DeepSlice<PRODUCT, OUT_PANELS, APART, COLUMNS>;
  constexpr int columns = Shape::columns;
  constexpr int published = 1, summed = 3;  // named barriers published + consumer, summed
  const Block block(work, layout);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    block.produce(maps);
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const Slice slice{block, consumer};
  const int lane = ptx::lane();
  const Pass& pass = block.pass;
  const int row = block.block.first_row + warp % 4 * 16 + accumulator_row(lane, 0);
  const bool ambiguous = ptx::any(is_ambiguous(load_row<true>(pass.x, row)) || is_ambiguous(load_row<true>(pass.x, row + 8)));
  const float unit = weight_unit<PRODUCT>(pass), per_unit = 1.0f / unit;
  float out[OUT_PANELS][8][4] = {};
#pragma unroll
  for (int p = 0; p < OUT_PANELS; ++p) ptx::hold(out[p]);  // zeros that no compiler may put off into the loop, between its wgmmas
  float s[columns / 8][4];
  std::uint32_t packed[Slice::steps][4] = {};
  PairSums sums[2];

  const auto issue_logits_of_slab = [&](int slab, Place at, bool accumulate) {
    block.ring.wait_for(at);
    ptx::wgmma_fence();
    block.ring.issue_logits(s, 0, slab, at, accumulate);
  };
  // The first slab stands apart, and the loop waits for all but the last groups: else ptxas serialises (C7515) or adds fences (C7519).
  const auto issue_logits = [&](int tile, Place at) {
    int slab = block.first_slab(tile);
    issue_logits_of_slab(slab, at, false);
#pragma unroll 1
    for (int i = 1; i < layout.slabs; ++i) {
      slab = block.next_slab(slab);
      at = block.ring.after(at, 1);
      ptx::wgmma_wait<1>();
      issue_logits_of_slab(slab, at, true);
    }
  };
  // Slabs of the depth that belong to no slice of this block: only the logits read them.
  const auto release_unsliced = [&](int tile, Place at) {
    const int first_sliced = ptx::block_z() * 2 * Slice::slabs, last_sliced = first_sliced + 2 * Slice::slabs;
#pragma unroll 1
    for (int slab = 0; slab < layout.slabs; ++slab) {
      if (slab < first_sliced || slab >= last_sliced) block.ring.release(block.place_of(tile, at, slab));
    }
  };
  const auto weigh = [&](int tile) {
    block.with_columns(tile, [&](const Columns& of_tile) {
      const void* const fields = block.shared + Shape::x_slots_at;
      const int of_block = row - block.block.first_row;
      // Each time: registers are short.
      const Row rows[2] = {load_row<true>(fields, 64, of_block), load_row<true>(fields, 64, of_block + 8)};
      const bool is_special = ambiguous || block.needs_mask(row, tile);
      const Special what = block.special(is_special, rows, row, tile, of_tile);
      with_special(is_special, [&](auto special) {
        weigh_tile<false, special, APART, columns>(sums, s, rows, block.scale, unit, SUMMED, of_tile, what, lane);
      });
    });
    pack_weights<PRODUCT, columns>(packed, s);
  };

  // Before consumer 0's first tile stands one whose W is zero, so that every tile is treated alike; its y is the end of the first: slabs of
  // a slice, at every depth, so none that release_unsliced gives back under this product.
  const int other = 1 - consumer;
  int tile = block.block.first_tile + consumer;
  Place before{0, 0};  // tile − 1, the other consumer's
  Place at = consumer == 0 ? before : block.ring.after(before, layout.slabs);
  if (consumer == 1) {
    slice.publish(packed);
    ptx::arrive_named(published + consumer, 256);
  }
  ptx::barrier_wait(block.x_full(), 0);
#pragma unroll 1
  for (; tile < block.block.last_tile; tile += 2) {
    issue_logits(tile, at);
    slice.wait_for(tile - 1, before);
    ptx::sync_named(published + other, 256);
    ptx::wgmma_fence();
    slice.issue_published(out, tile - 1, before);
    ptx::wgmma_wait<1>();
    ptx::hold(s);
    release_unsliced(tile, at);
    weigh(tile);
    ptx::wgmma_wait<0>();
    if (tile > block.block.first_tile) slice.release(tile - 1, before);
    slice.publish(packed);
    ptx::arrive_named(published + consumer, 256);
    slice.issue_own(out, packed, tile, at);
    ptx::wgmma_wait<0>();
    slice.release(tile, at);
    before = block.ring.after(at, layout.slabs);
    at = block.ring.after(before, layout.slabs);
  }
  if (tile == block.block.last_tile) {  // the other consumer's was the last
    slice.wait_for(tile - 1, before);
    ptx::sync_named(published + other, 256);
    ptx::wgmma_fence();
    slice.issue_published(out, tile - 1, before);
    ptx::wgmma_wait<0>();
  }
#pragma unroll
  for (int p = 0; p < OUT_PANELS; ++p) ptx::hold(out[p]);

  if constexpr (SUMMED) {  // the consumers have tiles of the same rows: the second hands its sums over where W was, once all products are done
    float* const of_second = reinterpret_cast<float*>(block.shared) + 2 * (ptx::thread() % 128);
    ptx::sync_named(summed, 256);
    if (consumer == 1) {
      for (int r = 0; r < 2; ++r) of_second[r] = sums[r].products;
    }
    ptx::sync_named(summed, 256);
    if (consumer == 0 && ptx::block_z() == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sums[r].products += of_second[r];
        store_pair_sums(pass, block.block, sums[r], load_row<true>(pass.x, row + 8 * r).factor * per_unit, row + 8 * r, lane);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= pass.x.count) continue;
    float* to = pass.out + block.block.place(pass, row + 8 * r) * work.depth;
#pragma unroll
    for (int p = 0; p < OUT_PANELS; ++p) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int panel = slice.first_slab() * Slice::slab_panels + p;
        const std::int64_t column = panel * kPanelDepth + 8 * n + accumulator_column(lane, 0);
        store_pair(to, work.depth, column, out[p][n][2 * r] * per_unit, out[p][n][2 * r + 1] * per_unit);
      }
    }
  }
}

}  // namespace fastsupcon::cuda
