// The CUDA backend's functions as a Python module. The types of ../problem.h are bound by ../bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace fastsupcon::cuda {

void bind(pybind11::module_ module);

}  // namespace fastsupcon::cuda
