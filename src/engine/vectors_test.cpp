#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "engine/condition.hpp"
#include "engine/parameters.hpp"
#include "engine/precision.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

/// One line of $BITWRIGHT_SHARED/engines/tests.jsonl as a request; tests_schema.md says what its members mean.
PlanRequest request_of(const OrderedJson& vector) {
  PlanRequest request{.engine = vector["engine"], .version = vector["version"]};
  request.hardware = Json::parse(vector["hardware"].dump());
  if (request.hardware.contains("env"))
    for (const auto& [name, value] : request.hardware["env"].items())
      request.environment[name] = value.get<std::string>();
  if (vector["model_quantization"].is_string()) request.checkpoint = vector["model_quantization"];
  if (vector.contains("model")) request.model = Json::parse(vector["model"].dump());
  const OrderedJson config = vector.value("config", OrderedJson::object());
  OrderedJson quant_config = config.value("fields", OrderedJson::object());
  if (config.contains("preset") && !config.contains("fields")) quant_config["preset"] = config["preset"];
  request.fields = resolve_fields(quant_config);
  if (config.contains("intent")) request.intent = intent_of(config["intent"]);
  for (const auto& [name, value] : vector["user_params"].items())
    request.parameters.emplace_back(name, Json::parse(value.dump()));
  return request;
}

/// JSON text as what it says.
Json structured(const Json& value) {
  if (!value.is_string()) return value;
  const Json parsed = Json::parse(value.get<std::string>(), nullptr, false);
  return parsed.is_structured() ? parsed : value;
}

/// `wanted` is the value, one of a list, or JSON compared by meaning; an object's other members are allowed.
bool accepts(const Json& wanted, const Json& value) {
  if (wanted.is_array() && !value.is_array())
    return std::ranges::any_of(wanted, [&](const Json& one) { return accepts(one, value); });
  if (wanted.is_object()) {
    return structured(value) == wanted;
  }
  return same_value(wanted, value);
}
/// Every member of `wanted` is in `value`; objects by their members.
bool includes(const Json& wanted, const Json& value) {
  if (!wanted.is_object()) return same_value(wanted, value);
  return value.is_object() && std::ranges::all_of(wanted.items(), [&](const auto& member) {
           return value.contains(member.key()) && includes(member.value(), value[member.key()]);
         });
}

/// One name for a flag and its aliases, with or without dashes: "-ctk" is "cache-type-k".
std::string one_name(const OrderedJson& vector, const std::string& flag) {
  const Json& engine = Facts::standard().get("engines", vector["engine"].get<std::string>());
  const OrderedJson model = vector.value("model", OrderedJson::object());
  const Json* row = find_flag(engine, flag, model.value("entry", engine["entry"].get<std::string>()));
  return plain_flag(row != nullptr ? (*row)["flag"].get<std::string>() : flag);
}
/// `flags` under their one name.
Json renamed(const OrderedJson& vector, const Json& flags) {
  Json named = Json::object();
  for (const auto& [flag, value] : flags.items()) named[one_name(vector, flag)] = value;
  return named;
}
bool is_given(const OrderedJson& vector, const std::string& name) {
  return std::ranges::any_of(vector["user_params"].items(),
                             [&](const auto& given) { return one_name(vector, given.key()) == name; });
}

/// What is wrong with the plan against one expectation; empty: nothing.
std::string fault(const OrderedJson& vector, const Json& expect, const EnginePlan& plan) {
  if (plan.outcome != expect["outcome"]) return "outcome " + plan.outcome;
  for (const Json& code : expect["codes"])
    if (std::ranges::none_of(plan.diagnostics, [&](const Diagnostic& d) { return code == d.code; }))
      return "no " + code.get<std::string>();
  Json emitted = Json::object();
  for (const Argument& argument : plan.args) emitted[one_name(vector, argument.flag)] = argument.value;
  const Json args = renamed(vector, expect["args"]);
  const Json allowed = renamed(vector, expect.value("may_args", Json::object()));
  if (plan.outcome != "error") {
    for (const auto& [flag, wanted] : args.items())
      if (!emitted.contains(flag) || !accepts(wanted, emitted[flag])) return "argument " + flag;
    for (const auto& [flag, value] : emitted.items())
      if (!args.contains(flag) && !is_given(vector, flag) && !(allowed.contains(flag) && accepts(allowed[flag], value)))
        return "extra argument " + flag + " " + value.dump();
  }
  const Json absent = renamed(vector, expect.value("absent", Json::object()));
  for (const auto& [flag, values] : absent.items())
    if (emitted.contains(flag) && accepts(values, emitted[flag])) return "forbidden " + flag;
  if (expect.contains("env"))
    for (const auto& [name, value] : expect["env"].items())
      if (!plan.environment.contains(name) || !includes(value, structured(plan.environment[name])))
        return "variable " + name;
  if (expect.contains("config_file") && !includes(expect["config_file"], plan.config_file))
    return "config_file " + plan.config_file.dump();
  if (expect.contains("api") && !includes(expect["api"], plan.api)) return "api " + plan.api.dump();
  if (expect.contains("resolved"))  // judged as far as the plan predicts it
    for (const auto& [name, value] : expect["resolved"].items())
      if (plan.resolved.contains(name) && !same_value(plan.resolved[name], value))
        return "resolved " + name + " " + plan.resolved[name].dump();
  return {};
}

using Counts = std::map<std::string, std::pair<int, int>>;  ///< by engine: good, all

void check_vector(const OrderedJson& vector, Counts& by_engine) {
  EnginePlan plan;
  try {
    plan = plan_engine(request_of(vector));
  } catch (const Error& error) {
    plan.outcome = error.what();  // no expectation's outcome: said below
  }
  const Json expect = Json::parse(vector["expect"].dump());
  std::string wrong = fault(vector, expect, plan);
  if (!wrong.empty() && expect.contains("alternatives"))
    for (const Json& other : expect["alternatives"])
      if (fault(vector, other, plan).empty()) wrong.clear();
  auto& [good, all] = by_engine[vector["engine"]];
  ++all;
  if (wrong.empty()) {
    ++good;
    return;
  }
  std::string said;
  for (const Diagnostic& d : plan.diagnostics)
    said += "\n    " + d.code + " (" + std::string(severity_name(d.severity)) + "): " + d.message;
  ADD_FAILURE() << vector["id"] << ": " << wrong << "\n  " << (plan.engine.empty() ? "" : engine_command(plan, "MODEL"))
                << said;
}

void check_file(const std::filesystem::path& path) {
  std::ifstream file(path);
  ASSERT_TRUE(file) << path;
  Counts by_engine;
  size_t cases = 0;
  for (std::string line; std::getline(file, line); ++cases) check_vector(OrderedJson::parse(line), by_engine);
  std::cout << path.filename().string() << '\n';
  for (const auto& [engine, counts] : by_engine)
    std::cout << "  " << engine << ": " << counts.first << " of " << counts.second << '\n';
  std::cout << "cases: " << cases << '\n';
}

TEST(EngineVectors, AllHold) {
  const auto path = test::shared_dir() / "engines/tests.jsonl";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no engine vectors here";
  check_file(path);
}

/// Vectors of this project's own, in the same form: what the shared ones leave out.
TEST(EngineVectors, OwnHold) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator("tests/vectors"))
    if (entry.path().extension() == ".jsonl") files.push_back(entry.path());
  std::ranges::sort(files);
  ASSERT_FALSE(files.empty());
  for (const auto& file : files) check_file(file);
}

}  // namespace
}  // namespace bitwright
