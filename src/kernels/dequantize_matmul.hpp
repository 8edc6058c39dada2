#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "base/dtype.hpp"
#include "kernels/compact_tensor.hpp"

namespace bitwright {

/// A product with a quantized matrix W of [rows, columns]. Both arrays are row-major, of `type`, bf16 or f32.
struct DequantizedProduct {
  const CompactTensor& weight;
  DType type;
  size_t tokens;
  const std::byte* in;  ///< forward: [tokens, columns]; backward: [tokens, rows]
  std::byte* out;       ///< the other
};

/// A way of multiplying that decodes a tile of W at a time, one that stays in the second-level cache: there is never
/// more of it in floats. A row of a table, best first, the definition last. Uses all threads; the same bits whatever
/// their number.
struct DequantizeMatmul {
  std::string_view name;
  bool (*usable)(DType type);                           ///< may this process run it on this CPU, for this type?
  void (*forward)(const DequantizedProduct& product);   ///< out = in Wᵀ
  void (*backward)(const DequantizedProduct& product);  ///< out = in W: the gradient of forward's input
};

std::span<const DequantizeMatmul> dequantize_matmuls();
/// The best usable one, or the one that BITWRIGHT_KERNEL's level allows ("scalar": no AMX).
const DequantizeMatmul& dequantize_matmul_for(DType type);

}  // namespace bitwright
