// Python's door to the compiled backends: raw addresses in, nothing out. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/lse.h"
#include "cpu/rows.h"
#include "cpu/team.h"
#include "lse_problem.h"
#ifdef FASTSUPCON_CUDA
#include "cuda/lse.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;
using fastsupcon::LseProblem;
using fastsupcon::Scalar;

namespace {

using Address = std::uintptr_t;  // of a tensor's first element; 0 where there is no such tensor

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

LseProblem make_problem(Scalar scalar, std::int64_t rows, std::int64_t columns, std::int64_t depth, Address a, Address b, Address bias,
                        Address skip, Address row_labels, Address column_labels, double scale, bool unit_rows) {
  return {scalar,
          rows,
          columns,
          depth,
          pointer<const void>(a),
          pointer<const void>(b),
          pointer<const void>(bias),
          pointer<const std::int64_t>(skip),
          pointer<const std::int64_t>(row_labels),
          pointer<const std::int64_t>(column_labels),
          scale,
          unit_rows};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastsupcon's compiled kernels. Call them through fastsupcon.functional.";

  py::enum_<Scalar>(m, "Scalar")
      .value("f32", Scalar::f32)
      .value("f64", Scalar::f64)
      .value("f16", Scalar::f16)
      .value("bf16", Scalar::bf16);

  py::class_<LseProblem>(m, "LseProblem")
      .def(py::init(&make_problem), py::kw_only(), "scalar"_a, "rows"_a, "columns"_a, "depth"_a, "a"_a, "b"_a, "bias"_a = 0, "skip"_a = 0,
           "row_labels"_a = 0, "column_labels"_a = 0, "scale"_a, "unit_rows"_a = false);

  auto cpu = m.def_submodule("cpu");
  cpu.def("instruction_sets", &fastsupcon::cpu::instruction_sets, "Names of the instruction sets built in that this processor has, best first.");
  cpu.def("instruction_set", &fastsupcon::cpu::instruction_set, "The one in use (FASTSUPCON_CPU forces one).");
  cpu.def("threads", &fastsupcon::cpu::team_runtime, "Which threads a call gets in this process.");
  cpu.def("micro_kernel", &fastsupcon::cpu::micro_kernel, py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "self_forward",
      [](const LseProblem& p, Address lse, int threads) { fastsupcon::cpu::self_forward(p, pointer<void>(lse), threads); },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "self_backward",
      [](const LseProblem& p, Address lse, Address grad, Address da, int threads) {
        fastsupcon::cpu::self_backward(p, pointer<const void>(lse), pointer<const void>(grad), pointer<void>(da), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "cross_forward",
      [](const LseProblem& p, Address lse, int threads) { fastsupcon::cpu::cross_forward(p, pointer<void>(lse), threads); },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "cross_backward",
      [](const LseProblem& p, Address lse, Address grad, Address da, Address db, Address dbias, int threads) {
        fastsupcon::cpu::cross_backward(p, pointer<const void>(lse), pointer<const void>(grad), pointer<void>(da), pointer<void>(db),
                                        pointer<void>(dbias), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<fastsupcon::cpu::Rows>(m, "Rows")
      .def(py::init([](Scalar scalar, Address data, std::int64_t count, std::int64_t depth) {
             return fastsupcon::cpu::Rows{scalar, pointer<const void>(data), count, depth};
           }),
           "scalar"_a, "data"_a, "count"_a, "depth"_a);
  using fastsupcon::cpu::Rows;
  cpu.def(
      "unit_rows",
      [](const Rows& x, Address unit, Address norm, int threads) {
        fastsupcon::cpu::unit_rows(x, pointer<void>(unit), pointer<void>(norm), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "unit_rows_backward",
      [](const Rows& unit, Address norm, Address grad, Address dx, int threads) {
        fastsupcon::cpu::unit_rows_backward(unit, pointer<const void>(norm), pointer<const void>(grad), pointer<void>(dx), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "number_labels",
      [](Scalar scalar, Address labels, std::int64_t count, Address ids, Address share) {
        return fastsupcon::cpu::number_labels(scalar, pointer<const std::int64_t>(labels), count, pointer<std::int64_t>(ids), pointer<void>(share));
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "sum_rows",
      [](const Rows& x, Address ids, Address weight, std::int64_t classes, Address start, Address sums, int threads) {
        fastsupcon::cpu::sum_rows(x, pointer<const std::int64_t>(ids), pointer<const void>(weight), classes, pointer<const void>(start),
                                  pointer<void>(sums), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "row_dots",
      [](const Rows& z, Address table, std::int64_t classes, Address ids, bool others, Address dots, int threads) {
        fastsupcon::cpu::row_dots(z, pointer<const void>(table), classes, pointer<const std::int64_t>(ids), others, pointer<void>(dots), threads);
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "row_dots_backward",
      [](const Rows& z, Address table, std::int64_t classes, Address ids, Address grad, Address grad_sums, Address start, Address dz,
         int threads) {
        fastsupcon::cpu::row_dots_backward(z, pointer<const void>(table), classes, pointer<const std::int64_t>(ids), pointer<const void>(grad),
                                           pointer<const void>(grad_sums), pointer<const void>(start), pointer<void>(dz), threads);
      },
      py::call_guard<py::gil_scoped_release>());

#ifdef FASTSUPCON_CUDA
  fastsupcon::cuda::bind(m.def_submodule("cuda"));
#endif
}
