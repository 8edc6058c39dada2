#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.hpp"
#include "scheme/scheme.hpp"

namespace bitwright {
namespace {

using Kind = Grouping::Kind;
constexpr std::array<std::pair<Kind, std::string_view>, 5> kGroupingNames = {{{Kind::tensor, "tensor"},
                                                                              {Kind::axis, "axis"},
                                                                              {Kind::flat, "flat"},
                                                                              {Kind::block, "block"},
                                                                              {Kind::index, "index"}}};
constexpr std::array<std::pair<OffsetKind, std::string_view>, 6> kOffsetNames = {
    {{OffsetKind::none, "none"},
     {OffsetKind::zero_point, "zero_point"},
     {OffsetKind::float_zero, "float_zero"},
     {OffsetKind::bias, "bias"},
     {OffsetKind::minimum, "minimum"},
     {OffsetKind::shift, "shift"}}};
constexpr int kMaxNesting = 4;

template <class Table, class Key>
std::string_view name_of(const Table& table, Key key) {
  for (const auto& [value, name] : table)
    if (value == key) return name;
  return {};
}

/// Reads one object's members, each once; what is left unread is an error, so that nothing is silently ignored.
class Members {
 public:
  Members(const Json& json, const std::string& where) : json_(json), where_(where) {
    if (!json.is_object()) fail("expected an object");
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw Error({.code = "bad-scheme", .what = "cannot read scheme", .where = where_, .why = why});
  }
  const Json* find(const char* key) {
    const auto found = json_.find(key);
    if (found == json_.end()) return nullptr;
    ++read_;
    return &*found;
  }
  int64_t integer(const char* key, int64_t fallback) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number_integer()) fail(fmt::format("'{}' is no integer", key));
    return value->get<int64_t>();
  }
  bool boolean(const char* key) {
    const Json* value = find(key);
    if (value == nullptr) return false;
    if (!value->is_boolean()) fail(fmt::format("'{}' is neither true nor false", key));
    return value->get<bool>();
  }
  float number(const char* key, float fallback) {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number()) fail(fmt::format("'{}' is no number", key));
    return value->get<float>();
  }
  template <class Table>
  auto one_of(const char* key, const Table& table) {
    const Json* value = find(key);
    if (value != nullptr && value->is_string())
      for (const auto& [row, name] : table)
        if (*value == name) return row;
    fail(fmt::format("'{}' is missing or unknown", key));
  }
  void finish() const {
    if (read_ != json_.size()) fail("unknown members");
  }
  const std::string& where() const { return where_; }

 private:
  const Json& json_;
  const std::string& where_;
  size_t read_ = 0;
};

OrderedJson grouping_to_json(const Grouping& g) {
  OrderedJson json = {{"kind", name_of(kGroupingNames, g.kind)}};
  if (g.kind == Kind::axis) json["axis"] = g.axis;
  if (g.size != 0) json["size"] = g.size;
  if (g.interleaved) json["interleaved"] = true;
  if (g.kind == Kind::block) {
    json["block_rows"] = g.block_rows;
    json["block_columns"] = g.block_columns;
  }
  return json;
}

Grouping grouping_from_json(const Json& json, const std::string& where) {
  Members members(json, where);
  Grouping g;
  g.kind = members.one_of("kind", kGroupingNames);
  g.axis = static_cast<int>(std::clamp<int64_t>(members.integer("axis", -1), -3, 0));
  g.size = members.integer("size", 0);
  g.interleaved = members.boolean("interleaved");
  g.block_rows = members.integer("block_rows", 0);
  g.block_columns = members.integer("block_columns", 0);
  members.finish();
  if (g.size < 0 || g.block_rows < 0 || g.block_columns < 0) members.fail("negative size");
  return g;
}

OrderedJson parameter_to_json(const Parameter& p) {
  OrderedJson json = {{"grouping", grouping_to_json(p.grouping)}};
  if (p.divides) json["divides"] = true;
  json["scheme"] = to_json(*p.scheme);
  return json;
}

Scheme read_scheme(const Json& json, const std::string& where, int depth);

Parameter parameter_from_json(const Json& json, const std::string& where, int depth) {
  Members members(json, where);
  const Json* grouping = members.find("grouping");
  const Json* scheme = members.find("scheme");
  if (grouping == nullptr || scheme == nullptr) members.fail("a parameter needs 'grouping' and 'scheme'");
  Parameter p = parameter(grouping_from_json(*grouping, where), read_scheme(*scheme, where, depth + 1));
  p.divides = members.boolean("divides");
  members.finish();
  return p;
}

Scheme read_scheme(const Json& json, const std::string& where, int depth) {
  Members members(json, where);
  if (depth > kMaxNesting) members.fail("nested too deep");
  Scheme scheme;
  const Json* element = members.find("element");
  if (element == nullptr || !element->is_string()) members.fail("'element' is missing");
  scheme.element = find_element(element->get_ref<const std::string&>());
  if (scheme.element == nullptr) members.fail(fmt::format("unknown element '{}'", element->get<std::string>()));
  if (const Json* scale = members.find("scale")) scheme.scale = parameter_from_json(*scale, where, depth);
  if (json.contains("offset_kind")) scheme.offset_kind = members.one_of("offset_kind", kOffsetNames);
  if (const Json* offset = members.find("offset")) scheme.offset = parameter_from_json(*offset, where, depth);
  scheme.shift = members.number("shift", 0);
  scheme.factor = members.number("factor", 1);
  members.finish();
  if (!scheme.scale && (scheme.factor != 1 || scheme.offset_kind != OffsetKind::none))
    members.fail("an offset or a factor without a scale");
  const bool stores_offset = scheme.offset_kind != OffsetKind::none && scheme.offset_kind != OffsetKind::shift;
  if (stores_offset != scheme.offset.has_value()) members.fail("'offset' and 'offset_kind' disagree");
  return scheme;
}

}  // namespace

OrderedJson to_json(const Scheme& scheme) {
  OrderedJson json = {{"element", scheme.element->name}};
  if (scheme.scale) json["scale"] = parameter_to_json(*scheme.scale);
  if (scheme.offset_kind != OffsetKind::none) json["offset_kind"] = name_of(kOffsetNames, scheme.offset_kind);
  if (scheme.offset) json["offset"] = parameter_to_json(*scheme.offset);
  if (scheme.shift != 0) json["shift"] = scheme.shift;
  if (scheme.factor != 1) json["factor"] = scheme.factor;
  return json;
}

Scheme scheme_from_json(const Json& json, const std::string& where) { return read_scheme(json, where, 0); }

}  // namespace bitwright
