#include "wgmma_launch.cuh"

namespace fastsupcon::cuda {
FASTSUPCON_WGMMA_INSTANTIATE(Product::f16)
}
