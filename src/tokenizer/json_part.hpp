#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "base/json.hpp"

namespace bitwright {

/// A value of a tokenizer's JSON file with its place, for the error messages: "tokenizer.json: model".
struct JsonPart {
  const Json& json;
  std::string file, name;

  [[noreturn]] void bad(const std::string& why) const;
  [[noreturn]] void unsupported(const std::string& what) const;

  const Json* find(const char* key) const;  ///< null where it is absent or null
  JsonPart child(const char* key) const;
  std::optional<JsonPart> maybe(const char* key) const;
  bool flag(const char* key, bool otherwise) const;
  const std::string& text(const char* key) const;
  std::string text(const char* key, const std::string& otherwise) const;
  size_t count(const char* key, size_t otherwise) const;
  /// A token's id.
  int32_t id(const Json& value, std::string_view token) const;
};

}  // namespace bitwright
