#pragma once

#include "kernels/dequantize_matmul.hpp"

namespace bitwright {

/// bf16 products on AMX's tiles: W's values rounded to bf16, sums in f32. Usable nowhere but on such a CPU under Linux.
extern const DequantizeMatmul amx_dequantize_matmul;

}  // namespace bitwright
