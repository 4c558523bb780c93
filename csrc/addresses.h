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

}  // namespace fastsupcon
