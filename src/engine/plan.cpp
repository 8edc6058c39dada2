#include "engine/plan.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "base/nearest.hpp"
#include "engine/condition.hpp"
#include "engine/parameters.hpp"

namespace bitwright {
namespace {

/// The four fields in the order they are mapped, with what they may hold and what it means that an engine cannot set
/// one (rule P4 of the project's policy: what changes nothing essential warns, what would change memory or accuracy
/// unseen fails).
struct Field {
  std::string_view name;
  std::vector<std::string> values;
  std::vector<std::string> weights;  ///< values that ask for quantized weights
};
const std::vector<Field>& fields() {
  static const std::vector<Field> table = {
      {"gemm_dtype", {"auto", "float16", "bfloat16", "float32", "fp8", "int8"}, {"fp8", "int8"}},
      {"moe_dtype",
       {"auto", "float16", "bfloat16", "fp8", "w4afp8", "mxfp4", "int8"},
       {"fp8", "w4afp8", "mxfp4", "int8"}},
      {"kvcache_dtype", {"auto", "fp16", "bfloat16", "fp8", "fp8_e5m2", "fp8_e4m3", "int8", "int4"}, {}},
      {"attention_dtype", {"auto", "float16", "bfloat16", "fp8", "fp8_e5m2", "fp8_e4m3", "fp8_block"}, {}},
  };
  return table;
}
const Field& field_named(std::string_view name) {
  const auto found = std::ranges::find(fields(), name, &Field::name);
  BW_ASSERT(found != fields().end());
  return *found;
}
bool is_one_of(const std::vector<std::string>& names, std::string_view name) {
  return std::ranges::find(names, name) != names.end();
}

std::string text_of(const Json& object, std::string_view name, std::string otherwise = {}) {
  const Json& value = member(object, name);
  return value.is_string() ? value.get<std::string>() : std::move(otherwise);
}

/// Puts `value` at "a.b.c" of an object, over what is there.
void put_at(Json& object, std::string_view path, const Json& value) {
  Json* at = &object;
  for (size_t dot; (dot = path.find('.')) != std::string_view::npos; path.remove_prefix(dot + 1)) {
    if (!at->is_object()) *at = Json::object();
    at = &(*at)[std::string(path.substr(0, dot))];
  }
  if (!at->is_object()) *at = Json::object();
  (*at)[std::string(path)] = value;
}

/// Digits, perhaps after a minus.
bool is_whole(std::string_view text) {
  if (text.starts_with('-')) text.remove_prefix(1);
  return !text.empty() && text.find_first_not_of("0123456789") == std::string_view::npos;
}

/// The entry a program is called by: its name, or how people shorten and lengthen it ("auto_awq" and "lmdeploy lite
/// auto_awq", "python -m mlx_lm.convert" and "mlx_lm.convert"); what none is stays as it is.
std::string known_entry(const Json& entries, const std::string& name) {
  const auto words = [](std::string text) {
    for (char& c : text) c = c == ' ' || c == '.' || c == '/' || c == '_' ? '-' : c;
    return "-" + text;
  };
  if (name.empty() || entries.contains(name)) return name;
  const std::string wanted = words(name);
  for (const auto& [entry, command] : entries.items())
    if (const std::string known = words(entry); known.ends_with(wanted) || wanted.ends_with(known)) return entry;
  return name;
}

/// "--config" of "--config llm_args.yaml".
std::string option_of(const std::string& pattern) { return pattern.substr(0, pattern.find(' ')); }

class Planner {
 public:
  Planner(const PlanRequest& request, const Facts& known);
  EnginePlan plan();

 private:
  void check_request() const;
  void add_parameters();
  void place(Argument argument, const std::string& path, const Json* row);
  void emit(const std::string& flag, const Json& value, const std::string& rule, const std::string& source);

  std::string rule_of(const std::string& name, const std::string& flag) const;

  void find_checkpoint();
  void say_version();
  void evaluate(std::string_view member_name);
  void answer_field(const Field& field);
  void answer_sixteen_bits(const std::string& field, const std::string& value);
  bool answered_by_parameter(const std::string& field, const std::string& value);
  bool answered_by_checkpoint(const std::string& field, const std::string& value);
  void answer_intent();
  /// The first candidate of map.FIELD.VALUE that holds; false if there is none.
  bool map(const std::string& field, const std::string& value);
  void apply(const Json& candidate, const std::string& field, const std::string& value);

  void judge_parameters();
  void judge_flag(const NamedParameter& parameter);
  void judge_value(const NamedParameter& parameter);
  void judge_methods();
  void judge_method(const std::string& name, bool from_checkpoint, bool at_load);
  void judge_capability(const Json& limits, const std::string& what);
  void judge_checkpoint();
  void judge_parallel();
  void judge_config_file();
  void run_rules(const Json& rules);

  void say(std::string code, Severity severity, std::string message, std::vector<std::string> instead = {});
  void say_rule(const Json& rule);
  std::string canonical_method(std::string_view name) const;
  Json canonical_value(const Json* row, const Json& value) const;

  const PlanRequest& request_;
  const Facts& known_;
  const Json& engine_;
  Json facts_ = Json::object();
  EnginePlan plan_;
  std::vector<NamedParameter> given_;
  const Json* checkpoint_ = nullptr;  ///< the engine's row for the checkpoint
  std::vector<std::string> said_;     ///< codes since the last candidate, those said before as well
};

Planner::Planner(const PlanRequest& request, const Facts& known)
    : request_(request), known_(known), engine_(known.get("engines", request.engine)) {
  plan_.engine = engine_["name"].get<std::string>();
  plan_.version = request.version.empty() ? engine_["version"].get<std::string>() : request.version;
  plan_.entry = known_entry(engine_["entries"], text_of(request.model, "entry", engine_["entry"].get<std::string>()));
}

void Planner::check_request() const {
  const auto check = [](const std::string& what, const std::string& value, const std::vector<std::string>& valid) {
    if (!is_one_of(valid, value))
      throw Error({.code = "bad-value",
                   .what = "bad configuration",
                   .where = what,
                   .why = fmt::format("'{}' is none of its values", printable(value)),
                   .fix = suggest(value, valid),
                   .status = ExitStatus::usage});
  };
  for (const auto& [name, value] : request_.fields) {
    check("quant_config", name, field_names());
    check(name, value, field_named(name).values);
  }
  check("quantization.method", request_.intent.method, intent_methods());
  std::vector<std::string> entries;
  for (const auto& [entry, command] : engine_["entries"].items()) entries.push_back(entry);
  check("entry", plan_.entry, entries);
}

EnginePlan Planner::plan() {
  check_request();
  facts_ = {{"engine", plan_.engine},  {"version", plan_.version},      {"entry", plan_.entry},
            {"model", request_.model}, {"hardware", request_.hardware}, {"arg", Json::object()},
            {"user", Json::object()},  {"env", Json::object()},         {"field", Json::object()},
            {"intent", Json::object()}};
  for (const std::string_view name : {"sm", "vendor"})
    if (const Json& value = member(request_.hardware, name); !value.is_null()) facts_[std::string(name)] = value;
  if (!facts_.contains("vendor") && facts_.contains("sm")) facts_["vendor"] = "nvidia";
  for (const auto& [name, value] : request_.environment) {
    const Json parsed = Json::parse(value, nullptr, false);
    facts_["env"][name] = parsed.is_structured() ? parsed : Json(value);
  }
  for (const auto& [name, value] : request_.fields)
    if (value != "auto") facts_["field"][name] = value;
  // without a method there is nothing that weight_only could be about
  if (request_.intent.method != "none" && request_.intent.method != "auto") {
    facts_["intent"]["method"] = request_.intent.method;
    if (request_.intent.weight_only) facts_["intent"]["weight_only"] = *request_.intent.weight_only;
  }
  if (!request_.intent.backend_method.empty()) facts_["intent"]["backend_method"] = request_.intent.backend_method;

  add_parameters();
  for (const Argument& argument : request_.derived) emit(argument.flag, argument.value, argument.rule, argument.source);
  find_checkpoint();
  evaluate("before");
  for (const Field& field : fields()) answer_field(field);
  answer_intent();
  judge_parameters();
  judge_methods();
  evaluate("after");
  judge_checkpoint();
  judge_parallel();
  run_rules(member(engine_, "checks"));
  judge_config_file();
  say_version();

  const auto worst = std::ranges::max_element(plan_.diagnostics, {}, &Diagnostic::severity);
  const Severity severity = worst == plan_.diagnostics.end() ? Severity::note : worst->severity;
  plan_.outcome = severity == Severity::note ? "ok" : severity_name(severity);
  return std::move(plan_);
}

// ---- what the user gave, and what comes out ----

void Planner::add_parameters() {
  given_ = name_parameters(engine_, plan_.entry, request_.parameters);
  for (const NamedParameter& parameter : given_) {
    Argument argument{.flag = parameter.flag, .value = parameter.value, .rule = "given", .given = true};
    if (parameter.row != nullptr) argument.source = text_of(*parameter.row, "file");
    if (!parameter.path.empty()) argument.flag += "." + parameter.path;
    const bool on_command_line = parameter.row == nullptr || text_of(*parameter.row, "place", "cli") == "cli";
    if (on_command_line) argument.value = parameter.given;
    place(argument, parameter.path, parameter.row);
    std::string at(without_dashes(parameter.flag));
    if (!parameter.path.empty()) at += "." + parameter.path;
    const Json value = canonical_value(parameter.path.empty() ? parameter.row : nullptr, parameter.value);
    // one name with dots is one fact; a member of a structured parameter is a member
    for (const char* tree : {"arg", "user"}) {
      if (parameter.path.empty())
        facts_[tree][at] = value;
      else
        put_at(facts_[tree], at, value);
    }
  }
}

/// An argument goes to the command line, the configuration file or the Python call, as its row says.
void Planner::place(Argument argument, const std::string& path, const Json* row) {
  argument.place = row != nullptr ? text_of(*row, "place", "cli") : "cli";
  std::string name(without_dashes(row != nullptr ? (*row)["flag"].get_ref<const std::string&>() : argument.flag));
  if (!path.empty()) name += "." + path;
  if (argument.place == "cli") return plan_.args.push_back(std::move(argument));
  plan_.settings.push_back(argument);
  plan_.settings.back().flag = name;
  if (argument.place == "config") return put_at(plan_.config_file, name, argument.value);
  static const Json unknown = Json::object();
  const Json& classes = member(row != nullptr ? *row : unknown, "classes");
  if (classes.is_object() && argument.value.is_object() && path.empty()) {
    // a configuration object: its class from what it calls itself, its members as they are
    const std::string method = text_of(argument.value, "quant_method");
    plan_.api["class"] = text_of(classes, method, method);
    for (const auto& [key, value] : argument.value.items())
      if (key != "quant_method") plan_.api[key] = value;
  } else {
    put_at(plan_.api, name, argument.value);
  }
}

void Planner::emit(const std::string& flag, const Json& value, const std::string& rule, const std::string& source) {
  const Json* row = find_flag(engine_, flag, plan_.entry);
  if (row == nullptr)
    return say("NO_ENGINE_FLAG", Severity::error, fmt::format("{}: {} has no {}", rule, plan_.entry, flag));
  const std::string name(without_dashes((*row)["flag"].get_ref<const std::string&>()));
  const Json text = value.is_structured() || value.is_boolean() ? value : Json(value_text(value));
  if (const auto there = facts_["arg"].find(name); there != facts_["arg"].end()) {
    if (!same_value(*there, canonical_value(row, text)))
      plan_.overrides.push_back(
          {.flag = flag, .derived = text, .given = *there, .rule = rule, .by = rule_of(name, flag)});
    return;
  }
  place({.flag = flag, .value = text, .rule = rule, .source = source}, {}, row);
  facts_["arg"][name] = canonical_value(row, text);
}

/// Which rule set a flag that stands already.
std::string Planner::rule_of(const std::string& name, const std::string& flag) const {
  for (const auto* arguments : {&plan_.args, &plan_.settings})
    for (const Argument& argument : *arguments)
      if (argument.flag == flag || argument.flag == name) return argument.rule;
  return "given";
}

Json Planner::canonical_value(const Json* row, const Json& value) const {
  if (row == nullptr || !value.is_string()) return value;
  std::string text = value.get<std::string>();
  if (row->value("lower_case", false))
    for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  if (row->value("upper_case", false))
    for (char& c : text) c = c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
  return text_of(member(*row, "same"), text, text);
}

// ---- the checkpoint ----

void Planner::find_checkpoint() {
  if (request_.checkpoint.empty()) return;
  facts_["ckpt"] = request_.checkpoint;
  for (const Json* table : known_.all("checkpoints")) {
    for (const Json& row : (*table)["first"]) {
      if (!holds(row["when"], facts_)) continue;
      facts_["kinds"] = fill(row["kinds"], facts_);
      break;
    }
  }
  for (const Json& row : engine_["checkpoints"]) {
    if (!holds(row["when"], facts_)) continue;
    checkpoint_ = &row;
    facts_["ckpt_method"] = text_of(row, "method", request_.checkpoint);
    break;
  }
}

std::string Planner::canonical_method(std::string_view name) const {
  const Json& row = member(engine_["methods"], name);
  return row.is_object() ? text_of(row, "is", std::string(name)) : std::string(name);
}

void Planner::say_version() {
  const std::string read_from = engine_["version"].get<std::string>();
  if (compare_versions(plan_.version, read_from) == 0) return;
  say("VERSION_UNVERIFIED", Severity::note,
      fmt::format("the facts about {} were read from version {}, the plan is for {}", plan_.engine, read_from,
                  printable(plan_.version)));
}

void Planner::evaluate(std::string_view member_name) {
  for (const Json& let : member(engine_, member_name)) {
    for (const Json& one : let["first"]) {
      if (one.contains("when") && !holds(one["when"], facts_)) continue;
      const Json value = fill(one["is"], facts_);
      const std::string name = let["name"].get<std::string>();
      if (!value.is_null()) facts_[name] = value;
      if (!value.is_null() && let.value("resolved", false)) plan_.resolved[name] = value;
      break;
    }
  }
}

// ---- fields and intent ----

void Planner::answer_field(const Field& field) {
  const std::string name(field.name);
  const auto asked = request_.fields.find(name);
  if (asked == request_.fields.end() || asked->second == "auto") return;
  const std::string& value = asked->second;
  facts_["value"] = value;
  const bool weights = is_one_of(field.weights, value);
  if (answered_by_parameter(name, value)) return;
  if (name == "moe_dtype" && !holds({{"model.moe", true}}, facts_)) {
    say("NO_EFFECT", Severity::note, fmt::format("moe_dtype {}: the model has no experts", value));
    plan_.answers.push_back({name, value, "diagnostic", "NO_EFFECT"});
  } else if (weights && answered_by_checkpoint(name, value)) {
    return;
  } else if (!map(name, value)) {
    if (weights) {
      say("NO_RUNTIME_QUANT", Severity::error,
          fmt::format("{} {}: {} {} cannot quantize weights so while loading", name, value, plan_.engine,
                      plan_.version),
          {"a checkpoint that is quantized already: bitwright quantize"});
    } else if (name == "kvcache_dtype" && value != "fp16" && value != "bfloat16") {
      say("UNSUPPORTED_KV", Severity::error, fmt::format("{} has no {} KV cache", plan_.engine, value));
    } else {
      return answer_sixteen_bits(name, value);
    }
    plan_.answers.push_back({name, value, "diagnostic", weights ? "NO_RUNTIME_QUANT" : "UNSUPPORTED_KV"});
  }
}

/// What no engine has a flag for: attention and experts compute in the type of everything else.
void Planner::answer_sixteen_bits(const std::string& field, const std::string& value) {
  const std::string flag(without_dashes(text_of(engine_, "dtype_flag")));
  const Json& dtype = member(facts_["arg"], flag);
  if (!flag.empty() && same_value(dtype, value) && field != "gemm_dtype") {
    plan_.answers.push_back({field, value, "argument", text_of(engine_, "dtype_flag")});
    return;
  }
  say("NO_ENGINE_FLAG", Severity::warning,
      fmt::format("{} {}: {} has no such setting; it is left to the engine", field, value, plan_.engine));
  plan_.answers.push_back({field, value, "diagnostic", "NO_ENGINE_FLAG"});
}

bool Planner::answered_by_parameter(const std::string& field, const std::string& value) {
  const Json& rows = member(member(engine_, "overridden_by"), field);
  if (!rows.is_object()) return false;
  const Json& flags = rows.contains(value) ? rows[value] : member(rows, "*");
  for (const Json& flag : flags) {
    const auto given = std::ranges::find(given_, flag.get_ref<const std::string&>(), &NamedParameter::flag);
    if (given == given_.end()) continue;
    plan_.overrides.push_back(
        {.flag = given->flag, .derived = value, .given = given->value, .rule = field + " " + value});
    plan_.answers.push_back({field, value, "override", given->flag + " is given"});
    return true;
  }
  return false;
}

/// A quantized checkpoint keeps its weights: no flag. What was asked is what it is, or that is said.
bool Planner::answered_by_checkpoint(const std::string& field, const std::string& value) {
  if (request_.checkpoint.empty()) return false;
  if (holds({{"kinds", value}}, facts_)) {
    plan_.answers.push_back({field, value, "checkpoint", "the checkpoint is " + request_.checkpoint});
    return true;
  }
  const Json& row = member(member(engine_, "already_quantized"), field == "intent" ? "intent" : "field");
  say("ALREADY_QUANTIZED", Severity::warning,
      fmt::format("the checkpoint is quantized already ({}); {} {} changes nothing", request_.checkpoint, field, value),
      {"quantize the 16-bit model instead", "leave the weights as they are and drop the request"});
  if (row.is_object()) run_rules(Json::array({row}));
  plan_.answers.push_back({field, value, "diagnostic", "ALREADY_QUANTIZED"});
  return true;
}

void Planner::answer_intent() {
  const std::string& own = request_.intent.backend_method;
  const std::string& method = request_.intent.method;
  facts_["value"] = own.empty() ? method : own;
  if (!own.empty()) {
    if (answered_by_parameter("intent", own)) return;
    if (map("backend_method", "*")) return;
    say("NO_ENGINE_FLAG", Severity::error,
        fmt::format("{} has no flag for the method '{}'", plan_.engine, printable(own)));
    plan_.answers.push_back({"backend_method", own, "diagnostic", "NO_ENGINE_FLAG"});
    return;
  }
  if (method == "none" || method == "auto") return;
  if (answered_by_parameter("intent", method) || answered_by_checkpoint("intent", method)) return;
  if (map("intent", method)) return;
  say("NO_RUNTIME_QUANT", Severity::error,
      fmt::format("{} {}: {} {} cannot quantize weights so while loading", "method", method, plan_.engine,
                  plan_.version),
      {"a checkpoint that is quantized already: bitwright quantize"});
  plan_.answers.push_back({"intent", method, "diagnostic", "NO_RUNTIME_QUANT"});
}

bool Planner::map(const std::string& field, const std::string& value) {
  for (const Json& candidate : member(member(engine_["map"], field), value)) {
    if (candidate.contains("when") && !holds(candidate["when"], facts_)) continue;
    apply(candidate, field, value);
    return true;
  }
  return false;
}

void Planner::apply(const Json& candidate, const std::string& field, const std::string& value) {
  const std::string shown = value == "*" ? value_text(facts_["value"]) : value;
  const std::string rule = field + " " + shown;
  said_.clear();
  const size_t overridden = plan_.overrides.size();
  const size_t args = plan_.args.size(), settings = plan_.settings.size();
  for (const auto& [flag, setting] : member(candidate, "args").items())
    emit(flag, fill(setting, facts_), rule, text_of(candidate, "file"));
  for (const auto& [name, setting] : member(candidate, "env").items()) {
    if (facts_["env"].contains(name)) continue;  // the user's own
    const Json filled = fill(setting, facts_);
    plan_.environment[name] = value_text(filled);
    plan_.settings.push_back({.flag = name,
                              .value = value_text(filled),
                              .rule = rule,
                              .source = text_of(candidate, "file"),
                              .place = "env"});
    facts_["env"][name] = filled;
  }
  if (candidate.contains("say")) run_rules(candidate["say"]);
  const bool sets = candidate.contains("args") || candidate.contains("env");
  std::vector<std::string> why = said_;
  for (size_t i = overridden; i < plan_.overrides.size(); ++i) {
    const Override& o = plan_.overrides[i];
    why.push_back(o.flag + (o.by == "given" ? " is given" : " is set by " + o.by));
  }
  for (size_t i = args; i < plan_.args.size(); ++i) why.push_back(plan_.args[i].flag);
  for (size_t i = settings; i < plan_.settings.size(); ++i) why.push_back(plan_.settings[i].flag);
  if (why.empty()) why.push_back(sets ? "what it sets stands there already" : text_of(candidate, "default"));
  plan_.answers.push_back({field, shown,
                           !said_.empty()                        ? "diagnostic"
                           : plan_.overrides.size() > overridden ? "override"
                           : sets                                ? "argument"
                                                                 : "default",
                           fmt::format("{}", fmt::join(why, ", ")), text_of(candidate, "file")});
}

// ---- judging ----

void Planner::judge_parameters() {
  for (const NamedParameter& parameter : given_) judge_flag(parameter);
}

void Planner::judge_flag(const NamedParameter& parameter) {
  const std::string plain = plain_flag(parameter.flag);
  const auto names = [&](const std::string& flag) {  // the flag, or a member of it
    return plain == plain_flag(flag) || plain.starts_with(plain_flag(flag) + ".");
  };
  for (const auto& [flag, row] : member(engine_, "removed_flags").items()) {
    if (!names(flag)) continue;
    if (row.contains("since") && compare_versions(plan_.version, text_of(row, "since")) < 0) continue;
    return say("FLAG_REMOVED", Severity::error, fmt::format("{}: {}", parameter.flag, text_of(row, "say")));
  }
  for (const auto& [flag, why] : member(engine_, "unknown_flags").items())
    if (names(flag))
      return say("UNKNOWN_FLAG", Severity::error, fmt::format("{}: {}", parameter.flag, value_text(why)));
  if (parameter.row == nullptr) return;  // not about precision: passed on unchanged
  if (parameter.other_entry)
    return say("UNKNOWN_FLAG", Severity::error,
               fmt::format("{} is no flag of {}, it belongs to {}", parameter.flag, plan_.entry,
                           fmt::join(member(*parameter.row, "entries").get<std::vector<std::string>>(), ", ")));
  const std::string since = text_of(*parameter.row, "since");
  if (!since.empty() && compare_versions(plan_.version, since) < 0)
    return say("UNKNOWN_FLAG", Severity::error,
               fmt::format("{} exists from {} {} on, the plan is for {}", parameter.flag, plan_.engine, since,
                           printable(plan_.version)));
  judge_value(parameter);
}

void Planner::judge_value(const NamedParameter& parameter) {
  const Json& row = *parameter.row;
  const auto bad = [&](const std::string& why, std::vector<std::string> instead = {}) {
    say("INVALID_VALUE", Severity::error, fmt::format("{} {}: {}", parameter.flag, value_text(parameter.value), why),
        std::move(instead));
  };
  const std::string type = text_of(row, "type");
  if (!parameter.path.empty()) return;
  if (type == "json" && !parameter.value.is_object() && !parameter.value.is_boolean()) return bad("JSON is needed");
  if (type == "int" && !is_whole(value_text(parameter.value))) return bad("a whole number is needed");
  const Json value = canonical_value(&row, parameter.value);
  for (const Json& refused : member(row, "refused"))
    if (same_value(refused["value"], value) &&
        (!refused.contains("since") || compare_versions(plan_.version, text_of(refused, "since")) >= 0))
      return say(text_of(refused, "code"),
                 text_of(refused, "severity") == "warning" ? Severity::warning : Severity::error,
                 fmt::format("{} {}: {}", parameter.flag, value_text(value), text_of(refused, "say")));
  const Json& values = member(row, "values");
  if (!values.is_array() || values.empty()) return;
  const auto is_value = [&](const Json& given) {
    return std::ranges::any_of(values, [&](const Json& one) { return same_value(one, given); });
  };
  if (type == "list" && value.is_array() ? std::ranges::all_of(value, is_value) : is_value(value)) return;
  if (row.contains("default") && same_value(row["default"], value)) return;
  if (text_of(engine_, "method_flag") == parameter.flag)
    if (const Json& named = member(member(engine_["methods"], value_text(value)), "named_when"); named.is_object())
      if (holds(named, facts_)) return;
  std::vector<std::string> valid;
  for (const Json& one : values) valid.push_back(value_text(one));
  bad("the engine has no such value", {suggest(value_text(value), valid)});
}

/// Which methods the weights are loaded or quantized with, and what each needs.
void Planner::judge_methods() {
  const std::string flag = text_of(engine_, "method_flag");
  const Json named = flag.empty() ? Json() : member(facts_["arg"], without_dashes(flag));
  const std::string wanted = named.is_string() ? named.get<std::string>() : std::string();
  const bool known = !wanted.empty() && member(engine_["methods"], wanted).is_object();
  if (known) facts_["method"] = canonical_method(wanted);
  if (!request_.checkpoint.empty() && checkpoint_ != nullptr) {
    const std::string own = text_of(*checkpoint_, "method");
    if (wanted.empty() && !own.empty()) {
      facts_["method"] = own;
      judge_method(own, true, false);
    }
    if (known) {
      const Json& over = member(engine_["methods"][wanted], "over");
      const auto lists = [](const Json& list, std::string_view name) {
        return list.is_array() && std::ranges::any_of(list, [&](const Json& one) { return one == "*" || one == name; });
      };
      const bool accepted = canonical_method(wanted) == own || lists(member(*checkpoint_, "accepts"), wanted) ||
                            lists(over, own) || lists(over, request_.checkpoint);
      // another name for what the checkpoint has is the checkpoint's own method
      if (accepted && engine_["methods"][wanted].contains("is")) facts_["method"] = own;
      if (!accepted)
        say("CKPT_MISMATCH", Severity::error,
            fmt::format("{} {} does not match the checkpoint's method {}", flag, wanted, request_.checkpoint),
            {fmt::format("leave {} out: the checkpoint says what it is", flag)});
      else
        judge_method(wanted, false, false);
    }
  } else if (known) {
    judge_method(wanted, false, true);
  }
  for (const Json& path : member(engine_, "method_facts")) {
    const Json* name = look_up(facts_, path.get_ref<const std::string&>());
    if (name != nullptr && name->is_string() && member(engine_["methods"], name->get<std::string>()).is_object())
      judge_method(name->get<std::string>(), false, request_.checkpoint.empty());
  }
}

void Planner::judge_method(const std::string& name, bool from_checkpoint, bool at_load) {
  const Json& named = member(engine_["methods"], name);
  if (!named.is_object()) return;
  // another name for a method has the method's limits, but may have rules of its own
  const Json& same = member(engine_["methods"], canonical_method(name));
  const Json& method = same.is_object() ? same : named;
  facts_["this_method"] = name;
  if (at_load && std::ranges::find(method["mode"], Json("online")) == method["mode"].end())
    say("NO_RUNTIME_QUANT", Severity::error,
        fmt::format("{} needs a checkpoint that was quantized so; this one has 16-bit weights", name),
        {"bitwright quantize, or a quantized checkpoint of the model"});
  const Json& vendors = member(method, "vendors");
  const Json& vendor = member(facts_, "vendor");
  if (vendors.is_array() && vendor.is_string() && std::ranges::find(vendors, vendor) == vendors.end())
    say("HW_UNSUPPORTED", Severity::error, fmt::format("{} does not run on {} devices", name, value_text(vendor)));
  judge_capability(from_checkpoint && checkpoint_->contains("min_sm") ? *checkpoint_ : method, name);
  const std::string dtype = text_of(facts_["arg"], without_dashes(text_of(engine_, "dtype_flag")));
  const Json& activations = member(method, "activations");
  if (activations.is_array() && !dtype.empty() && dtype != "auto" &&
      std::ranges::find(activations, Json(dtype)) == activations.end())
    say("DTYPE_CONFLICT", Severity::error,
        fmt::format("{} computes in {}, not in {}", name,
                    fmt::join(activations.get<std::vector<std::string>>(), " or "), dtype));
  if (at_load && method.value("experts_only", false) && !holds({{"model.moe", true}}, facts_))
    say("NO_EFFECT", Severity::warning, fmt::format("{} quantizes experts only, and the model has none", name));
  run_rules(member(method, "rules"));
  if (&named != &method) run_rules(member(named, "rules"));
}

void Planner::judge_capability(const Json& limits, const std::string& what) {
  const Json& sm = member(facts_, "sm");
  if (!sm.is_number() || member(facts_, "vendor") != "nvidia") return;
  const auto outside = [&](const char* limit, auto compare) {
    const Json& bound = member(limits, limit);
    return bound.is_number() && compare(sm.get<int>(), bound.get<int>());
  };
  if (outside("min_sm", std::less<>()))
    return say("HW_UNSUPPORTED", Severity::error,
               fmt::format("{} needs compute capability {:.1f}, the device has {:.1f}", what,
                           limits["min_sm"].get<int>() / 10.0, sm.get<int>() / 10.0));
  if (outside("max_sm", std::greater<>()))
    return say("HW_UNSUPPORTED", Severity::error,
               fmt::format("{} runs up to compute capability {:.1f} only, the device has {:.1f}", what,
                           limits["max_sm"].get<int>() / 10.0, sm.get<int>() / 10.0));
  if (outside("native_sm", std::less<>()))
    say("HW_FALLBACK", holds({{"intent.weight_only", true}}, facts_) ? Severity::note : Severity::warning,
        fmt::format("{} runs natively from compute capability {:.1f} on; at {:.1f} it saves memory, not arithmetic "
                    "(weight-only or emulated)",
                    what, limits["native_sm"].get<int>() / 10.0, sm.get<int>() / 10.0));
}

void Planner::judge_checkpoint() {
  if (request_.checkpoint.empty()) return;
  if (checkpoint_ == nullptr)
    return say("UNSUPPORTED_CKPT", Severity::error,
               fmt::format("{} {} does not load {} checkpoints", plan_.engine, plan_.version, request_.checkpoint));
  run_rules(member(*checkpoint_, "rules"));
}

/// Tensor parallelism cuts heads and rows: it may cut neither a head nor a group of a quantized row.
void Planner::judge_parallel() {
  const std::string flag = text_of(engine_, "parallel_flag");
  const Json& given = member(facts_["arg"], without_dashes(flag));
  const std::string text = given.is_string() ? given.get<std::string>() : "";
  constexpr size_t kDigits = 4;
  if (text.empty() || text.size() > kDigits || text.find_first_not_of("0123456789") != std::string::npos) return;
  const int64_t parts = std::max<int64_t>(1, std::stoll(text));
  plan_.tensor_parallel = parts;
  const auto fact = [&](std::string_view name) {
    const Json& value = member(facts_["model"], name);
    return value.is_number_integer() ? value.get<int64_t>() : 0;
  };
  const auto refuse = [&](const std::string& what) {
    say("PARALLEL_SPLIT", Severity::error, fmt::format("{} {}: {}", flag, parts, what),
        {"a smaller degree of tensor parallelism", "pipeline parallelism"});
  };
  if (const int64_t heads = fact("heads"); heads % parts != 0)
    return refuse(fmt::format("{} attention heads cannot be shared by {} devices", heads, parts));
  const std::string experts(without_dashes(text_of(member(engine_, "parallel"), "expert")));
  if (!experts.empty() && facts_["arg"].contains(experts)) return;  // on one device each
  const int64_t group = fact("group_size");
  const char* const inner = holds({{"model.moe", true}}, facts_) ? "moe_intermediate_size" : "intermediate_size";
  if (request_.checkpoint.empty() || group <= 1 || fact(inner) == 0) return;
  if (fact(inner) % parts != 0 || fact(inner) / parts % group != 0)
    refuse(
        fmt::format("rows of {} weights, shared by {}, cut the checkpoint's groups of {}", fact(inner), parts, group));
}

/// The user's own configuration file holds what the plan would have written into one.
void Planner::judge_config_file() {
  const std::string option = option_of(text_of(engine_, "config_file"));
  const auto given = std::ranges::find(given_, option, &NamedParameter::flag);
  if (plan_.config_file.empty() || given == given_.end()) return;
  say("CONFIG_FILE_ONLY", Severity::warning,
      fmt::format("add to {}: {}", value_text(given->value), value_text(plan_.config_file)));
}

void Planner::run_rules(const Json& rules) {
  for (const Json& rule : rules)
    if (!rule.contains("when") || holds(rule["when"], facts_)) say_rule(rule);
}

void Planner::say_rule(const Json& rule) {
  const std::string severity = text_of(rule, "severity", "error");
  std::vector<std::string> instead;
  for (const Json& one : member(rule, "instead")) instead.push_back(fill_text(one.get<std::string>(), facts_));
  say(text_of(rule, "code"),
      severity == "note"      ? Severity::note
      : severity == "warning" ? Severity::warning
                              : Severity::error,
      fill_text(text_of(rule, "say"), facts_), std::move(instead));
}

void Planner::say(std::string code, Severity severity, std::string message, std::vector<std::string> instead) {
  constexpr size_t kMost = 2000;
  message = printable(message, kMost);  // it may repeat what the user typed
  said_.push_back(code);
  for (const Diagnostic& said : plan_.diagnostics)
    if (said.code == code && said.message == message) return;
  plan_.diagnostics.push_back({std::move(code), severity, std::move(message), std::move(instead)});
}

}  // namespace

std::string_view severity_name(Severity severity) {
  return severity == Severity::error ? "error" : severity == Severity::warning ? "warning" : "note";
}

EnginePlan plan_engine(const PlanRequest& request, const Facts& facts) { return Planner(request, facts).plan(); }

const std::vector<std::string>& field_values(std::string_view field) { return field_named(field).values; }

const std::vector<std::string>& field_names() {
  static const std::vector<std::string> names = {"gemm_dtype", "kvcache_dtype", "attention_dtype", "moe_dtype"};
  return names;
}

const std::vector<std::string>& intent_methods() {
  static const std::vector<std::string> methods = {"none", "int8", "int4",  "int3",  "int2", "nf4",
                                                   "fp4",  "fp8",  "mxfp4", "nvfp4", "auto"};
  return methods;
}

OrderedJson plan_json(const EnginePlan& plan, std::string_view model, const Facts& facts) {
  OrderedJson args = OrderedJson::array(), warnings = OrderedJson::array(), errors = OrderedJson::array();
  OrderedJson explained = OrderedJson::array(), overrides = OrderedJson::array(), answers = OrderedJson::array();
  for (const auto* arguments : {&plan.args, &plan.settings})
    for (const Argument& a : *arguments)
      explained.push_back({{"flag", a.flag},
                           {"value", OrderedJson(a.value)},
                           {"place", a.place},
                           {"rule", a.rule},
                           {"source", a.source}});
  for (const Answer& a : plan.answers)
    answers.push_back(
        {{"field", a.field}, {"value", a.value}, {"outcome", a.outcome}, {"why", a.why}, {"source", a.source}});
  const Json& engine = facts.get("engines", plan.engine);
  for (const Argument& a : plan.args)
    for (std::string& word : argument_words(a, engine)) args.push_back(std::move(word));
  for (const Override& o : plan.overrides)
    overrides.push_back({{"flag", o.flag},
                         {"derived", OrderedJson(o.derived)},
                         {"given", OrderedJson(o.given)},
                         {"rule", o.rule},
                         {"by", o.by}});
  for (const Diagnostic& d : plan.diagnostics)
    (d.severity == Severity::error ? errors : warnings)
        .push_back({{"code", d.code},
                    {"severity", severity_name(d.severity)},
                    {"message", d.message},
                    {"instead", d.instead}});
  return {{"name", plan.engine},
          {"version", plan.version},
          {"entry", plan.entry},
          {"outcome", plan.outcome},
          {"args", args},
          {"explained", explained},
          {"answers", answers},
          {"env", OrderedJson(plan.environment)},
          {"config_file", OrderedJson(plan.config_file)},
          {"api", OrderedJson(plan.api)},
          {"command", engine_command(plan, model, facts)},
          {"resolved", OrderedJson(plan.resolved)},
          {"overrides", overrides},
          {"warnings", warnings},
          {"errors", errors}};
}

}  // namespace bitwright
