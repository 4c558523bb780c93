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
  using Shape = typename Block::Shape;
  static constexpr int steps = Block::columns / 16;  // of the second product, 16 columns of the tile each
  static constexpr int slabs = OUT_PANELS / Shape::slab_panels;
  using SlabProduct = ptx::Wgmma<PRODUCT == Product::bf16, Shape::slab_depth>;
  using Out = float[slabs][Shape::slab_depth / 8][4];

  const Block& block;
  int consumer;

  FASTSUPCON_DEVICE int first_slab() const { return (ptx::block_z() * 2 + consumer) * slabs; }
  // A slice may reach past the depth: it then multiplies the last slab again, given back or not, and stores nothing of that.
  FASTSUPCON_DEVICE Place place_of(int tile, Place tile_at, int i) const {
    const int slab = first_slab() + i, last = block.layout.slabs - 1;
    return block.place_of(tile, tile_at, slab < last ? slab : last);
  }

  FASTSUPCON_DEVICE void wait_for(int tile, Place tile_at) const {
#pragma unroll
    for (int i = 0; i < slabs; ++i) block.wait_for(place_of(tile, tile_at, i));
  }
  // Waits for the products with slabs first … last − 1 of the tile issued last, and gives each back as soon as it is read. The tile before
  // the first holds nothing of its own.
  FASTSUPCON_DEVICE void finish(int first, int last, int tile, Place tile_at) const {
#pragma unroll
    for (int i = 0; i < slabs; ++i) {
      if (i < first || i >= last) continue;
      ptx::wgmma_wait_but(slabs - 1 - i);
      if (tile >= block.block.first_tile && first_slab() + i < block.layout.slabs) block.release(place_of(tile, tile_at, i));
    }
  }
  // So many of the slabs have been multiplied when a tile's weights are done for so many groups of 16 columns: waits cost nothing then.
  __host__ __device__ static constexpr int multiplied_after(int groups) {
    return (2 * slabs * groups - steps) / (2 * steps);
  }

  // use(slab of the slice, where it is, step) for all products of a tile; a group of wgmmas for each slab.
  template <class Use>
  FASTSUPCON_DEVICE void for_each_product(int tile, Place tile_at, Use use) const {
#pragma unroll
    for (int i = 0; i < slabs; ++i) {
      const ptx::Address slab = block.y_slab(place_of(tile, tile_at, i));
#pragma unroll
      for (int k = 0; k < steps; ++k) use(i, slab, k);
      ptx::wgmma_commit();
    }
  }
  FASTSUPCON_DEVICE int weights_step(int owner) const { return Shape::weights_panels == 1 ? owner * steps : 0; }  // in its panel
  FASTSUPCON_DEVICE ptx::Address weights_panel(int owner) const {
    return block.weights + (Shape::weights_panels == 1 ? 0 : owner * 64 * kPanelBytes);
  }
  // out += W y with W published by the tile's owner, under way on return.
  FASTSUPCON_DEVICE void issue_published(Out& out, int tile, Place tile_at) const {
    const int owner = block.owner(tile), first_step = weights_step(owner);
    const ptx::Address w = weights_panel(owner);
    for_each_product(tile, tile_at, [&](int i, ptx::Address y, int k) {
      SlabProduct::shared_row_major(out[i], depth_major_descriptor(w, first_step + k), row_major_descriptor(y, k, Shape::panel_bytes));
    });
  }
  // The same with W of this consumer's own tile: from registers, which spares shared memory a third of what the product reads.
  FASTSUPCON_DEVICE void issue_own(Out& out, const std::uint32_t (&w)[steps][4], int tile, Place tile_at) const {
    ptx::wgmma_fence();
    for_each_product(tile, tile_at, [&](int i, ptx::Address y, int k) {
      SlabProduct::registers(out[i], w[k], row_major_descriptor(y, k, Shape::panel_bytes));
    });
  }
  // Writes the A fragments of this warp's 16 rows into this consumer's part of the weights, and makes them visible to wgmma.
  FASTSUPCON_DEVICE void publish(const std::uint32_t (&w)[steps][4]) const {
    const int lane = ptx::lane(), row = ptx::warp() % 4 * 16 + accumulator_row(lane, 0);
#pragma unroll
    for (int k = 0; k < steps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int chunk = 2 * (weights_step(consumer) + k) + i / 2;
        ptx::store_word(weights_panel(consumer) + panel_offset(row + 8 * (i % 2), chunk) + 2 * accumulator_column(lane, 0), w[k][i]);
      }
    }
    ptx::fence_async_proxy();
  }
};

template <Product PRODUCT, int OUT_PANELS, bool APART, int COLUMNS>
__global__ void __launch_bounds__(DeepShape<true, APART, COLUMNS>::threads, 1)
    wgmma_deep_backward(const __grid_constant__ Work work, const __grid_constant__ DeepLayout layout,
                        const __grid_constant__ Maps maps) {
  using Block = DeepBlock<PRODUCT, true, APART, COLUMNS>;
  using Shape = typename Block::Shape;
  using Slice = DeepSlice<PRODUCT, OUT_PANELS, APART, COLUMNS>;
  constexpr int columns = Shape::columns;
  constexpr int published = 1;  // named barriers published + consumer
  const Block block(work, layout);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    block.produce(maps);
    block.finish();
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const Slice slice{block, consumer};
  const int lane = ptx::lane();
  const Pass& pass = block.pass;
  const int row = block.block.first_row + warp % 4 * 16 + accumulator_row(lane, 0);
  const bool ambiguous = ptx::any(is_ambiguous(load_row<true>(pass.x, row)) || is_ambiguous(load_row<true>(pass.x, row + 8)));
  const float unit = weight_unit<PRODUCT>(pass), per_unit = 1.0f / unit;
  typename Slice::Out out = {};
#pragma unroll
  for (int i = 0; i < Slice::slabs; ++i) ptx::hold(out[i]);  // zeros that no compiler may put off into the loop, between its wgmmas
  float s[columns / 8][4];
  std::uint32_t packed[Slice::steps][4] = {};

  // Of x, the slabs with which this consumer's tiles begin: in registers, they spare shared memory half of what these products read.
  constexpr int x_slabs = Shape::slab_panels > 1 ? 0 : OUT_PANELS > 3 ? 2 : 4;
  std::uint32_t x[x_slabs > 0 ? x_slabs : 1][4][4];
  const auto load_x = [&](int slab) {
#pragma unroll
    for (int i = 0; i < x_slabs; ++i) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const MatrixRow from = fragment_rows(lane);
        ptx::load_matrices(x[i][step], block.x_panel(slab) + panel_offset(warp % 4 * 16 + from.row, 2 * step + from.chunk));
      }
      slab = block.next_slab(slab);
    }
  };

  const auto issue_logits_of_slab = [&](int slab, Place at, bool accumulate) {
    block.wait_for(at);
    ptx::wgmma_fence();
    block.issue_logits_of_slab(s, 0, slab, at, accumulate);
  };
  // The first slabs stand apart, and the loop waits for all but the last groups: else ptxas serialises (C7515) or adds fences (C7519).
  const auto issue_logits = [&](int tile, Place at) {
    int slab = block.first_slab(tile);
    if constexpr (x_slabs == 0) {
      issue_logits_of_slab(slab, at, false);
    } else {
#pragma unroll
      for (int i = 0; i < x_slabs; ++i) {
        if (i > 0) {
          slab = block.next_slab(slab);
          at = block.after(at, 1);
        }
        block.wait_for(at);
        ptx::wgmma_fence();
        block.issue_logits_of_slab(s, x[i], at, i > 0);
      }
    }
#pragma unroll 1
    for (int i = x_slabs > 0 ? x_slabs : 1; i < layout.slabs; ++i) {
      slab = block.next_slab(slab);
      at = block.after(at, 1);
      ptx::wgmma_wait<1>();
      issue_logits_of_slab(slab, at, true);
    }
  };
  // Slabs of the depth that belong to no slice of this block: only the logits read them.
  const auto release_unsliced = [&](int tile, Place at) {
    const int first_sliced = ptx::block_z() * 2 * Slice::slabs, last_sliced = first_sliced + 2 * Slice::slabs;
#pragma unroll 1
    for (int slab = 0; slab < layout.slabs; ++slab) {
      if (slab < first_sliced || slab >= last_sliced) block.release(block.place_of(tile, at, slab));
    }
  };
  // Under this the product with the tile before runs, whose slabs are given back one by one.
  const auto weigh = [&](int tile, Place before) {
    const auto after = [&](int groups) {
      slice.finish(Slice::multiplied_after(groups - 1), Slice::multiplied_after(groups), tile - 1, before);
    };
    block.with_columns(tile, [&](const Columns& of_tile) {
      PairSums unused[2];
      const void* const fields = block.shared + Shape::x_slots_at;
      const int of_block = row - block.block.first_row;
      // Each time: registers are short.
      const Row rows[2] = {load_row<true>(fields, 64, of_block), load_row<true>(fields, 64, of_block + 8)};
      const bool is_special = ambiguous || block.needs_mask(row, tile);
      const Special what = block.special(is_special, rows, row, tile, of_tile);
      with_special(is_special, [&](auto special) {
        weigh_tile<false, special, APART, columns>(unused, s, rows, block.scale, unit, false, of_tile, what, lane, after);
      });
    });
    slice.finish(Slice::multiplied_after(Slice::steps), Slice::slabs, tile - 1, before);
    pack_weights<PRODUCT, columns>(packed, s);
  };

  // Before consumer 0's first tile stands one whose W is zero, so that every tile is treated alike; its y is the end of the first: slabs of
  // a slice, at every depth, so none that release_unsliced gives back under this product.
  const int other = 1 - consumer;
  int tile = block.block.first_tile + consumer;
  Place before{0, 0};  // tile − 1, the other consumer's
  Place at = consumer == 0 ? before : block.after(before, layout.slabs);
  if (consumer == 1) {
    slice.publish(packed);
    ptx::arrive_named(published + consumer, 256);
  }
  ptx::barrier_wait(block.x_full(), 0);
  load_x(block.first_slab(tile));
#pragma unroll 1
  for (; tile < block.block.last_tile; tile += 2) {
    issue_logits(tile, at);
    slice.wait_for(tile - 1, before);
    ptx::sync_named(published + other, 256);
    ptx::wgmma_fence();
    slice.issue_published(out, tile - 1, before);
    ptx::wgmma_wait<Slice::slabs>();
    ptx::hold(s);
    release_unsliced(tile, at);
    weigh(tile, before);
    slice.publish(packed);
    ptx::arrive_named(published + consumer, 256);
    slice.issue_own(out, packed, tile, at);
    slice.finish(0, Slice::slabs, tile, at);
    before = block.after(at, layout.slabs);
    at = block.after(before, layout.slabs);
  }
  if (tile == block.block.last_tile) {  // the other consumer's was the last
    slice.wait_for(tile - 1, before);
    ptx::sync_named(published + other, 256);
    ptx::wgmma_fence();
    slice.issue_published(out, tile - 1, before);
    ptx::wgmma_wait<0>();
  }
#pragma unroll
  for (int i = 0; i < Slice::slabs; ++i) ptx::hold(out[i]);

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= pass.x.count) continue;
    float* to = pass.out + block.block.place(pass, row + 8 * r) * work.depth;
#pragma unroll
    for (int i = 0; i < Slice::slabs; ++i) {
#pragma unroll
      for (int n = 0; n < Shape::slab_depth / 8; ++n) {
        const std::int64_t column = (slice.first_slab() + i) * Shape::slab_depth + 8 * n + accumulator_column(lane, 0);
        store_pair(to, work.depth, column, out[i][n][2 * r] * per_unit, out[i][n][2 * r + 1] * per_unit);
      }
    }
  }
  block.finish();
}

}  // namespace fastsupcon::cuda
