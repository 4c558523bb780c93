// One instruction set's kernels. A unit_*.cpp defines FASTSUPCON_UNIT (its namespace), FASTSUPCON_VECTOR_BYTES and the micro-kernel's
// FASTSUPCON_ROWS × FASTSUPCON_VECTORS vectors, includes this, and is compiled with that instruction set's flags.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastsupcon::cpu {
namespace FASTSUPCON_UNIT {
namespace {

#include "simd.h"

#include "elements.h"

#include "row_kernels.h"

#include "product.h"

#include "tiles.h"

}  // namespace
}  // namespace FASTSUPCON_UNIT
}  // namespace fastsupcon::cpu
