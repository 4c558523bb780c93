// bf16 rows by dot products of pairs (vdpbf16ps): Intel since Cooper Lake, AMD since Zen 4. For other rows this set is AVX-512.
#define FASTSUPCON_UNIT avx512_bf16
#define FASTSUPCON_VECTOR_BYTES 64
#define FASTSUPCON_ROWS 8
#define FASTSUPCON_VECTORS 2
#include "unit.h"

namespace fastsupcon::cpu {

extern const Kernels avx512_bf16_kernels = avx512_bf16::make_kernels<avx512_bf16::BfloatPairs, avx512_bf16::Bfloat>();

}  // namespace fastsupcon::cpu
