#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/json.hpp"
#include "base/output.hpp"
#include "checkpoint/checkpoint.hpp"
#include "container/container.hpp"
#include "quantize/conversion.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {

/// Where a model goes and what its writing may take.
struct OutputOptions {
  std::filesystem::path output;
  Existing existing = Existing::refuse;
  std::optional<uint64_t> max_shard_bytes{};              ///< of data; else kUsualShard, and of GGUF one file
  std::optional<uint64_t> max_memory{};                   ///< bytes this process may hold
  static constexpr uint64_t kUsualShard = 5'000'000'000;  ///< as transformers has it
  uint64_t shard_bytes() const { return max_shard_bytes.value_or(kUsualShard); }
};

struct QuantizeOptions {
  OutputOptions output;
  bool verify = true;
  std::optional<double> max_kl{};                           ///< mean, nats a token
  std::optional<double> max_perplexity_increase_percent{};  ///< over the original's
  const Container* container = nullptr;                     ///< one with write_metadata
  std::filesystem::path stats{};                            ///< calibration statistics; empty: none
};

/// Quantizes `source` by `request` into `options.output`, reads the result back, judges it, and only then gives it its
/// name. Returns what INTERFACES.md lists for `quantize`. Adds to `warnings`.
/// Throws Error; nothing is left under the output's name then. Interruptions and failures of disks leave a staging
/// directory that a run with Existing::resume goes on with, to the same bytes.
OrderedJson quantize(const Checkpoint& source, const QuantizationRequest& request, const QuantizeOptions& options,
                     std::vector<Warning>& warnings);

struct ConvertOptions {
  OutputOptions output{};
  ConversionRequest request{};  ///< container: one with write_metadata
  bool verify = true;
  bool dry_run = false;
};
/// Writes a quantized model as another container has it, and compares every value of the result with the source's.
/// Returns what INTERFACES.md lists for `convert`; with dry_run only the verdicts, and nothing is written. Adds to
/// `warnings`. Throws Error{"does-not-fit"} where a tensor is impossible, {"not-exact"}, and as quantize does.
OrderedJson convert(const Checkpoint& source, const ConvertOptions& options, std::vector<Warning>& warnings);

/// Writes `source` as plain floats of `dtype` (f32, f16, bf16), without a trace of quantization. Tensors that are not
/// floats are kept. Returns what INTERFACES.md lists for `dequantize`. Throws as quantize does.
OrderedJson dequantize(const Checkpoint& source, const OutputOptions& options, DType dtype);

}  // namespace bitwright
