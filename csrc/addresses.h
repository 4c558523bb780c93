// How Python names memory: by addresses of tensors' first elements, 0 where there is no such tensor.
#pragma once

#include <cstdint>

#include "problem.h"

namespace fastsupcon {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Those of the mask's bits, in order, `step` bytes apart.
inline Quantities<void*> make_quantities(Address first, std::int64_t step, unsigned mask) {
  const auto take = [&](unsigned bit) -> void* {
    if (!(mask >> bit & 1)) return nullptr;
    first += step;
    return pointer(first - step);
  };
  return {take(0), take(1), take(2), take(3), take(4)};  // braces evaluate from left to right
}

// What a loss's forward keeps for its backward, one array of Sum: the quantities of the mask's bits, [rows] each, the norms (one number
// where rows stay as they are), and what a backend adds.
struct Kept {
  Quantities<void*> values;
  void *norms, *rest;

  Kept(const Problem& problem, unsigned mask, Address first) {
    const std::int64_t size = problem.scalar == Scalar::f64 ? sizeof(double) : sizeof(float), step = problem.rows * size;
    values = make_quantities(first, step, mask);
    for (unsigned bits = mask; bits; bits &= bits - 1) first += step;
    norms = pointer(first);
    rest = pointer(first + size * (problem.unit ? problem.rows + (problem.b ? problem.columns : 0) : 1));
  }
};

}  // namespace fastsupcon
