// Hopper kernels for depths of 257 to 1024, half: what the forward of all pairs and the backward share beside slabs.
#pragma once

#include "wgmma.cuh"
#include "wgmma_slabs.cuh"

namespace fastsupcon::cuda {

template <bool BACKWARD, bool APART, int COLUMNS>
struct DeepShape : SlabShape<COLUMNS> {
  using SlabShape<COLUMNS>::columns;
  using SlabShape<COLUMNS>::slab_panels;
  using SlabShape<COLUMNS>::slab_bytes;
  static constexpr int slots_places = BACKWARD ? 4 : 1;  // tiles whose slots are held
  static constexpr int most_places = 20;
  static constexpr int most_threads = 3 * 128;
  static constexpr int producer_registers = BACKWARD ? 24 : 40, consumer_registers = BACKWARD ? 240 : 232;
  static_assert(producer_registers + 2 * consumer_registers <= 3 * (65536 / most_threads / 8 * 8),
                "setmaxnreg hands out what the block was launched with, and waits forever for more");
  static constexpr int slots = cuda::slots(BACKWARD, false, APART), slots_bytes = slots * columns * kFieldBytes;
  static constexpr int x_slots = BACKWARD ? kEqual + 1 : 0;  // fields of x; the forward holds those of a lane's rows in registers
  // Shared memory: W of two tiles; slots of tiles and of x; barriers; x; the ring.
  static constexpr int slots_at = BACKWARD ? 2 * 64 * COLUMNS * 2 : 0;
  static constexpr int x_slots_at = slots_at + slots_places * slots_bytes, x_slots_bytes = x_slots * 64 * kFieldBytes;
  static constexpr int barriers_at = x_slots_at + x_slots_bytes;
  static constexpr int ring_barriers_at = barriers_at + 8 * (1 + 2 * slots_places);
  static constexpr int x_at = (ring_barriers_at + 16 * most_places + 1023) / 1024 * 1024;

  __host__ __device__ static constexpr int rows(int consumers) { return BACKWARD ? 64 : 64 * consumers; }
  __host__ __device__ static constexpr int ring_at(int slabs, int consumers) {
    return x_at + slabs * slab_panels * rows(consumers) * kPanelBytes;
  }
  static constexpr int fitting_places(int slabs, int consumers) {
    const int fitting = (kBlockSharedBytes - ring_at(slabs, consumers)) / slab_bytes;
    return fitting < most_places ? fitting : most_places;
  }
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
  float scale = scale_of(work.scale) * logit_unit(true);  // of logits, in their unit
  unsigned char* shared = ptx::shared_memory();
  ptx::Address weights = ptx::address(shared), barriers = weights + Shape::barriers_at;
  Slabs<PRODUCT, COLUMNS> ring{layout, rows, weights + Shape::x_at, weights + Shape::ring_at(layout.slabs, layout.consumers),
                               weights + Shape::ring_barriers_at};

  FASTSUPCON_DEVICE DeepBlock(const Work& work, const DeepLayout& layout)
      : work(work),
        layout(layout),
        rows(Shape::rows(layout.consumers)),
        block(block_work(work, rows, columns)),
        pass(work.passes[block.pass]) {
    if (ptx::thread() == 0) {
      const int releases = BACKWARD ? 4 : 4 * layout.consumers;  // by warps: of the one consumer that reads last, or of all
      ptx::barrier_init(x_full(), 1);
      for (int place = 0; place < Shape::slots_places; ++place) {
        ptx::barrier_init(slots_full(place), 1);
        ptx::barrier_init(slots_empty(place), releases);
      }
      ring.init(releases);
      ptx::barrier_init_done();
    }
    ptx::sync_block();
  }

  FASTSUPCON_DEVICE ptx::Address x_full() const { return barriers; }
  FASTSUPCON_DEVICE ptx::Address slots_full(int place) const { return barriers + 8 * (1 + place); }
  FASTSUPCON_DEVICE ptx::Address slots_empty(int place) const { return barriers + 8 * (1 + Shape::slots_places + place); }

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
    return ring.after(tile_at, position < 0 ? position + layout.slabs : position);
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
      ptx::copy_box_async(ring.x_panel(p), x_map, kPanelDepth * p, block.first_row, x_full());
    }
    Place at{0, 0};
#pragma unroll 1  // the producer has few registers
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      int slab = first_slab(tile);
#pragma unroll 1
      for (int i = 0; i < layout.slabs; ++i) {
        ring.fetch(y_map, tile, slab, at);
        at = ring.after(at, 1);
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
};

}  // namespace fastsupcon::cuda
