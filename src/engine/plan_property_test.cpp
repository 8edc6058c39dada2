#include <gtest/gtest.h>

#include <iostream>
#include <random>
#include <set>

#include "engine/condition.hpp"
#include "engine/parameters.hpp"
#include "engine/plan.hpp"

namespace bitwright {
namespace {

/// Requests of every kind the tables know, and of some they do not.
class RandomRequests {
 public:
  explicit RandomRequests(uint64_t seed) : random_(seed) {}

  PlanRequest next() {
    PlanRequest r{.engine = (*pick(engines_))["name"].get<std::string>()};
    const Json& engine = Facts::standard().get("engines", r.engine);
    if (chance(4)) r.version = pick(versions_);
    if (!chance(8)) r.hardware = *pick(hardware_);
    if (chance(10)) r.hardware = {{"vendor", "nvidia"}, {"sm", 50 + static_cast<int>(random_() % 90)}};
    if (chance(2)) r.checkpoint = pick(checkpoints_);
    for (const std::string& field : field_names())
      if (chance(2)) r.fields[field] = pick(field_values(field));
    if (chance(3)) r.intent.method = pick(intent_methods());
    if (chance(2)) r.intent.weight_only = chance(2);
    if (chance(20)) r.intent.backend_method = pick(words_);
    add_model(r, engine);
    for (size_t n = random_() % 4; n > 0; --n) add_parameter(r, engine);
    if (chance(10)) r.environment["VLLM_HUMMING_ONLINE_QUANT_CONFIG"] = R"({"dtype": "int4"})";
    return r;
  }

 private:
  bool chance(uint64_t one_in) { return random_() % one_in == 0; }
  template <class T>
  const T& pick(const std::vector<T>& from) {
    return from[random_() % from.size()];
  }

  void add_model(PlanRequest& r, const Json& engine) {
    r.model = {{"moe", chance(2)}, {"mla", chance(4)}};
    if (chance(3)) r.model["head_dim"] = std::vector<int>{64, 80, 96, 128}[random_() % 4];
    if (chance(3)) r.model["bits"] = std::vector<int>{2, 3, 4, 8}[random_() % 4];
    if (chance(4)) r.model["sym"] = chance(2);
    if (chance(4)) r.model["group_size"] = std::vector<int>{-1, 32, 64, 128}[random_() % 4];
    if (chance(3)) r.model["scheme"] = pick(schemes_);
    if (chance(6)) r.model["quant_algo"] = pick(algos_);
    if (chance(6)) r.model["kv_cache_quant_algo"] = chance(2) ? "FP8" : "NVFP4";
    if (chance(3)) {
      std::vector<std::string> entries;
      for (const auto& [name, command] : engine["entries"].items()) entries.push_back(name);
      r.model["entry"] = pick(entries);
    }
  }
  void add_parameter(PlanRequest& r, const Json& engine) {
    if (engine["flags"].empty() || chance(6)) {
      r.parameters.emplace_back(pick(words_), chance(2) ? Json(true) : Json(7));
      return;
    }
    const Json& row = engine["flags"][random_() % engine["flags"].size()];
    std::string name = row["flag"];
    if (chance(3)) name = plain_flag(name);
    if (std::ranges::any_of(r.parameters, [&](const auto& p) { return plain_flag(p.first) == plain_flag(name); }))
      return;
    Json value = pick(words_);
    if (row.contains("values") && !chance(5)) value = row["values"][random_() % row["values"].size()];
    if (row.value("type", "") == "json" && !chance(5))
      value = {{chance(2) ? "linear" : "moe", pick(words_)}, {"quant_method", pick(words_)}};
    if (row.value("type", "") == "int" && !chance(5)) value = random_() % 9;
    if (row.value("type", "") == "bool") value = true;
    r.parameters.emplace_back(std::move(name), std::move(value));
  }

  std::mt19937_64 random_;
  std::vector<const Json*> engines_ = Facts::standard().all("engines"), hardware_ = Facts::standard().all("hardware");
  std::vector<std::string> versions_ = {"0.1", "1.2.0", "1.3.0rc27", "0.28.0", "99", "b9000", "", "x"};
  std::vector<std::string> checkpoints_ = {
      "awq",        "gptq",         "fp8",     "bitsandbytes", "compressed-tensors",
      "modelopt",   "modelopt_fp4", "mxfp4",   "gguf",         "mlx",
      "hqq",        "quanto",       "torchao", "w4afp8",       "fp_quant",
      "auto-round", "quark",        "aqlm",    "bitwright",    "nonsense"};
  std::vector<std::string> schemes_ = {"w8a8_fp8",   "w8a16_fp8", "w8a8_int8",  "wNa16",
                                       "w4a4_nvfp4", "w4a8_fp8",  "w4a4_mxfp4", "mixed"};
  std::vector<std::string> algos_ = {"FP8", "NVFP4", "W4A16_AWQ", "W4A8_AWQ", "MIXED_PRECISION", "INT8", "W4A16_MXFP4"};
  std::vector<std::string> words_ = {"fp8", "auto",         "int8",    "nonsense",    "fp8_per_tensor",
                                     "hqq", "bitsandbytes", "{broken", "'; rm -rf /", "online",
                                     "gptq"};
};

std::string shown(const PlanRequest& r) {
  std::string text = r.engine + " " + r.version + " ckpt " + r.checkpoint + " hardware " + r.hardware.dump() +
                     " model " + r.model.dump() + " intent " + r.intent.method;
  for (const auto& [field, value] : r.fields) text += " " + field + "=" + value;
  for (const auto& [name, value] : r.parameters) text += " " + name + "=" + value.dump();
  return text;
}

/// A derived argument must be a flag of the table, with a value that the table lists.
void check_derived(const Json& engine, const Argument& argument, const std::string& entry) {
  const Json* row = find_flag(engine, argument.flag, entry);
  ASSERT_NE(row, nullptr) << argument.flag;
  if (!row->contains("values") || argument.rule.starts_with("backend_method")) return;
  if (engine.value("method_flag", "") == argument.flag && engine["methods"].contains(value_text(argument.value)))
    return;
  const auto& values = (*row)["values"];
  EXPECT_TRUE(std::ranges::any_of(values, [&](const Json& one) { return same_value(one, argument.value); }))
      << argument.flag << " " << argument.value;
}

/// Is the user's parameter still there as given?
bool is_kept(const EnginePlan& plan, const NamedParameter& parameter) {
  const std::string flag = parameter.path.empty() ? parameter.flag : parameter.flag + "." + parameter.path;
  if (std::ranges::any_of(plan.args,
                          [&](const Argument& a) { return a.given && a.flag == flag && a.value == parameter.given; }))
    return true;
  if (parameter.row == nullptr || !parameter.row->contains("place")) return false;
  if (const Json* value = look_up(plan.config_file, parameter.flag); value != nullptr && *value == parameter.value)
    return true;
  if (const Json* value = look_up(plan.api, parameter.flag); value != nullptr && *value == parameter.value) return true;
  return plan.api.contains("class") && parameter.value.is_object();  // a configuration object stands as its members
}

/// The leaves of a tree of settings by their dotted names.
void list_leaves(const Json& tree, const std::string& prefix, std::vector<std::string>& names) {
  for (const auto& [name, value] : tree.items())
    if (value.is_object() && !value.empty())
      list_leaves(value, prefix + name + ".", names);
    else
      names.push_back(prefix + name);
}

/// Nothing stands in a plan without the rule that put it there, and what was derived names the engine's file.
void check_explained(const PlanRequest& request, const EnginePlan& plan) {
  std::set<std::string> explained;
  for (const auto* arguments : {&plan.args, &plan.settings})
    for (const Argument& argument : *arguments) {
      EXPECT_FALSE(argument.rule.empty()) << argument.flag;
      EXPECT_TRUE(argument.given || !argument.source.empty()) << argument.flag;
      explained.insert(argument.flag);
    }
  std::vector<std::string> leaves;
  for (const Json* tree : {&plan.environment, &plan.config_file, &plan.api}) list_leaves(*tree, "", leaves);
  for (std::string name : leaves) {
    // the members of a structured setting are explained with it; a configuration object stands as its members
    while (!explained.contains(name) && name.find('.') != std::string::npos) name.resize(name.rfind('.'));
    EXPECT_TRUE(explained.contains(name) || explained.contains("quantization_config")) << name;
  }
  for (const Answer& answer : plan.answers) EXPECT_FALSE(answer.why.empty()) << answer.field << " " << answer.value;
  if (const std::string& method = request.intent.method; method != "none" && method != "auto") {
    EXPECT_TRUE(std::ranges::any_of(plan.answers, [](const Answer& a) {
      return a.field == "intent" || a.field == "backend_method";
    })) << method;
  }
}

void check_plan(const PlanRequest& request, const EnginePlan& plan) {
  check_explained(request, plan);
  const Json& engine = Facts::standard().get("engines", request.engine);
  for (const Argument& argument : plan.args)
    if (!argument.given) check_derived(engine, argument, plan.entry);
  for (const NamedParameter& parameter : name_parameters(engine, plan.entry, request.parameters))
    EXPECT_TRUE(is_kept(plan, parameter)) << parameter.flag << " " << parameter.value;
  for (const auto& [field, value] : request.fields) {
    if (value == "auto") continue;
    const auto answer = std::ranges::find(plan.answers, field, &Answer::field);
    ASSERT_NE(answer, plan.answers.end()) << field;
    if (answer->outcome == "diagnostic") {
      EXPECT_FALSE(plan.diagnostics.empty());
    }
    if (answer->outcome == "override") {
      EXPECT_FALSE(plan.overrides.empty());
    }
    if (answer->outcome == "argument") {
      EXPECT_FALSE(plan.args.empty() && plan.config_file.empty() && plan.api.empty()) << field;
    }
    if (answer->outcome == "checkpoint") {
      EXPECT_FALSE(request.checkpoint.empty());
    }
  }
  const bool has_error =
      std::ranges::any_of(plan.diagnostics, [](const Diagnostic& d) { return d.severity == Severity::error; });
  EXPECT_EQ(has_error, plan.outcome == "error");
  for (const Diagnostic& d : plan.diagnostics) {
    EXPECT_FALSE(d.code.empty());
    EXPECT_FALSE(d.message.empty());
  }
}

TEST(PlanProperty, RandomCombinations) {
  constexpr int kCombinations = 100000;
  RandomRequests requests(20260821);
  std::map<std::string, int> outcomes;
  for (int i = 0; i < kCombinations; ++i) {
    const PlanRequest request = requests.next();
    SCOPED_TRACE(i);
    const EnginePlan plan = plan_engine(request);
    ++outcomes[plan.outcome];
    check_plan(request, plan);
    if (i % 100 == 0) {
      EXPECT_EQ(plan_json(plan, "M").dump(), plan_json(plan_engine(request), "M").dump());
    }
    ASSERT_FALSE(::testing::Test::HasFailure()) << shown(request);
  }
  for (const auto& [outcome, count] : outcomes) std::cout << outcome << ": " << count << '\n';
  EXPECT_GT(outcomes["ok"], kCombinations / 100);
  EXPECT_GT(outcomes["warning"], kCombinations / 100);
}

}  // namespace
}  // namespace bitwright
