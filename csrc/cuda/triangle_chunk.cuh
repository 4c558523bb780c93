// What a block does in the forward of triangle.h for Hopper, and how its columns' sums get from warps to memory.
//
// Warps write their sums of a tile's columns into a place in shared memory, where warps of the producer's group add them up in the order of
// the warps, with those of the group's row blocks before, and write them out.
#pragma once

#include "triangle_pairs.cuh"

namespace fastsupcon::cuda {

struct TriangleChunk {
  const Triangle& triangle;
  int block_tiles;                              // in the square on the diagonal of a row block
  int group, chunk, first_tile, last_tile = 0;  // 0: an idle block

  FASTSUPCON_DEVICE TriangleChunk(const Triangle& triangle, int block_tiles) : triangle(triangle), block_tiles(block_tiles) {
    int stripe = 0;
    for (group = static_cast<int>(ptx::block_x()); group >= triangle.groups_in(stripe); ++stripe) group -= triangle.groups_in(stripe);
    chunk = stripe - triangle.first_tile(group) / triangle.chunk;
    first_tile = triangle.first_tile(group) + chunk * triangle.chunk;
    if (chunk >= triangle.chunks(group)) return;
    last_tile = least(first_tile + triangle.chunk, triangle.tiles());
  }

  static FASTSUPCON_DEVICE int least(int a, int b) { return a < b ? a : b; }
  static FASTSUPCON_DEVICE int most(int a, int b) { return a < b ? b : a; }

  FASTSUPCON_DEVICE int first_row_block() const { return group * triangle.group; }
  FASTSUPCON_DEVICE int last_row_block() const { return least(first_row_block() + triangle.group, triangle.row_blocks()); }
  // The first tile of the chunk that a row block meets, and the first beyond the diagonal.
  FASTSUPCON_DEVICE int first_of(int row_block) const { return most(first_tile, row_block * block_tiles); }
  FASTSUPCON_DEVICE int beyond(int row_block) const { return (row_block + 1) * block_tiles; }

  FASTSUPCON_DEVICE float* row_sums() const {
    return triangle.row_sums + triangle.place(group, chunk) * kTriangleSums * triangle.group_rows();
  }
};

// WARPS: that fill a place. THREADS: that add up.
template <int COLUMNS, int WARPS, int PLACES, int THREADS>
struct ColumnSums {
  static constexpr int words = TileSums<1, COLUMNS>::words, place_bytes = WARPS * words * kFieldBytes, bytes = PLACES * place_bytes;
  static constexpr int barriers_bytes = 8 * 2 * PLACES;

  unsigned char* at;
  ptx::Address barriers;

  FASTSUPCON_DEVICE void init() const {
    for (int place = 0; place < PLACES; ++place) {
      ptx::barrier_init(full(place), WARPS);
      ptx::barrier_init(empty(place), THREADS / 32);
    }
  }
  FASTSUPCON_DEVICE ptx::Address full(int place) const { return barriers + 8 * place; }
  FASTSUPCON_DEVICE ptx::Address empty(int place) const { return barriers + 8 * (PLACES + place); }

  // The turn-th filling takes place turn % PLACES.
  FASTSUPCON_DEVICE float* of(unsigned turn, int warp) const {
    return reinterpret_cast<float*>(at + turn % PLACES * place_bytes) + warp * words;
  }
  FASTSUPCON_DEVICE void wait_for_place(unsigned turn) const {
    ptx::barrier_wait(empty(static_cast<int>(turn % PLACES)), static_cast<int>((turn / PLACES + 1) % 2));
  }
  FASTSUPCON_DEVICE void publish(unsigned turn) const { ptx::barrier_arrive(full(static_cast<int>(turn % PLACES))); }  // by a lane

  // By so many threads: adds up the sums of the chunk's tiles, each of which is `turns` fillings.
  FASTSUPCON_DEVICE void reduce(const TriangleChunk& chunk, unsigned turns, int thread) const {
    constexpr int each = COLUMNS / THREADS;  // columns of a thread
    const Triangle& triangle = chunk.triangle;
    const std::int64_t of_quantity = triangle.columns_of(chunk.group);
    unsigned turn = 0;
#pragma unroll 1
    for (int row_block = chunk.first_row_block(); row_block < chunk.last_row_block(); ++row_block) {
      int tile = TriangleChunk::most(chunk.first_tile, chunk.beyond(row_block));
      float* to = triangle.column_sums + kTriangleSums * triangle.columns_before(chunk.group) +
                  (tile - triangle.first_tile(chunk.group)) * COLUMNS + thread;
#pragma unroll 1
      for (; tile < chunk.last_tile; ++tile, to += COLUMNS) {
        float total[each][kTriangleSums] = {};
        if (row_block > chunk.first_row_block()) {
          for (int c = 0; c < each; ++c) {
            for (int i = 0; i < kTriangleSums; ++i) total[c][i] = to[i * of_quantity + c * THREADS];
          }
        }
        std::uint32_t counts[each] = {};
#pragma unroll 1
        for (const unsigned end = turn + turns; turn < end; ++turn) {
          ptx::barrier_wait(full(static_cast<int>(turn % PLACES)), static_cast<int>(turn / PLACES % 2));
#pragma unroll 2  // the producer's registers are few
          for (int warp = 0; warp < WARPS; ++warp) {
            const float* const of_warp = of(turn, warp);
#pragma unroll
            for (int c = 0; c < each; ++c) {
              const int column = thread + c * THREADS;
              const CountPlace count = count_place(column);
              total[c][0] += of_warp[column];
              total[c][1] += of_warp[COLUMNS + column];
              counts[c] += reinterpret_cast<const std::uint32_t*>(of_warp)[2 * COLUMNS + count.word] >> count.shift & ((1u << kColumnCountBits) - 1);
            }
          }
          ptx::sync_warp();
          if (ptx::lane() == 0) ptx::barrier_arrive(empty(static_cast<int>(turn % PLACES)));
        }
        for (int c = 0; c < each; ++c) {
          total[c][2] += static_cast<float>(counts[c]);
          for (int i = 0; i < kTriangleSums; ++i) to[i * of_quantity + c * THREADS] = total[c][i];
        }
      }
    }
  }
};

}  // namespace fastsupcon::cuda
