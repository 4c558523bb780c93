// 256-bit vectors with FMA and F16C: Intel since Haswell, AMD since Excavator.
#define FASTSUPCON_UNIT avx2
#define FASTSUPCON_VECTOR_BYTES 32
#define FASTSUPCON_ROWS 4  // 12 sums, 3 columns and a broadcast fill the 16 registers; 7 loads feed 12 FMAs (6 × 2: 8 loads)
#define FASTSUPCON_VECTORS 3
#include "unit.h"

namespace fastsupcon::cpu {

extern const Kernels avx2_kernels[4] = {
    avx2::make_kernels<avx2::Float32, float>(),
    avx2::make_kernels<avx2::Float64, double>(),
    avx2::make_kernels<avx2::Float32, avx2::Half>(),
    avx2::make_kernels<avx2::Float32, avx2::Bfloat>(),
};

}  // namespace fastsupcon::cpu
