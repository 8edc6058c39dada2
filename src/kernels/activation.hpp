#pragma once

#include <array>
#include <optional>

#include "scheme/quantized_linear.hpp"

namespace bitwright {

/// Quantizes what goes into or comes out of a layer while the model runs, and decodes it again: what an engine's
/// low-precision product computes with, in f32. The same bits for every level and number of threads.
class ActivationQuantizer {
 public:
  /// Can it: scales that come from the values, of lines or groups of plain numbers; or one stored scale for all.
  static bool supports(const ActivationScheme& activation);
  /// Needs supports(). Throws Error{"bad-scheme"} where stored scales are missing.
  explicit ActivationQuantizer(const ActivationScheme& activation);

  /// Scales from the values: encode() is the definition; a stored one of integers: scheme/affine.hpp, PyTorch's way.
  /// out = what the codes of x stand for, both [tokens, columns]; they may be the same. A token's bits do not depend on
  /// the others, unless the scheme has one scale for all of them that comes from the values.
  /// Throws Error{"not-finite"}.
  void apply(const float* x, size_t tokens, size_t columns, float* out) const;

 private:
  void apply_stored(const float* x, size_t count, float* out) const;
  void apply_dynamic(const float* x, size_t tokens, size_t columns, float* out) const;

  Scheme scheme_;
  std::optional<GroupParameters> stored_{};
  std::array<float, 256> values_{};  ///< of each code that is no integer, with the stored parameters
};

}  // namespace bitwright
