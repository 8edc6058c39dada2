#include "model/lora_adapter.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/checkpoint.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConfig = "adapter_config.json";
constexpr const char* kWeights = "adapter_model.safetensors";

fs::path find_base(const PeftLora& config, const fs::path& directory) {
  std::error_code unreadable;
  if (config.base_model.empty())
    fail_bad_adapter((directory / kConfig).string(), "it names no base_model_name_or_path");
  for (const fs::path& base : {fs::path(config.base_model), directory / config.base_model})
    if (fs::exists(base, unreadable)) return base;
  throw Error({.code = "no-base",
               .what = "cannot read adapter",
               .where = directory.string(),
               .why = fmt::format("the model that it belongs to, '{}', is not there", printable(config.base_model)),
               .fix = "change base_model_name_or_path in adapter_config.json to where it is"});
}

/// One factor, [outer, inner], where one of them is the rank.
std::vector<float> read_factor(const Checkpoint& file, const std::string& key, int64_t rank, size_t rank_at,
                               size_t& other) {
  const TensorEntry* const entry = file.find(key);
  if (entry == nullptr) fail_bad_adapter(file.path().string(), fmt::format("'{}' is missing", printable(key)));
  if (entry->quantized() || entry->shape.size() != 2 || entry->shape[rank_at] != rank)
    fail_bad_adapter(file.path().string(),
                     fmt::format("'{}' is {}, not a matrix of rank {}", printable(key), to_string(entry->shape), rank));
  std::vector<float> values = file.read_f32(*entry);
  if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); }))
    fail_bad_adapter(file.path().string(), fmt::format("'{}' is not finite", printable(key)));
  other = static_cast<size_t>(entry->shape[1 - rank_at]);
  return values;
}

}  // namespace

bool LoraAdapter::is_at(const fs::path& directory) {
  std::error_code unreadable;
  return fs::exists(directory / kConfig, unreadable) && !fs::exists(directory / "config.json", unreadable);
}

LoraAdapter::LoraAdapter(const fs::path& directory) : path_(directory) {
  const fs::path config = directory / kConfig;
  config_ = parse_peft_lora(MappedFile(config).text(), config.string());
  base_ = find_base(config_, directory);
  if (config_.r < 1 || !std::isfinite(config_.lora_alpha)) fail_bad_adapter(config.string(), "r is less than 1");
  const Checkpoint file(directory / kWeights);
  std::vector<std::string_view> keys;
  for (const TensorEntry& entry : file.tensors()) keys.push_back(entry.name);
  std::set<std::string_view> unread(keys.begin(), keys.end());
  const double rank = static_cast<double>(config_.r);
  const auto scaling = static_cast<float>(config_.lora_alpha / (config_.use_rslora ? std::sqrt(rank) : rank));
  for (const std::string& module : peft_layers(keys)) {
    Layer& layer = layers_[module];
    layer.rank = static_cast<size_t>(config_.r);
    const std::string a = peft_key(module, "lora_A"), b = peft_key(module, "lora_B");
    layer.a = read_factor(file, a, config_.r, 0, layer.columns);
    layer.b = read_factor(file, b, config_.r, 1, layer.rows);
    for (float& value : layer.b) value *= scaling;
    unread.erase(a);
    unread.erase(b);
  }
  if (!unread.empty() || layers_.empty())
    fail_bad_adapter(file.path().string(), unread.empty() ? "it holds no adapter"
                                                          : fmt::format("'{}' is no matrix of an adapter",
                                                                        printable(std::string(*unread.begin()))));
}

uint64_t LoraAdapter::parameters() const {
  uint64_t sum = 0;
  for (const auto& [module, layer] : layers_) sum += layer.a.size() + layer.b.size();
  return sum;
}

}  // namespace bitwright
