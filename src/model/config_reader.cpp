#include "model/config_reader.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace bitwright {
namespace {

std::string show(const Json& value) { return printable(value.dump(-1, ' ', true, Json::error_handler_t::replace), 60); }

bool is_positive(const Json& value, double high) {
  return value.is_number() && value.get<double>() > 0 && value.get<double>() <= high;
}

bool is_integer(const Json& value, int64_t low, int64_t high) {
  const bool too_large =
      value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  return value.is_number_integer() && !too_large && value.get<int64_t>() >= low && value.get<int64_t>() <= high;
}

}  // namespace

ConfigReader::ConfigReader(const Json& config, std::string where) : config_(&config), where_(std::move(where)) {
  if (!config.is_object())
    throw Error({.code = "bad-config", .what = "cannot run this model", .where = where_, .why = "it is not an object"});
}

void ConfigReader::raise(const char* code, const char* key, const std::string& why) const {
  const Json* const value = find(key);
  throw Error({.code = code,
               .what = "cannot run this model",
               .where = where_,
               .why = value == nullptr ? fmt::format("'{}' {}", key, why)
                                       : fmt::format("'{}' is {}, {}", key, show(*value), why)});
}

void ConfigReader::fail(const char* key, const std::string& why) const { raise("bad-config", key, why); }

void ConfigReader::unsupported(const char* key, const std::string& why) const { raise("unsupported-config", key, why); }

const Json* ConfigReader::find(const char* key) const {
  const auto found = config_->find(key);
  return found == config_->end() || found->is_null() ? nullptr : &*found;
}

bool ConfigReader::has(const char* key) const { return config_->contains(key); }

std::optional<ConfigReader> ConfigReader::object(const char* key) const {
  const Json* const value = find(key);
  if (value == nullptr) return std::nullopt;
  return ConfigReader(*value, where_ + ", " + key);
}

int64_t ConfigReader::integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> fallback) const {
  const Json* const value = find(key);
  if (value == nullptr) {
    if (!fallback) fail(key, "is missing");
    return *fallback;
  }
  if (!is_integer(*value, low, high)) fail(key, fmt::format("not an integer from {} to {}", low, high));
  return value->get<int64_t>();
}

double ConfigReader::positive(const char* key, double high, std::optional<double> fallback) const {
  const Json* const value = find(key);
  if (value == nullptr) {
    if (!fallback) fail(key, "is missing");
    return *fallback;
  }
  if (!is_positive(*value, high)) fail(key, fmt::format("not a number above 0, at most {}", high));
  return value->get<double>();
}

bool ConfigReader::boolean(const char* key, bool fallback) const {
  const Json* const value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) fail(key, "neither true nor false");
  return value->get<bool>();
}

std::string ConfigReader::text(const char* key, const std::string& fallback) const {
  const Json* const value = find(key);
  if (value == nullptr) return fallback;
  if (!value->is_string()) fail(key, "not a text");
  return value->get<std::string>();
}

std::vector<double> ConfigReader::positives(const char* key, size_t count, double high) const {
  const Json* const value = find(key);
  if (value == nullptr) fail(key, "is missing");
  const bool good = value->is_array() && value->size() == count &&
                    std::ranges::all_of(*value, [&](const Json& v) { return is_positive(v, high); });
  if (!good) fail(key, fmt::format("not {} numbers above 0, at most {}", count, high));
  return value->get<std::vector<double>>();
}

std::vector<std::string> ConfigReader::texts(const char* key) const {
  const Json* const value = find(key);
  if (value == nullptr) return {};
  if (!value->is_array() || !std::ranges::all_of(*value, [](const Json& v) { return v.is_string(); }))
    fail(key, "not a list of texts");
  return value->get<std::vector<std::string>>();
}

std::vector<int64_t> ConfigReader::integers(const char* key, int64_t low, int64_t high) const {
  const Json* const value = find(key);
  if (value == nullptr) return {};
  if (!value->is_array() || !std::ranges::all_of(*value, [&](const Json& v) { return is_integer(v, low, high); }))
    fail(key, fmt::format("not a list of integers from {} to {}", low, high));
  return value->get<std::vector<int64_t>>();
}

void ConfigReader::only(const char* key, const Json& value) const {
  const Json* const found = find(key);
  if (found != nullptr && *found != value) unsupported(key, fmt::format("only {} is supported", show(value)));
}

}  // namespace bitwright
