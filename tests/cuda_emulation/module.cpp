// The emulated kernels as a Python module: csrc/cuda's own dispatch and binding, over the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <hardware/launch.h>

#include "bind.cpp"  // in this unit, as pybind11 takes seconds to read
#include "layout.h"

PYBIND11_MODULE(emulated, m) {
  using namespace fastsupcon::cuda;
  bind(m.def_submodule("cuda"));
  m.def("set_device", [](int multiprocessors, int capability) { emulated_device() = {multiprocessors, capability}; });
  m.def("without_cuda", [] { return ""; });
  m.def("set_driver_fault", [](const std::string& text) { driver_fault() = text; });
  m.def("panel_offset", &panel_offset);
  m.def("tma_offset", [](int row, int byte) { return ptx::swizzled(static_cast<ptx::Address>(row * kPanelBytes + byte)); });
  m.def("accumulator_place", [](int lane, int element) { return std::pair(accumulator_row(lane, element), accumulator_column(lane, element)); });
  m.def("fragment_places", [](int lane) {
    const auto pair = [](MatrixRow at) { return std::pair(at.row, at.chunk); };
    return std::tuple(pair(fragment_rows(lane)), pair(fragment_columns(lane)), pair(fragment_transposed(lane)));
  });
  m.def("launched", [] {  // names and grids since the last call
    std::vector<std::pair<std::string, std::tuple<std::int64_t, std::int64_t, std::int64_t>>> found;
    for (const auto& launch : std::exchange(launched(), {})) found.push_back({launch.name, {launch.x, launch.y, launch.z}});
    return found;
  });
  m.def("set_dry", [](bool is_dry) { dry() = is_dry; });
}
