// 128-bit vectors: baseline x86-64 (SSE2), and whatever other architecture the compiler builds for (NEON on aarch64).
#include "tiles.h"

namespace fastsupcon::cpu {

extern const Kernels<float> generic_f32, generic_f16, generic_bf16;
extern const Kernels<double> generic_f64;

const Kernels<float> generic_f32 = generic::make_kernels<float, float>();
const Kernels<float> generic_f16 = generic::make_kernels<float, generic::Half>();
const Kernels<float> generic_bf16 = generic::make_kernels<float, generic::Bfloat>();
const Kernels<double> generic_f64 = generic::make_kernels<double, double>();

}  // namespace fastsupcon::cpu
