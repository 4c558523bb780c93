// The self shape's forward with each pair of rows visited once: how the upper triangle of pairs is cut into blocks of a launch.
//
// A row block meets the columns from its own first row on. In the square on the diagonal it sees each pair from both of its rows, and only
// rows are summed. A tile beyond counts for its rows, whose sums stay in registers, and for its columns, whose sums over the row block go to
// memory. A group is some row blocks next to each other, whose columns' sums are added up as they are made, so that there are fewer to keep:
// the more rows, the larger the groups. A block of the launch takes a chunk of the columns with all row blocks of a group.
//
// A launch goes from stripe to stripe of columns, each as wide as a chunk: a block for each group whose rows begin in the stripe or before
// it, with the one of its chunks that begins there. So blocks that run at a time read the columns of a few stripes, which L2 holds where it
// does not hold all rows. Where a group's last chunk begins before the last stripe, the block is idle.
//
// Sums of rows lie in memory fold by fold: groups g and groups − 1 − g have about as many chunks together for every g, `length` at most.
#pragma once

#include <cstdint>

namespace fastsupcon::cuda {

constexpr int kTriangleSums = 3;  // of exponentials, of similarities, of pairs of equal keys

struct Triangle {
  int group;                // row blocks; 0: all ordered pairs are visited
  int chunk;                // tiles
  int rows, columns;        // of a row block, of a tile
  int count;                // of all rows
  int groups, length;
  float* row_sums;          // [places, kTriangleSums, rows of a group]
  float* column_sums;       // for each group [kTriangleSums, columns from its first row on]

  __host__ __device__ int tiles() const { return (count + columns - 1) / columns; }
  __host__ __device__ int row_blocks() const { return (count + rows - 1) / rows; }
  __host__ __device__ int group_rows() const { return group * rows; }
  __host__ __device__ int group_tiles() const { return group_rows() / columns; }
  __host__ __device__ int first_tile(int of_group) const { return of_group * group_tiles(); }
  __host__ __device__ int chunks(int of_group) const { return (tiles() - first_tile(of_group) + chunk - 1) / chunk; }

  __host__ __device__ std::int64_t columns_of(int of_group) const {
    return std::int64_t{tiles()} * columns - std::int64_t{of_group} * group_rows();
  }
  __host__ __device__ std::int64_t columns_before(int of_group) const {  // of all groups before this one
    return std::int64_t{of_group} * tiles() * columns - std::int64_t{group_rows()} * of_group * (of_group - 1) / 2;
  }

  __host__ __device__ int stripes() const { return (tiles() + chunk - 1) / chunk; }
  __host__ __device__ int groups_in(int stripe) const {
    const int begun = ((stripe + 1) * chunk + group_tiles() - 1) / group_tiles();
    return begun < groups ? begun : groups;
  }
  std::int64_t blocks() const {
    std::int64_t total = 0;
    for (int stripe = 0; stripe < stripes(); ++stripe) total += groups_in(stripe);
    return total;
  }

  __host__ __device__ int folds() const { return (groups + 1) / 2; }
  __host__ __device__ std::int64_t place(int of_group, int of_chunk) const {
    const int other = groups - 1 - of_group;
    return of_group <= other ? std::int64_t{of_group} * length + of_chunk : std::int64_t{other} * length + chunks(other) + of_chunk;
  }
};

}  // namespace fastsupcon::cuda
