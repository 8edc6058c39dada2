#include "model/architectures.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace bitwright {

std::span<const Architecture* const> all_architectures() {
  static constexpr auto all = std::to_array<const Architecture*>({
#define ARCHITECTURE(name) &architectures::name,
#include "model/architectures.def"
  });
  return all;
}

const Architecture* find_architecture(const Json& config) {
  if (!config.is_object()) return nullptr;
  const auto names = config.find("architectures");
  const bool named = names != config.end() && names->is_array() && !names->empty();
  const auto type = config.find("model_type");
  const auto all = all_architectures();
  const auto found = std::ranges::find_if(all, [&](const Architecture* row) {
    if (named) return names->front() == row->name;
    return type != config.end() && *type == row->model_type;
  });
  return found == all.end() ? nullptr : *found;
}

ModelConfig read_model_config(const Json& config, const std::string& where) {
  if (const Architecture* const architecture = find_architecture(config)) return architecture->configure(config, where);
  std::string known;
  for (const Architecture* row : all_architectures()) known += (known.empty() ? "" : ", ") + std::string(row->name);
  throw Error({.code = "unknown-architecture",
               .what = "cannot run this model",
               .where = where,
               .why = "it names no architecture that is supported (" + known + ")"});
}

}  // namespace bitwright
