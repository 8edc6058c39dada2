#include "scheme/scheme.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "scheme/rows.hpp"

namespace bitwright {
namespace {

bool same(const std::shared_ptr<const Scheme>& a, const std::shared_ptr<const Scheme>& b) {
  return a == b || (a && b && *a == *b);
}

bool same(const std::optional<Parameter>& a, const std::optional<Parameter>& b) {
  return a.has_value() == b.has_value() && (!a || *a == *b);
}

std::string describe_grouping(const Grouping& grouping) {
  switch (grouping.kind) {
    case Grouping::Kind::tensor:
      return "per tensor";
    case Grouping::Kind::axis:
      if (grouping.size == 0) return grouping.axis == -1 ? "per channel" : "per column";
      return fmt::format("group {}{}", grouping.size, grouping.axis == -1 ? "" : " along columns");
    case Grouping::Kind::flat:
      return fmt::format("blocks of {}", grouping.size);
    case Grouping::Kind::block:
      return fmt::format("blocks of {}x{}", grouping.block_rows, grouping.block_columns);
    case Grouping::Kind::index:
      return fmt::format("indexed groups of {}", grouping.size);
  }
  return {};
}

/// "int4" for uint4 too: signedness is what "symmetric" says.
std::string describe_element(const ElementType& type) {
  return type.kind == ElementKind::integer ? fmt::format("int{}", type.bits) : std::string(type.name);
}

std::string describe_numbers(const Scheme& scheme) {
  return scheme.is_plain() ? std::string(scheme.element->name)
                           : fmt::format("double-quantized ({})", describe_element(*scheme.element));
}

}  // namespace

std::span<const ElementType* const> all_elements() {
  static const std::vector<const ElementType*> all = [] {
    std::vector<const ElementType*> rows;
#define SCHEME(name) \
  for (const ElementType& type : name##_rows) rows.push_back(&type);
#include "scheme/schemes.def"
    return rows;
  }();
  return all;
}

const ElementType* find_element(std::string_view name) {
  for (const ElementType* type : all_elements())
    if (type->name == name) return type;
  return nullptr;
}

bool operator==(const Parameter& a, const Parameter& b) {
  return a.grouping == b.grouping && same(a.scheme, b.scheme) && a.divides == b.divides;
}

bool operator==(const Scheme& a, const Scheme& b) {
  return a.element == b.element && same(a.scale, b.scale) && a.offset_kind == b.offset_kind &&
         same(a.offset, b.offset) && a.shift == b.shift && a.factor == b.factor;
}

Scheme plain(DType dtype) { return {.element = &float_element(dtype)}; }

Parameter parameter(const Grouping& grouping, Scheme scheme) {
  return {.grouping = grouping, .scheme = std::make_shared<const Scheme>(std::move(scheme))};
}

std::string describe(const Scheme& scheme) {
  if (scheme.is_plain()) return std::string(scheme.element->name);
  std::string text = describe_element(*scheme.element);
  if (scheme.element->kind == ElementKind::integer)
    text += scheme.offset_kind == OffsetKind::none || scheme.offset_kind == OffsetKind::shift ? " symmetric"
                                                                                              : " asymmetric";
  if (scheme.scale)
    text += fmt::format(", {}, {} scales", describe_grouping(scheme.scale->grouping),
                        describe_numbers(*scheme.scale->scheme));
  return text;
}

}  // namespace bitwright
