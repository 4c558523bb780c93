// Where elements live: the swizzled panels of shared memory and the fragments of the tensor cores. Pure index maps, tested on the host.
//
// A panel is ROWS rows of 128 bytes (64 half or 32 single elements: a slice of the depth). Its eight 16-byte chunks are permuted by the
// row, chunk ^= row % 8: the image TMA writes with CU_TENSOR_MAP_SWIZZLE_128B, which wgmma reads, and in which ldmatrix has no bank
// conflicts either way (eight rows of one chunk lie in eight different chunks). Both kernel families share it.
#pragma once

#include <hardware/ptx.h>

namespace fastsupcon::cuda {

constexpr int kPanelBytes = 128;  // of one row
constexpr int kChunkBytes = 16;
constexpr int kChunks = kPanelBytes / kChunkBytes;

// The most shared memory that a block may have: on sm_90, and on any GPU from sm_80 on. All launches of a kernel come to the same limit, as
// the driver keeps it per function: two host threads that set what each needs would lower it under each other's launches.
constexpr int kBlockSharedBytes = 227 * 1024, kSmallestBlockSharedBytes = 99 * 1024;
constexpr int shared_limit(int bytes) { return bytes > kSmallestBlockSharedBytes ? kBlockSharedBytes : kSmallestBlockSharedBytes; }

__host__ __device__ constexpr int panel_offset(int row, int chunk) { return row * kPanelBytes + ((chunk ^ (row % 8)) * kChunkBytes); }

// Accumulator fragment of mma.m16n8 and of each 16 rows × 8 columns of wgmma: element e of lane l.
__host__ __device__ constexpr int accumulator_row(int lane, int element) { return lane / 4 + (element / 2) * 8; }
__host__ __device__ constexpr int accumulator_column(int lane, int element) { return 2 * (lane % 4) + element % 2; }

// Which row and chunk lane l names to ldmatrix.x4.
//   rows:       A fragment of 16 rows × 32 bytes             (matrices: rows 0-7, rows 8-15, then the next chunk)
//   columns:    B fragments of two 8-column tiles × 32 bytes (matrices: chunk 0, chunk 1 of columns 0-7, then of columns 8-15)
//   transposed: B fragments of 16 tile rows × two chunks, for the product that sums over the tile's rows
struct MatrixRow {
  int row, chunk;
};
__host__ __device__ constexpr MatrixRow fragment_rows(int lane) { return {lane % 16, lane / 16}; }
__host__ __device__ constexpr MatrixRow fragment_columns(int lane) { return {lane % 8 + (lane / 16) * 8, (lane / 8) % 2}; }
__host__ __device__ constexpr MatrixRow fragment_transposed(int lane) { return {lane % 16, lane / 16}; }

// Descriptors of wgmma operands in 128-byte-swizzled panels (PTX ISA, "Shared Memory Matrix Layout"): the start, the leading and the stride
// offset in units of 16 bytes, and layout type 1. Groups of eight rows are 1024 bytes apart; panels must start at multiples of that.
//   depth-major: the product sums along the 128 bytes of a row; a step of 16 depths moves the start by 32 bytes, the leading offset is unused
//   row-major:   it sums over rows; 64 columns further is the next panel, `panel_bytes` away; a step of 16 rows moves the start by 2048
// The step is added last and to the low word, so that the steps of a panel cost one addition each: more would not keep up with wgmma.
__host__ __device__ constexpr std::uint64_t wgmma_descriptor(std::uint32_t panel, std::uint32_t leading_bytes, std::uint32_t step_bytes) {
  const std::uint32_t low = (((panel & 0x3ffff) >> 4) | ((leading_bytes >> 4) << 16)) + (step_bytes >> 4);
  return (std::uint64_t{1} << 62) | (std::uint64_t{1024 >> 4} << 32) | low;
}
__host__ __device__ constexpr std::uint64_t depth_major_descriptor(std::uint32_t panel, int step) {
  return wgmma_descriptor(panel, 16, 32 * step);
}
__host__ __device__ constexpr std::uint64_t row_major_descriptor(std::uint32_t panel, int step, std::uint32_t panel_bytes) {
  return wgmma_descriptor(panel, panel_bytes, 16 * kPanelBytes * step);
}

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace fastsupcon::cuda
