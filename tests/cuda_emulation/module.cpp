// The emulated kernels as a Python module: csrc/cuda's own dispatch and binding, over the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <hardware/launch.h>

#include "lse.h"

PYBIND11_MODULE(emulated, m) {
  using namespace fastsupcon::cuda;
  bind(m.def_submodule("cuda"));
  m.def("set_device", [](int multiprocessors, int capability) { emulated_device() = {multiprocessors, capability}; });
  m.def("launched", [] { return std::exchange(launched(), {}); });
}
