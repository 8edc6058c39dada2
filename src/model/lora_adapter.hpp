#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/peft_adapter.hpp"

namespace bitwright {

/// A LoRA as PEFT's files hold it (adapter_config.json, adapter_model.safetensors), to run on the model that it was
/// trained for: y = W x + scaling B A x.
class LoraAdapter {
 public:
  /// Is there an adapter in this directory, and no model?
  static bool is_at(const std::filesystem::path& directory);
  /// Throws Error{"bad-adapter"} naming the file and what is wrong with it, {"no-base"} if its model is not there.
  explicit LoraAdapter(const std::filesystem::path& directory);

  struct Layer {
    size_t rank = 0, columns = 0, rows = 0;
    std::vector<float> a{};  ///< [rank, columns]
    std::vector<float> b{};  ///< [rows, rank], times scaling
  };
  /// By the paths of modules: "model.layers.0.mlp.up_proj".
  const std::map<std::string, Layer, std::less<>>& layers() const { return layers_; }
  const PeftLora& config() const { return config_; }
  /// The model that it belongs to: base_model_name_or_path, from here or from beside the adapter.
  const std::filesystem::path& base() const { return base_; }
  const std::filesystem::path& path() const { return path_; }
  uint64_t parameters() const;

 private:
  std::filesystem::path path_, base_;
  PeftLora config_;
  std::map<std::string, Layer, std::less<>> layers_{};
};

}  // namespace bitwright
