#include "container/qlinear.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "container/stored_arrays.hpp"

namespace bitwright::qlinear {

std::string layer_of(std::string_view name, std::string_view suffix) {
  if (name == suffix.substr(1)) return {};
  return std::string(name.ends_with(suffix) ? name.substr(0, name.size() - suffix.size()) : name);
}

std::string array_of(const std::string& layer, std::string_view suffix) {
  return layer.empty() ? std::string(suffix.substr(1)) : layer + std::string(suffix);
}

const Json& config_of(const CheckpointView& checkpoint, std::span<const std::string_view> documents) {
  if (const Json& config = quantization_config(checkpoint); !config.empty()) return config;
  for (const std::string_view name : documents)
    if (const Json& document = checkpoint.document(name); !document.empty()) return document;
  return checkpoint.document({});
}

std::string text_of(const Json& config, std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    const auto found = config.find(key);
    if (found == config.end() || !found->is_string()) continue;
    std::string text = found->get<std::string>();
    for (char& c : text)
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return text;
  }
  return {};
}

std::optional<int64_t> number_of(const CheckpointView& checkpoint, const Json& config,
                                 std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    const auto found = config.find(key);
    if (found == config.end() || found->is_null()) continue;
    if (!found->is_number_integer()) bad_setting(checkpoint, fmt::format("'{}' is no integer", key));
    return found->get<int64_t>();
  }
  return std::nullopt;
}

void bad_setting(const CheckpointView& checkpoint, const std::string& why) {
  throw Error({.code = "bad-container",
               .what = "cannot read model",
               .where = checkpoint.where,
               .why = "its quantization_config: " + why,
               .fix = "see `bitwright formats`"});
}

void for_each_layer(const CheckpointView& checkpoint,
                    const std::function<void(const std::string& layer, const ArraySpec& codes)>& visit) {
  for (const auto& [name, spec] : checkpoint.arrays)
    if (name.ends_with(kCodes) || name == kCodes.substr(1)) visit(layer_of(name, kCodes), spec);
}

bool is_method(const CheckpointView& checkpoint, const Json& config, std::string_view method, bool as_wide_as_scales) {
  const std::string named = text_of(config, {"quant_method"});
  bool found = false;
  for_each_layer(checkpoint, [&](const std::string& layer, const ArraySpec& codes) {
    const auto scales = checkpoint.arrays.find(array_of(layer, kScales));
    const bool matrices =
        scales != checkpoint.arrays.end() && scales->second.shape.size() == 2 && codes.shape.size() == 2;
    found = found || (named.empty() ? matrices && (codes.shape[1] == scales->second.shape[1]) == as_wide_as_scales
                                    : named == method);
  });
  return found;
}

void check_matrices(const CheckpointView& checkpoint, const std::string& name,
                    std::initializer_list<const ArraySpec*> arrays) {
  for (const ArraySpec* array : arrays)
    if (array->shape.size() != 2 || array->shape[0] <= 0 || array->shape[1] <= 0)
      bad_container(checkpoint, name,
                    fmt::format("'{}' is no matrix: {}", printable(array->name), to_string(array->shape)));
}

}  // namespace bitwright::qlinear
