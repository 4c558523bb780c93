// The two kernel families, each as one function per direction; instantiated per product in mma_*.cu and wgmma_*.cu.
#pragma once

#include <hardware/launch.h>

#include "work.h"

namespace fastsupcon::cuda {

// How a family cuts work into blocks.
struct Tiling {
  int rows, columns;       // of x that a block owns, and of y in a tile
  int blocks_per_multiprocessor;
  int out_chunks;          // blocks that share the columns of the result
};

std::string shape_of(const Work& work);  // for error texts

template <Product PRODUCT>
Tiling mma_tiling(const Work& work, bool backward);
template <Product PRODUCT>
void mma_launch(const Work& work, bool backward, int splits, const Where& where);

// sm_90a: half rows that TMA can fetch, up to a depth of 1024. false where it does not serve.
template <Product PRODUCT>
bool wgmma_serves(const Work& work, bool backward, const Device& device);
template <Product PRODUCT>
Tiling wgmma_tiling(const Work& work, bool backward);
template <Product PRODUCT>
void wgmma_launch(const Work& work, bool backward, int splits, const Where& where);

}  // namespace fastsupcon::cuda
