// The self shape's forward with each pair of rows visited once: how the upper triangle of pairs is cut into blocks.
//
// A row block meets the columns from its own first row on. The square on the diagonal counts for its rows alone, each pair seen from both
// of them; a tile beyond it for the rows, whose sums stay in registers, and for the columns, whose sums over the row block go to memory.
// Row blocks next to each other are a group: where one block of the launch visits them one after the other, it adds their columns' sums
// up, so that there are fewer of them to keep. A group's columns are cut into chunks; a block of the launch does a chunk of a group.
//
// Group g has the fewer chunks the greater g, so that groups g and groups - 1 - g have about equally many together: `length` places of the
// launch belong to the two, the last of which may be idle.
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

  __host__ __device__ std::int64_t columns_of(int of_group) const { return std::int64_t{tiles()} * columns - std::int64_t{of_group} * group_rows(); }
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
