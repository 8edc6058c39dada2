#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "container/container.hpp"

namespace bitwright {

/// How compressed-tensors' configuration says that something is quantized (QuantizationArgs).
struct CompressedArguments {
  enum class Dynamic : uint8_t { no, yes, local };  ///< local: but for the global scale of NVFP4
  int bits = 8;
  bool is_float = false, symmetric = true, indexed = false;
  std::string strategy{};  ///< tensor, channel, token, group, tensor_group, block
  int64_t group_size = 0, block_rows = 0, block_columns = 0;
  Dynamic dynamic = Dynamic::no;
  bool power_scales = false;  ///< e8m0: scale_dtype is torch.uint8

  /// scales: of plain ones.
  Scheme scheme(DType scales) const;
};

/// One of config_groups.
struct CompressedGroup {
  std::vector<std::string> targets;
  std::optional<CompressedArguments> weights{}, input{}, output{};
  std::string format{};  ///< how the weights are laid out: the group's, or the model's
};

struct CompressedConfig {
  std::vector<CompressedGroup> groups{};
  std::vector<std::string> ignore{};
  std::optional<CompressedArguments> kv_cache{};

  /// The group of a module: of those whose target is its name, else whose pattern it matches, else the first that names
  /// a class (what class a module has is not known here). Null: none.
  const CompressedGroup* find(const CheckpointView& checkpoint, const std::string& module) const;
};

/// quantization_config where it is one of compressed-tensors; null otherwise.
const Json* find_compressed_config(const Json& config);
/// Throws Error{"bad-container"} or {"unsupported-container"}.
CompressedConfig read_compressed_config(const CheckpointView& checkpoint);

/// config.json's quantization_config for these tensors.
OrderedJson write_compressed_config(std::span<const StoredTensor> tensors, std::span<const std::string> kept,
                                    std::string_view (*format_of)(const StoredTensor& tensor));

}  // namespace bitwright
