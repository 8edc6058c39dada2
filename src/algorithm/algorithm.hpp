#pragma once

#include <optional>
#include <span>
#include <string_view>

#include "scheme/quantized_tensor.hpp"
#include "scheme/range.hpp"

namespace bitwright {

/// What an algorithm may be told beside the scheme.
struct AlgorithmOptions {
  RangeRule range = RangeRule::minmax;
  /// How the container's owner rounds (Container::encode): for rtn with minmax. Null: as scheme/ defines it.
  QuantizedTensor (*owner)(const Scheme& scheme, const Shape& shape, WeightView weight) = nullptr;
  /// Container::encode_fused, and `largest` for it; instead of `owner` where there is one.
  QuantizedTensor (*fused)(const Scheme& scheme, const Shape& shape, WeightView weight, float largest) = nullptr;
  std::optional<float> largest{};
  /// How much an error in each column counts, one a column; empty: as much in all. For algorithms that are `weighted`.
  std::span<const float> importance{};
  /// Container::encode_weighted, in place of `owner` where there is importance.
  QuantizedTensor (*weighted_owner)(const Scheme& scheme, const Shape& shape, WeightView weight,
                                    std::span<const float> importance) = nullptr;
};

/// One way of choosing codes: a row of a table.
struct Algorithm {
  std::string_view name;     ///< as in --algorithm; never renamed once released
  std::string_view summary;  ///< for `methods`
  std::string_view source;   ///< paper or repository followed
  /// One weight to its codes. weight: element_count(shape) floats of any width. Throws what `encode` throws.
  QuantizedTensor (*quantize)(const Scheme& scheme, const Shape& shape, WeightView weight,
                              const AlgorithmOptions& options);
  bool weighted = false;  ///< heeds AlgorithmOptions::importance
};

std::span<const Algorithm* const> all_algorithms();
const Algorithm* find_algorithm(std::string_view name);

}  // namespace bitwright
