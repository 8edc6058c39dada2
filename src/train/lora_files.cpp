#include <algorithm>
#include <cmath>
#include <map>

#include "base/error.hpp"
#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "checkpoint/checkpoint.hpp"
#include "checkpoint/safetensors.hpp"
#include "train/lora.hpp"

// The files of an adapter as PEFT has them: huggingface/peft, src/peft/tuners/lora/config.py and
// src/peft/utils/save_and_load.py.

namespace bitwright {
namespace {

using torch::Tensor;

constexpr const char* kWeights = "adapter_model.safetensors";
constexpr const char* kConfig = "adapter_config.json";
constexpr const char* kPrefix = "base_model.model.";

[[noreturn]] void bad_adapter(const std::filesystem::path& file, const std::string& why, const std::string& fix = {}) {
  throw Error({.code = "bad-adapter", .what = "cannot read adapter", .where = file.string(), .why = why, .fix = fix});
}

std::string key_of(const std::string& path, const std::string& factor) {
  return kPrefix + path + (path.empty() ? "" : ".") + factor + ".weight";
}

std::string module_of(const std::string& path) { return path.substr(path.rfind('.') + 1); }

/// What PEFT matches paths with: exact ones and ends of them, so that its reading names the same layers as ours.
std::vector<std::string> named_targets(const torch::nn::Module& model, const std::vector<train::AdaptedLayer>& layers) {
  std::vector<std::string> ends;
  for (const train::AdaptedLayer& layer : layers) ends.push_back(module_of(layer.path));
  std::ranges::sort(ends);
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  size_t matched = 0;
  train::for_each_linear(model, [&](const std::string& path, torch::nn::LinearImpl&) {
    matched += std::ranges::binary_search(ends, module_of(path)) ? 1 : 0;
  });
  if (matched == layers.size()) return ends;
  std::vector<std::string> paths;  // some layers of these names have none: each by its whole path
  for (const train::AdaptedLayer& layer : layers) paths.push_back(layer.path);
  return paths;
}

OrderedJson to_json(const LoraConfig& c, const std::vector<std::string>& targets) {
  OrderedJson json = {{"alpha_pattern", OrderedJson::object()},
                      {"auto_mapping", nullptr},
                      {"base_model_name_or_path", nullptr},
                      {"bias", "none"},
                      {"fan_in_fan_out", c.fan_in_fan_out},
                      {"inference_mode", true},
                      // Of LoftQ too: what it started from is the base as it was quantized then.
                      {"init_lora_weights", true},
                      {"layers_pattern", nullptr},
                      {"layers_to_transform", nullptr},
                      {"lora_alpha", c.lora_alpha},
                      {"lora_dropout", c.lora_dropout},
                      {"modules_to_save", nullptr},
                      {"peft_type", "LORA"},
                      {"r", c.r},
                      {"rank_pattern", OrderedJson::object()},
                      {"revision", nullptr},
                      {"target_modules", targets},
                      {"task_type", "CAUSAL_LM"},
                      {"use_rslora", c.use_rslora}};
  if (!c.base_model.empty()) json["base_model_name_or_path"] = c.base_model;
  // A whole number is written as one, as PEFT's users write it.
  if (c.lora_alpha == std::floor(c.lora_alpha) && c.lora_alpha < 1e9)
    json["lora_alpha"] = static_cast<int64_t>(c.lora_alpha);
  return json;
}

/// Absent, null, false, empty: it asks for nothing.
bool asks_for_nothing(const OrderedJson& value) {
  return value.is_null() || (value.is_boolean() && !value.get<bool>()) || (value.is_structured() && value.empty());
}

/// Members with which the layers compute something else than B A x.
constexpr std::array<std::string_view, 10> kUnknownHere = {
    "rank_pattern", "alpha_pattern",           "modules_to_save",   "use_dora",          "lora_bias",
    "use_qalora",   "trainable_token_indices", "layer_replication", "target_parameters", "layers_to_transform"};

class ConfigReader {
 public:
  ConfigReader(const OrderedJson& json, const std::filesystem::path& file) : json_(json), file_(file) {
    if (!json.is_object()) bad_adapter(file, "it is no JSON object");
  }
  template <class T>
  void number(const char* key, T& value) const {
    const auto found = json_.find(key);
    if (found == json_.end() || found->is_null()) return;
    const bool fits = std::is_integral_v<T> ? found->is_number_unsigned() : found->is_number();
    if (!fits) bad_adapter(file_, fmt::format("'{}' is {}", key, printable(found->dump())));
    value = found->get<T>();
  }
  void flag(const char* key, bool& value) const {
    const auto found = json_.find(key);
    if (found == json_.end() || found->is_null()) return;
    if (!found->is_boolean()) bad_adapter(file_, fmt::format("'{}' is no true or false", key));
    value = found->get<bool>();
  }
  std::string text(const char* key) const {
    const auto found = json_.find(key);
    return found != json_.end() && found->is_string() ? found->get<std::string>() : "";
  }
  std::vector<std::string> texts(const char* key) const {
    const auto found = json_.find(key);
    if (found == json_.end() || found->is_null()) return {};
    if (found->is_string()) return {found->get<std::string>()};
    std::vector<std::string> all;
    const auto is_text = [](const OrderedJson& item) { return item.is_string(); };
    if (!found->is_array() || !std::ranges::all_of(*found, is_text))
      bad_adapter(file_, fmt::format("'{}' is no list of names", key));
    for (const OrderedJson& item : *found) all.push_back(item.get<std::string>());
    return all;
  }

 private:
  const OrderedJson& json_;
  const std::filesystem::path& file_;
};

using Factors = std::map<std::string, Tensor>;

/// All tensors of the file, f32, by their keys.
Factors read_factors(const std::filesystem::path& file) {
  const Checkpoint checkpoint(file);
  Factors factors;
  for (const TensorEntry& entry : checkpoint.tensors()) {
    if (entry.quantized() || entry.shape.size() != 2)
      bad_adapter(file,
                  fmt::format("'{}' is {}, not a matrix of floats", printable(entry.name), to_string(entry.shape)));
    const std::vector<float> values = checkpoint.read_f32(entry);
    factors.emplace(entry.name, torch::tensor(values).reshape(entry.shape));
  }
  return factors;
}

/// Every layer's matrices and nothing else, each of its shape.
void check_factors(const Factors& factors, const torch::nn::Module& model, const std::vector<std::string>& paths,
                   const LoraConfig& config, const std::filesystem::path& file) {
  std::map<std::string, Shape> expected;
  train::for_each_linear(model, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    if (std::ranges::find(paths, path) == paths.end()) return;
    expected[key_of(path, "lora_A")] = {config.r, layer.weight.size(1)};
    expected[key_of(path, "lora_B")] = {layer.weight.size(0), config.r};
  });
  for (const auto& [key, tensor] : factors)
    if (!expected.contains(key))
      bad_adapter(file, fmt::format("'{}' belongs to no layer that its configuration targets", printable(key)),
                  "is it an adapter of this model?");
  for (const auto& [key, shape] : expected) {
    const auto found = factors.find(key);
    if (found == factors.end())
      bad_adapter(file, fmt::format("'{}' is missing", key), "is it an adapter of this model?");
    if (found->second.sizes() != torch::IntArrayRef(shape))
      bad_adapter(file, fmt::format("'{}' is {}, the model's layer and r make it {}", key,
                                    to_string(found->second.sizes().vec()), to_string(shape)));
    if (!torch::isfinite(found->second).all().item<bool>()) bad_adapter(file, fmt::format("'{}' is not finite", key));
  }
}

/// The layers whose matrices the file holds.
std::vector<std::string> stored_paths(const std::filesystem::path& file) {
  constexpr std::string_view kSuffix = ".lora_A.weight";
  const Checkpoint checkpoint(file);
  std::vector<std::string> paths;
  for (const TensorEntry& entry : checkpoint.tensors()) {
    std::string_view name = entry.name;
    if (!name.starts_with(kPrefix) || !name.ends_with(kSuffix)) continue;
    name.remove_prefix(std::string_view(kPrefix).size());
    if (name.size() > kSuffix.size()) paths.emplace_back(name.substr(0, name.size() - kSuffix.size()));
  }
  return paths;
}

/// The layers that an adapter's configuration means.
std::vector<std::string> targeted_paths(const torch::nn::Module& model, const LoraConfig& config) {
  std::vector<std::string> paths;
  train::for_each_linear(model, [&](const std::string& path, torch::nn::LinearImpl&) {
    const auto is_one = [&](const std::string& target) { return train::is_target(target, path); };
    if (std::ranges::any_of(config.target_modules, is_one) && std::ranges::none_of(config.exclude_modules, is_one))
      paths.push_back(path);
  });
  return paths;
}

}  // namespace

void save_lora(const torch::nn::Module& model, const LoraConfig& config, const std::filesystem::path& directory) {
  const std::vector<train::AdaptedLayer> layers = train::adapted_layers(model);
  if (layers.empty())
    throw Error({.code = "no-adapter", .what = "cannot save", .where = "model", .why = "no layer has an adapter"});
  std::map<std::string, Tensor> tensors;
  for (const train::AdaptedLayer& layer : layers) {
    tensors[key_of(layer.path, "lora_A")] = layer.lora->a()->weight.detach().to(torch::kFloat32).contiguous();
    tensors[key_of(layer.path, "lora_B")] = layer.lora->b()->weight.detach().to(torch::kFloat32).contiguous();
  }
  std::vector<ArraySpec> specs;
  for (const auto& [key, tensor] : tensors)
    specs.push_back({.name = key, .dtype = DType::f32, .shape = tensor.sizes().vec()});
  OutputDirectory out(directory, Existing::replace);
  SafetensorsWriter writer(out.staging() / kWeights, specs);
  for (const auto& [key, tensor] : tensors)
    writer.add({static_cast<const std::byte*>(tensor.data_ptr()), tensor.nbytes()});
  writer.finish();
  write_text_file(out.staging() / kConfig, to_json(config, named_targets(model, layers)).dump(2) + "\n");
  out.commit();
}

LoraConfig read_lora_config(const std::filesystem::path& directory) {
  const std::filesystem::path file = directory / kConfig;
  const OrderedJson json = parse_ordered_json(MappedFile(file).text(), file.string());
  const ConfigReader reader(json, file);
  if (const std::string type = reader.text("peft_type"); type != "LORA")
    bad_adapter(file, fmt::format("peft_type is '{}'", printable(type)), "adapters of type LORA can be read");
  for (const std::string_view key : kUnknownHere)
    if (const auto found = json.find(key); found != json.end() && !asks_for_nothing(*found))
      bad_adapter(file, fmt::format("it uses {}, which is not supported", key));
  if (const std::string bias = reader.text("bias"); !bias.empty() && bias != "none")
    bad_adapter(file, fmt::format("bias is '{}'", printable(bias)), "adapters without biases can be read");
  LoraConfig config;
  config.r = 8;  // PEFT's, where they are left out
  config.lora_alpha = 8;
  reader.number("r", config.r);
  reader.number("lora_alpha", config.lora_alpha);
  reader.number("lora_dropout", config.lora_dropout);
  reader.flag("use_rslora", config.use_rslora);
  reader.flag("fan_in_fan_out", config.fan_in_fan_out);
  config.target_modules = reader.texts("target_modules");
  // A text is a regular expression of Python's; what it matched is what the file holds.
  if (json.contains("target_modules") && json["target_modules"].is_string() && config.target_modules[0] != "all-linear")
    config.target_modules = stored_paths(directory / kWeights);
  config.exclude_modules = reader.texts("exclude_modules");
  config.base_model = reader.text("base_model_name_or_path");
  try {
    check_lora_config(config);
  } catch (const Error& error) {
    bad_adapter(file, error.report().why);
  }
  return config;
}

LoraConfig load_lora(torch::nn::Module& model, const std::filesystem::path& directory) {
  const LoraConfig config = read_lora_config(directory);
  const std::filesystem::path file = directory / kWeights;
  const Factors factors = read_factors(file);
  check_factors(factors, model, targeted_paths(model, config), config, file);
  if (train::adapted_layers(model).empty()) add_lora(model, config);
  const torch::NoGradGuard no_gradients;
  for (const train::AdaptedLayer& layer : train::adapted_layers(model)) {
    layer.lora->a()->weight.copy_(factors.at(key_of(layer.path, "lora_A")));
    layer.lora->b()->weight.copy_(factors.at(key_of(layer.path, "lora_B")));
  }
  return config;
}

}  // namespace bitwright
