# The CUDA kernels, linked into _C. Included from CMakeLists.txt where find.cmake found a CUDA compiler.
#
# sm_80 machine code serves 8.x, sm_90a (with TMA and wgmma) Hopper; the PTX of compute_80 is compiled by the driver of anything newer.
find_package(CUDAToolkit REQUIRED)
message(STATUS "fastsupcon: CUDA kernels are built with ${CMAKE_CUDA_COMPILER}")

add_library(fastsupcon_cuda STATIC
  csrc/cuda/bind.cpp
  csrc/cuda/plan.cu
  csrc/cuda/mma_f16.cu
  csrc/cuda/mma_bf16.cu
  csrc/cuda/mma_tf32.cu
  csrc/cuda/mma_f32.cu)
set(FASTSUPCON_GENERATIONS
  "-gencode=arch=compute_80,code=[sm_80,compute_80]" "-gencode=arch=compute_90a,code=sm_90a")
set_target_properties(fastsupcon_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static
  CUDA_ARCHITECTURES OFF)
target_compile_options(fastsupcon_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${FASTSUPCON_GENERATIONS}>")
target_include_directories(fastsupcon_cuda PRIVATE csrc/cuda csrc)
target_link_libraries(fastsupcon_cuda PRIVATE pybind11::module CUDA::cudart_static)

# wgmma and setmaxnreg exist in sm_90a alone.
add_library(fastsupcon_hopper OBJECT csrc/cuda/wgmma_f16.cu csrc/cuda/wgmma_bf16.cu)
set_target_properties(fastsupcon_hopper PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static
  CUDA_ARCHITECTURES OFF)
target_compile_options(fastsupcon_hopper PRIVATE "-gencode=arch=compute_90a,code=sm_90a")
target_include_directories(fastsupcon_hopper PRIVATE csrc/cuda csrc)
target_sources(fastsupcon_cuda PRIVATE $<TARGET_OBJECTS:fastsupcon_hopper>)

target_compile_definitions(_C PRIVATE FASTSUPCON_CUDA)
target_link_libraries(_C PRIVATE fastsupcon_cuda)
