// Hopper kernels for depths of 257 to 1024, half: what their forward and backward share.
//
// Shared memory holds the block's rows x for good, and a ring of slabs of tiles of y: whole tiles would be too few. A slab is a panel, 64
// of the depth; of tiles of 32 columns it is two panels, as the wait for one and its addresses took longer than its products. A slab's
// place in the ring is given back as soon as its last product has read it. How much fits depends on the depth alone and is decided on the
// host (DeepLayout), so that one kernel serves all depths that need as many registers.
#pragma once

#include "wgmma.cuh"

namespace fastsupcon::cuda {

constexpr int kDeepDepth = 1024;  // the largest
constexpr int kPanelDepth = 64;

struct DeepLayout {
  int slabs;      // of the depth
  int slice;      // slabs of the result that a consumer of the backward owns; 0 in the forward
  int consumers;  // warpgroups beside the producer
  int places;     // of the ring
};

template <bool BACKWARD, bool APART, int COLUMNS>
struct DeepShape {
  static constexpr int columns = COLUMNS;                // of a tile
  static constexpr int slots_places = BACKWARD ? 4 : 1;  // tiles whose slots are held
  static constexpr int slab_panels = COLUMNS == 32 ? 2 : 1, slab_depth = slab_panels * kPanelDepth;
  static constexpr int most_places = 20;
  static constexpr int most_threads = 3 * 128;
  static constexpr int producer_registers = BACKWARD ? 24 : 40, consumer_registers = BACKWARD ? 240 : 232;
  static_assert(producer_registers + 2 * consumer_registers <= 3 * (65536 / most_threads / 8 * 8),
                "setmaxnreg hands out what the block was launched with, and waits forever for more");
  static constexpr int panel_bytes = columns * kPanelBytes, slab_bytes = slab_panels * panel_bytes;
  static constexpr int slots = cuda::slots(BACKWARD, false, APART), slots_bytes = slots * columns * kFieldBytes;
  static constexpr int x_slots = BACKWARD ? kEqual + 1 : 0;  // fields of x; the forward holds those of a lane's rows in registers
  // Shared memory: W of two tiles; slots of tiles and of x; barriers; x; the ring.
  static constexpr int slots_at = BACKWARD ? 2 * 64 * COLUMNS * 2 : 0;
  static constexpr int x_slots_at = slots_at + slots_places * slots_bytes, x_slots_bytes = x_slots * 64 * kFieldBytes;
  static constexpr int barriers_at = x_slots_at + x_slots_bytes;
  static constexpr int x_at = (barriers_at + 8 * (1 + 2 * slots_places + 2 * most_places) + 1023) / 1024 * 1024;

  __host__ __device__ static constexpr int rows(int consumers) { return BACKWARD ? 64 : 64 * consumers; }
  __host__ __device__ static constexpr int ring_at(int slabs, int consumers) {
    return x_at + slabs * slab_panels * rows(consumers) * kPanelBytes;
  }
  static constexpr int fitting_places(int slabs, int consumers) {
    const int fitting = (kBlockSharedBytes - ring_at(slabs, consumers)) / slab_bytes;
    return fitting < most_places ? fitting : most_places;
  }
};

// Where a slab lies in the ring, and the parity of the round in which it is there.
struct Place {
  int index, parity;
};

template <Product PRODUCT, bool BACKWARD, bool APART, int COLUMNS>
struct DeepBlock {
  using Shape = DeepShape<BACKWARD, APART, COLUMNS>;
  static constexpr int columns = Shape::columns;

  const Work& work;
  const DeepLayout& layout;
  int rows;
  BlockWork block;
  const Pass& pass;
  float scale = static_cast<float>(work.scale.value) * logit_unit(true);  // of logits, in their unit
  unsigned char* shared = ptx::shared_memory();
  ptx::Address weights = ptx::address(shared), barriers = weights + Shape::barriers_at, x_at = weights + Shape::x_at, ring;

  FASTSUPCON_DEVICE DeepBlock(const Work& work, const DeepLayout& layout)
      : work(work),
        layout(layout),
        rows(Shape::rows(layout.consumers)),
        block(block_work(work, rows, columns)),
        pass(work.passes[block.pass]),
        ring(weights + Shape::ring_at(layout.slabs, layout.consumers)) {
    if (ptx::thread() == 0) {
      const int releases = BACKWARD ? 4 : 4 * layout.consumers;  // by warps: of the one consumer that reads last, or of all
      ptx::barrier_init(x_full(), 1);
      for (int place = 0; place < Shape::slots_places; ++place) {
        ptx::barrier_init(slots_full(place), 1);
        ptx::barrier_init(slots_empty(place), releases);
      }
      for (int place = 0; place < layout.places; ++place) {
        ptx::barrier_init(full(place), 1);
        ptx::barrier_init(empty(place), releases);
      }
      ptx::barrier_init_done();
    }
    ptx::sync_block();
  }

  FASTSUPCON_DEVICE ptx::Address x_full() const { return barriers; }
  FASTSUPCON_DEVICE ptx::Address slots_full(int place) const { return barriers + 8 * (1 + place); }
  FASTSUPCON_DEVICE ptx::Address slots_empty(int place) const { return barriers + 8 * (1 + Shape::slots_places + place); }
  FASTSUPCON_DEVICE ptx::Address full(int place) const { return barriers + 8 * (1 + 2 * Shape::slots_places + place); }
  FASTSUPCON_DEVICE ptx::Address empty(int place) const { return full(Shape::most_places + place); }

  FASTSUPCON_DEVICE ptx::Address x_panel(int panel) const { return x_at + panel * rows * kPanelBytes; }
  FASTSUPCON_DEVICE ptx::Address y_slab(Place at) const { return ring + at.index * Shape::slab_bytes; }
  FASTSUPCON_DEVICE Place after(Place at, int slabs) const {  // slabs ≤ places
    const int index = at.index + slabs;
    return index < layout.places ? Place{index, at.parity} : Place{index - layout.places, at.parity ^ 1};
  }

  // The slab with which a tile's order begins; the others follow cyclically. Backward: the order ends with the slice of the consumer that
  // does not own the tile, as it holds this slice while it waits for all of the next tile: at depth 1024 the ring could not pass it.
  FASTSUPCON_DEVICE int first_slab(int tile) const {
    const int other = 1 - owner(tile);
    const int end = (ptx::block_z() * 2 + other + 1) * layout.slice;
    return end < layout.slabs ? end : 0;
  }
  FASTSUPCON_DEVICE int owner(int tile) const { return (tile - block.first_tile) & 1; }
  FASTSUPCON_DEVICE int next_slab(int slab) const { return slab + 1 < layout.slabs ? slab + 1 : 0; }
  FASTSUPCON_DEVICE Place place_of(int tile, Place tile_at, int slab) const {
    const int position = slab - first_slab(tile);
    return after(tile_at, position < 0 ? position + layout.slabs : position);
  }

  // The slots of tile number t of this block use place t % slots_places for the (t / slots_places)-th time.
  FASTSUPCON_DEVICE int slots_place(int tile) const { return (tile - block.first_tile) % Shape::slots_places; }
  FASTSUPCON_DEVICE int slots_parity(int tile) const { return (tile - block.first_tile) / Shape::slots_places % 2; }

  // The producer: one thread of its first warp asks for the slabs, one of its second for the slots. Not the same, as the forward wants the
  // next tile's slabs before it gives a tile's slots back.
  FASTSUPCON_DEVICE void produce(const Maps& maps) const {
    if (ptx::lane() != 0) return;
    if (ptx::thread() == 0) fetch_slabs(maps.x[block.pass], maps.y[block.pass]);
    if (ptx::thread() == 32) fetch_tiles_slots();
  }
  FASTSUPCON_DEVICE void fetch_slabs(const ptx::TensorMap& x_map, const ptx::TensorMap& y_map) const {
    const int panels = layout.slabs * Shape::slab_panels;
    ptx::barrier_arrive_expecting(x_full(), panels * rows * kPanelBytes + Shape::x_slots_bytes);
    fetch_slots(weights + Shape::x_slots_at, pass.x, block.first_row, 64, Shape::x_slots, true, true, x_full());
    for (int p = 0; p < panels; ++p) {
      ptx::copy_box_async(x_panel(p), x_map, kPanelDepth * p, block.first_row, x_full());
    }
    Place at{0, 0};
#pragma unroll 1  // the producer has few registers
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      int slab = first_slab(tile);
#pragma unroll 1
      for (int i = 0; i < layout.slabs; ++i) {
        ptx::barrier_wait(empty(at.index), at.parity ^ 1);
        ptx::barrier_arrive_expecting(full(at.index), Shape::slab_bytes);
        for (int h = 0; h < Shape::slab_panels; ++h) {
          ptx::copy_box_async(y_slab(at) + h * Shape::panel_bytes, y_map, Shape::slab_depth * slab + kPanelDepth * h, tile * columns,
                              full(at.index));
        }
        at = after(at, 1);
        slab = next_slab(slab);
      }
    }
  }
  FASTSUPCON_DEVICE void fetch_tiles_slots() const {
#pragma unroll 1  // the producer has few registers
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      const int place = slots_place(tile);
      ptx::barrier_wait(slots_empty(place), slots_parity(tile) ^ 1);
      ptx::barrier_arrive_expecting(slots_full(place), Shape::slots_bytes);
      fetch_slots(weights + Shape::slots_at + place * Shape::slots_bytes, pass.y, tile * columns, columns, Shape::slots, BACKWARD,
                  false, slots_full(place));
    }
  }

  FASTSUPCON_DEVICE void wait_for(Place at) const { ptx::barrier_wait(full(at.index), at.parity); }
  FASTSUPCON_DEVICE void release(Place at) const {
    if (ptx::lane() == 0) ptx::barrier_arrive(empty(at.index));
  }

  // use(the tile's columns).
  template <class Use>
  FASTSUPCON_DEVICE void with_columns(int tile, Use use) const {
    const int place = slots_place(tile);
    ptx::barrier_wait(slots_full(place), slots_parity(tile));
    use(Columns{shared + Shape::slots_at + place * Shape::slots_bytes, columns});
    ptx::sync_warp();
    if (ptx::lane() == 0) ptx::barrier_arrive(slots_empty(place));
  }
  // For the 16 rows of a warp, of which the lane holds `row` and row + 8.
  FASTSUPCON_DEVICE bool needs_mask(int row, int tile) const {
    return cuda::needs_mask(work, pass, row - accumulator_row(ptx::lane(), 0), 16, tile * columns, columns);
  }
  FASTSUPCON_DEVICE Special special(bool is_special, const Row (&rows)[2], int row, int tile, const Columns& of_tile) const {
    return is_special ? special_of<columns>(work, pass, rows, row, tile * columns, of_tile, ptx::lane()) : Special{};
  }

  // s (+)= x yᵀ over one slab of the depth, of 64 rows from `row` on; under way on return.
  FASTSUPCON_DEVICE void issue_logits_of_slab(float (&s)[columns / 8][4], int row, int slab, Place at, bool accumulate) const {
#pragma unroll
    for (int h = 0; h < Shape::slab_panels; ++h) {
      const ptx::Address x = x_panel(slab * Shape::slab_panels + h) + row * kPanelBytes, y = y_slab(at) + h * Shape::panel_bytes;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::Wgmma<PRODUCT == Product::bf16, columns>::shared(s, depth_major_descriptor(x, step), depth_major_descriptor(y, step),
                                                              accumulate || h + step > 0);
      }
    }
    ptx::wgmma_commit();
  }
};

}  // namespace fastsupcon::cuda
