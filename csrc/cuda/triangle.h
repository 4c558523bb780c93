// The self shape's forward with each pair of rows visited once: how the upper triangle of pairs is cut into blocks of a launch.
//
// A row block meets the columns from its own first row on. In the square on the diagonal it sees each pair from both of its rows, and only
// rows are summed. A tile beyond counts for its rows, whose sums stay in registers, and for its columns, whose sums over the row block go to
// memory. A group is some row blocks next to each other, whose columns' sums are added up as they are made, so that there are fewer to keep:
// the more rows, the larger the groups. A block of the launch takes a chunk of the columns with all row blocks of a group.
//
// Groups g and groups − 1 − g have about as many chunks together for every g: `length` places of the launch, the last of which may be idle.
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
  float* row_sums;          // [places of the launch, kTriangleSums, rows of a group]
  float* column_sums;       // for each group [kTriangleSums, columns from its first row on]

  __host__ __device__ int tiles() const { return (count + columns - 1) / columns; }
  __host__ __device__ int row_blocks() const { return (count + rows - 1) / rows; }
  __host__ __device__ int group_rows() const { return group * rows; }
  __host__ __device__ int first_tile(int of_group) const { return of_group * (group_rows() / columns); }
  __host__ __device__ int chunks(int of_group) const { return (tiles() - first_tile(of_group) + chunk - 1) / chunk; }

  __host__ __device__ std::int64_t columns_of(int of_group) const {
    return std::int64_t{tiles()} * columns - std::int64_t{of_group} * group_rows();
  }
  __host__ __device__ std::int64_t columns_before(int of_group) const {  // of all groups before this one
    return std::int64_t{of_group} * tiles() * columns - std::int64_t{group_rows()} * of_group * (of_group - 1) / 2;
  }

  __host__ __device__ int folds() const { return (groups + 1) / 2; }
  __host__ __device__ std::int64_t place(int of_group, int of_chunk) const {
    const int other = groups - 1 - of_group;
    return of_group <= other ? std::int64_t{of_group} * length + of_chunk : std::int64_t{other} * length + chunks(other) + of_chunk;
  }
};

}  // namespace fastsupcon::cuda
