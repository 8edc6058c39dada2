#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/json.hpp"

namespace bitwright {

using Parameters = std::vector<std::pair<std::string, Json>>;

/// "kv-cache-dtype" of "--kv-cache-dtype".
std::string_view without_dashes(std::string_view flag);

/// How flags are compared: no leading dashes, letter case aside (but -c and -C are two), underscores as hyphens.
std::string plain_flag(std::string_view flag);

/// The engine's row for a parameter name, by its flag or alias, of this entry if several have it; or null.
/// `other_entry`: set if only other programs of the engine have it.
const Json* find_flag(const Json& engine, std::string_view name, std::string_view entry, bool* other_entry = nullptr);

/// A parameter as the engine spells it. Members of structured parameters ("attention-config.backend", or an object
/// where the engine's keys are dotted) are set apart by `path`.
struct NamedParameter {
  std::string flag;           ///< "--kv-cache-dtype"; what the user typed with "--" before it if nobody knows it
  std::string path{};         ///< "backend" of --attention-config.backend; empty: the whole
  const Json* row = nullptr;  ///< null: unknown
  bool other_entry = false;
  Json value;  ///< JSON text as what it says, numbers as text
  Json given;  ///< what goes to the engine: the user's own text
};
std::vector<NamedParameter> name_parameters(const Json& engine, std::string_view entry, const Parameters& parameters);

}  // namespace bitwright
