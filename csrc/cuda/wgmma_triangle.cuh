// The forward of triangle.h for Hopper: half rows, depth up to 256, bounded sums over all pairs.
//
// A consumer owns two blocks of 64 rows, and takes a tile with both at once: what the columns bring is loaded once for the two, and a lane
// adds up four rows of a column before lanes meet. Lanes hold the sums of their rows in registers. Those of the columns go by a butterfly
// over the 8 lanes that share a column, each step of which halves the columns that a lane is left with; then, warp by warp, to shared
// memory, where two warps beside the producer add them up in the order of the warps and write them out. Nothing waits for that: there are
// two places for them.
#pragma once

#include "tile.cuh"

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
  // Of a warp, for each column a word of exponentials and one of similarities, for four a word of counts.
  static constexpr int sums_words = 2 * columns + columns / 4, sums_places = 2;
  static constexpr int sums_at = slots_at + stages * slots_bytes, sums_bytes = warps * sums_words * kFieldBytes;
  static constexpr int barriers_at = sums_at + sums_places * sums_bytes;
  static constexpr int shared_bytes = barriers_at + 8 * (2 * stages + 2 * consumers + 2 * sums_places);
  static_assert(shared_bytes <= kBlockSharedBytes);
};

// Sums over the 8 lanes that hold the same columns: lane l is left with value l / 4 · N / 8 of N.
template <int N, class T>
FASTSUPCON_DEVICE T butterfly(T (&values)[N], int lane) {
#pragma unroll
  for (int mask = 16, n = N / 2; mask >= 4; mask /= 2, n /= 2) {
    if (n == 0) values[0] += ptx::shuffle_xor(values[0], mask);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const bool high = (lane & mask) != 0;
      const T kept = ptx::select(high, values[k + n], values[k]), given = ptx::select(high, values[k], values[k + n]);
      values[k] = kept + ptx::shuffle_xor(given, mask);
    }
  }
  return values[0];
}

// How many pairs of equal keys a lane finds in a group of 16 columns, in fields of one word: of each of its four columns, of either row.
constexpr int kColumnCountBits = 6, kRowCountBits = 4, kRowCountsAt = 4 * kColumnCountBits;

// Where a column's count is among a warp's words of them, and its shift.
struct CountPlace {
  int word, shift;
};
FASTSUPCON_DEVICE CountPlace count_place(int column) {
  const int of_group = column % 16;
  return {column / 16 * 4 + of_group % 8 / 2, kColumnCountBits * (of_group / 8 * 2 + of_group % 2)};
}

// A lane's rows, and its share of their sums.
template <int BLOCKS>
struct TriangleRows {
  Row rows[BLOCKS][2];
  float exponentials[BLOCKS][2], similarities[BLOCKS][2];
  std::uint32_t counts[BLOCKS][2];
};

// Adds a tile to the sums of the lane's rows and, beyond the diagonal, writes the warp's sums of its columns to `to`. s is used up.
template <bool BEYOND, bool SPECIAL, int BLOCKS, int COLUMNS>
FASTSUPCON_DEVICE void add_pairs(TriangleRows<BLOCKS>& of, float (&s)[BLOCKS][COLUMNS / 8][4], float scale, const Columns& columns,
                                 const Special (&special)[BLOCKS], float* to, int lane) {
  std::uint32_t counts[COLUMNS > 64 ? 8 : 4] = {};
#pragma unroll
  for (int twice = 0; twice < COLUMNS / 32; ++twice) {  // 32 columns, so that the butterfly leaves each lane with one
    float exponentials[8], similarities[8];
    std::uint32_t of_rows[BLOCKS] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = 2 * twice + half;
      const auto factors = columns.four(0, group, lane);
      const auto codes = columns.four<std::uint32_t>(1, group, lane);
      counts[group] = 0;
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block) {
        std::uint32_t found = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int j = 2 * group + i / 4, e = i % 4, r = e / 2, c = i / 4 * 2 + e % 2, place = 4 * j + e, k = 4 * half + c;
          const Row& row = of.rows[block][r];
          const bool is_equal = codes.of[c] == row.code && (!SPECIAL || !is_set(special[block].unequal, place));
          const float t = logit<false>(s[block][j][e], row.factor, factors.of[c], scale);
          const float exponential = SPECIAL && is_set(special[block].excluded, place) ? 0.0f : ptx::exp2(t);
          of.exponentials[block][r] += exponential;
          const float similarity = is_equal ? t : 0.0f;
          of.similarities[block][r] += similarity;
          if (is_equal) found += 1u << kColumnCountBits * c | 1u << (kRowCountsAt + kRowCountBits * r);
          if (BEYOND) {
            const bool is_first = block == 0 && r == 0;
            exponentials[k] = is_first ? exponential : exponentials[k] + exponential;
            similarities[k] = is_first ? similarity : similarities[k] + similarity;
          }
        }
        of_rows[block] += found >> kRowCountsAt;
        counts[group] += found;  // what the fields of rows carry over is lost past the highest bit
      }
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      of.counts[block][0] += of_rows[block] & ((1u << kRowCountBits) - 1);
      of.counts[block][1] += of_rows[block] >> kRowCountBits;
    }
    if (BEYOND) {
      const bool any = ptx::any((counts[2 * twice] | counts[2 * twice + 1]) != 0);
      const float similarity = any ? butterfly(similarities, lane) : 0.0f;
      float* const column = to + 32 * twice + lane / 16 * 16 + lane / 8 % 2 * 8 + lane % 4 * 2 + lane / 4 % 2;
      column[0] = butterfly(exponentials, lane);
      column[COLUMNS] = similarity;
    }
  }
  if (BEYOND) {
    const std::uint32_t count = butterfly(counts, lane);
    const int group = COLUMNS > 64 ? lane / 4 : lane / 8;
    const bool is_mine = COLUMNS > 64 ? group < COLUMNS / 16 : lane / 4 % 2 == 0;
    if (is_mine) reinterpret_cast<std::uint32_t*>(to)[2 * COLUMNS + 4 * group + lane % 4] = count;
  }
}

template <Product PRODUCT, int PANELS>
struct TriangleBlock {
  using Shape = TriangleShape<PANELS>;
  static constexpr int columns = Shape::columns;

  const Work& work;
  const Triangle& triangle = work.triangle;
  const Side& side = work.passes[0].x;
  unsigned char* shared = ptx::shared_memory();
  ptx::Address x_at = ptx::address(shared), y_at = x_at + Shape::x_bytes, barriers = x_at + Shape::barriers_at;
  int group, first_tile, last_tile = 0;

  FASTSUPCON_DEVICE explicit TriangleBlock(const Work& work) : work(work) {
    const auto index = static_cast<int>(ptx::block_x());
    const int fold = index / triangle.length, place = index % triangle.length, of_fold = triangle.chunks(fold);
    group = place < of_fold ? fold : triangle.groups - 1 - fold;
    const int chunk = place < of_fold ? place : place - of_fold;
    first_tile = triangle.first_tile(group) + chunk * triangle.chunk;
    if ((group == fold && place >= of_fold) || chunk >= triangle.chunks(group)) return;  // an idle place
    last_tile = least(first_tile + triangle.chunk, triangle.tiles());
    if (ptx::thread() == 0) {
      for (int stage = 0; stage < Shape::stages; ++stage) {
        ptx::barrier_init(full(stage), 1);
        ptx::barrier_init(empty(stage), Shape::warps);
      }
      for (int consumer = 0; consumer < Shape::consumers; ++consumer) {
        ptx::barrier_init(x_full(consumer), 1);
        ptx::barrier_init(x_empty(consumer), 4);
      }
      for (int place = 0; place < Shape::sums_places; ++place) {
        ptx::barrier_init(sums_full(place), Shape::warps);
        ptx::barrier_init(sums_empty(place), columns / 32);
      }
      ptx::barrier_init_done();
    }
    ptx::sync_block();
  }

  static FASTSUPCON_DEVICE int least(int a, int b) { return a < b ? a : b; }
  static FASTSUPCON_DEVICE int most(int a, int b) { return a < b ? b : a; }

  FASTSUPCON_DEVICE ptx::Address full(int stage) const { return barriers + 8 * stage; }
  FASTSUPCON_DEVICE ptx::Address empty(int stage) const { return barriers + 8 * (Shape::stages + stage); }
  FASTSUPCON_DEVICE ptx::Address x_full(int consumer) const { return barriers + 8 * (2 * Shape::stages + consumer); }
  FASTSUPCON_DEVICE ptx::Address x_empty(int consumer) const { return x_full(Shape::consumers + consumer); }
  FASTSUPCON_DEVICE ptx::Address sums_full(int place) const { return x_full(2 * Shape::consumers + place); }
  FASTSUPCON_DEVICE ptx::Address sums_empty(int place) const { return sums_full(Shape::sums_places + place); }

  FASTSUPCON_DEVICE float* sums(int place, int warp) const {
    return reinterpret_cast<float*>(shared + Shape::sums_at + place * Shape::sums_bytes) + warp * Shape::sums_words;
  }
  FASTSUPCON_DEVICE Columns columns_in(int stage) const { return {shared + Shape::slots_at + stage * Shape::slots_bytes, columns}; }

  FASTSUPCON_DEVICE int first_row_block() const { return group * triangle.group; }
  FASTSUPCON_DEVICE int last_row_block() const { return least(first_row_block() + triangle.group, triangle.row_blocks()); }
  // The first tile of the chunk that a row block meets, and the first beyond the diagonal.
  FASTSUPCON_DEVICE int first_of(int row_block) const { return most(first_tile, row_block * (Shape::rows / columns)); }
  FASTSUPCON_DEVICE int beyond(int row_block) const { return (row_block + 1) * (Shape::rows / columns); }

  // By one thread.
  FASTSUPCON_DEVICE void produce(const ptx::TensorMap& x_map, const ptx::TensorMap& y_map) const {
    int step = 0;
#pragma unroll 1
    for (int row_block = first_row_block(); row_block < last_row_block(); ++row_block) {
#pragma unroll 1
      for (int consumer = 0; consumer < Shape::consumers; ++consumer) {
        ptx::barrier_wait(x_empty(consumer), (row_block - first_row_block() + 1) % 2);
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
      for (int tile = first_of(row_block); tile < last_tile; ++tile, ++step) {
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

  // By one thread for each column of a tile: adds up the warps' sums of it, and those of the group's row blocks before.
  FASTSUPCON_DEVICE void reduce(int column) const {
    const std::int64_t of_quantity = triangle.columns_of(group);
    const CountPlace at = count_place(column);
    unsigned step = 0;
#pragma unroll 1
    for (int row_block = first_row_block(); row_block < last_row_block(); ++row_block) {
      int tile = most(first_tile, beyond(row_block));
      float* to = triangle.column_sums + kTriangleSums * triangle.columns_before(group) +
                  (tile - triangle.first_tile(group)) * columns + column;
#pragma unroll 1
      for (; tile < last_tile; ++tile, ++step, to += columns) {
        float total[kTriangleSums] = {};
        if (row_block > first_row_block()) {
          for (int i = 0; i < kTriangleSums; ++i) total[i] = to[i * of_quantity];
        }
        const int place = static_cast<int>(step % Shape::sums_places);
        ptx::barrier_wait(sums_full(place), static_cast<int>(step / Shape::sums_places % 2));
        std::uint32_t count = 0;
#pragma unroll 2  // the producer's registers are few
        for (int warp = 0; warp < Shape::warps; ++warp) {
          const float* const of_warp = sums(place, warp);
          total[0] += of_warp[column];
          total[1] += of_warp[columns + column];
          count += reinterpret_cast<const std::uint32_t*>(of_warp)[2 * columns + at.word] >> at.shift & ((1u << kColumnCountBits) - 1);
        }
        ptx::sync_warp();
        if (ptx::lane() == 0) ptx::barrier_arrive(sums_empty(place));
        total[2] += static_cast<float>(count);
        for (int i = 0; i < kTriangleSums; ++i) to[i * of_quantity] = total[i];
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
  using Block = TriangleBlock<PRODUCT, PANELS>;
  using Shape = typename Block::Shape;
  constexpr int columns = Shape::columns, blocks = Shape::blocks;
  const Block block(work);
  const int warp = ptx::warp(), consumer = warp / 4 - 1;
  if (block.last_tile == 0) return;
  if (consumer < 0) {
    ptx::lower_registers<Shape::producer_registers>();
    if (ptx::thread() == 0) block.produce(x_map, y_map);
    else if (warp > 0 && warp <= columns / 32) block.reduce(ptx::thread() - 32);
    return;
  }
  ptx::raise_registers<Shape::consumer_registers>();
  const int lane = ptx::lane();
  const Pass& pass = work.passes[0];
  const Triangle& triangle = work.triangle;
  const float scale = static_cast<float>(work.scale.value) * logit_unit(true);
  float* const out = triangle.row_sums + ptx::block_x() * kTriangleSums * triangle.group_rows();
  float s[blocks][columns / 8][4];
  unsigned step = 0, sums_step = 0;
#pragma unroll 1
  for (int row_block = block.first_row_block(); row_block < block.last_row_block(); ++row_block) {
    const int row = row_block * Shape::rows + consumer * 64 * blocks + warp % 4 * 16 + accumulator_row(lane, 0);
    TriangleRows<blocks> of;
    bool is_any_ambiguous = false;
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        of.rows[b][r] = load_row<false>(pass.x, row + 64 * b + 8 * r);
        of.exponentials[b][r] = of.similarities[b][r] = 0.0f;
        of.counts[b][r] = 0;
        is_any_ambiguous |= is_ambiguous(of.rows[b][r]);
      }
    }
    const bool ambiguous = ptx::any(is_any_ambiguous);
    ptx::barrier_wait(block.x_full(consumer), (row_block - block.first_row_block()) % 2);
    const int beyond = block.beyond(row_block), whole_tiles = pass.y.count / columns;
#pragma unroll 1
    for (int tile = block.first_of(row_block); tile < block.last_tile; ++tile, ++step) {
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
      const bool is_special = !is_beyond || ambiguous || tile >= whole_tiles;
      if (is_special) {
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
          special[b] = special_of<columns>(work, pass, of.rows[b], row + 64 * b, tile * columns, fields, lane);
        }
      }
      const int place = static_cast<int>(sums_step % Shape::sums_places);
      float* const to = block.sums(place, warp - 4);
      if (is_beyond) ptx::barrier_wait(block.sums_empty(place), static_cast<int>((sums_step / Shape::sums_places + 1) % 2));
      if (!is_beyond) add_pairs<false, true, blocks, columns>(of, s, scale, fields, special, to, lane);
      else if (is_special) add_pairs<true, true, blocks, columns>(of, s, scale, fields, special, to, lane);
      else add_pairs<true, false, blocks, columns>(of, s, scale, fields, special, to, lane);
      ptx::sync_warp();
      if (lane == 0) {
        ptx::barrier_arrive(block.empty(stage));
        if (is_beyond) ptx::barrier_arrive(block.sums_full(place));
      }
      sums_step += is_beyond;
    }
    ptx::sync_warp();  // where there was no tile, a lane may still wait for x, and would wait for good once it is fetched anew
    if (lane == 0) ptx::barrier_arrive(block.x_empty(consumer));
    // The four lanes that share a row.
#pragma unroll
    for (int b = 0; b < blocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sums[kTriangleSums] = {of.exponentials[b][r], of.similarities[b][r], static_cast<float>(of.counts[b][r])};
#pragma unroll
        for (int i = 0; i < kTriangleSums; ++i) {
          sums[i] += ptx::shuffle_xor(sums[i], 1);
          sums[i] += ptx::shuffle_xor(sums[i], 2);
          if (lane % 4 == 0) out[i * triangle.group_rows() + row + 64 * b + 8 * r - block.first_row_block() * Shape::rows] = sums[i];
        }
      }
    }
  }
}

}  // namespace fastsupcon::cuda
