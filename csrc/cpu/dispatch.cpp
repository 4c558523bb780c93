#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "pairs.h"

#ifdef FASTSUPCON_X86
#include <cpuid.h>
#endif

namespace fastsupcon::cpu {

#define FASTSUPCON_TABLES(unit)                                  \
  extern const Kernels<float> unit##_f32, unit##_f16, unit##_bf16; \
  extern const Kernels<double> unit##_f64;  // unit_*.cpp
FASTSUPCON_TABLES(generic)
FASTSUPCON_TABLES(avx2)
FASTSUPCON_TABLES(avx512)
#undef FASTSUPCON_TABLES

namespace {

#ifdef FASTSUPCON_X86
// Clang up to 15 knows no "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// All that were built, best first.
const Unit kUnits[] = {
#ifdef FASTSUPCON_X86
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     },
     &avx512_f32, &avx512_f16, &avx512_bf16, &avx512_f64},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); },
     &avx2_f32, &avx2_f16, &avx2_bf16, &avx2_f64},
#endif
    {"generic", [] { return true; }, &generic_f32, &generic_f16, &generic_bf16, &generic_f64},
};

std::vector<const Unit*> supported_units() {
  std::vector<const Unit*> units;
  for (const Unit& unit : kUnits) {
    if (unit.supported()) units.push_back(&unit);
  }
  return units;
}

const Unit& choose() {
  const std::vector<const Unit*> units = supported_units();
  const char* forced = std::getenv("FASTSUPCON_CPU");
  if (!forced || !*forced) return *units.front();
  std::string known;
  for (const Unit* unit : units) {
    if (unit->name == std::string(forced)) return *unit;
    known += std::string(known.empty() ? "" : ", ") + unit->name;
  }
  throw std::invalid_argument("FASTSUPCON_CPU=" + std::string(forced) +
                              " is not an instruction set of this processor that was built; there are " + known);
}

}  // namespace

const Unit& unit_in_use() {
  static const Unit& unit = choose();
  return unit;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Unit* unit : supported_units()) names.emplace_back(unit->name);
  return names;
}

std::string instruction_set() { return unit_in_use().name; }

}  // namespace fastsupcon::cpu
