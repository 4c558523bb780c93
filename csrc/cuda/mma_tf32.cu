#include "mma_launch.cuh"

namespace fastsupcon::cuda {
template Family mma_family<Product::tf32>();
}
