// The kernels for sm_80 and every newer GPU: mma.sync fed by ldmatrix from panels that cp.async fills. Any depth, any alignment.
//
// A block owns ROWS = 4 warps · M_TILES · 16 rows x and visits tiles of 32 to 64 rows y; each warp forms the logits of its own rows with
// the whole tile, so nothing but panels and slots is shared and one barrier per step is enough. Depth in panels of 128 bytes:
//   PANELS 1, 2, 4: x stays in shared memory, tiles of y are double-buffered.
//   PANELS 0: any number of panels. Panels of x and y come through a ring of four stages; the backward's grid.z says which four panels of
//             the result a block sums (registers hold no more), and the logits are recomputed for each.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace fastsupcon::cuda {

constexpr int kMmaThreads = 128;
constexpr int kRing = 4;          // stages of the ring, PANELS = 0
constexpr int kOutPanels = 4;     // of the result that one block sums, PANELS = 0

// Unrolling of the loops over what is to be loaded and over panels of the depth. For f32 they stay loops: unrolled, the addresses of every
// turn took registers (mma_backward, 4 panels, sm_80: 255 and 248 bytes spilled, now 200 and none).
template <Product PRODUCT>
constexpr int kUnroll = PRODUCT == Product::f32 ? 1 : 16;

template <Product PRODUCT, int PANELS, bool BACKWARD>
struct MmaShape {
  // Registers decide, 255 of a thread: a backward of 32 rows × 64 columns (64 accumulators, 64 logits) spilled 3 KiB.
  static constexpr int m_tiles = kIsHalf<PRODUCT> && (PANELS == 1 || PANELS == 2) && !BACKWARD ? 2 : 1;
  static constexpr int rows = 4 * 16 * m_tiles;
  // Of a tile. In the backward 64 would not do: two tiles of four panels and their slots pass 99 KiB (with 48, 104 bytes were spilled).
  static constexpr int columns = PANELS == 4 && BACKWARD ? 32 : 64;
  static constexpr int out_panels = PANELS ? PANELS : kOutPanels;
  static constexpr int panel_columns = kPanelBytes / kElementBytes<PRODUCT>;
  static constexpr int stages = PANELS ? 2 : kRing;
  static constexpr int x_bytes = rows * kPanelBytes * (PANELS ? PANELS : kRing);
  static constexpr int y_panel_bytes = columns * kPanelBytes;
  static constexpr int y_bytes = y_panel_bytes * (PANELS ? 2 * PANELS : kRing);
  static constexpr int slots_at = x_bytes + y_bytes, slots_bytes = slots(BACKWARD, true, true) * columns * kFieldBytes;
  static constexpr int shared_bytes = slots_at + 2 * slots_bytes;
  static_assert(shared_bytes <= kSmallestBlockSharedBytes, "the smallest GPU of this generation gives a block 99 KiB");
};

// ---- Shared memory in -----------------------------------------------------------------------------------------------------------

// 16 bytes of row `row` from byte `column` on, element by element: rows that do not start at multiples of 16 bytes.
template <int BYTES>
FASTSUPCON_DEVICE void gather_16_bytes(ptx::Address to, const Side& side, std::int64_t row, std::int64_t column, std::int64_t row_bytes) {
  std::uint32_t words[4] = {0, 0, 0, 0};
  const auto* bytes = static_cast<const unsigned char*>(side.rows) + row * row_bytes + column;
  if (row < side.count) {
#pragma unroll
    for (int i = 0; i < 16; i += BYTES) {
      if (column + i >= row_bytes) continue;
      if constexpr (BYTES == 4) words[i / 4] = *reinterpret_cast<const std::uint32_t*>(bytes + i);
      else words[i / 4] |= static_cast<std::uint32_t>(*reinterpret_cast<const std::uint16_t*>(bytes + i)) << (8 * (i % 4));
    }
  }
  ptx::store_16_bytes(to, words);
}

template <Product PRODUCT, int ROWS>
FASTSUPCON_DEVICE void load_panel(ptx::Address panel, const Work& work, const Side& side, std::int64_t first_row, int panel_index) {
  constexpr int bytes = kElementBytes<PRODUCT>;
  static_assert(ROWS * kChunks % kMmaThreads == 0);
  const std::int64_t row_bytes = work.depth * bytes;
#pragma unroll kUnroll<PRODUCT>
  for (int i = 0; i < ROWS * kChunks / kMmaThreads; ++i) {
    const int place = ptx::thread() + i * kMmaThreads;
    const int row = place / kChunks, chunk = place % kChunks;
    const std::int64_t column = static_cast<std::int64_t>(panel_index) * kPanelBytes + chunk * kChunkBytes;
    const ptx::Address to = panel + panel_offset(row, chunk);
    if (work.aligned) {
      const bool valid = first_row + row < side.count && column < row_bytes;
      const auto* from = static_cast<const unsigned char*>(side.rows) + (valid ? (first_row + row) * row_bytes + column : 0);
      ptx::copy_async_16_bytes(to, from, valid);
    } else {
      gather_16_bytes<bytes>(to, side, first_row + row, column, row_bytes);
    }
  }
}

// ---- Products -------------------------------------------------------------------------------------------------------------------

// Operands of one mma: 32 bits per register; for f32 also what rounding to tf32 left, so that three products give single precision.
template <Product PRODUCT, int N>
struct Operand {
  std::uint32_t high[N];
};
template <int N>
struct Operand<Product::f32, N> {
  std::uint32_t high[N], low[N];
};

template <Product PRODUCT, int N>
FASTSUPCON_DEVICE Operand<PRODUCT, N> operand(const std::uint32_t (&raw)[N]) {
  Operand<PRODUCT, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (kIsHalf<PRODUCT>) {
      result.high[i] = raw[i];
    } else if constexpr (PRODUCT == Product::tf32) {
      result.high[i] = ptx::round_to_tf32(ptx::from_bits(raw[i]));
    } else {
      // To nearest, in integers: cvt.rna is four instructions on sm_80 and sm_90. What is left, exact, has at most 12 significant bits, and
      // the tensor cores read 11: 2^-23 |x| is lost at most, as if it had been rounded too. A NaN that the sum turns into 0 is left in low.
      result.high[i] = (raw[i] + 0x1000) & ~0x1fffu;
      result.low[i] = ptx::bits(ptx::from_bits(raw[i]) - ptx::from_bits(result.high[i]));
    }
  }
  return result;
}

// Steps of the summation that one multiply_add takes together.
template <Product PRODUCT>
constexpr int kSteps = PRODUCT == Product::f32 ? 2 : 1;

// d += a b. Tensor cores round toward zero when they add, so a long sum kept in their accumulators comes out too small, by up to 2^-23 for
// each addition. f16, bf16 and tf32 have rounded operands by far more. f32 has not: there the products of two steps are summed apart, small
// terms first, so that two additions truncate (< 2^-22 of the two steps' sum), and FADD, which rounds to nearest, adds that to d.
template <Product PRODUCT, int N>
FASTSUPCON_DEVICE void multiply_add(float (&d)[4], const Operand<PRODUCT, 4> (&a)[kSteps<PRODUCT>],
                                    const Operand<PRODUCT, N> (&b)[kSteps<PRODUCT>], int first) {
  if constexpr (PRODUCT == Product::f16) {
    ptx::mma_f16(d, a[0].high, b[0].high[first], b[0].high[first + 1]);
  } else if constexpr (PRODUCT == Product::bf16) {
    ptx::mma_bf16(d, a[0].high, b[0].high[first], b[0].high[first + 1]);
  } else if constexpr (PRODUCT == Product::tf32) {
    ptx::mma_tf32(d, a[0].high, b[0].high[first], b[0].high[first + 1]);
  } else {
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < kSteps<PRODUCT>; ++i) {
      ptx::mma_tf32(sum, a[i].low, b[i].high[first], b[i].high[first + 1]);
      ptx::mma_tf32(sum, a[i].high, b[i].low[first], b[i].low[first + 1]);
    }
#pragma unroll
    for (int i = 0; i < kSteps<PRODUCT>; ++i) ptx::mma_tf32(sum, a[i].high, b[i].high[first], b[i].high[first + 1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] += sum[e];
  }
}

// s += x yᵀ over one panel of the depth, in steps of 32 bytes.
template <Product PRODUCT, int M_TILES, int GROUPS>
FASTSUPCON_DEVICE void add_logits_of_panel(float (&s)[M_TILES][GROUPS][4], ptx::Address x_panel, ptx::Address y_panel, int first_row,
                                           int lane) {
  constexpr int steps = kSteps<PRODUCT>;
  const MatrixRow x_at = fragment_rows(lane), y_at = fragment_columns(lane);
#pragma unroll
  for (int step = 0; step < kChunks / 2; step += steps) {
    Operand<PRODUCT, 4> x[M_TILES][steps];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int i = 0; i < steps; ++i) {
        std::uint32_t raw[4];
        ptx::load_matrices(raw, x_panel + panel_offset(first_row + 16 * m + x_at.row, 2 * (step + i) + x_at.chunk));
        x[m][i] = operand<PRODUCT>(raw);
      }
    }
#pragma unroll
    for (int j = 0; j < GROUPS; j += 2) {
      Operand<PRODUCT, 4> y[steps];
#pragma unroll
      for (int i = 0; i < steps; ++i) {
        std::uint32_t raw[4];
        ptx::load_matrices(raw, y_panel + panel_offset(8 * j + y_at.row, 2 * (step + i) + y_at.chunk));
        y[i] = operand<PRODUCT>(raw);
      }
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        multiply_add(s[m][j], x[m], y, 0);
        multiply_add(s[m][j + 1], x[m], y, 2);
      }
    }
  }
}

// out += w y over COUNT panels of the result's columns, which lie one after the other in shared memory. Half: panel by panel.
template <Product PRODUCT, int COUNT, int M_TILES, int STEPS>
FASTSUPCON_DEVICE void add_weighted_panels(float (*out)[M_TILES][8][4], const std::uint32_t (&w)[M_TILES][STEPS][4], ptx::Address y_panels,
                                           int lane) {
  const MatrixRow y_at = fragment_transposed(lane);
#pragma unroll
  for (int p = 0; p < COUNT; ++p) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        std::uint32_t raw[4];
        ptx::load_matrices_transposed(raw, y_panels + p * 16 * STEPS * kPanelBytes + panel_offset(16 * k + y_at.row, n + y_at.chunk));
        const Operand<PRODUCT, 4> y[1] = {operand<PRODUCT>(raw)};
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          const Operand<PRODUCT, 4> weights[1] = {operand<PRODUCT>(w[m][k])};
          multiply_add(out[p][m][n], weights, y, 0);
          multiply_add(out[p][m][n + 1], weights, y, 2);
        }
      }
    }
  }
}

// The same for 32-bit elements. ldmatrix cannot transpose those, so y comes by words. The sum over a tile's rows may take any order: with
// k = t standing for row 2t and k = t + 4 for row 2t + 1, the accumulators of the first product are the A fragment as they are.
// Step by step through all panels: panel by panel the compiler would keep both halves of all of w for the next one, 32 registers.
template <Product PRODUCT, int COUNT, int GROUPS>
FASTSUPCON_DEVICE void add_weighted_panels(float (*out)[1][4][4], const float (&w)[1][GROUPS][4], ptx::Address y_panels, int lane) {
  constexpr int steps = kSteps<PRODUCT>;
  const int row = 2 * (lane % 4), column = lane / 4;
#pragma unroll
  for (int k = 0; k < GROUPS; k += steps) {
    Operand<PRODUCT, 4> weights[steps];
#pragma unroll
    for (int i = 0; i < steps; ++i) {
      const auto& of = w[0][k + i];
      weights[i] = operand<PRODUCT, 4>({ptx::bits(of[0]), ptx::bits(of[2]), ptx::bits(of[1]), ptx::bits(of[3])});
    }
#pragma unroll
    for (int p = 0; p < COUNT; ++p) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int chunk = 2 * n + column / 4;
        Operand<PRODUCT, 2> y[steps];
#pragma unroll
        for (int i = 0; i < steps; ++i) {
          const ptx::Address panel = y_panels + p * 8 * GROUPS * kPanelBytes + 4 * (column % 4);
          const int first = 8 * (k + i) + row;
          y[i] = operand<PRODUCT, 2>({ptx::load_word(panel + panel_offset(first, chunk)),
                                      ptx::load_word(panel + panel_offset(first + 1, chunk))});
        }
        multiply_add(out[p][0][n], weights, y, 0);
      }
    }
  }
}

// ---- Kernels --------------------------------------------------------------------------------------------------------------------

// What both kernels share: the tiles of one block, their panels and slots in shared memory.
template <Product PRODUCT, int PANELS, bool BACKWARD>
struct MmaBlock {
  using Shape = MmaShape<PRODUCT, PANELS, BACKWARD>;

  const Work& work;
  BlockWork block;
  const Pass& pass;
  int tile;
  int panels;  // of the depth
  bool bounded;
  float scale;  // of logits, in their unit
  unsigned char* shared = ptx::shared_memory();
  ptx::Address x_at = ptx::address(shared), y_at = x_at + Shape::x_bytes;

  FASTSUPCON_DEVICE explicit MmaBlock(const Work& work)
      : work(work),
        block(block_work(work, Shape::rows, Shape::columns)),
        pass(work.passes[block.pass]),
        tile(block.first_tile),
        panels(static_cast<int>(ceil_div(work.depth * kElementBytes<PRODUCT>, kPanelBytes))),
        bounded(is_bounded(work.scale)),
        scale(scale_of(work.scale) * logit_unit(bounded)) {}

  FASTSUPCON_DEVICE ptx::Address x_panel(int place) const { return x_at + place * Shape::rows * kPanelBytes; }
  FASTSUPCON_DEVICE ptx::Address y_panel(int place) const { return y_at + place * Shape::y_panel_bytes; }

  FASTSUPCON_DEVICE void load_x(int place, int panel) const {
    load_panel<PRODUCT, Shape::rows>(x_panel(place), work, pass.x, block.first_row, panel);
  }
  FASTSUPCON_DEVICE void load_y(int place, int of_tile, int panel) const {
    load_panel<PRODUCT, Shape::columns>(y_panel(place), work, pass.y, of_tile * Shape::columns, panel);
  }

  FASTSUPCON_DEVICE void load_slots(int of_tile) const {  // two tiles' places
    constexpr int per_slot = Shape::columns * kFieldBytes / 16;
    const int places = slots(BACKWARD, !bounded, true) * per_slot;
    const ptx::Address to = x_at + Shape::slots_at + of_tile % 2 * Shape::slots_bytes;
#pragma unroll 1
    for (int place = ptx::thread(); place < places; place += kMmaThreads) {
      const int slot = place / per_slot;
      const std::int64_t first = std::int64_t{field_of(slot, BACKWARD, !bounded)} * pass.y.field_rows + of_tile * Shape::columns;
      ptx::copy_async_16_bytes(to + place * 16, pass.y.fields + first * kFieldBytes + place % per_slot * 16, true);
    }
  }
  FASTSUPCON_DEVICE Columns columns() const { return {shared + Shape::slots_at + tile % 2 * Shape::slots_bytes, Shape::columns}; }

  // use(RUNNING, SPECIAL, the lane's rows, what is special) for this tile and the 16 rows of a warp from the lane's `row` and row + 8 on.
  template <class Use>
  FASTSUPCON_DEVICE void with_rows(int row, Use use) const {
    const int lane = ptx::lane(), first_column = tile * Shape::columns;
    const Row rows[2] = {load_row<BACKWARD>(pass.x, row), load_row<BACKWARD>(pass.x, row + 8)};  // each time: registers are short
    const bool ambiguous = ptx::any(is_ambiguous(rows[0]) || is_ambiguous(rows[1]));
    const bool masked = needs_mask(work, pass, row - accumulator_row(lane, 0), 16, first_column, Shape::columns);
    const bool is_special = ambiguous || masked;
    const Special what = is_special ? special_of<Shape::columns>(work, pass, rows, row, first_column, columns(), lane) : Special{};
    with_form(!bounded, is_special, [&](auto running, auto special) { use(running, special, rows, what); });
  }

  // The ring (PANELS = 0) runs over steps: for each tile its logits' panels of x and y, then, backward, the result's panels of y.
  int ring_tile = 0;  // of the step that is loaded next
  int ring_panel = 0, ring_place = 0;

  FASTSUPCON_DEVICE void ring_load() {
    if (ring_tile < block.last_tile) {
      if (ring_panel == 0) load_slots(ring_tile);  // at most three steps ahead, so into the place of the tile before this one
      if (ring_panel < panels) {
        load_x(ring_place, ring_panel);
        load_y(ring_place, ring_tile, ring_panel);
      } else {
        load_y(ring_place, ring_tile, ptx::block_z() * kOutPanels + ring_panel - panels);
      }
      if (++ring_panel == panels + (BACKWARD ? kOutPanels : 0)) {
        ring_panel = 0;
        ++ring_tile;
      }
    }
    ring_place = (ring_place + 1) % kRing;
    ptx::copy_async_commit();  // an empty group keeps the count
  }
  FASTSUPCON_DEVICE int ring_next() {  // waits for the oldest stage, and refills the one that was read before it
    ptx::copy_async_wait<kRing - 2>();
    ptx::sync_block();
    ring_load();
    return ring_place;  // all but one stage are loaded ahead, so that the next to be loaded is the one to be read
  }

  FASTSUPCON_DEVICE void load_tile(int of_tile) const {
    if (of_tile >= block.last_tile) return;
#pragma unroll kUnroll<PRODUCT>
    for (int p = 0; p < PANELS; ++p) load_y(of_tile % 2 * PANELS + p, of_tile, p);
    load_slots(of_tile);
    ptx::copy_async_commit();
  }
  FASTSUPCON_DEVICE int tile_place() const { return tile % 2 * PANELS; }

  // Tile by tile: on_logits(s), and then, backward, on_panels(COUNT, first, y) for COUNT panels of the result: for all of them at once, or,
  // where y comes through the ring, one by one.
  template <class OnLogits, class OnPanels>
  FASTSUPCON_DEVICE void for_each_tile(OnLogits on_logits, OnPanels on_panels) {
    if constexpr (PANELS) {
#pragma unroll
      for (int p = 0; p < PANELS; ++p) load_x(p, p);
      load_tile(tile);
    } else {
      ring_tile = tile;
      for (int i = 0; i < kRing - 1; ++i) ring_load();
    }
    const int warp_row = ptx::warp() * 16 * Shape::m_tiles, lane = ptx::lane();
    for (; tile < block.last_tile; ++tile) {
      float s[Shape::m_tiles][Shape::columns / 8][4] = {};
      if constexpr (PANELS) {
        ptx::copy_async_wait<0>();
        ptx::sync_block();
        load_tile(tile + 1);
#pragma unroll kUnroll<PRODUCT>
        for (int p = 0; p < PANELS; ++p) add_logits_of_panel<PRODUCT>(s, x_panel(p), y_panel(tile_place() + p), warp_row, lane);
      } else {
        for (int p = 0; p < panels; ++p) {
          const int place = ring_next();
          add_logits_of_panel<PRODUCT>(s, x_panel(place), y_panel(place), warp_row, lane);
        }
      }
      on_logits(s);
      if constexpr (BACKWARD && PANELS) {
        on_panels(std::integral_constant<int, PANELS>{}, 0, y_panel(tile_place()));
      } else if constexpr (BACKWARD) {
#pragma unroll
        for (int p = 0; p < Shape::out_panels; ++p) on_panels(std::integral_constant<int, 1>{}, p, y_panel(ring_next()));
      }
    }
  }
};

template <Product PRODUCT, int PANELS>
__global__ void __launch_bounds__(kMmaThreads) mma_forward(const __grid_constant__ Work work) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  using Block = MmaBlock<PRODUCT, PANELS, false>;
  using Shape = typename Block::Shape;
  Block block(work);
  const int lane = ptx::lane();
  const int first = block.block.first_row + ptx::warp() * 16 * Shape::m_tiles + accumulator_row(lane, 0);  // of this lane's rows
  RowSums sums[Shape::m_tiles][2];
  // nvcc 13.0 makes zeros of all but the first of an array of arrays, whatever their members' initial values are.
#pragma unroll
  for (int m = 0; m < Shape::m_tiles; ++m) sums[m][0] = sums[m][1] = RowSums{};
  block.for_each_tile(
      [&](auto& s) {
#pragma unroll
        for (int m = 0; m < Shape::m_tiles; ++m) {
          block.with_rows(first + 16 * m, [&](auto running, auto special, const auto& rows, const Special& what) {
            add_tile<running, special, true, Shape::columns>(sums[m], s[m], rows, block.scale, block.columns(), what, lane);
          });
        }
      },
      [](auto, int, ptx::Address) {});
#pragma unroll
  for (int m = 0; m < Shape::m_tiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) store_sums(block.pass, block.block, sums[m][r], first + 16 * m + 8 * r, block.bounded, lane);
  }
  static_assert(Shape::rows <= kMmaThreads);
  ptx::sync_block();
  const int thread = ptx::thread();
  if (is_last_split(block.pass, block.block, thread, [] { ptx::sync_block(); }) && thread < Shape::rows) {
    combine_splits(block.pass, block.block.first_row + thread);
  }
}

template <Product PRODUCT, int PANELS>
__global__ void __launch_bounds__(kMmaThreads) mma_backward(const __grid_constant__ Work work) {
  ptx::begin_kernel();
  if (!is_turn(work)) return;
  using Block = MmaBlock<PRODUCT, PANELS, true>;
  using Shape = typename Block::Shape;
  constexpr bool half = kIsHalf<PRODUCT>;
  Block block(work);
  const Pass& pass = block.pass;
  const int lane = ptx::lane();
  const int first = block.block.first_row + ptx::warp() * 16 * Shape::m_tiles + accumulator_row(lane, 0);
  const float unit = weight_unit<PRODUCT>(pass), per_unit = 1.0f / unit;
  const bool summed = pass.weight_sums || pass.products;
  PairSums sums[Shape::m_tiles][2];
  float out[Shape::out_panels][Shape::m_tiles][Shape::panel_columns / 8][4] = {};
  std::uint32_t packed[Shape::m_tiles][Shape::columns / 16][4];
  float weights[Shape::m_tiles][Shape::columns / 8][4];
  block.for_each_tile(
      [&](auto& s) {
#pragma unroll
        for (int m = 0; m < Shape::m_tiles; ++m) {
          block.with_rows(first + 16 * m, [&](auto running, auto special, const auto& rows, const Special& what) {
            weigh_tile<running, special, true, Shape::columns>(sums[m], s[m], rows, block.scale, unit, summed, block.columns(), what, lane);
          });
        }
#pragma unroll
        for (int m = 0; m < Shape::m_tiles; ++m) {
          if constexpr (half) {
            pack_weights<PRODUCT, Shape::columns>(packed[m], s[m]);
          } else {
#pragma unroll
            for (int j = 0; j < Shape::columns / 8; ++j) {
#pragma unroll
              for (int e = 0; e < 4; ++e) weights[m][j][e] = s[m][j][e];
            }
          }
        }
      },
      [&](auto count, int first, ptx::Address y_panels) {
        constexpr int COUNT = decltype(count)::value;
        if constexpr (half) {
          add_weighted_panels<PRODUCT, COUNT>(out + first, packed, y_panels, lane);
        } else {
          if constexpr (!PANELS) ptx::hold(weights[0]);  // else both halves of all weights are kept from panel to panel, and some spilled
          add_weighted_panels<PRODUCT, COUNT>(out + first, weights, y_panels, lane);
        }
      });
  const int first_panel = PANELS ? 0 : ptx::block_z() * kOutPanels;
#pragma unroll
  for (int m = 0; m < Shape::m_tiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + 16 * m + 8 * r;
      if (summed && first_panel == 0) {
        const float factor = row < pass.x.count ? load_row<true>(pass.x, row).factor : 0.0f;
        store_pair_sums(pass, block.block, sums[m][r], factor * per_unit, row, lane);
      }
      if (row >= pass.x.count) continue;
      float* to = pass.out + block.block.place(pass, row) * work.depth;
#pragma unroll
      for (int p = 0; p < Shape::out_panels; ++p) {
#pragma unroll
        for (int n = 0; n < Shape::panel_columns / 8; ++n) {
          const std::int64_t column = std::int64_t{first_panel + p} * Shape::panel_columns + 8 * n + accumulator_column(lane, 0);
          store_pair(to, work.depth, column, out[p][m][n][2 * r] * per_unit, out[p][m][n][2 * r + 1] * per_unit);
        }
      }
    }
  }
}

}  // namespace fastsupcon::cuda
