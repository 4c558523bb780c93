#include "wgmma_launch.cuh"

namespace fastsupcon::cuda {
template Family wgmma_family<Product::bf16>();
}
