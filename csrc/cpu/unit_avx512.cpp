// 512-bit vectors: Intel servers since Skylake, AMD since Zen 4.
#define FASTSUPCON_UNIT avx512
#define FASTSUPCON_VECTOR_BYTES 64
#define FASTSUPCON_ROWS 8
#define FASTSUPCON_VECTORS 2
#include "unit.h"

namespace fastsupcon::cpu {

extern const Kernels avx512_kernels[4] = {
    avx512::make_kernels<avx512::Float32, float>(),
    avx512::make_kernels<avx512::Float64, double>(),
    avx512::make_kernels<avx512::Float32, avx512::Half>(),
    avx512::make_kernels<avx512::Float32, avx512::Bfloat>(),
};

}  // namespace fastsupcon::cpu
