// The instruction set in use.
#pragma once

#include "kernels.h"

namespace fastsupcon::cpu {

// The best that this processor has, or the one that the environment variable FASTSUPCON_CPU names. Throws std::invalid_argument if it names
// none, or one this processor lacks.
const Unit& unit_in_use();

}  // namespace fastsupcon::cpu
