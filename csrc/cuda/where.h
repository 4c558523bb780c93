// Where kernels run.
#pragma once

namespace fastsupcon::cuda {

struct Where {
  int device;
  void* stream;  // cudaStream_t
};

}  // namespace fastsupcon::cuda
