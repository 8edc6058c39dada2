#include "cli/plan_diff.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "cli/page.hpp"
#include "cli/tensor_groups.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

const OrderedJson* member(const OrderedJson& object, const char* name) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(name);
  return found == object.end() ? nullptr : &*found;
}

std::string text_at(const OrderedJson& object, const char* name) {
  const OrderedJson* value = member(object, name);
  return value != nullptr && value->is_string() ? value->get<std::string>() : std::string();
}

/// A list as an object, each element under the text of its member `key`; a name that comes again gets a number.
OrderedJson keyed(const OrderedJson& list, const char* key, const char* value) {
  OrderedJson object = OrderedJson::object();
  if (!list.is_array()) return object;
  for (const OrderedJson& element : list) {
    const std::string name = text_at(element, key);
    std::string unused = name;
    for (int i = 2; object.contains(unused); ++i) unused = fmt::format("{} {}", name, i);
    const OrderedJson* what = member(element, value);
    object[unused] = what != nullptr ? *what : OrderedJson(true);
  }
  return object;
}

/// What the two sides are compared by: lists become objects by name, what only repeats the rest is left out.
OrderedJson comparable(OrderedJson plan) {
  if (!plan.is_object()) return plan;
  for (const char* derived : {"explain", "diff"}) plan.erase(derived);
  for (const char* said : {"warnings", "errors"})
    if (const OrderedJson* list = member(plan, said)) plan[said] = keyed(*list, "code", "message");
  if (const OrderedJson* list = member(plan, "changes")) plan["changes"] = keyed(*list, "field", "to");
  if (const OrderedJson* list = member(plan, "recommend")) plan["recommend"] = keyed(*list, "method", "total_bytes");
  if (const OrderedJson* tensors = member(plan, "tensors")) {
    OrderedJson kinds = OrderedJson::object();
    for (const auto& [kind, scheme] : schemes_by_kind(*tensors)) kinds[kind] = scheme;
    plan["tensors"] = std::move(kinds);
  }
  if (const OrderedJson* answers = find_config(plan, "engine.answers")) {
    OrderedJson asked = keyed(*answers, "field", "value");
    plan["asked"] = std::move(asked);
  }
  if (const OrderedJson* engine = member(plan, "engine"); engine == nullptr || !engine->is_object()) return plan;
  OrderedJson& engine = plan["engine"];
  OrderedJson arguments = OrderedJson::array();
  if (const OrderedJson* explained = member(engine, "explained"); explained != nullptr && explained->is_array())
    for (const OrderedJson& argument : *explained)
      if (text_at(argument, "place") == "cli") arguments.push_back(argument);
  engine["args"] = keyed(arguments, "flag", "value");
  for (const char* derived : {"command", "explained", "answers", "overrides"}) engine.erase(derived);
  return plan;
}

/// What is absent on one side differs member by member where the other has an object.
void compare(const OrderedJson& before, const OrderedJson& after, const std::string& path, OrderedJson& diff) {
  const auto inner = [](const OrderedJson& value) { return value.is_null() || value.is_object(); };
  if (before == after) return;
  if (!inner(before) || !inner(after)) {
    diff.push_back({{"path", path}, {"before", before}, {"after", after}});
    return;
  }
  const OrderedJson none;
  const auto at = [&](const OrderedJson& side, const std::string& name) -> const OrderedJson& {
    const OrderedJson* value = member(side, name.c_str());
    return value != nullptr ? *value : none;
  };
  const auto below = [&](const std::string& name) { return path.empty() ? name : path + "." + name; };
  if (before.is_object())
    for (const auto& [name, value] : before.items()) compare(value, at(after, name), below(name), diff);
  if (after.is_object())
    for (const auto& [name, value] : after.items())
      if (member(before, name.c_str()) == nullptr) compare(none, value, below(name), diff);
}

/// What a plan that only one side has is called.
std::string title(const OrderedJson& plan) {
  const OrderedJson* engine = member(plan, "engine");
  return (engine != nullptr ? text_at(*engine, "name") + ", " : "") + text_at(plan, "quant_config");
}

std::string shown(const OrderedJson& value, const std::string& path) {
  if (value.is_null()) return "-";
  if (value.is_string()) return printable(value.get<std::string>(), 1000);
  if (value.is_number() && path.ends_with("bytes")) return size_text(value.get<double>());
  return printable(value.dump(-1, ' ', false, OrderedJson::error_handler_t::replace), 1000);
}

}  // namespace

bool is_plan(const OrderedJson& document) {
  const OrderedJson* plans = member(document, "plans");
  const OrderedJson* engine = member(document, "engine");
  return (plans != nullptr && plans->is_array()) ||
         (engine != nullptr && engine->is_object() && engine->contains("outcome") && document.contains("predicted"));
}

OrderedJson diff_plans(const OrderedJson& before, const OrderedJson& after) {
  OrderedJson diff = OrderedJson::array();
  const auto list = [](const OrderedJson& result) {
    const OrderedJson* plans = member(result, "plans");
    return plans != nullptr && plans->is_array() ? *plans : OrderedJson::array({result});
  };
  const OrderedJson ours = list(before), theirs = list(after);
  const bool several = ours.size() != 1 || theirs.size() != 1;
  for (size_t i = 0; i < std::max(ours.size(), theirs.size()); ++i) {
    const std::string path = several ? fmt::format("plans.{}", i) : "";
    if (i < ours.size() && i < theirs.size())
      compare(comparable(ours[i]), comparable(theirs[i]), path, diff);
    else if (i < ours.size())
      diff.push_back({{"path", path}, {"before", title(ours[i])}, {"after", nullptr}});
    else
      diff.push_back({{"path", path}, {"before", nullptr}, {"after", title(theirs[i])}});
  }
  return diff;
}

void print_diff(const OrderedJson& diff) {
  if (diff.empty()) return fmt::print("no difference\n");
  std::vector<std::vector<std::string>> rows;
  for (const OrderedJson& row : diff) {
    const auto path = row["path"].get<std::string>();
    rows.push_back({printable(path), shown(row["before"], path) + " -> " + shown(row["after"], path)});
  }
  fmt::print("{}", columns(rows));
}

}  // namespace bitwright
