#include "bind.h"

#include <pybind11/stl.h>

#include "addresses.h"
#include "pairs.h"

namespace py = pybind11;

namespace fastsupcon::cuda {

// Arguments are by position: names would cost a microsecond a call. A loss keeps, beside what Kept names, the number of rows with a pair of
// equal keys.
void bind(py::module_ m) {
  m.doc() = "Kernels for NVIDIA GPUs. A forward or backward is planned, then run with `bytes` of scratch memory on a device's stream.";
  m.def("unusable", &unusable, "Why no kernel can run on this device, or an empty text. Makes it the runtime's current one.");
  py::class_<Plan>(m, "Plan", py::module_local())  // the emulated kernels of the tests bind it again
      .def_readonly("bytes", &Plan::bytes)
      .def(
          "run",
          [](const Plan& plan, Address scratch, int device, Address stream) { run(plan, pointer(scratch), {device, pointer(stream)}); },
          py::call_guard<py::gil_scoped_release>());
  m.def("forward", [](const Problem& problem, const Quantities<void*>& rows, const Quantities<void*>& columns, Address norms,
                      bool allow_tf32, int device) { return forward(problem, rows, columns, pointer(norms), allow_tf32, device); });
  m.def("backward", [](const Problem& problem, const Incoming& rows, const Incoming& columns, Address norms, const Outgoing& out,
                       bool allow_tf32, int device) { return backward(problem, rows, columns, pointer(norms), out, allow_tf32, device); });
  m.def("loss", [](const Problem& problem, const Line& of, unsigned mask, Address kept, Address loss, bool allow_tf32, int device) {
    const Kept to(problem, mask, kept);
    return cuda::loss(problem, of, to.values, to.norms, to.rest, pointer(loss), allow_tf32, device);
  });
  m.def("loss_backward", [](const Problem& problem, const Line& of, unsigned mask, Address kept, Address grad, const Outgoing& out,
                            bool allow_tf32, int device) {
    const Kept from(problem, mask, kept);
    return loss_backward(problem, of, constant(from.values), from.norms, from.rest, pointer(grad), out, allow_tf32, device);
  });
  m.def("line", [](const Line& of, std::int64_t rows, const Quantities<void*>& values, Address loss, int device, Address stream) {
    line(of, rows, constant(values), pointer(loss), {device, pointer(stream)});
  });
  m.def("line_backward", [](const Line& of, std::int64_t rows, const Quantities<void*>& values, Address grad,
                            const Quantities<void*>& grads, int device, Address stream) {
    line_backward(of, rows, constant(values), pointer(grad), grads, {device, pointer(stream)});
  });
}

}  // namespace fastsupcon::cuda
