// The families of tile kernels, and how each cuts work into blocks. Instantiated per product in mma_*.cu and wgmma_*.cu.
#pragma once

#include <hardware/launch.h>

#include <vector>

#include "work.h"

namespace fastsupcon::cuda {

struct Tiling {
  int rows, columns;  // of x that a block owns, and of y in a tile
  int blocks_per_multiprocessor;
  int out_chunks;     // blocks that share the columns of the result
};

// A family can cut the same work into blocks of more or fewer consumers: groups of warps that own rows of their own.
struct Family {
  const char* name;
  bool runs;  // sums of every size; else only such as are bounded: running ones of a tile of 128 columns spilled 0.3 KiB
  bool (*serves)(const Work& work, const Device& device);
  std::vector<int> (*consumers)(std::int64_t depth, bool backward);  // numbers to choose from
  Tiling (*tiling)(const Work& work, bool backward, int consumers);
  void (*launch)(const Work& work, bool backward, int consumers, const Where& where);
  // Of the forward of triangle.h: no rows, or null, where there is none.
  Tiling (*triangle_tiling)(std::int64_t depth) = nullptr;
  void (*launch_triangle)(const Work& work, const Where& where) = nullptr;
};

std::string shape_of(const Work& work);  // for error texts

inline Grid tile_grid(const Work& work, const Tiling& tiling) {
  Grid grid{0, 1, tiling.out_chunks};
  for (int i = 0; i < work.count; ++i) grid.x += std::int64_t{work.passes[i].row_blocks} * work.passes[i].splits;
  return grid;
}

// For sm_80 and newer: everything. For sm_90: half rows of a depth up to 1024 whose sums are bounded.
template <Product PRODUCT>
Family mma_family();
template <Product PRODUCT>
Family wgmma_family();

}  // namespace fastsupcon::cuda
