#include "container/container.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace bitwright {

#define CONTAINER(name) extern const Container name##_container;
#include "container/containers.def"

std::span<const Container* const> all_containers() {
#define CONTAINER(name) &name##_container,
  static const std::array all = {
#include "container/containers.def"
  };
  return all;
}

std::string_view method_of(const Container& container) {
  return container.method.empty() ? container.name : container.method;
}

const Container* find_container(std::string_view name) {
  for (const Container* container : all_containers())
    if (container->name == name) return container;
  return nullptr;
}

bool has_inputs_first(const Json& config, std::string_view tensor) {
  // Those of transformers' models that have Conv1D, and what they call it.
  constexpr std::array<std::string_view, 4> kModels = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"};
  constexpr std::array<std::string_view, 4> kEnds = {".c_attn.weight", ".q_attn.weight", ".c_proj.weight",
                                                     ".c_fc.weight"};
  const auto type = config.find("model_type");
  if (type == config.end() || !type->is_string()) return false;
  return std::ranges::find(kModels, type->get_ref<const std::string&>()) != kModels.end() &&
         std::ranges::any_of(kEnds, [&](std::string_view end) { return tensor.ends_with(end); });
}

const Json& CheckpointView::document(std::string_view name) const {
  static const Json nothing = Json::object();
  if (documents == nullptr) return nothing;
  const auto found = documents->find(name);
  return found == documents->end() ? nothing : found->second;
}

void bad_container(const CheckpointView& checkpoint, const std::string& tensor, const std::string& why) {
  throw Error({.code = "bad-container",
               .what = "cannot read model",
               .where = checkpoint.where,
               .why = fmt::format("quantized tensor '{}': {}", printable(tensor), why),
               .fix = "the checkpoint is incomplete or damaged, fetch it again"});
}

const ArraySpec& need_array(const CheckpointView& checkpoint, const std::string& tensor, const std::string& array) {
  const auto found = checkpoint.arrays.find(array);
  if (found == checkpoint.arrays.end())
    bad_container(checkpoint, tensor, fmt::format("array '{}' is missing", printable(array)));
  if (const BlockType* block = found->second.block; block != nullptr)
    bad_container(checkpoint, tensor, fmt::format("array '{}' is of GGUF's type {}", printable(array), block->name));
  return found->second;
}

}  // namespace bitwright
