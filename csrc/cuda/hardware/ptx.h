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
FASTSUPCON_DEVICE int block_z() { return blockIdx.z; }

// The first statement of every kernel, by all of its threads. A launch of launch.h does not wait for the kernel before it in the stream:
// that, and what it wrote, is waited for here, when blocks are already in place; and the next kernel may be put in place from here on.
FASTSUPCON_DEVICE void begin_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

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
FASTSUPCON_DEVICE void store_word(Address to, std::uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

// ---- Threads together -----------------------------------------------------------------------------------------------------------

FASTSUPCON_DEVICE void sync_block() { __syncthreads(); }
FASTSUPCON_DEVICE void sync_warp() { __syncwarp(); }
FASTSUPCON_DEVICE void sync_named(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
FASTSUPCON_DEVICE void arrive_named(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
template <class T>  // float or double
FASTSUPCON_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}
FASTSUPCON_DEVICE bool any(bool of_lane) { return __any_sync(0xffffffff, of_lane); }
FASTSUPCON_DEVICE int atomic_add(int* sum, int value) { return atomicAdd(sum, value); }  // what was there before
FASTSUPCON_DEVICE void fence_device() { __threadfence(); }
FASTSUPCON_DEVICE void store_two(float* to, float first, float second) { *reinterpret_cast<float2*>(to) = make_float2(first, second); }
FASTSUPCON_DEVICE void store_two_words(void* to, std::uint32_t first, std::uint32_t second) {
  *static_cast<uint2*>(to) = make_uint2(first, second);
}
FASTSUPCON_DEVICE void store_four(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}
FASTSUPCON_DEVICE void load_two_words(std::uint32_t (&to)[2], const void* from) {
  const uint2 found = *static_cast<const uint2*>(from);
  to[0] = found.x;
  to[1] = found.y;
}
FASTSUPCON_DEVICE void load_four(float (&to)[4], const float* from) {
  const float4 found = *reinterpret_cast<const float4*>(from);
  to[0] = found.x;
  to[1] = found.y;
  to[2] = found.z;
  to[3] = found.w;
}
FASTSUPCON_DEVICE float load_fresh(const float* from) { return __ldcg(from); }  // past L1, which may hold what was there before

// ---- Arithmetic -----------------------------------------------------------------------------------------------------------------

FASTSUPCON_DEVICE float exp2(float x) {  // error 2 ulp; exp2(−inf) = 0, NaN stays NaN
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FASTSUPCON_DEVICE double reciprocal_root(double x) { return rsqrt(x); }
FASTSUPCON_DEVICE float log2(float x) { return log2f(x); }
FASTSUPCON_DEVICE std::uint32_t round_to_tf32(float x) {
  std::uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
// As one instruction each: of two with the same condition nvcc makes a branch, and of that three moves.
FASTSUPCON_DEVICE float select(bool condition, float yes, float no) {
  float y;
  asm("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nselp.f32 %0, %1, %2, p;\n}" : "=f"(y) : "f"(yes), "f"(no), "r"(static_cast<int>(condition)));
  return y;
}
FASTSUPCON_DEVICE std::uint32_t select(bool condition, std::uint32_t yes, std::uint32_t no) {
  std::uint32_t y;
  asm("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nselp.b32 %0, %1, %2, p;\n}" : "=r"(y) : "r"(yes), "r"(no), "r"(static_cast<int>(condition)));
  return y;
}
FASTSUPCON_DEVICE int first_set(std::uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }  // of x ≠ 0
FASTSUPCON_DEVICE std::uint32_t bits(float x) { return __float_as_uint(x); }
FASTSUPCON_DEVICE float from_bits(std::uint32_t x) { return __uint_as_float(x); }
FASTSUPCON_DEVICE float from_f16(std::uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
FASTSUPCON_DEVICE float from_bf16(std::uint16_t x) { return from_bits(static_cast<std::uint32_t>(x) << 16); }
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

// ---- sm_90a: transaction barriers, the tensor memory accelerator, wgmma ----------------------------------------------------------

using TensorMap = CUtensorMap;

template <int REGISTERS>
FASTSUPCON_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
FASTSUPCON_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// A barrier of 8 bytes: a phase ends when `arrivals` threads have come and every expected byte is there.
FASTSUPCON_DEVICE void barrier_init(Address barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
FASTSUPCON_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FASTSUPCON_DEVICE void barrier_arrive(Address barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
FASTSUPCON_DEVICE void barrier_arrive_expecting(Address barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
FASTSUPCON_DEVICE void barrier_wait(Address barrier, int parity) {  // returns once the phase of this parity has ended
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Writes the box at (column, row) of a matrix, zeros where it lies outside, and counts its bytes on the barrier.
FASTSUPCON_DEVICE void copy_box_async(Address to, const TensorMap& map, int column, int row, Address barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(reinterpret_cast<std::uint64_t>(&map)), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

// Copies `bytes`, a multiple of 16 as both addresses are, and counts them on the barrier.
FASTSUPCON_DEVICE void copy_bulk_async(Address to, const void* from, int bytes, Address barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

// wgmma reads shared memory as the asynchronous proxy: what this thread has written is visible to it only from here on.
FASTSUPCON_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

FASTSUPCON_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTSUPCON_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
FASTSUPCON_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving reads and writes of registers that a wgmma in flight uses.
template <int N>
FASTSUPCON_DEVICE void hold(float (&d)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}
template <int N>
FASTSUPCON_DEVICE void hold(std::uint32_t (&a)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3])::"memory");
}

// d (64 × N, rows of the warpgroup) = or += a b.
//   shared            a and b in shared memory, depth-major both
//   shared_row_major  the same, b (16 × N) row-major, which the descriptor's transpose bit says; always adds
//   registers         a in registers, b depth-major; always adds
//   registers_row_major  the same, b row-major
template <bool BF16, int N>
struct Wgmma;

#define FASTSUPCON_D1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FASTSUPCON_D4(j) FASTSUPCON_D1(j), FASTSUPCON_D1(j + 1), FASTSUPCON_D1(j + 2), FASTSUPCON_D1(j + 3)
#define FASTSUPCON_D8(j) FASTSUPCON_D4(j), FASTSUPCON_D4(j + 4)
#define FASTSUPCON_D12(j) FASTSUPCON_D8(j), FASTSUPCON_D4(j + 8)
#define FASTSUPCON_D16(j) FASTSUPCON_D8(j), FASTSUPCON_D8(j + 8)
#define FASTSUPCON_D32(j) FASTSUPCON_D16(j), FASTSUPCON_D16(j + 16)
#define FASTSUPCON_R16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTSUPCON_R32 FASTSUPCON_R16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTSUPCON_R48 FASTSUPCON_R32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTSUPCON_R64 FASTSUPCON_R48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTSUPCON_R128 FASTSUPCON_R64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
  "%125, %126, %127"

// The instruction and its accumulators. J = N / 8; I0 = N / 2 … I4: the numbers of the operands behind the accumulators.
#define FASTSUPCON_WGMMA_D(N, TYPE, I0) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTSUPCON_R##I0 "}"
#define FASTSUPCON_WGMMA(BF16, TYPE, N, J, I0, I1, I2, I3, I4)                                                         \
  template <>                                                                                                          \
  struct Wgmma<BF16, N> {                                                                                              \
    using Accumulators = float[N / 8][4];                                                                              \
    static FASTSUPCON_DEVICE void shared(Accumulators& d, std::uint64_t a, std::uint64_t b, bool accumulate) {         \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #I2 ", 0;\n"                                               \
                   FASTSUPCON_WGMMA_D(N, TYPE, I0) ", %" #I0 ", %" #I1 ", add, 1, 1, 0, 0;\n}"                         \
                   : FASTSUPCON_D##J(0)                                                                                \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                               \
    }                                                                                                                  \
    static FASTSUPCON_DEVICE void shared_row_major(Accumulators& d, std::uint64_t a, std::uint64_t b) {                \
      asm volatile(FASTSUPCON_WGMMA_D(N, TYPE, I0) ", %" #I0 ", %" #I1 ", 1, 1, 1, 0, 1;"                              \
                   : FASTSUPCON_D##J(0)                                                                                \
                   : "l"(a), "l"(b));                                                                                  \
    }                                                                                                                  \
    static FASTSUPCON_DEVICE void registers(Accumulators& d, const std::uint32_t (&a)[4], std::uint64_t b) {           \
      asm volatile(FASTSUPCON_WGMMA_D(N, TYPE, I0) ", {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", 1, 1, 1, 0;" \
                   : FASTSUPCON_D##J(0)                                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
    }                                                                                                                  \
    static FASTSUPCON_DEVICE void registers_row_major(Accumulators& d, const std::uint32_t (&a)[4], std::uint64_t b) { \
      asm volatile(FASTSUPCON_WGMMA_D(N, TYPE, I0) ", {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", 1, 1, 1, 1;" \
                   : FASTSUPCON_D##J(0)                                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
    }                                                                                                                  \
  };
#define FASTSUPCON_WGMMA_BOTH(N, ...)                                                                                  \
  FASTSUPCON_WGMMA(false, "f16", N, __VA_ARGS__)                                                                       \
  FASTSUPCON_WGMMA(true, "bf16", N, __VA_ARGS__)
FASTSUPCON_WGMMA_BOTH(32, 4, 16, 17, 18, 19, 20)
FASTSUPCON_WGMMA_BOTH(64, 8, 32, 33, 34, 35, 36)
FASTSUPCON_WGMMA_BOTH(96, 12, 48, 49, 50, 51, 52)
FASTSUPCON_WGMMA_BOTH(128, 16, 64, 65, 66, 67, 68)
FASTSUPCON_WGMMA_BOTH(256, 32, 128, 129, 130, 131, 132)
#undef FASTSUPCON_WGMMA_BOTH
#undef FASTSUPCON_WGMMA
#undef FASTSUPCON_WGMMA_D
#undef FASTSUPCON_R128
#undef FASTSUPCON_R64
#undef FASTSUPCON_R48
#undef FASTSUPCON_R32
#undef FASTSUPCON_R16
#undef FASTSUPCON_D32
#undef FASTSUPCON_D16
#undef FASTSUPCON_D12
#undef FASTSUPCON_D8
#undef FASTSUPCON_D4
#undef FASTSUPCON_D1

}  // namespace fastsupcon::cuda::ptx
