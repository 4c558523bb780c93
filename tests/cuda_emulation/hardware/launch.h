// csrc/cuda/hardware/launch.h over the emulator: a grid runs block after block on the CPU, "device" memory is the host's.
#pragma once

#include <map>
#include <string>
#include <type_traits>

#include "layout.h"
#include "ptx.h"
#include "where.h"

namespace fastsupcon::cuda {

struct Grid {
  std::int64_t x;
  int y = 1, z = 1;
};

struct Device {
  int multiprocessors, capability;
};

inline Device& emulated_device() {
  static Device device{4, 80};
  return device;
}
struct Launch {
  std::string name;
  std::int64_t x, y, z;  // of the grid
};
inline std::vector<Launch>& launched() {  // the log, for the tests to see which kernels ran
  static std::vector<Launch> log;
  return log;
}
inline bool& dry() {  // launches are logged and not run
  static bool is_dry = false;
  return is_dry;
}
inline std::string& driver_fault() {  // what loading a kernel says, for the tests to set
  static std::string text;
  return text;
}
template <class Kernel>
std::string why_not(Kernel*, int) {
  return driver_fault();
}
inline Device device_info(int) { return emulated_device(); }
inline void enter(const Where&) {}

template <class Shape, class... P, class... A>
void launch(const char* name, const Shape& shape, void (*kernel)(P...), Grid grid, int threads, int shared_bytes, const Where&,
            const A&... arguments) {
  static std::map<const void*, int> limits;
  const int limit = shared_limit(shared_bytes);
  if (shared_bytes > 48 * 1024 && limits.emplace(reinterpret_cast<const void*>(kernel), limit).first->second != limit) {
    throw std::runtime_error(std::string(name) + " (" + shape() + "): a kernel's limit of shared memory changes between launches");
  }
  if (shared_bytes > limit) throw std::runtime_error(std::string(name) + " (" + shape() + "): too much shared memory");
  launched().push_back({name, grid.x, grid.y, grid.z});
  if (dry()) return;
  try {
    emulation::run_grid({grid.x, grid.y, grid.z}, threads, shared_bytes, [&] { kernel(arguments...); });
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(name) + " (" + shape() + "): " + error.what());
  }
}

template <class Shape>
ptx::TensorMap make_tensor_map(const void* rows, std::int64_t count, std::int64_t depth, bool, int box_rows, const Shape&) {
  if (box_rows > 256) throw std::runtime_error("a TMA box has at most 256 rows");
  return {static_cast<const unsigned char*>(rows), count, depth, box_rows};
}

}  // namespace fastsupcon::cuda
