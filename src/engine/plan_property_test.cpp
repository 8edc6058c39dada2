#include <gtest/gtest.h>

#include <iostream>
#include <random>
#include <set>

#include "base/error.hpp"
#include "base/json.hpp"
#include "engine/adapt.hpp"
#include "engine/condition.hpp"
#include "engine/parameters.hpp"
#include "engine/precision.hpp"
#include "tests/support.hpp"

// What must hold of every plan, over random requests. What a plan should hold is worked out here from the tables again,
// not by the planner's own functions, wherever that is possible.

namespace bitwright {
namespace {

/// A request with the quant_config its fields come from.
struct Asked {
  PlanRequest request;
  OrderedJson quant_config = OrderedJson::object();
};

/// Requests of every kind the tables know, and of many they do not.
class RandomRequests {
 public:
  explicit RandomRequests(uint64_t seed) : random_(seed) { read_real_configs(); }

  Asked next() {
    Asked asked{.request = {.engine = (*pick(engines_))["name"].get<std::string>()}};
    PlanRequest& r = asked.request;
    const Json& engine = Facts::standard().get("engines", r.engine);
    if (chance(4)) r.version = chance(3) ? engine["version"].get<std::string>() : pick(versions_);
    if (!chance(8)) r.hardware = *pick(hardware_);
    if (chance(10))
      r.hardware = {{"vendor", chance(4) ? "amd" : "nvidia"}, {"sm", 50 + static_cast<int>(random_() % 90)}};
    add_fields(asked);
    if (chance(3)) r.intent.method = pick(intent_methods());
    if (chance(2)) r.intent.weight_only = chance(2);
    if (chance(20)) r.intent.backend_method = pick(words_);
    add_model(r, engine);
    for (size_t n = random_() % 4; n > 0; --n) r.parameters.emplace_back(parameter(engine));
    if (chance(8)) add_environment(r);
    return asked;
  }
  size_t real_configs() const { return real_.size(); }

 private:
  bool chance(uint64_t one_in) { return random_() % one_in == 0; }
  template <class T>
  const T& pick(const std::vector<T>& from) {
    return from[random_() % from.size()];
  }

  void read_real_configs() {
    for (const auto& path : test::files_in(test::shared_dir() / "data/quant_configs", "config.json")) {
      const Json config = parse_json(test::read_file(path), path.string());
      DetectedQuantization found = detect_model_quantization({{"config.json", config}});
      Json facts = model_facts(config);
      facts.update(found.facts);
      found.facts = facts;
      real_.push_back(std::move(found));
    }
  }

  void add_fields(Asked& asked) {
    if (chance(3)) asked.quant_config["preset"] = (*pick(presets_))["name"].get<std::string>();
    for (const std::string& field : field_names())
      if (chance(asked.quant_config.empty() ? 2 : 5)) asked.quant_config[field] = pick(field_values(field));
    asked.request.fields = resolve_fields(asked.quant_config);
  }
  void add_model(PlanRequest& r, const Json& engine) {
    if (!real_.empty() && chance(3)) {
      const DetectedQuantization& real = pick(real_);
      r.checkpoint = real.method;
      r.model = real.facts;
    } else {
      if (chance(2)) r.checkpoint = pick(checkpoints_);
      add_model_facts(r.model);
    }
    if (!chance(3)) return;
    std::vector<std::string> entries;
    for (const auto& [name, command] : engine["entries"].items()) entries.push_back(name);
    r.model["entry"] = pick(entries);
  }
  void add_model_facts(Json& model) {
    model = {{"moe", chance(2)}, {"mla", chance(4)}};
    const auto add = [&](const char* name, const std::vector<Json>& values) {
      if (chance(4)) model[name] = pick(values);
    };
    add("head_dim", {64, 80, 96, 128});
    add("bits", {2, 3, 4, 8, 2.5, "4"});
    add("sym", {true, false});
    add("group_size", {-1, 32, 64, 128});
    add("heads", {6, 32, 64});
    add("intermediate_size", {1408, 11008});
    add("scheme", {"w8a8_fp8", "w8a16_fp8", "w8a8_int8", "wNa16", "w4a4_nvfp4", "w4a8_fp8", "w4a4_mxfp4", "mixed"});
    add("quant_algo", {"FP8", "NVFP4", "W4A16_AWQ", "W4A8_AWQ", "MIXED_PRECISION", "INT8", "W4A16_MXFP4"});
    add("kv_cache_quant_algo", {"FP8", "NVFP4", 7});
  }
  void add_environment(PlanRequest& r) {
    r.environment[pick(variables_)] = chance(2) ? R"({"dtype": "int4"})" : pick(words_);
  }

  std::pair<std::string, Json> parameter(const Json& engine) {
    if (engine["flags"].empty() || chance(6)) return {pick(words_), pick(values_)};
    const Json& row = engine["flags"][random_() % engine["flags"].size()];
    std::string name = row["flag"];
    if (row.contains("aliases") && chance(4)) name = row["aliases"][random_() % row["aliases"].size()];
    if (const Json& gone = engine.value("removed_flags", Json::object()); !gone.empty() && chance(12))
      name = gone.begin().key();
    name = respelled(std::move(name));
    if (chance(5)) return {std::move(name), pick(values_)};
    if (row.contains("values")) return {std::move(name), row["values"][random_() % row["values"].size()]};
    const std::string type = row.value("type", "");
    if (type == "json")
      return {std::move(name), {{chance(2) ? "linear" : "moe", pick(words_)}, {"quant_method", pick(words_)}}};
    if (type == "int") return {std::move(name), random_() % 9};
    return {std::move(name), type == "bool" ? Json(true) : Json(pick(words_))};
  }
  /// The same name as another would write it. Single letters keep their case: -c and -C are two flags.
  std::string respelled(std::string name) {
    const size_t dashes = std::min(name.find_first_not_of('-'), name.size());
    if (chance(3)) name.erase(0, dashes);
    for (char& c : name)
      if ((c == '-' || c == '_') && &c - name.data() >= 2 && chance(3)) c = c == '-' ? '_' : '-';
    if (name.size() - std::min(dashes, name.size()) > 1 && chance(6))
      for (char& c : name) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
    if (chance(12) && name.find('.') == std::string::npos) name += ".backend";
    return name;
  }

  std::mt19937_64 random_;
  std::vector<const Json*> engines_ = Facts::standard().all("engines"), hardware_ = Facts::standard().all("hardware"),
                           presets_ = Facts::standard().all("presets");
  std::vector<DetectedQuantization> real_;
  std::vector<std::string> versions_ = {
      "0.1",   "0.27.0",      "1.2.0", "1.3.0rc6", "1.3.0rc27", "0.28.0", "0.28.0.dev1",
      "99",    "b9000",       "",      "x",        "-1",        "1..2",   "9999999999999999999999",
      " 0.28", "0.28.0+cu128"};
  std::vector<std::string> checkpoints_ = {
      "awq",        "gptq",         "fp8",     "bitsandbytes", "compressed-tensors",
      "modelopt",   "modelopt_fp4", "mxfp4",   "gguf",         "mlx",
      "hqq",        "quanto",       "torchao", "w4afp8",       "fp_quant",
      "auto-round", "quark",        "aqlm",    "bitwright",    "exl2",
      "modelslim",  "experts_int8", "nvfp4",   "nonsense"};
  std::vector<std::string> words_ = {
      "fp8",  "auto",   "int8",    "nonsense",    "fp8_per_tensor", "hqq",   "bitsandbytes",
      "gptq", "online", "{broken", "'; rm -rf /", "$(id)",          "a b",   "-",
      "--",   "---x",   "x=y",     "two\nlines",  "\x1b[31m",       "größe", "kv.cache.dtype",
      "."};
  std::vector<Json> values_ = {nullptr,
                               true,
                               false,
                               0,
                               -1,
                               7,
                               0.8,
                               1e300,
                               9999999999999999999U,
                               "",
                               "fp8",
                               "8",
                               "0x8",
                               "two\nlines",
                               "'quoted'",
                               Json::array(),
                               {1, 2},
                               Json::object(),
                               {{"a", {{"b", 1}}}},
                               R"({"linear": "fp8"})",
                               "{broken",
                               std::string(300, 'x')};
  std::vector<std::string> variables_ = {"VLLM_HUMMING_ONLINE_QUANT_CONFIG", "SGLANG_INT4_WEIGHT",
                                         "CUDA_VISIBLE_DEVICES", "HTTP_PROXY", "x"};
};

std::string shown(const Asked& asked) {
  const PlanRequest& r = asked.request;
  std::string text = r.engine + " '" + r.version + "' ckpt " + r.checkpoint + " hardware " + r.hardware.dump() +
                     " model " + r.model.dump() + " quant_config " + asked.quant_config.dump() + " intent " +
                     r.intent.method + " backend_method " + r.intent.backend_method;
  for (const auto& [name, value] : r.parameters) text += " " + name + "=" + value.dump();
  for (const auto& [name, value] : r.environment) text += " $" + name + "=" + value;
  return text;
}

bool says(const EnginePlan& plan, std::string_view code) {
  return std::ranges::find(plan.diagnostics, code, &Diagnostic::code) != plan.diagnostics.end();
}
bool is_error_about(const EnginePlan& plan, std::string_view code, const std::string& flag) {
  return std::ranges::any_of(plan.diagnostics, [&](const Diagnostic& d) {
    return d.code == code && d.severity == Severity::error && d.message.find(printable(flag)) != std::string::npos;
  });
}

// ---- derived arguments ----

/// A value as the row's table spells it: what is another name for it, in the case that the engine takes.
Json in_table(const Json& row, Json value) {
  if (!value.is_string()) return value;
  auto& text = value.get_ref<std::string&>();
  if (row.value("lower_case", false))
    for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  const Json same = row.value("same", Json::object());
  return same.contains(text) ? same[text] : value;
}
bool is_listed(const Json& row, const Json& value) {
  return std::ranges::any_of(row["values"], [&](const Json& one) { return same_value(one, value); }) ||
         (row.contains("default") && same_value(row["default"], value));
}
bool is_refused(const Json& row, const Json& value, const std::string& version) {
  const Json refused = row.value("refused", Json::array());
  return std::ranges::any_of(refused, [&](const Json& one) {
    return same_value(one["value"], value) &&
           (!one.contains("since") || compare_versions(version, one["since"].get<std::string>()) >= 0);
  });
}

/// A derived argument is a flag that the table has for this program and version, with a value that it allows there.
void check_derived(const Json& engine, const Argument& argument, const EnginePlan& plan) {
  if (argument.place == "env") return;
  const Json* row = find_flag(engine, argument.flag, plan.entry);
  ASSERT_NE(row, nullptr) << argument.flag << " is no flag of " << plan.entry;
  if (row->contains("since")) {
    EXPECT_GE(compare_versions(plan.version, (*row)["since"].get<std::string>()), 0)
        << argument.flag << " exists from " << (*row)["since"] << " on, not in " << plan.version;
  }
  const Json removed = engine.value("removed_flags", Json::object());
  for (const auto& [flag, gone] : removed.items())
    EXPECT_FALSE(plain_flag(flag) == plain_flag(argument.flag) &&
                 (!gone.contains("since") || compare_versions(plan.version, gone["since"].get<std::string>()) >= 0))
        << argument.flag << " is gone in " << plan.version;
  const Json value = in_table(*row, argument.value);
  const std::string type = row->value("type", "");
  EXPECT_TRUE(type != "json" || value.is_object()) << argument.flag;
  EXPECT_TRUE(type != "int" || value_text(value).find_first_not_of("-0123456789") == std::string::npos)
      << argument.flag;
  // backend_method is the way round the tables: what the user names is judged as if it were his own parameter
  const bool bypass = argument.rule.starts_with("backend_method");
  if (bypass || !row->contains("values") || (*row)["values"].empty()) return;
  EXPECT_FALSE(is_refused(*row, value, plan.version) && plan.outcome == "ok") << argument.flag << " " << value;
  const bool is_method =
      engine.value("method_flag", "") == argument.flag && engine["methods"].contains(value_text(value));
  EXPECT_TRUE(is_method || is_listed(*row, value)) << argument.flag << " " << value;
}

/// Nothing that was derived stands beside what the user gave for the same flag.
void check_nothing_twice(const Json& engine, const EnginePlan& plan) {
  std::multiset<std::string> derived;
  std::set<std::string> given;
  for (const auto* arguments : {&plan.args, &plan.settings})
    for (const Argument& argument : *arguments) {
      const Json* row = find_flag(engine, argument.flag, plan.entry);
      const std::string name =
          argument.place + plain_flag(row != nullptr ? (*row)["flag"].get<std::string>() : argument.flag);
      argument.given ? static_cast<void>(given.insert(name)) : static_cast<void>(derived.insert(name));
    }
  for (const std::string& name : derived) {
    EXPECT_EQ(derived.count(name), 1U) << name;
    EXPECT_FALSE(given.contains(name)) << name << " is given and derived";
  }
}

// ---- the user's parameters ----

/// Is the user's parameter still there as given? In a tree of settings the last of several stands.
bool is_kept(const EnginePlan& plan, const NamedParameter& parameter, bool last) {
  const std::string flag = parameter.path.empty() ? parameter.flag : parameter.flag + "." + parameter.path;
  const std::string place = parameter.row == nullptr ? "cli" : parameter.row->value("place", "cli");
  if (place == "cli")
    return std::ranges::any_of(
        plan.args, [&](const Argument& a) { return a.given && a.flag == flag && a.value == parameter.given; });
  if (!last) return true;
  const Json& tree = place == "config" ? plan.config_file : plan.api;
  if (const Json* value = look_up(tree, flag); value != nullptr && *value == parameter.value) return true;
  if (place != "api" || !tree.contains("class") || !parameter.value.is_object()) return false;
  // a configuration object stands as its members
  return std::ranges::all_of(parameter.value.items(), [&](const auto& member) {
    return member.key() == "quant_method" || (tree.contains(member.key()) && tree[member.key()] == member.value());
  });
}

void check_kept(const Json& engine, const PlanRequest& request, const EnginePlan& plan) {
  const std::vector<NamedParameter> named = name_parameters(engine, plan.entry, request.parameters);
  // none may be lost on the way here either: an object may become several, null and "" say nothing
  const auto count = std::ranges::count_if(request.parameters, [](const auto& p) {
    return !p.second.is_null() && !p.first.empty() && !p.second.is_object();
  });
  EXPECT_GE(static_cast<int64_t>(named.size()), count);
  for (size_t i = 0; i < named.size(); ++i) {
    const auto overlaps = [&](const NamedParameter& other) {
      return other.flag == named[i].flag || other.flag.starts_with(named[i].flag + ".") ||
             named[i].flag.starts_with(other.flag + ".") || other.value.is_object();
    };
    const bool last = std::none_of(named.begin() + static_cast<std::ptrdiff_t>(i) + 1, named.end(), overlaps);
    EXPECT_TRUE(is_kept(plan, named[i], last)) << named[i].flag << " " << named[i].value;
  }
}

/// What the table knows to be wrong with a parameter is an error in the plan; "" where it knows nothing.
std::string expected_judgement(const Json& engine, const NamedParameter& parameter, const EnginePlan& plan) {
  const auto named = [&](const char* table) -> const Json* {
    const auto rows = engine.find(table);
    if (rows == engine.end()) return nullptr;
    for (const auto& [flag, row] : rows->items())
      if (plain_flag(flag) == plain_flag(parameter.flag)) return &row;
    return nullptr;
  };
  if (const Json* gone = named("removed_flags"))
    if (!gone->contains("since") || compare_versions(plan.version, (*gone)["since"].get<std::string>()) >= 0)
      return "FLAG_REMOVED";
  if (named("unknown_flags") != nullptr) return "UNKNOWN_FLAG";
  if (parameter.row == nullptr) return "";
  const Json& row = *parameter.row;
  const Json entries = row.value("entries", Json::array());
  if (!entries.empty() && std::ranges::find(entries, Json(plan.entry)) == entries.end()) return "UNKNOWN_FLAG";
  if (row.contains("since") && compare_versions(plan.version, row["since"].get<std::string>()) < 0)
    return "UNKNOWN_FLAG";
  if (!parameter.path.empty()) return "";
  const Json value = in_table(row, parameter.value);
  const std::string type = row.value("type", "");
  if (type == "json" && !value.is_object() && !value.is_boolean()) return "INVALID_VALUE";
  if (type == "int") {
    const std::string text = value_text(value);
    const size_t sign = text.starts_with('-') ? 1 : 0;
    if (text.size() == sign || text.find_first_not_of("0123456789", sign) != std::string::npos) return "INVALID_VALUE";
  }
  if (is_refused(row, value, plan.version)) return "";  // a code of its own
  if (!row.contains("values") || row["values"].empty() || is_listed(row, value)) return "";
  if (type == "list" && value.is_array() &&
      std::ranges::all_of(value, [&](const Json& one) { return is_listed(row, one); }))
    return "";
  if (engine.value("method_flag", "") == parameter.flag && engine["methods"].contains(value_text(value))) return "";
  return "INVALID_VALUE";
}

// ---- what was asked ----

/// Is there a candidate of the table all of whose settings the plan has, set by something else?
bool stands_already(const PlanRequest& request, const EnginePlan& plan, const std::string& field,
                    const std::string& value) {
  const Json& candidates = Facts::standard().get("engines", request.engine)["map"][field][value];
  return std::ranges::any_of(candidates, [&](const Json& candidate) {
    const Json args = candidate.value("args", Json::object()), env = candidate.value("env", Json::object());
    const auto has = [&](const std::vector<Argument>& arguments, const std::string& flag) {
      return std::ranges::any_of(arguments, [&](const Argument& a) { return plain_flag(a.flag) == plain_flag(flag); });
    };
    for (const auto& [flag, setting] : args.items())
      if (!has(plan.args, flag) && !has(plan.settings, flag)) return false;
    for (const auto& [name, setting] : env.items())
      if (!request.environment.contains(name) && !plan.environment.contains(name)) return false;
    return !args.empty() || !env.empty();
  });
}

/// `field` was asked for: one answer, and what it says is there to be seen.
void check_answer(const PlanRequest& request, const EnginePlan& plan, const std::string& field,
                  const std::string& value) {
  SCOPED_TRACE(field + " " + value);
  ASSERT_EQ(std::ranges::count(plan.answers, field, &Answer::field), 1);
  const Answer& answer = *std::ranges::find(plan.answers, field, &Answer::field);
  EXPECT_EQ(answer.value, value);
  EXPECT_FALSE(answer.why.empty());
  const std::string rule = field + " " + value;
  const auto is_of_rule = [&](const Argument& a) { return !a.given && a.rule == rule; };
  const auto is_there = [&](const Argument& a) { return plain_flag(a.flag) == plain_flag(answer.why); };
  if (answer.outcome == "argument") {
    EXPECT_TRUE(std::ranges::any_of(plan.args, is_of_rule) || std::ranges::any_of(plan.settings, is_of_rule) ||
                std::ranges::any_of(plan.args, is_there) || std::ranges::any_of(plan.settings, is_there) ||
                stands_already(request, plan, field, value))
        << answer.why;
  } else if (answer.outcome == "override") {
    EXPECT_TRUE(std::ranges::any_of(plan.overrides, [&](const Override& o) {
      if (!o.rule.starts_with(field)) return false;
      return o.by == "given" ? !request.parameters.empty() : o.by.starts_with("gemm_dtype") || o.by.starts_with("moe_");
    })) << answer.why;
  } else if (answer.outcome == "diagnostic") {
    EXPECT_TRUE(std::ranges::any_of(plan.diagnostics, [&](const Diagnostic& d) {
      return answer.why.find(d.code) != std::string::npos;
    })) << answer.why;
  } else if (answer.outcome == "checkpoint") {
    EXPECT_FALSE(request.checkpoint.empty());
  } else {
    EXPECT_EQ(answer.outcome, "default");  // the table says why nothing needs to be set
    const Json& candidates = Facts::standard().get("engines", request.engine)["map"][field][value];
    EXPECT_TRUE(std::ranges::any_of(candidates, [&](const Json& c) { return c.value("default", "") == answer.why; }));
  }
}

void check_answers(const PlanRequest& request, const EnginePlan& plan) {
  size_t asked = 0;
  for (const auto& [field, value] : request.fields) {
    if (value == "auto") continue;
    check_answer(request, plan, field, value);
    ++asked;
  }
  if (!request.intent.backend_method.empty()) {
    ++asked;  // the name it goes by is the intent's where a parameter took its place
    EXPECT_TRUE(std::ranges::any_of(plan.answers, [&](const Answer& a) {
      return (a.field == "backend_method" || a.field == "intent") && a.value == request.intent.backend_method;
    }));
  } else if (request.intent.method != "none" && request.intent.method != "auto") {
    check_answer(request, plan, "intent", request.intent.method);
    ++asked;
  }
  EXPECT_EQ(plan.answers.size(), asked);
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
void check_explained(const EnginePlan& plan) {
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
}

void check_outcome(const PlanRequest& request, const EnginePlan& plan) {
  const bool has_error =
      std::ranges::any_of(plan.diagnostics, [](const Diagnostic& d) { return d.severity == Severity::error; });
  EXPECT_EQ(has_error, plan.outcome == "error");
  for (const Diagnostic& d : plan.diagnostics) {
    EXPECT_FALSE(d.code.empty());
    EXPECT_FALSE(d.message.empty());
    EXPECT_TRUE(std::ranges::none_of(d.message, [](char c) { return static_cast<unsigned char>(c) < ' '; }))
        << "no line of its own for what the user typed: " << printable(d.message);
  }
  const Json& engine = Facts::standard().get("engines", request.engine);
  if (!request.version.empty() && compare_versions(request.version, engine["version"].get<std::string>()) != 0) {
    EXPECT_TRUE(says(plan, "VERSION_UNVERIFIED")) << request.version;
  }
  for (const auto& [name, value] : request.environment) EXPECT_FALSE(plan.environment.contains(name)) << name;
}

/// What a shell makes of a line without expansions; fails on what it would expand.
std::vector<std::string> shell_words(const std::string& line) {
  std::vector<std::string> words;
  bool quote = false, open = false;
  for (size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (c == '\'') {
      quote = !quote;
    } else if (c == '\\' && !quote) {
      if (!open) words.emplace_back();
      words.back() += line[++i];
      open = true;
      continue;
    } else if (c == ' ' && !quote) {
      open = false;
      continue;
    }
    if (!open) words.emplace_back();
    open = true;
    if (c == '\'') continue;
    EXPECT_TRUE(quote || std::string_view("$`\"|&;<>()*?[#~!{}\n\t").find(c) == std::string_view::npos)
        << "unquoted " << c << " in " << line;
    words.back() += c;
  }
  EXPECT_FALSE(quote);
  return words;
}

/// The command, read as a shell reads it, ends in the plan's arguments.
void check_command(const EnginePlan& plan) {
  std::vector<std::string> expected;
  const Json& engine = Facts::standard().get("engines", plan.engine);
  for (const Argument& argument : plan.args)
    for (std::string& word : argument_words(argument, engine)) expected.push_back(std::move(word));
  const std::string pattern = engine["entries"][plan.entry];
  if (pattern.find("({model}") != std::string::npos) return;  // a Python call, with tests of its own
  const std::string command = engine_command(plan, "M");
  size_t at = command.find(fill_text(pattern, Json{{"model", "M"}}));
  ASSERT_NE(at, std::string::npos) << command;
  at += fill_text(pattern, Json{{"model", "M"}}).size();
  std::vector<std::string> words = shell_words(command.substr(at));
  ASSERT_GE(words.size(), expected.size()) << command;
  words.resize(expected.size());
  EXPECT_EQ(words, expected) << command;
}

void check_plan(const Asked& asked, const EnginePlan& plan) {
  const PlanRequest& request = asked.request;
  const Json& engine = Facts::standard().get("engines", request.engine);
  for (const auto* arguments : {&plan.args, &plan.settings})
    for (const Argument& argument : *arguments)
      if (!argument.given) check_derived(engine, argument, plan);
  check_nothing_twice(engine, plan);
  check_kept(engine, request, plan);
  for (const NamedParameter& parameter : name_parameters(engine, plan.entry, request.parameters))
    if (const std::string code = expected_judgement(engine, parameter, plan); !code.empty()) {
      EXPECT_TRUE(is_error_about(plan, code, parameter.flag))
          << code << " is expected of " << parameter.flag << " " << parameter.value;
    }
  check_answers(request, plan);
  check_explained(plan);
  check_outcome(request, plan);
  check_command(plan);
}

/// What is explicit stands over the preset; what neither says is absent.
void check_fields(const Asked& asked) {
  const bool preset = asked.quant_config.contains("preset");
  for (const std::string& field : field_names()) {
    std::string expected = "auto";
    if (preset)
      expected = Facts::standard().get("presets", asked.quant_config["preset"].get<std::string>()).value(field, "auto");
    if (asked.quant_config.contains(field)) expected = asked.quant_config[field];
    const auto found = asked.request.fields.find(field);
    EXPECT_EQ(found == asked.request.fields.end() ? "auto" : found->second, expected) << field;
  }
}

/// An adapted plan works, differs in what it lists and in nothing else; where there is none, asking for nothing fails
/// too.
void check_adapted(const PlanRequest& request) {
  const auto adapted = adapt_plan(request);
  if (!adapted) {
    PlanRequest least = request;
    least.fields.clear();
    if (least.intent.backend_method.empty()) least.intent = {};
    EXPECT_EQ(plan_engine(least).outcome, "error") << "a plan that works was not found";
    return;
  }
  EXPECT_NE(adapted->plan.outcome, "error");
  PlanRequest expected = request;
  for (const Change& change : adapted->changes) {
    EXPECT_NE(change.from, change.to) << change.field;
    if (change.field == "intent") {
      EXPECT_EQ(expected.intent.method, change.from);
      expected.intent.method = change.to;
    } else if (change.field == "weight_only") {
      EXPECT_EQ(expected.intent.weight_only, change.from == "true");
      expected.intent.weight_only = change.to == "true";
    } else {
      EXPECT_EQ(expected.fields.at(change.field), change.from);
      expected.fields[change.field] = change.to;
    }
  }
  const auto same = [](const PlanRequest& a, const PlanRequest& b) {
    return a.engine == b.engine && a.version == b.version && a.hardware == b.hardware && a.checkpoint == b.checkpoint &&
           a.model == b.model && a.fields == b.fields && a.intent.method == b.intent.method &&
           a.intent.weight_only == b.intent.weight_only && a.intent.backend_method == b.intent.backend_method &&
           a.parameters == b.parameters && a.environment == b.environment;
  };
  EXPECT_TRUE(same(adapted->request, expected)) << "a change is not listed";
  EXPECT_EQ(plan_json(adapted->plan, "M"), plan_json(plan_engine(expected), "M"));
  EXPECT_TRUE(plan_engine(request).outcome == "error" || adapted->changes.empty());
}

TEST(PlanProperty, RandomCombinations) {
  constexpr int kCombinations = 100000;
  RandomRequests requests(20260821);
  std::map<std::string, int> outcomes;
  for (int i = 0; i < kCombinations; ++i) {
    const Asked asked = requests.next();
    SCOPED_TRACE(i);
    check_fields(asked);
    const EnginePlan plan = plan_engine(asked.request);
    ++outcomes[plan.outcome];
    for (const Answer& answer : plan.answers) ++outcomes["answer " + answer.outcome];
    check_plan(asked, plan);
    if (i % 50 == 0) {
      check_adapted(asked.request);
      EXPECT_EQ(plan_json(plan, "M").dump(), plan_json(plan_engine(asked.request), "M").dump());
    }
    ASSERT_FALSE(::testing::Test::HasFailure()) << shown(asked);
  }
  for (const auto& [outcome, count] : outcomes) std::cout << outcome << ": " << count << '\n';
  std::cout << "real configs: " << requests.real_configs() << '\n';
  for (const char* outcome : {"ok", "warning", "error", "answer argument", "answer default", "answer checkpoint",
                              "answer override", "answer diagnostic"})
    EXPECT_GT(outcomes[outcome], kCombinations / 200) << outcome;
}

}  // namespace
}  // namespace bitwright
