// What the products of the kernels for depths of 257 to 1024 on Hopper read: rows x, which stay, and a ring of slabs of tiles of y: whole
// tiles would be too few. A slab is a panel, 64 of the depth; of tiles of 32 columns it is two panels, as the wait for one and its addresses
// took longer than its products. A slab's place in the ring is given back as soon as its last product has read it. How much fits depends
// on the depth alone and is decided on the host (DeepLayout), so that one kernel serves all depths that need as many registers.
#pragma once

#include "tile.cuh"

namespace fastsupcon::cuda {

constexpr int kDeepDepth = 1024;  // the largest
constexpr int kPanelDepth = 64;

struct DeepLayout {
  int slabs;      // of the depth
  int slice;      // slabs of the result that a consumer of the backward owns; 0 in the forward
  int consumers;  // warpgroups beside the producer
  int places;     // of the ring
};

template <int COLUMNS>
struct SlabShape {
  static constexpr int columns = COLUMNS;  // of a tile
  static constexpr int slab_panels = COLUMNS == 32 ? 2 : 1, slab_depth = slab_panels * kPanelDepth;
  static constexpr int panel_bytes = columns * kPanelBytes, slab_bytes = slab_panels * panel_bytes;
};

// Where a slab lies in the ring, and the parity of the round in which it is there.
struct Place {
  int index, parity;
};

template <Product PRODUCT, int COLUMNS>
struct Slabs {
  using Shape = SlabShape<COLUMNS>;

  const DeepLayout& layout;
  int rows;  // of x
  ptx::Address x_at, ring, barriers;

  FASTSUPCON_DEVICE void init(int releases) const {  // by a thread; releases: by warps, of a place
    for (int place = 0; place < layout.places; ++place) {
      ptx::barrier_init(full(place), 1);
      ptx::barrier_init(empty(place), releases);
    }
  }
  FASTSUPCON_DEVICE ptx::Address full(int place) const { return barriers + 16 * place; }
  FASTSUPCON_DEVICE ptx::Address empty(int place) const { return full(place) + 8; }

  FASTSUPCON_DEVICE ptx::Address x_panel(int panel) const { return x_at + panel * rows * kPanelBytes; }
  FASTSUPCON_DEVICE ptx::Address y_slab(Place at) const { return ring + at.index * Shape::slab_bytes; }
  FASTSUPCON_DEVICE Place after(Place at, int slabs) const {  // slabs ≤ places
    const int index = at.index + slabs;
    return index < layout.places ? Place{index, at.parity} : Place{index - layout.places, at.parity ^ 1};
  }

  // By one thread; `more` bytes come with the slab.
  FASTSUPCON_DEVICE void fetch(const ptx::TensorMap& map, int tile, int slab, Place at, int more = 0) const {
    ptx::barrier_wait(empty(at.index), at.parity ^ 1);
    ptx::barrier_arrive_expecting(full(at.index), Shape::slab_bytes + more);
    for (int h = 0; h < Shape::slab_panels; ++h) {
      ptx::copy_box_async(y_slab(at) + h * Shape::panel_bytes, map, Shape::slab_depth * slab + kPanelDepth * h, tile * COLUMNS,
                          full(at.index));
    }
  }
  FASTSUPCON_DEVICE void wait_for(Place at) const { ptx::barrier_wait(full(at.index), at.parity); }
  FASTSUPCON_DEVICE void release(Place at) const {
    if (ptx::lane() == 0) ptx::barrier_arrive(empty(at.index));
  }

  // s (+)= x yᵀ over one slab of the depth, of 64 rows from `row` on; under way on return.
  FASTSUPCON_DEVICE void issue_logits(float (&s)[COLUMNS / 8][4], int row, int slab, Place at, bool accumulate) const {
#pragma unroll
    for (int h = 0; h < Shape::slab_panels; ++h) {
      const ptx::Address x = x_panel(slab * Shape::slab_panels + h) + row * kPanelBytes, y = y_slab(at) + h * Shape::panel_bytes;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::Wgmma<PRODUCT == Product::bf16, COLUMNS>::shared(s, depth_major_descriptor(x, step), depth_major_descriptor(y, step),
                                                              accumulate || h + step > 0);
      }
    }
    ptx::wgmma_commit();
  }

  // x in registers: a warp's 16 rows of a panel, as it comes with 64 rows in a place of the ring; what is held of it gives the place back.
  FASTSUPCON_DEVICE void take_x(std::uint32_t (&x)[4][4], Place at) const {
    const MatrixRow mine = fragment_rows(ptx::lane());
    const int row = ptx::warp() % 4 * 16 + mine.row;
#pragma unroll
    for (int step = 0; step < 4; ++step) ptx::load_matrices(x[step], y_slab(at) + panel_offset(row, 2 * step + mine.chunk));
  }
  FASTSUPCON_DEVICE void issue_logits(float (&s)[COLUMNS / 8][4], const std::uint32_t (&x)[4][4], Place at) const {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::Wgmma<PRODUCT == Product::bf16, COLUMNS>::registers(s, x[step], depth_major_descriptor(y_slab(at), step));
    }
    ptx::wgmma_commit();
  }
};

}  // namespace fastsupcon::cuda
