#include "container/container.hpp"

#include <fmt/format.h>

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
