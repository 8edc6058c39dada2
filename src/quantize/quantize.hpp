#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/json.hpp"
#include "checkpoint/checkpoint.hpp"
#include "container/container.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {

struct QuantizeOptions {
  std::filesystem::path output;
  bool force = false;
  bool verify = true;
  std::optional<double> max_kl{};                           ///< mean, nats a token
  std::optional<double> max_perplexity_increase_percent{};  ///< over the original's
  const Container* container = nullptr;                     ///< one with write_metadata
};

/// Quantizes `source` by `request` into `options.output`, reads the result back, judges it, and only then gives it its
/// name. Returns what INTERFACES.md lists for `quantize`. Adds to `warnings`.
/// Throws Error; nothing is left under the output's name then.
OrderedJson quantize(const Checkpoint& source, const QuantizationRequest& request, const QuantizeOptions& options,
                     std::vector<Warning>& warnings);

/// Writes `source` as plain floats of `dtype` (f32, f16, bf16), without a trace of quantization. Tensors that are not
/// floats are kept. Returns what INTERFACES.md lists for `dequantize`.
OrderedJson dequantize(const Checkpoint& source, const std::filesystem::path& output, DType dtype, bool force);

}  // namespace bitwright
