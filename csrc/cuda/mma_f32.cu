#include "mma_launch.cuh"

namespace fastsupcon::cuda {
FASTSUPCON_MMA_INSTANTIATE(Product::f32)
}
