#pragma once

#include <optional>
#include <string>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// What becomes of a tensor on another grid.
struct Regridded {
  std::optional<QuantizedTensor> tensor{};
  std::string reason{};  ///< why there is none
};
/// The same values under the scheme `to`, each code by the rule e -> r * e + d and only parameters rounded, never a
/// code: so what comes of it is equal but for the rounding of scales and offsets to their types (at most half a step of
/// `from` at the ends of a group's range; a zero point that is a whole number at most by 1/8). Nothing is quantized
/// anew: where groups of `to` hold several scales, codes have no place among its elements, or that much rounding would
/// not do, there is no tensor. Never throws for a tensor whose sizes are right.
/// docs/decisions/0008-conversion.md
Regridded regrid(const QuantizedTensor& from, const Scheme& to);

/// Why no tensor of `from` can become one of `to`, as far as it is known without the tensor; empty: some may.
std::string why_not_regrid(const Scheme& from, const Scheme& to);

}  // namespace bitwright
