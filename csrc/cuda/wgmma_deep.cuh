// Hopper kernels for depths of 257 to 1024, half: what their forward and backward share.
//
// Shared memory holds the block's rows x for good, and a ring of panels (64 of the depth) of tiles of y: whole tiles would be too few. A
// panel's place is given back as soon as its last product has read it. How much fits depends on the depth alone and is decided on the host
// (DeepLayout), so that one kernel serves all depths that need as many registers.
#pragma once

#include "pairs.cuh"

namespace fastsupcon::cuda {

constexpr int kDeepDepth = 1024;  // the largest
constexpr int kPanelDepth = 64;

struct DeepLayout {
  int panels;     // of the depth
  int slice;      // panels of the result that a consumer of the backward owns; 0 in the forward
  int consumers;  // warpgroups beside the producer
  int places;     // of the ring
};

template <bool BACKWARD>
struct DeepShape {
  static constexpr int columns = BACKWARD ? 32 : 128;    // of a tile
  static constexpr int terms_places = BACKWARD ? 4 : 1;  // tiles whose terms are held
  static constexpr int terms_threads = 96;               // that compute them
  static constexpr int most_places = 40;
  static constexpr int most_threads = 3 * 128;
  static constexpr int producer_registers = BACKWARD ? 24 : 40, consumer_registers = BACKWARD ? 240 : 232;
  static_assert(producer_registers + 2 * consumer_registers <= 3 * (65536 / most_threads / 8 * 8),
                "setmaxnreg hands out what the block was launched with, and waits forever for more");
  static constexpr int panel_bytes = columns * kPanelBytes;
  // Shared memory: W of two tiles side by side, one panel; terms and keys; sums of W; barriers; x; the ring.
  static constexpr int terms_at = BACKWARD ? 64 * kPanelBytes : 0;
  static constexpr int keys_at = terms_at + terms_places * columns * static_cast<int>(sizeof(Terms));
  static constexpr int sums_at = keys_at + terms_places * columns * static_cast<int>(sizeof(std::int64_t));
  static constexpr int barriers_at = sums_at + (BACKWARD ? 64 * static_cast<int>(sizeof(float)) : 0);
  static constexpr int x_at = (barriers_at + 8 * (1 + 2 * terms_places + 2 * most_places) + 1023) / 1024 * 1024;

  __host__ __device__ static constexpr int rows(int consumers) { return BACKWARD ? 64 : 64 * consumers; }
  __host__ __device__ static constexpr int ring_at(int panels, int consumers) { return x_at + panels * rows(consumers) * kPanelBytes; }
  static constexpr int fitting_places(int panels, int consumers) {
    const int fitting = (kBlockSharedBytes - ring_at(panels, consumers)) / panel_bytes;
    return fitting < most_places ? fitting : most_places;
  }
};

// Where a panel lies in the ring, and the parity of the round in which it is there.
struct Place {
  int index, parity;
};

template <Product PRODUCT, bool BACKWARD>
struct DeepBlock {
  using Shape = DeepShape<BACKWARD>;
  static constexpr int columns = Shape::columns;

  const Work& work;
  const DeepLayout& layout;
  int rows;
  std::int64_t first_row;
  int first_tile, last_tile;
  unsigned char* shared = ptx::shared_memory();
  ptx::Address weights = ptx::address(shared), barriers = weights + Shape::barriers_at, x_at = weights + Shape::x_at, ring;

  FASTSUPCON_DEVICE DeepBlock(const Work& work, const DeepLayout& layout)
      : work(work),
        layout(layout),
        rows(Shape::rows(layout.consumers)),
        first_row(ptx::block_x() * rows),
        first_tile(static_cast<int>(ptx::block_y() * work.tiles_per_split)),
        last_tile(first_tile + static_cast<int>(work.tiles_per_split)),
        ring(weights + Shape::ring_at(layout.panels, layout.consumers)) {
    const int tiles = static_cast<int>(ceil_div(work.y.count, columns));
    if (last_tile > tiles) last_tile = tiles;
    if (ptx::thread() == 0) {
      const int releases = BACKWARD ? 4 : 4 * layout.consumers;  // by warps: of the one consumer that reads last, or of all
      ptx::barrier_init(x_full(), 1);
      for (int place = 0; place < Shape::terms_places; ++place) {
        ptx::barrier_init(terms_full(place), Shape::terms_threads);
        ptx::barrier_init(terms_empty(place), releases);
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
  FASTSUPCON_DEVICE ptx::Address terms_full(int place) const { return barriers + 8 * (1 + place); }
  FASTSUPCON_DEVICE ptx::Address terms_empty(int place) const { return barriers + 8 * (1 + Shape::terms_places + place); }
  FASTSUPCON_DEVICE ptx::Address full(int place) const { return barriers + 8 * (1 + 2 * Shape::terms_places + place); }
  FASTSUPCON_DEVICE ptx::Address empty(int place) const { return full(Shape::most_places + place); }

  FASTSUPCON_DEVICE ptx::Address x_panel(int panel) const { return x_at + panel * rows * kPanelBytes; }
  FASTSUPCON_DEVICE ptx::Address y_panel(Place at) const { return ring + at.index * Shape::panel_bytes; }
  FASTSUPCON_DEVICE Place after(Place at, int panels) const {  // panels ≤ places
    const int index = at.index + panels;
    return index < layout.places ? Place{index, at.parity} : Place{index - layout.places, at.parity ^ 1};
  }

  // The panel with which a tile's order begins; the others follow cyclically. Backward: the order ends with the slice of the consumer that
  // does not own the tile, as it holds this slice while it waits for all of the next tile: at depth 1024 the ring could not pass it.
  FASTSUPCON_DEVICE int first_panel(int tile) const {
    const int other = 1 - owner(tile);
    const int end = (ptx::block_z() * 2 + other + 1) * layout.slice;
    return end < layout.panels ? end : 0;
  }
  FASTSUPCON_DEVICE int owner(int tile) const { return (tile - first_tile) & 1; }
  FASTSUPCON_DEVICE int next_panel(int panel) const { return panel + 1 < layout.panels ? panel + 1 : 0; }
  FASTSUPCON_DEVICE Place place_of(int tile, Place tile_at, int panel) const {
    const int position = panel - first_panel(tile);
    return after(tile_at, position < 0 ? position + layout.panels : position);
  }

  // The terms of tile number t of this block use place t % terms_places for the (t / terms_places)-th time.
  FASTSUPCON_DEVICE int terms_place(int tile) const { return (tile - first_tile) % Shape::terms_places; }
  FASTSUPCON_DEVICE int terms_parity(int tile) const { return (tile - first_tile) / Shape::terms_places % 2; }
  FASTSUPCON_DEVICE Terms* terms(int place) const { return reinterpret_cast<Terms*>(shared + Shape::terms_at) + place * columns; }
  FASTSUPCON_DEVICE std::int64_t* keys(int place) const {
    return reinterpret_cast<std::int64_t*>(shared + Shape::keys_at) + place * columns;
  }

  // The producer: one thread of its first warp asks TMA for the panels, the other warps compute the terms. Apart, as the terms wait for
  // global memory, and TMA must not.
  FASTSUPCON_DEVICE void produce(const ptx::TensorMap& x_map, const ptx::TensorMap& y_map) const {
    if (ptx::warp() > 0) compute_terms(ptx::thread() - 32);
    else if (ptx::thread() == 0) fetch_panels(x_map, y_map);
  }
  FASTSUPCON_DEVICE void fetch_panels(const ptx::TensorMap& x_map, const ptx::TensorMap& y_map) const {
    ptx::barrier_arrive_expecting(x_full(), layout.panels * rows * kPanelBytes);
    for (int p = 0; p < layout.panels; ++p) {
      ptx::copy_box_async(x_panel(p), x_map, kPanelDepth * p, static_cast<int>(first_row), x_full());
    }
    Place at{0, 0};
#pragma unroll 1  // the producer has few registers
    for (int tile = first_tile; tile < last_tile; ++tile) {
      int panel = first_panel(tile);
#pragma unroll 1
      for (int p = 0; p < layout.panels; ++p) {
        ptx::barrier_wait(empty(at.index), at.parity ^ 1);
        ptx::barrier_arrive_expecting(full(at.index), Shape::panel_bytes);
        ptx::copy_box_async(y_panel(at), y_map, kPanelDepth * panel, tile * columns, full(at.index));
        at = after(at, 1);
        panel = next_panel(panel);
      }
    }
  }
  FASTSUPCON_DEVICE void compute_terms(int thread) const {
    const float per_unit = 1.0f / gradient_unit(work);
    constexpr int turns = (columns + Shape::terms_threads - 1) / Shape::terms_threads;
    int place = 0, parity = 1;
#pragma unroll 1
    for (int tile = first_tile; tile < last_tile; ++tile) {
      ptx::barrier_wait(terms_empty(place), parity);
#pragma unroll 1  // the producer has few registers
      for (int turn = 0; turn < turns; ++turn) {
        const int c = turn * Shape::terms_threads + thread;
        if (c >= columns) continue;
        const std::int64_t column = std::int64_t{tile} * columns + c;
        terms(place)[c] = terms_of(work, work.y, column, per_unit);
        keys(place)[c] = key_of(work.y, column);
      }
      ptx::barrier_arrive(terms_full(place));
      if (++place == Shape::terms_places) {
        place = 0;
        parity ^= 1;
      }
    }
  }

  FASTSUPCON_DEVICE void wait_for(Place at) const { ptx::barrier_wait(full(at.index), at.parity); }
  FASTSUPCON_DEVICE void release(Place at) const {
    if (ptx::lane() == 0) ptx::barrier_arrive(empty(at.index));
  }

  // use(terms) with the terms of a tile's columns.
  template <class Use>
  FASTSUPCON_DEVICE void with_terms(int tile, Use use) const {
    const int place = terms_place(tile);
    ptx::barrier_wait(terms_full(place), terms_parity(tile));
    use(ColumnTerms{terms(place), keys(place), std::int64_t{tile} * columns});
    ptx::sync_warp();
    if (ptx::lane() == 0) ptx::barrier_arrive(terms_empty(place));
  }
  FASTSUPCON_DEVICE bool needs_mask(int tile) const {
    return cuda::needs_mask(work, first_row, rows, std::int64_t{tile} * columns, columns);
  }

  // s (+)= x yᵀ over one panel of the depth, of 64 rows from `row` on; under way on return.
  FASTSUPCON_DEVICE void issue_logits_of_panel(float (&s)[columns / 8][4], int row, int panel, Place at, bool accumulate) const {
    const ptx::Address x = x_panel(panel) + row * kPanelBytes, y = y_panel(at);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::Wgmma<PRODUCT == Product::bf16, columns>::shared(s, depth_major_descriptor(x, step), depth_major_descriptor(y, step),
                                                            accumulate || step > 0);
    }
    ptx::wgmma_commit();
  }
};

}  // namespace fastsupcon::cuda
