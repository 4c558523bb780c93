// The self shape's forward with each pair of rows visited once: how the upper triangle of pairs is cut into blocks of a launch.
//
// A row block meets the columns from its own first row on. In the square on the diagonal it sees each pair from both of its rows, and only
// rows are summed. A tile beyond counts for its rows, whose sums stay in registers, and for its columns, whose sums over the row block go to
// memory. A group is some row blocks next to each other, whose columns' sums are added up as they are made, so that there are fewer to keep:
// the more rows, the larger the groups. A block of the launch takes a chunk of the columns with all row blocks of a group.
//
// A launch goes from stripe to stripe of columns, each as wide as a chunk: to a place of the launch each group that begins in the stripe or
// before it, with the chunk that it begins there. So blocks that run at a time read the columns of two or three stripes, which L2 holds
// where it does not hold all rows. A group whose last chunk begins before the last stripe leaves a place there idle.
#pragma once

#include <cstdint>

namespace fastsupcon::cuda {

constexpr int kTriangleSums = 3;  // of exponentials, of similarities, of pairs of equal keys

struct Triangle {
  int group;                // row blocks; 0: all ordered pairs are visited
  int chunk;                // tiles, a multiple of those of a group
  int rows, columns;        // of a row block, of a tile
  int count;                // of all rows
  int groups;
  float* row_sums;          // [places of the launch, kTriangleSums, rows of a group]
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

  __host__ __device__ int beginning() const { return chunk / group_tiles(); }  // groups, in each stripe
  __host__ __device__ std::int64_t place(int of_group, int of_chunk) const {
    const std::int64_t stripe = of_group / beginning() + of_chunk;
    return beginning() * stripe * (stripe + 1) / 2 + of_group;
  }
  __host__ __device__ std::int64_t places() const { return groups > 0 ? place(groups - 1, 0) + 1 : 0; }
};

}  // namespace fastsupcon::cuda
