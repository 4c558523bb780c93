// 128-bit vectors: baseline x86-64 (SSE2), and whatever other architecture the compiler builds for (NEON on aarch64).
#define FASTSUPCON_UNIT generic
#define FASTSUPCON_VECTOR_BYTES 16
#define FASTSUPCON_ROWS 4  // 8 sums, 2 columns, a broadcast and a product fit x86-64's 16 registers
#define FASTSUPCON_VECTORS 2
#include "unit.h"

namespace fastsupcon::cpu {

extern const Kernels generic_kernels[4] = {
    generic::make_kernels<generic::Float32, float>(),
    generic::make_kernels<generic::Float64, double>(),
    generic::make_kernels<generic::Float32, generic::Half>(),
    generic::make_kernels<generic::Float32, generic::Bfloat>(),
};

}  // namespace fastsupcon::cpu
