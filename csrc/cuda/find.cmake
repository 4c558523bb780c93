# Enables CUDA, or says in `without_cuda` why it is not there. An nvcc that is there and does not work is an error: nobody asked for less.
include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES OFF)  # sources.cmake names them per source
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)  # no wgmma, no tensor maps
    set(without_cuda "nvcc ${CMAKE_CUDA_COMPILER_VERSION} was found at build time, older than 12.0")
  endif()
else()
  set(nvcc "$ENV{CUDACXX}")
  if(NOT nvcc)
    find_program(nvcc nvcc HINTS ENV CUDA_PATH PATH_SUFFIXES bin)
  endif()
  if(nvcc)
    message(FATAL_ERROR "fastsupcon: ${nvcc} does not work: CMakeFiles/CMakeConfigureLog.yaml in ${CMAKE_BINARY_DIR} says why")
  endif()
  set(without_cuda "no nvcc was found at build time")
endif()
