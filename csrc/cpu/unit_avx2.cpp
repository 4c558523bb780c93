// 256-bit vectors with FMA and F16C: Intel since Haswell, AMD since Excavator.
#include "tiles.h"

namespace fastsupcon::cpu {

extern const Kernels<float> avx2_f32, avx2_f16, avx2_bf16;
extern const Kernels<double> avx2_f64;

const Kernels<float> avx2_f32 = avx2::make_kernels<float, float>();
const Kernels<float> avx2_f16 = avx2::make_kernels<float, avx2::Half>();
const Kernels<float> avx2_bf16 = avx2::make_kernels<float, avx2::Bfloat>();
const Kernels<double> avx2_f64 = avx2::make_kernels<double, double>();

}  // namespace fastsupcon::cpu
