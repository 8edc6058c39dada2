#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"

namespace bitwright {

/// One key of the configuration, declared once: the YAML key, its option, its help, its check and the printed
/// configuration all come from this row.
struct ConfigKey {
  /// rules: settings by module; arguments: any names with any values; engines: a configuration for each name.
  enum class Type : uint8_t { text, integer, boolean, names, integers, rules, arguments, engines };
  std::string_view path;  ///< "quantization.scheme.group_size"
  Type type;
  std::string_view fallback;  ///< what --help says of the default
  std::string_view help;
  std::vector<std::string> values = {};  ///< the only ones allowed; empty: any
  int64_t least = 0, most = 0;           ///< for integers
  bool per_layer = false;                ///< may stand in layer_configs, by its last name
  bool plan_only = false;                ///< `plan` reads it; making weights does not depend on it
  std::string_view option = {};          ///< where it is not called as its last name says
  bool short_form = false;               ///< its section may be given as this value alone ("engine: vllm")
};
std::span<const ConfigKey> config_keys();

/// "--group-size" for "quantization.scheme.group_size"; empty for keys that have no option (rules).
std::string option_of(const ConfigKey& key);

/// Reads a YAML or JSON file. Throws Error (exit status 2 for what the user wrote wrong) naming the file and line.
OrderedJson read_config_file(const std::filesystem::path& path);
/// `text` as YAML reads it: 4 is a number, true a boolean, [a, b] a list.
OrderedJson parse_config_value(std::string_view text, const std::string& where);

/// Sets a key given by its full path ("quantization.scheme.bits", "quantization.layer_configs.*.q_proj" too).
void set_config_value(OrderedJson& config, std::string_view path, const OrderedJson& value);
/// Throws Error{"unknown-key"} or {"bad-value"} (exit status 2) on the first key or value that no row allows,
/// with the nearest name or all valid values. Short forms become long ones.
void check_config(OrderedJson& config, const std::string& where);
/// Keys below "quantization" that are set and that only `plan` reads.
std::vector<std::string> plan_only_keys(const OrderedJson& config);

/// The value at "a.b.c", or null.
const OrderedJson* find_config(const OrderedJson& config, std::string_view path);

}  // namespace bitwright
