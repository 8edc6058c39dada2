#include "engine/parameters.hpp"

#include <algorithm>

#include "engine/condition.hpp"
#include "engine/facts.hpp"

namespace bitwright {
namespace {

bool answers_to(const Json& row, const std::string& plain) {
  if (plain_flag(row["flag"].get_ref<const std::string&>()) == plain) return true;
  const auto aliases = row.find("aliases");
  return aliases != row.end() && std::ranges::any_of(*aliases, [&](const Json& alias) {
           return plain_flag(alias.get_ref<const std::string&>()) == plain;
         });
}

bool belongs_to(const Json& row, std::string_view entry) {
  const auto entries = row.find("entries");
  return entries == row.end() || std::ranges::find(*entries, Json(entry)) != entries->end();
}

/// Are there dotted flags below `name`: kv_cache_config.dtype below kv_cache_config?
bool has_members(const Json& engine, std::string_view name) {
  const std::string prefix = plain_flag(name) + ".";
  return std::ranges::any_of(engine["flags"], [&](const Json& row) {
    return plain_flag(row["flag"].get_ref<const std::string&>()).starts_with(prefix);
  });
}

/// JSON text as the value it stands for; anything else as it is.
Json structured(const Json& value) {
  if (!value.is_string()) return value;
  Json parsed = Json::parse(value.get_ref<const std::string&>(), nullptr, false);
  return parsed.is_structured() ? parsed : value;
}

/// How a plain value goes to the command line: text, or a bare flag.
Json as_argument(const Json& value) {
  return value.is_boolean() || value.is_structured() ? value : Json(value_text(value));
}

void add_parameter(const Json& engine, std::string_view entry, const std::string& name, const Json& value,
                   std::vector<NamedParameter>& named) {
  NamedParameter one;
  one.row = find_flag(engine, name, entry, &one.other_entry);
  if (one.row == nullptr && value.is_object() && has_members(engine, name)) {
    for (const auto& [member, inner] : value.items()) add_parameter(engine, entry, name + "." + member, inner, named);
    return;
  }
  if (const size_t dot = name.find('.'); one.row == nullptr && dot != std::string::npos) {
    one.row = find_flag(engine, name.substr(0, dot), entry, &one.other_entry);
    if (one.row != nullptr) one.path = name.substr(dot + 1);
  }
  if (one.row != nullptr) {
    one.flag = (*one.row)["flag"].get<std::string>();
    one.value = one.row->value("type", "") == "json" ? structured(value) : as_argument(value);
  } else {
    one.flag = name.starts_with('-') ? name : "--" + name;
    one.value = as_argument(value);
  }
  one.given = value.is_string() ? value : one.value;
  named.push_back(std::move(one));
}

}  // namespace

std::string_view without_dashes(std::string_view flag) {
  flag.remove_prefix(std::min(flag.find_first_not_of('-'), flag.size()));
  return flag;
}

std::string plain_flag(std::string_view flag) {
  std::string plain(without_dashes(flag));
  if (plain.size() == 1) return plain;
  for (char& c : plain) c = c == '_' ? '-' : c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return plain;
}

const Json* find_flag(const Json& engine, std::string_view name, std::string_view entry, bool* other_entry) {
  const std::string plain = plain_flag(name);
  const Json* elsewhere = nullptr;
  if (other_entry != nullptr) *other_entry = false;
  for (const Json& row : engine["flags"]) {
    if (!answers_to(row, plain)) continue;
    if (belongs_to(row, entry)) return &row;
    elsewhere = &row;
  }
  if (other_entry != nullptr) *other_entry = elsewhere != nullptr;
  return other_entry != nullptr ? elsewhere : nullptr;
}

std::vector<NamedParameter> name_parameters(const Json& engine, std::string_view entry, const Parameters& parameters) {
  std::vector<NamedParameter> named;
  for (const auto& [name, value] : parameters) {
    if (value.is_null() || name.empty()) continue;
    add_parameter(engine, entry, name, value, named);
  }
  return named;
}

}  // namespace bitwright
