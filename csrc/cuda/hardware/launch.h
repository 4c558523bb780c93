// The CUDA runtime, as little of it as the kernels need: every call checked, errors as exceptions that name the kernel and its shape.
// tests/cuda_emulation/hardware/launch.h puts the same names over the emulator.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "../layout.h"
#include "../where.h"

namespace fastsupcon::cuda {

struct Grid {
  std::int64_t x;
  int y = 1, z = 1;
};

inline void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // else the next launch would report it
    throw std::runtime_error("fastsupcon CUDA: " + what + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
  }
}

struct Device {
  int multiprocessors, capability;  // 90 is sm_90
};

inline Device device_info(int device) {
  static std::array<std::atomic<int>, 64> known{};  // multiprocessors · 1000 + capability; 0 is not yet asked
  if (device < 0 || device >= static_cast<int>(known.size())) throw std::runtime_error("fastsupcon CUDA: device " + std::to_string(device));
  int packed = known[device].load(std::memory_order_relaxed);
  if (packed == 0) {
    int multiprocessors, major, minor;
    const std::string what = "attributes of device " + std::to_string(device);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), what);
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), what);
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), what);
    packed = multiprocessors * 1000 + major * 10 + minor;
    known[device].store(packed, std::memory_order_relaxed);
  }
  return {packed / 1000, packed % 1000};
}

// This library has its own copy of the runtime; the caller's current device is made its own, once per call into the library.
inline void enter(const Where& where) { check(cudaSetDevice(where.device), "device " + std::to_string(where.device)); }

// Why `kernel` cannot run on `device`, or "". A driver older than this library's runtime, or than the nvcc whose PTX it would have to
// compile, shows when the kernel is loaded.
template <class Kernel>
std::string why_not(Kernel* kernel, int device) {
  cudaFuncAttributes attributes;
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // else the next launch would report it
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

// For TMA: a row-major matrix of half elements, fetched in boxes of `box_rows` × 64 columns into 128-byte-swizzled panels, zeros outside.
// The driver's encoder is asked for by name, so that the library does not link libcuda and loads where there is no driver.
template <class Shape>
CUtensorMap make_tensor_map(const void* rows, std::int64_t count, std::int64_t depth, bool bf16, int box_rows, const Shape& shape) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), "cuTensorMapEncodeTiled");
#endif
    if (!found) throw std::runtime_error("fastsupcon CUDA: this driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(count)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(depth) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult status = encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(rows),
                                 sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("fastsupcon CUDA: tensor map (" + shape() + "): driver error " + std::to_string(static_cast<int>(status)));
  }
  return map;
}

// Once per kernel, device and host thread: it is a call into the driver, and a kernel's limit is always the same.
inline cudaError_t raise_shared_limit(const void* kernel, int device, int bytes) {
  thread_local std::set<std::pair<const void*, int>> raised;
  if (raised.count({kernel, device})) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess) raised.insert({kernel, device});
  return status;
}

// `shape()` words the sizes; it is asked only when something failed.
template <class Kernel, class Shape, class... A>
void launch(const char* name, const Shape& shape, Kernel* kernel, Grid grid, int threads, int shared_bytes, const Where& where,
            const A&... arguments) {
  const auto described = [&] {
    return std::string(name) + " (" + shape() + ", grid " + std::to_string(grid.x) + " × " + std::to_string(grid.y) + " × " +
           std::to_string(grid.z) + ", " + std::to_string(shared_bytes) + " bytes of shared memory)";
  };
  if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) throw std::runtime_error("fastsupcon CUDA: grid too large: " + described());
  if (shared_bytes > 48 * 1024) {  // more than every kernel may have
    const cudaError_t status = raise_shared_limit(reinterpret_cast<const void*>(kernel), where.device, shared_limit(shared_bytes));
    if (status != cudaSuccess) check(status, described());
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(where.stream);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  // What such a launch does not wait for, ptx::begin_kernel does. From CUDA 12.3 on a graph that is captured keeps it.
  config.numAttrs = CUDART_VERSION >= 12030 && device_info(where.device).capability >= 90;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (status != cudaSuccess) check(status, described());
}

}  // namespace fastsupcon::cuda
