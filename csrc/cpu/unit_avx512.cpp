// 512-bit vectors: Intel servers since Skylake, AMD since Zen 4.
#include "tiles.h"

namespace fastsupcon::cpu {

extern const Kernels<float> avx512_f32, avx512_f16, avx512_bf16;
extern const Kernels<double> avx512_f64;

const Kernels<float> avx512_f32 = avx512::make_kernels<float, float>();
const Kernels<float> avx512_f16 = avx512::make_kernels<float, avx512::Half>();
const Kernels<float> avx512_bf16 = avx512::make_kernels<float, avx512::Bfloat>();
const Kernels<double> avx512_f64 = avx512::make_kernels<double, double>();

}  // namespace fastsupcon::cpu
