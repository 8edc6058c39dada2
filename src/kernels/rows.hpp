#pragma once

#include <span>

#include "kernels/kernel_level.hpp"

namespace bitwright {

/// The levels that the compiler could build from kernels_simd.cpp, best first; whether this CPU runs them is asked
/// later.
std::span<const KernelLevel> simd_kernel_levels();
extern const KernelLevel scalar_kernel_level;

}  // namespace bitwright
