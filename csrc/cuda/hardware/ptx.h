// Every instruction of the GPU that C++ does not know, one thin wrapper each. No other file holds PTX or a CUDA built-in.
// tests/cuda_emulation/hardware/ptx.h puts the same names into plain C++, so that the kernels' numerics are tested without a GPU.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastsupcon::cuda::ptx {

#define FASTSUPCON_DEVICE __device__ __forceinline__

// ---- Where this thread is -------------------------------------------------------------------------------------------------------

FASTSUPCON_DEVICE int thread() { return threadIdx.x; }
FASTSUPCON_DEVICE int lane() { return threadIdx.x % 32; }
FASTSUPCON_DEVICE int warp() { return __shfl_sync(0xffffffff, threadIdx.x / 32, 0); }  // the shuffle tells the compiler it is uniform
FASTSUPCON_DEVICE std::int64_t block_x() { return blockIdx.x; }
FASTSUPCON_DEVICE int block_y() { return blockIdx.y; }
FASTSUPCON_DEVICE int block_z() { return blockIdx.z; }
FASTSUPCON_DEVICE int blocks_y() { return gridDim.y; }

// ---- Shared memory --------------------------------------------------------------------------------------------------------------

using Address = std::uint32_t;  // in the shared window: what ldmatrix, TMA and the wgmma descriptors take

FASTSUPCON_DEVICE unsigned char* shared_memory() {  // aligned to the 1024 bytes of a 128-byte-swizzle atom
  extern __shared__ __align__(1024) unsigned char storage[];
  return storage;
}
FASTSUPCON_DEVICE Address address(const void* shared) { return static_cast<Address>(__cvta_generic_to_shared(shared)); }
FASTSUPCON_DEVICE void store_16_bytes(Address to, const std::uint32_t (&from)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
}
FASTSUPCON_DEVICE std::uint32_t load_word(Address from) {
  std::uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from));
  return word;
}

// ---- Threads together -----------------------------------------------------------------------------------------------------------

FASTSUPCON_DEVICE void sync_block() { __syncthreads(); }
FASTSUPCON_DEVICE void sync_warp() { __syncwarp(); }
FASTSUPCON_DEVICE void sync_named(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
FASTSUPCON_DEVICE void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
FASTSUPCON_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
FASTSUPCON_DEVICE void atomic_add(unsigned long long* sum, unsigned long long value) { atomicAdd(sum, value); }
FASTSUPCON_DEVICE void atomic_or(unsigned long long* bits, unsigned long long value) { atomicOr(bits, value); }

// ---- Arithmetic -----------------------------------------------------------------------------------------------------------------

FASTSUPCON_DEVICE float exp2(float x) {  // error 2 ulp; exp2(−inf) = 0, NaN stays NaN
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTSUPCON_DEVICE float log2(float x) { return log2f(x); }
FASTSUPCON_DEVICE std::uint32_t round_to_tf32(float x) {
  std::uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
FASTSUPCON_DEVICE std::uint32_t bits(float x) { return __float_as_uint(x); }
FASTSUPCON_DEVICE float from_bits(std::uint32_t x) { return __uint_as_float(x); }
FASTSUPCON_DEVICE std::uint32_t pack_f16(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
FASTSUPCON_DEVICE std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- sm_80: asynchronous copies, matrix fragments, mma.sync ---------------------------------------------------------------------

// Copies 16 bytes, or writes 16 zeros where not `valid` (then nothing is read, `from` need only be aligned).
FASTSUPCON_DEVICE void copy_async_16_bytes(Address to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0) : "memory");
}
FASTSUPCON_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
FASTSUPCON_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8×8 matrices of 16-bit elements (or 8×4 of 32-bit); lane l gives the address of row l % 8 of matrix l / 8.
FASTSUPCON_DEVICE void load_matrices(std::uint32_t (&out)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row));
}
FASTSUPCON_DEVICE void load_matrices_transposed(std::uint32_t (&out)[4], Address row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row));
}

#define FASTSUPCON_MMA(NAME, INSTRUCTION)                                                                                   \
  FASTSUPCON_DEVICE void NAME(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {              \
    asm("mma.sync.aligned." INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                    \
  }
FASTSUPCON_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTSUPCON_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTSUPCON_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTSUPCON_MMA

}  // namespace fastsupcon::cuda::ptx
