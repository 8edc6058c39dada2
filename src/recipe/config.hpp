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
  enum class Type : uint8_t { text, integer, boolean, names, rules };
  std::string_view path;  ///< "quantization.scheme.group_size"
  Type type;
  std::string_view fallback;  ///< what --help says of the default
  std::string_view help;
  std::vector<std::string> values = {};  ///< the only ones allowed; empty: any
  int64_t least = 0, most = 0;           ///< for integers
  bool per_layer = false;                ///< may stand in layer_configs, by its last name
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
/// with the nearest name or all valid values.
void check_config(const OrderedJson& config, const std::string& where);

/// The value at "a.b.c", or null.
const OrderedJson* find_config(const OrderedJson& config, std::string_view path);

}  // namespace bitwright
