#include <algorithm>
#include <cmath>
#include <map>

#include "base/error.hpp"
#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "checkpoint/checkpoint.hpp"
#include "checkpoint/peft_adapter.hpp"
#include "checkpoint/safetensors.hpp"
#include "train/lora.hpp"

// The files of an adapter as PEFT has them: huggingface/peft, src/peft/tuners/lora/config.py and
// src/peft/utils/save_and_load.py.

namespace bitwright {
namespace {

using torch::Tensor;

constexpr const char* kWeights = "adapter_model.safetensors";
constexpr const char* kConfig = "adapter_config.json";
[[noreturn]] void refuse(const std::filesystem::path& file, const std::string& why, const std::string& fix = {}) {
  fail_bad_adapter(file.string(), why, fix);
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

using Factors = std::map<std::string, Tensor>;

/// All tensors of the file, f32, by their keys.
Factors read_factors(const std::filesystem::path& file) {
  const Checkpoint checkpoint(file);
  Factors factors;
  for (const TensorEntry& entry : checkpoint.tensors()) {
    if (entry.quantized() || entry.shape.size() != 2)
      refuse(file, fmt::format("'{}' is {}, not a matrix of floats", printable(entry.name), to_string(entry.shape)));
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
    expected[peft_key(path, "lora_A")] = {config.r, layer.weight.size(1)};
    expected[peft_key(path, "lora_B")] = {layer.weight.size(0), config.r};
  });
  for (const auto& [key, tensor] : factors)
    if (!expected.contains(key))
      refuse(file, fmt::format("'{}' belongs to no layer that its configuration targets", printable(key)),
             "is it an adapter of this model?");
  for (const auto& [key, shape] : expected) {
    const auto found = factors.find(key);
    if (found == factors.end()) refuse(file, fmt::format("'{}' is missing", key), "is it an adapter of this model?");
    if (found->second.sizes() != torch::IntArrayRef(shape))
      refuse(file, fmt::format("'{}' is {}, the model's layer and r make it {}", key,
                               to_string(found->second.sizes().vec()), to_string(shape)));
    if (!torch::isfinite(found->second).all().item<bool>()) refuse(file, fmt::format("'{}' is not finite", key));
  }
}

/// The layers whose matrices the file holds.
std::vector<std::string> stored_paths(const std::filesystem::path& file) {
  const Checkpoint checkpoint(file);
  std::vector<std::string_view> keys;
  for (const TensorEntry& entry : checkpoint.tensors()) keys.push_back(entry.name);
  return peft_layers(keys);
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
    tensors[peft_key(layer.path, "lora_A")] = layer.lora->a()->weight.detach().to(torch::kFloat32).contiguous();
    tensors[peft_key(layer.path, "lora_B")] = layer.lora->b()->weight.detach().to(torch::kFloat32).contiguous();
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
  PeftLora lora = parse_peft_lora(MappedFile(file).text(), file.string());
  LoraConfig config = {.r = lora.r,
                       .lora_alpha = lora.lora_alpha,
                       .lora_dropout = lora.lora_dropout,
                       .exclude_modules = std::move(lora.exclude_modules),
                       .use_rslora = lora.use_rslora,
                       .base_model = std::move(lora.base_model),
                       .fan_in_fan_out = lora.fan_in_fan_out};
  config.target_modules = lora.target_modules ? std::move(*lora.target_modules) : stored_paths(directory / kWeights);
  try {
    check_lora_config(config);
  } catch (const Error& error) {
    refuse(file, error.report().why);
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
    layer.lora->a()->weight.copy_(factors.at(peft_key(layer.path, "lora_A")));
    layer.lora->b()->weight.copy_(factors.at(peft_key(layer.path, "lora_B")));
  }
  return config;
}

}  // namespace bitwright
