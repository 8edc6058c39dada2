#include "model/end_tokens.hpp"

#include <limits>
#include <nlohmann/json.hpp>

#include "base/mapped_file.hpp"
#include "model/config_reader.hpp"

namespace bitwright {
namespace {

std::vector<int32_t> read(const Json& json, const std::string& where) {
  constexpr const char* kKey = "eos_token_id";
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const ConfigReader config(json, where);
  const Json* const value = config.find(kKey);
  if (value == nullptr) return {};
  const std::vector<int64_t> ids =
      value->is_array() ? config.integers(kKey, 0, kMost) : std::vector<int64_t>{config.integer(kKey, 0, kMost)};
  std::vector<int32_t> out;
  for (const int64_t id : ids) out.push_back(static_cast<int32_t>(id));
  return out;
}

}  // namespace

std::vector<int32_t> end_tokens(const Json& config, const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "generation_config.json";
  if (!directory.empty() && std::filesystem::exists(path))
    if (std::vector<int32_t> ids = read(parse_json(read_text_file(path), path.string()), path.string()); !ids.empty())
      return ids;
  return read(config, (directory / "config.json").string());
}

}  // namespace bitwright
