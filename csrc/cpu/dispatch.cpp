#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "lse.h"

#ifdef FASTSUPCON_X86
#include <cpuid.h>
#endif

namespace fastsupcon::cpu {

extern const Kernels generic_kernels[4], avx2_kernels[4], avx512_kernels[4], avx512_bf16_kernels;  // unit_*.cpp

namespace {

#ifdef FASTSUPCON_X86
// Clang up to 15 knows no "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// All that were built, best first except for what slow_bf16 says.
const Unit kUnits[] = {
#ifdef FASTSUPCON_X86
    {"avx512_bf16",
     [] {
       return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     {&avx512_kernels[0], &avx512_kernels[1], &avx512_kernels[2], &avx512_bf16_kernels}},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     },
     {&avx512_kernels[0], &avx512_kernels[1], &avx512_kernels[2], &avx512_kernels[3]}},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); },
     {&avx2_kernels[0], &avx2_kernels[1], &avx2_kernels[2], &avx2_kernels[3]}},
#endif
    {"generic", [] { return true; }, {&generic_kernels[0], &generic_kernels[1], &generic_kernels[2], &generic_kernels[3]}},
};

// vdpbf16ps does twice the work of an FMA. On Sapphire and Emerald Rapids it was measured to issue at a quarter of the FMA's rate (88 GF/s
// against 186), so there bf16 rows are faster converted to fp32. For AMD's Zen 4 it is documented to issue at the FMA's rate, which would make
// it the faster; that has not been measured with this kernel.
bool slow_bf16(const Unit& unit) {
#ifdef FASTSUPCON_X86
  return unit.kernels[int(Scalar::bf16)] == &avx512_bf16_kernels && !__builtin_cpu_is("amd");
#else
  return (void)unit, false;
#endif
}

std::vector<const Unit*> supported_units() {
  std::vector<const Unit*> units;
  for (const Unit& unit : kUnits) {
    if (unit.supported()) units.push_back(&unit);
  }
  std::stable_partition(units.begin(), units.end(), [](const Unit* unit) { return !slow_bf16(*unit); });
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
  throw std::invalid_argument("FASTSUPCON_CPU=" + std::string(forced) + " is not an instruction set of this processor that was built; there are " +
                              known);
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
