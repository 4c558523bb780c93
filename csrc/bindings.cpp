// Python's door to the compiled backends: raw addresses in, nothing out. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "addresses.h"
#include "cpu/pairs.h"
#include "cpu/team.h"
#include "problem.h"
#ifdef FASTSUPCON_CUDA
#include "cuda/bind.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;
using namespace fastsupcon;

namespace {

Problem make_problem(Scalar scalar, std::int64_t rows, std::int64_t columns, std::int64_t depth, Address a, Address b, Address bias,
                     Address row_keys, Address column_keys, Address own_column, double scale, Address scale_address, bool unit) {
  return {scalar,
          rows,
          columns,
          depth,
          pointer(a),
          pointer(b),
          pointer(bias),
          pointer<const std::int64_t>(row_keys),
          pointer<const std::int64_t>(column_keys),
          pointer<const std::int64_t>(own_column),
          scale,
          pointer(scale_address),
          unit};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastsupcon's compiled kernels. Call them through fastsupcon.functional.";

  py::enum_<Scalar>(m, "Scalar")
      .value("f32", Scalar::f32)
      .value("f64", Scalar::f64)
      .value("f16", Scalar::f16)
      .value("bf16", Scalar::bf16);

  // Arguments in the order of problem.h: names would cost a microsecond a call.
  py::class_<Problem>(m, "Problem").def(py::init(&make_problem));
  py::class_<Quantities<void*>>(m, "Quantities").def(py::init(&make_quantities));
  py::class_<Incoming>(m, "Incoming").def(py::init([](const Quantities<void*>& values, const Quantities<void*>& grads) {
    return Incoming{constant(values), constant(grads)};
  }));
  py::class_<Outgoing>(m, "Outgoing").def(py::init([](Address rows, Address columns, Address bias, Address scale) {
    return Outgoing{pointer(rows), pointer(columns), pointer(bias), pointer(scale)};
  }));
  py::class_<Line> line(m, "Line");
  py::enum_<Line::Reduction>(line, "Reduction")
      .value("mean", Line::Reduction::mean)
      .value("sum", Line::Reduction::sum)
      .value("none", Line::Reduction::none);
  line.def(py::init([](double all, double different, double equal, double similarity, double log_count, double factor, double lone,
                       bool skip_lone, Line::Reduction reduction) {
    return Line{all, different, equal, similarity, log_count, factor, lone, skip_lone, reduction};
  }));

  auto cpu = m.def_submodule("cpu");
  cpu.def("instruction_sets", &cpu::instruction_sets, "Names of the instruction sets built in that this processor has, best first.");
  cpu.def("instruction_set", &cpu::instruction_set, "The one in use (FASTSUPCON_CPU forces one).");
  cpu.def("threads", &cpu::team_runtime, "Which threads a call gets in this process.");
  cpu.def("micro_kernel", &cpu::micro_kernel, py::call_guard<py::gil_scoped_release>());
  cpu.def("kept_size", &cpu::kept_size);
  cpu.def(
      "forward",
      [](const Problem& p, const Quantities<void*>& rows, const Quantities<void*>& columns, Address norms, Address kept, int threads) {
        cpu::forward(p, rows, columns, pointer(norms), pointer(kept), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "backward",
      [](const Problem& p, const Incoming& rows, const Incoming& columns, Address norms, Address kept, const Outgoing& out, int threads) {
        cpu::backward(p, rows, columns, pointer(norms), pointer(kept), out, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "loss",
      [](const Problem& p, const Line& of, unsigned mask, Address kept, Address exponentials, Address loss, int threads) {
        const Kept to(p, mask, kept);
        cpu::loss(p, of, to.values, to.norms, pointer(exponentials), pointer(loss), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "loss_backward",
      [](const Problem& p, const Line& of, unsigned mask, Address kept, Address exponentials, Address grad, const Outgoing& out,
         int threads) {
        const Kept from(p, mask, kept);
        cpu::loss_backward(p, of, constant(from.values), from.norms, pointer(exponentials), pointer(grad), out, threads);
      },
      py::call_guard<py::gil_scoped_release>());

  m.def("without_cuda", [] { return FASTSUPCON_WITHOUT_CUDA; }, "Why there are no CUDA kernels, or an empty text.");
#ifdef FASTSUPCON_CUDA
  fastsupcon::cuda::bind(m.def_submodule("cuda"));
#endif
}
