#include <pybind11/pybind11.h>

#include "lse.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace fastsupcon::cuda {

namespace {
template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
}  // namespace

void bind(py::module_ m) {
  m.doc() = "Kernels for NVIDIA GPUs. Each call returns the bytes of scratch memory it needs; given less, it has launched nothing.";
  m.def("unusable", &unusable, "device"_a, "Why no kernel can run on this device, or an empty text. Makes it the runtime's current one.");
  m.def(
      "forward",
      [](const LseProblem& problem, bool self, bool allow_tf32, std::uintptr_t lse, std::uintptr_t scratch, std::size_t scratch_bytes,
         int device, std::uintptr_t stream) {
        return forward(problem, self, allow_tf32, pointer<float>(lse), {pointer<void>(scratch), scratch_bytes},
                       {device, pointer<void>(stream)});
      },
      py::call_guard<py::gil_scoped_release>(), "problem"_a, "self_shape"_a, "allow_tf32"_a, "lse"_a, "scratch"_a, "scratch_bytes"_a,
      "device"_a, "stream"_a);
  m.def(
      "backward",
      [](const LseProblem& problem, bool self, bool allow_tf32, std::uintptr_t lse, std::uintptr_t grad, std::uintptr_t da,
         std::uintptr_t db, std::uintptr_t dbias, std::uintptr_t scratch, std::size_t scratch_bytes, int device, std::uintptr_t stream) {
        return backward(problem, self, allow_tf32, pointer<const float>(lse), pointer<const float>(grad), pointer<void>(da),
                        pointer<void>(db), pointer<float>(dbias), {pointer<void>(scratch), scratch_bytes},
                        {device, pointer<void>(stream)});
      },
      py::call_guard<py::gil_scoped_release>(), "problem"_a, "self_shape"_a, "allow_tf32"_a, "lse"_a, "grad"_a, "da"_a, "db"_a, "dbias"_a,
      "scratch"_a, "scratch_bytes"_a, "device"_a, "stream"_a);
}

}  // namespace fastsupcon::cuda
