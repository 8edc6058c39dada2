#include "tokenizer/json_part.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "tokenizer/pipeline.hpp"

namespace bitwright {

void JsonPart::bad(const std::string& why) const { bad_tokenizer(file, name.empty() ? why : name + ": " + why); }
void JsonPart::unsupported(const std::string& what) const {
  unsupported_tokenizer(file, name.empty() ? what : name + ": " + what);
}

const Json* JsonPart::find(const char* key) const {
  if (!json.is_object()) bad("not an object");
  const auto it = json.find(key);
  return it == json.end() || it->is_null() ? nullptr : &*it;
}

std::optional<JsonPart> JsonPart::maybe(const char* key) const {
  const Json* value = find(key);
  if (value == nullptr) return std::nullopt;
  return JsonPart{*value, file, name.empty() ? key : fmt::format("{}.{}", name, key)};
}

JsonPart JsonPart::child(const char* key) const {
  const Json* value = find(key);
  if (value == nullptr) bad(fmt::format("'{}' is missing", key));
  return {*value, file, name.empty() ? key : fmt::format("{}.{}", name, key)};
}

bool JsonPart::flag(const char* key, bool otherwise) const {
  const Json* value = find(key);
  if (value == nullptr) return otherwise;
  if (!value->is_boolean()) bad(fmt::format("'{}' is neither true nor false", key));
  return value->get<bool>();
}

const std::string& JsonPart::text(const char* key) const {
  const Json* value = find(key);
  if (value == nullptr || !value->is_string()) bad(fmt::format("'{}' is missing or not a string", key));
  return value->get_ref<const std::string&>();
}

std::string JsonPart::text(const char* key, const std::string& otherwise) const {
  return find(key) == nullptr ? otherwise : text(key);
}

size_t JsonPart::count(const char* key, size_t otherwise) const {
  const Json* value = find(key);
  if (value == nullptr) return otherwise;
  if (!value->is_number_unsigned()) bad(fmt::format("'{}' is not a whole number", key));
  return value->get<size_t>();
}

int32_t JsonPart::id(const Json& value, std::string_view token) const {
  const bool fits = value.is_number_integer() && value >= 0 && value < kMaxVocabulary;
  if (!fits) bad(fmt::format("the id of {} is not a number from 0 to {}", shown_token(token), kMaxVocabulary - 1));
  return value.get<int32_t>();
}

}  // namespace bitwright
