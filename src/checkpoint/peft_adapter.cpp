#include "checkpoint/peft_adapter.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/json.hpp"

namespace bitwright {
namespace {

constexpr const char* kPrefix = "base_model.model.";
constexpr int64_t kMostRank = 1 << 20;

/// Absent, null, false, empty: it asks for nothing.
bool asks_for_nothing(const OrderedJson& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) || (value.is_structured() && value.empty());
}

/// Fields with which the layers compute something else than W + scaling B A.
constexpr std::array kOther = {"alora_invocation_tokens",
                               "alpha_pattern",
                               "arrow_config",
                               "kasa_config",
                               "layer_replication",
                               "layers_to_transform",
                               "lora_bias",
                               "megatron_config",
                               "modules_to_save",
                               "monteclora_config",
                               "rank_pattern",
                               "target_parameters",
                               "trainable_token_indices",
                               "use_bdlora",
                               "use_dora",
                               "use_qalora",
                               "velora_config"};
/// Values of init_lora_weights with which PEFT changes the base too, whenever it reads the adapter.
constexpr std::array<std::string_view, 5> kChangeTheBase = {"pissa", "olora", "corda", "lora_ga", "loftq"};

class Reader {
 public:
  Reader(const OrderedJson& json, const std::string& where) : json_(json), where_(where) {
    if (!json.is_object()) fail("it is no JSON object");
  }
  [[noreturn]] void fail(const std::string& why, const std::string& fix = {}) const {
    fail_bad_adapter(where_, why, fix);
  }
  /// Null where the field is absent or null.
  const OrderedJson* find(const char* key) const {
    const auto found = json_.find(key);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }
  void rank(const char* key, int64_t& value) const {
    const OrderedJson* const found = find(key);
    if (found == nullptr) return;
    if (!found->is_number_unsigned() || found->get<uint64_t>() > kMostRank)
      fail(fmt::format("'{}' is {}", key, printable(found->dump())));
    value = found->get<int64_t>();
  }
  void number(const char* key, double& value) const {
    const OrderedJson* const found = find(key);
    if (found == nullptr) return;
    if (!found->is_number()) fail(fmt::format("'{}' is {}", key, printable(found->dump())));
    value = found->get<double>();
  }
  void flag(const char* key, bool& value) const {
    const OrderedJson* const found = find(key);
    if (found == nullptr) return;
    if (!found->is_boolean()) fail(fmt::format("'{}' is no true or false", key));
    value = found->get<bool>();
  }
  std::string text(const char* key) const {
    const OrderedJson* const found = find(key);
    if (found == nullptr) return "";
    if (!found->is_string()) fail(fmt::format("'{}' is no text", key));
    return found->get<std::string>();
  }
  std::vector<std::string> texts(const char* key) const {
    const OrderedJson* const found = find(key);
    std::vector<std::string> all;
    if (found == nullptr) return all;
    const auto is_text = [](const OrderedJson& item) { return item.is_string(); };
    if (!found->is_array() || !std::ranges::all_of(*found, is_text)) fail(fmt::format("'{}' is no list of names", key));
    for (const OrderedJson& item : *found) all.push_back(item.get<std::string>());
    return all;
  }

 private:
  const OrderedJson& json_;
  const std::string& where_;
};

void refuse_other_kinds(const Reader& reader) {
  if (const std::string type = reader.text("peft_type"); type != "LORA")
    reader.fail(fmt::format("peft_type is '{}'", printable(type)), "adapters of type LORA can be read");
  for (const char* key : kOther)
    if (const OrderedJson* found = reader.find(key); found != nullptr && !asks_for_nothing(*found))
      reader.fail(fmt::format("it uses {}, which is not supported", key));
  if (const std::string bias = reader.text("bias"); !bias.empty() && bias != "none")
    reader.fail(fmt::format("bias is '{}'", printable(bias)), "adapters without biases can be read");
  const OrderedJson* const init = reader.find("init_lora_weights");
  if (init == nullptr || init->is_boolean()) return;
  const std::string name = reader.text("init_lora_weights");
  for (const std::string_view other : kChangeTheBase)
    if (name.starts_with(other))
      reader.fail(
          fmt::format("init_lora_weights is '{}': it belongs to a base that was changed with it", printable(name)),
          "save it with path_initial_model_for_weight_conversion");
}

/// A text is a regular expression of Python's, but for this one.
bool is_expression(const OrderedJson* value) {
  return value != nullptr && value->is_string() && *value != "all-linear";
}

}  // namespace

void fail_bad_adapter(const std::string& where, const std::string& why, const std::string& fix) {
  throw Error({.code = "bad-adapter", .what = "cannot read adapter", .where = where, .why = why, .fix = fix});
}

PeftLora parse_peft_lora(std::string_view text, const std::string& where) {
  const OrderedJson json = parse_ordered_json(text, where);
  const Reader reader(json, where);
  refuse_other_kinds(reader);
  PeftLora lora;
  reader.rank("r", lora.r);
  reader.number("lora_alpha", lora.lora_alpha);
  reader.number("lora_dropout", lora.lora_dropout);
  reader.flag("use_rslora", lora.use_rslora);
  reader.flag("fan_in_fan_out", lora.fan_in_fan_out);
  lora.base_model = reader.text("base_model_name_or_path");
  const OrderedJson *const targets = reader.find("target_modules"), *const excluded = reader.find("exclude_modules");
  if (is_expression(targets) || is_expression(excluded)) return lora;
  if (targets != nullptr && targets->is_string()) {
    lora.target_modules = {targets->get<std::string>()};
  } else {
    lora.target_modules = reader.texts("target_modules");
  }
  lora.exclude_modules = reader.texts("exclude_modules");
  return lora;
}

std::string peft_key(const std::string& path, const std::string& factor) {
  return kPrefix + path + (path.empty() ? "" : ".") + factor + ".weight";
}

std::vector<std::string> peft_layers(std::span<const std::string_view> keys) {
  constexpr std::string_view kSuffix = ".lora_A.weight";
  std::vector<std::string> paths;
  for (std::string_view key : keys) {
    if (!key.starts_with(kPrefix) || !key.ends_with(kSuffix)) continue;
    key.remove_prefix(std::string_view(kPrefix).size());
    if (key.size() > kSuffix.size()) paths.emplace_back(key.substr(0, key.size() - kSuffix.size()));
  }
  return paths;
}

}  // namespace bitwright
