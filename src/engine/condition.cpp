#include "engine/condition.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>

namespace bitwright {
namespace {

std::optional<double> number_of(const Json& value) {
  if (value.is_number()) return value.get<double>();
  if (!value.is_string()) return std::nullopt;
  const auto& text = value.get_ref<const std::string&>();
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

/// The sign of `fact` against `operand`; none where they cannot be compared.
std::optional<int> compare(const Json& fact, const Json& operand) {
  if (operand.is_string() && fact.is_string())
    return compare_versions(fact.get_ref<const std::string&>(), operand.get_ref<const std::string&>());
  const auto a = number_of(fact), b = number_of(operand);
  if (!a || !b) return std::nullopt;
  return *a < *b ? -1 : *a > *b ? 1 : 0;
}

bool matches(const Json* fact, const Json& wanted, const Json& facts);

bool starts_with(const Json& fact, const Json& prefix) {
  return fact.is_string() && prefix.is_string() &&
         fact.get_ref<const std::string&>().starts_with(prefix.get_ref<const std::string&>());
}

bool contains(const Json& fact, const Json& part) {
  if (fact.is_array()) return std::ranges::any_of(fact, [&](const Json& element) { return same_value(element, part); });
  return fact.is_string() && part.is_string() &&
         fact.get_ref<const std::string&>().find(part.get_ref<const std::string&>()) != std::string::npos;
}

bool multiple_of(const Json& fact, const Json& unit) {
  const auto number = number_of(fact), divisor = number_of(unit);
  return number && divisor && *divisor != 0 && std::fmod(*number, *divisor) == 0;
}

/// One operator; the table is what check_condition knows as well. `fact` is there.
struct Operator {
  std::string_view name;
  bool (*holds)(const Json& fact, const Json& operand);
};
template <class Sign>
bool compared(const Json& fact, const Json& operand, Sign accepts) {
  const auto sign = compare(fact, operand);
  return sign && accepts(*sign);
}
constexpr std::array<Operator, 7> kOperators = {{
    {">=", [](const Json& f, const Json& o) { return compared(f, o, [](int s) { return s >= 0; }); }},
    {">", [](const Json& f, const Json& o) { return compared(f, o, [](int s) { return s > 0; }); }},
    {"<=", [](const Json& f, const Json& o) { return compared(f, o, [](int s) { return s <= 0; }); }},
    {"<", [](const Json& f, const Json& o) { return compared(f, o, [](int s) { return s < 0; }); }},
    {"starts", starts_with},
    {"has", contains},
    {"multiple_of", multiple_of},
}};

bool operators_hold(const Json* fact, const Json& operators, const Json& facts) {
  for (const auto& [name, operand] : operators.items()) {
    if (name == "not") {
      if (matches(fact, operand, facts)) return false;
    } else if (name == "present") {
      if ((fact != nullptr) != operand.get<bool>()) return false;
    } else {
      const auto* row = std::ranges::find(kOperators, std::string_view(name), &Operator::name);
      if (row == kOperators.end() || fact == nullptr || !row->holds(*fact, operand)) return false;
    }
  }
  return true;
}

bool matches(const Json* fact, const Json& wanted, const Json& facts) {
  if (wanted.is_null()) return fact == nullptr;
  if (wanted.is_array()) return std::ranges::any_of(wanted, [&](const Json& one) { return matches(fact, one, facts); });
  if (wanted.is_object()) return operators_hold(fact, wanted, facts);
  if (fact == nullptr) return false;
  if (wanted.is_string() && wanted.get_ref<const std::string&>().starts_with('$')) {
    const Json* other = look_up(facts, std::string_view(wanted.get_ref<const std::string&>()).substr(1));
    return other != nullptr && same_value(*fact, *other);
  }
  if (fact->is_array())
    return std::ranges::any_of(*fact, [&](const Json& element) { return same_value(element, wanted); });
  return same_value(*fact, wanted);
}

/// A version's next part: a run of digits or of letters. Marks what comes before a release ("rc", "dev") as below zero.
struct Part {
  int rank;  ///< -1: before the release; 0: the end; 1: a word; 2: a number
  long number;
  std::string_view word;
};
Part next_part(std::string_view& rest) {
  const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
  const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  while (!rest.empty() && !is_digit(rest[0]) && !is_letter(rest[0])) rest.remove_prefix(1);
  if (rest.empty()) return {0, 0, {}};
  const bool digits = is_digit(rest[0]);
  size_t length = 0;
  while (length < rest.size() && (digits ? is_digit(rest[length]) : is_letter(rest[length]))) ++length;
  const std::string_view text = rest.substr(0, length);
  rest.remove_prefix(length);
  long number = 0;
  if (digits) std::from_chars(text.data(), text.data() + text.size(), number);
  constexpr std::array<std::string_view, 7> kBefore = {"dev", "a", "alpha", "beta", "rc", "pre", "preview"};
  const bool before = !digits && std::ranges::find(kBefore, text) != kBefore.end();
  return {digits ? 2 : before ? -1 : 1, number, text};
}

}  // namespace

bool holds(const Json& condition, const Json& facts) {
  const auto each = [&](const Json& one) { return holds(one, facts); };
  for (const auto& [path, wanted] : condition.items()) {
    const bool good = path == "any"   ? std::ranges::any_of(wanted, each)
                      : path == "all" ? std::ranges::all_of(wanted, each)
                      : path == "not" ? !holds(wanted, facts)
                                      : matches(look_up(facts, path), wanted, facts);
    if (!good) return false;
  }
  return true;
}

const Json& member(const Json& object, std::string_view name) {
  static const Json none;
  if (!object.is_object()) return none;
  const auto found = object.find(name);
  return found == object.end() ? none : *found;
}

const Json* look_up(const Json& facts, std::string_view path) {
  if (!facts.is_object()) return nullptr;
  if (const auto whole = facts.find(path); whole != facts.end()) return whole->is_null() ? nullptr : &*whole;
  for (size_t dot = path.find('.'); dot != std::string_view::npos; dot = path.find('.', dot + 1)) {
    const auto member = facts.find(path.substr(0, dot));
    if (member == facts.end()) continue;
    if (const Json* found = look_up(*member, path.substr(dot + 1))) return found;
  }
  return nullptr;
}

Json fill(const Json& value, const Json& facts) {
  if (value.is_string() && value.get_ref<const std::string&>().starts_with('$')) {
    const Json* fact = look_up(facts, std::string_view(value.get_ref<const std::string&>()).substr(1));
    return fact != nullptr ? *fact : Json();
  }
  if (!value.is_object() && !value.is_array()) return value;
  Json filled = value;
  for (Json& element : filled) element = fill(element, facts);
  return filled;
}

std::string fill_text(std::string_view text, const Json& facts) {
  std::string filled;
  while (!text.empty()) {
    const size_t open = text.find('{');
    const size_t close = open == std::string_view::npos ? open : text.find('}', open);
    if (close == std::string_view::npos) break;
    filled += text.substr(0, open);
    const std::string_view path = text.substr(open + 1, close - open - 1);
    if (path.find_first_of("\"' :,") != std::string_view::npos) {  // braces of JSON, no path
      filled += '{';
      text.remove_prefix(open + 1);
      continue;
    }
    const Json* fact = look_up(facts, path);
    filled += fact != nullptr ? value_text(*fact) : "unknown";
    text.remove_prefix(close + 1);
  }
  return filled.append(text);
}

std::string value_text(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

bool same_value(const Json& a, const Json& b) {
  if (a == b) return true;
  const bool plain = !a.is_structured() && !b.is_structured() && a.type() != b.type();
  return plain && (a.is_string() || b.is_string()) && value_text(a) == value_text(b);
}

int compare_versions(std::string_view a, std::string_view b) {
  for (;;) {
    const Part x = next_part(a), y = next_part(b);
    if (x.rank != y.rank) return x.rank < y.rank ? -1 : 1;
    if (x.rank == 0) return 0;
    if (x.number != y.number) return x.number < y.number ? -1 : 1;
    if (x.rank != 2 && x.word != y.word) return x.word < y.word ? -1 : 1;
  }
}

void check_condition(const Json& condition, const std::string& where, std::vector<std::string>& problems) {
  if (!condition.is_object()) {
    problems.push_back(where + ": a condition is an object");
    return;
  }
  for (const auto& [path, wanted] : condition.items()) {
    const std::string here = where + "." + path;
    if (path == "any" || path == "all") {
      if (!wanted.is_array() || wanted.empty()) problems.push_back(here + ": a list of conditions is needed");
      for (const Json& one : wanted) check_condition(one, here, problems);
    } else if (path == "not") {
      check_condition(wanted, here, problems);
    } else if (wanted.is_object()) {
      if (wanted.empty()) problems.push_back(here + ": says nothing");
      for (const auto& [name, operand] : wanted.items()) {
        const bool known = name == "not" || (name == "present" && operand.is_boolean()) ||
                           std::ranges::find(kOperators, std::string_view(name), &Operator::name) != kOperators.end();
        if (!known) problems.push_back(fmt::format("{}: no operator '{}'", here, name));
      }
    }
  }
}

}  // namespace bitwright
