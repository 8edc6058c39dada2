#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <span>

#include "engine/condition.hpp"
#include "engine/facts.hpp"

namespace bitwright {
namespace {

using Problems = std::vector<std::string>;

/// Kinds of JSON values, as a set.
using Types = unsigned;
constexpr Types kText = 1, kList = 2, kObject = 4, kFlag = 8, kWhole = 16, kReal = 32, kNull = 64, kTexts = 128,
                kTextMap = 256;

/// A member a document may have. Every member must be known: a misspelt one would silently say nothing.
struct Member {
  std::string_view name;
  Types types;
  bool required = false;
};

/// A list of texts is a list too, an object of texts an object.
Types type_of(const Json& value) {
  const bool texts = value.is_structured() && std::ranges::all_of(value, [](const Json& v) { return v.is_string(); });
  return value.is_string()            ? kText
         : value.is_array()           ? kList | (texts ? kTexts : 0)
         : value.is_object()          ? kObject | (texts ? kTextMap : 0)
         : value.is_boolean()         ? kFlag
         : value.is_number_unsigned() ? kWhole | kReal
         : value.is_number()          ? kReal
                                      : kNull;
}

void check_members(const Json& object, std::span<const Member> members, const std::string& where, Problems& problems) {
  if (!object.is_object()) return problems.push_back(where + ": an object is needed");
  for (const Member& member : members)
    if (member.required && !object.contains(member.name))
      problems.push_back(fmt::format("{}: '{}' is missing", where, member.name));
  for (const auto& [name, value] : object.items()) {
    const auto member = std::ranges::find(members, std::string_view(name), &Member::name);
    if (member == members.end())
      problems.push_back(fmt::format("{}: no member is called '{}'", where, name));
    else if ((member->types & type_of(value)) == 0)
      problems.push_back(fmt::format("{}.{}: a {} does not belong here", where, name, value.type_name()));
  }
}

const Json& member_or(const Json& object, std::string_view name, const Json& otherwise) {
  if (!object.is_object()) return otherwise;
  const auto found = object.find(name);
  return found == object.end() ? otherwise : *found;
}

void check_when(const Json& row, const std::string& where, Problems& problems) {
  if (row.is_object() && row.contains("when")) check_condition(row["when"], where + ".when", problems);
}

/// What a rule says: a code, how grave it is, and to whom it helps.
void check_diagnostic(const Json& row, const std::string& where, Problems& problems) {
  static const std::array kMembers = {Member{"code", kText, true}, Member{"severity", kText},
                                      Member{"say", kText, true},  Member{"instead", kTexts},
                                      Member{"when", kObject},     Member{"file", kText}};
  check_members(row, kMembers, where, problems);
  const Json error = "error";
  const Json& severity = member_or(row, "severity", error);
  if (severity != "error" && severity != "warning" && severity != "note")
    problems.push_back(where + ".severity: error, warning or note");
  check_when(row, where, problems);
}

void check_flags(const Json& engine, Problems& problems) {
  static const std::array kMembers = {
      Member{"flag", kText, true}, Member{"aliases", kTexts},
      Member{"type", kText},       Member{"default", kText | kList | kObject | kFlag | kWhole | kNull},
      Member{"values", kList},     Member{"open_ended", kFlag},
      Member{"lower_case", kFlag}, Member{"upper_case", kFlag},
      Member{"same", kTextMap},    Member{"refused", kList},
      Member{"place", kText},      Member{"entries", kTexts},
      Member{"since", kText},      Member{"classes", kTextMap},
      Member{"help", kText},       Member{"call", kText},
      Member{"file", kText, true}};
  const Json none = Json::array();
  for (const Json& flag : member_or(engine, "flags", none)) {
    const std::string where = "flags." + value_text(member_or(flag, "flag", none));
    check_members(flag, kMembers, where, problems);
    for (const Json& refused : member_or(flag, "refused", none)) {
      static const std::array kRefused = {Member{"value", kText, true}, Member{"code", kText, true},
                                          Member{"severity", kText}, Member{"say", kText, true},
                                          Member{"since", kText}};
      check_members(refused, kRefused, where + ".refused", problems);
    }
  }
}

void check_methods(const Json& engine, Problems& problems) {
  static const std::array kMembers = {
      Member{"mode", kTexts, true},  Member{"min_sm", kWhole},      Member{"max_sm", kWhole},
      Member{"native_sm", kWhole},   Member{"vendors", kTexts},     Member{"activations", kTexts},
      Member{"experts_only", kFlag}, Member{"is", kText},           Member{"over", kTexts},
      Member{"rules", kList},        Member{"named_when", kObject}, Member{"format", kText},
      Member{"file", kText, true}};
  const Json none = Json::object(), no_rules = Json::array();
  for (const auto& [name, method] : member_or(engine, "methods", none).items()) {
    const std::string where = "methods." + name;
    check_members(method, kMembers, where, problems);
    if (method.is_object() && method.contains("named_when"))
      check_condition(method["named_when"], where + ".named_when", problems);
    for (const Json& rule : member_or(method, "rules", no_rules)) check_diagnostic(rule, where + ".rules", problems);
  }
}

void check_checkpoints(const Json& engine, Problems& problems) {
  static const std::array kMembers = {
      Member{"when", kObject, true}, Member{"method", kText},     Member{"accepts", kTexts}, Member{"min_sm", kWhole},
      Member{"max_sm", kWhole},      Member{"native_sm", kWhole}, Member{"rules", kList},    Member{"file", kText}};
  const Json none = Json::array();
  for (const Json& row : member_or(engine, "checkpoints", none)) {
    const std::string where = "checkpoints." + value_text(member_or(row, "when", none));
    check_members(row, kMembers, where, problems);
    check_when(row, where, problems);
    for (const Json& rule : member_or(row, "rules", none)) check_diagnostic(rule, where + ".rules", problems);
  }
}

void check_candidates(const Json& candidates, const std::string& where, Problems& problems) {
  static const std::array kMembers = {Member{"when", kObject}, Member{"args", kObject},  Member{"env", kObject},
                                      Member{"say", kList},    Member{"default", kText}, Member{"file", kText}};
  if (!candidates.is_array() || candidates.empty())
    return problems.push_back(where + ": a list of candidates is needed");
  const Json none = Json::array();
  for (const Json& candidate : candidates) {
    check_members(candidate, kMembers, where, problems);
    check_when(candidate, where, problems);
    for (const Json& rule : member_or(candidate, "say", none)) check_diagnostic(rule, where + ".say", problems);
  }
}

void check_map(const Json& engine, Problems& problems) {
  static const std::array kFields = {Member{"gemm_dtype", kObject},    Member{"moe_dtype", kObject},
                                     Member{"kvcache_dtype", kObject}, Member{"attention_dtype", kObject},
                                     Member{"intent", kObject},        Member{"backend_method", kObject}};
  const Json none = Json::object();
  const Json& map = member_or(engine, "map", none);
  check_members(map, kFields, "map", problems);
  for (const auto& [field, values] : map.items())
    for (const auto& [value, candidates] : values.items())
      check_candidates(candidates, fmt::format("map.{}.{}", field, value), problems);
}

/// Every flag a rule sets must be in the table of flags: a plan never makes one up.
void check_derived_flags(const Json& engine, Problems& problems) {
  const auto is_listed = [&](const std::string& flag) {
    return std::ranges::any_of(engine["flags"], [&](const Json& row) { return row["flag"] == flag; });
  };
  const Json no_args = Json::object();
  for (const auto& [field, values] : engine["map"].items())
    for (const auto& [value, candidates] : values.items())
      for (const Json& candidate : candidates)
        for (const auto& [flag, setting] : member_or(candidate, "args", no_args).items())
          if (!is_listed(flag)) problems.push_back(fmt::format("map.{}.{}: {} is none of 'flags'", field, value, flag));
  const Json& parallel = member_or(engine, "parallel", no_args);
  for (const char* kind : {"tensor", "pipeline", "expert"})
    if (parallel.contains(kind) && !is_listed(parallel[kind].get<std::string>()))
      problems.push_back(fmt::format("parallel.{}: {} is none of 'flags'", kind, value_text(parallel[kind])));
}

void check_choices(const Json& rows, std::string_view member, const std::string& where, Problems& problems) {
  static const std::array kMembers = {Member{"name", kText, true}, Member{"first", kList, true},
                                      Member{"resolved", kFlag}};
  static const std::array kFirst = {Member{"when", kObject},
                                    Member{"is", kText | kList | kObject | kFlag | kWhole | kNull, true}};
  const Json none = Json::array();
  for (const Json& row : member_or(rows, member, none)) {
    const std::string here = where + "." + value_text(member_or(row, "name", none));
    check_members(row, kMembers, here, problems);
    for (const Json& one : member_or(row, "first", none)) {
      check_members(one, kFirst, here + ".first", problems);
      check_when(one, here + ".first", problems);
    }
  }
}

/// The small tables of an engine: what took a flag's place, which flags answer a field, what quantized checkpoints say.
void check_tables(const Json& engine, Problems& problems) {
  static const std::array kRemoved = {Member{"say", kText, true}, Member{"since", kText}};
  static const std::array kMemory = {Member{"kv_from", kTexts, true},
                                     Member{"kv_bytes", kObject, true},
                                     Member{"weights_from", kTexts, true},
                                     Member{"weight_bits", kObject, true},
                                     Member{"experts_from", kTexts},
                                     Member{"expert_bits", kObject},
                                     Member{"overhead_gib", kReal},
                                     Member{"source", kText},
                                     Member{"windows", kFlag},
                                     Member{"usable", kList},
                                     Member{"kv_share", kList},
                                     Member{"reserved_gib", kList},
                                     Member{"prefill_tokens", kList},
                                     Member{"logit_rows", kList},
                                     Member{"kv_step", kWhole},
                                     Member{"value_step", kWhole},
                                     Member{"activation_bytes", kReal}};
  static const std::array kRow = {Member{"when", kObject}, Member{"is", kReal | kWhole | kText, true},
                                  Member{"file", kText}};
  const Json none = Json::object();
  for (const auto& [flag, row] : member_or(engine, "removed_flags", none).items())
    check_members(row, kRemoved, "removed_flags." + flag, problems);
  for (const auto& [field, row] : member_or(engine, "already_quantized", none).items())
    check_diagnostic(row, "already_quantized." + field, problems);
  if (engine.is_object() && engine.contains("memory")) check_members(engine["memory"], kMemory, "memory", problems);
  const Json& memory = member_or(engine, "memory", none);
  const auto is_number = [](const Json& value) { return value.is_number() && value >= 0; };
  const Json no_rows = Json::array();
  for (const char* name : {"usable", "kv_share", "reserved_gib", "prefill_tokens", "logit_rows"})
    for (const Json& row : member_or(memory, name, no_rows)) {
      check_members(row, kRow, std::string("memory.") + name, problems);
      check_when(row, std::string("memory.") + name, problems);
    }
  for (const auto& [type, bytes] : member_or(memory, "kv_bytes", none).items())
    if (!bytes.is_array() || bytes.size() != 2 || !std::ranges::all_of(bytes, is_number))
      problems.push_back(fmt::format("memory.kv_bytes.{}: bytes of an element and of a head's scale are needed", type));
  if (memory.contains("experts_from") != memory.contains("expert_bits"))
    problems.emplace_back("memory: experts_from and expert_bits stand together");
  for (const char* name : {"weight_bits", "expert_bits"})
    for (const auto& [method, bits] : member_or(memory, name, none).items())
      if (!bits.is_number() || bits <= 0 || bits > 16)
        problems.push_back(fmt::format("memory.{}.{}: a number up to 16 is needed", name, method));
  for (const auto& [field, values] : member_or(engine, "overridden_by", none).items())
    for (const auto& [value, flags] : values.items())
      if ((type_of(flags) & kTexts) == 0)
        problems.push_back(fmt::format("overridden_by.{}.{}: a list of flags is needed", field, value));
}

/// What the engine refuses of a checkpoint's layers: which it fuses, and rules over one layer's facts (lint.cpp).
void check_lint(const Json& lint, Problems& problems) {
  static const std::array kMembers = {Member{"fused", kList}, Member{"experts", kText}, Member{"rules", kList, true},
                                      Member{"source", kText, true}};
  static const std::array kFused = {Member{"as", kText, true}, Member{"of", kTexts, true}, Member{"when", kObject},
                                    Member{"file", kText}};
  check_members(lint, kMembers, "lint", problems);
  const Json none = Json::array(), all = "all";
  const Json& experts = member_or(lint, "experts", all);
  if (experts != "all" && experts != "projection") problems.emplace_back("lint.experts: all or projection");
  for (const Json& row : member_or(lint, "fused", none)) {
    check_members(row, kFused, "lint.fused", problems);
    check_when(row, "lint.fused", problems);
  }
  for (const Json& rule : member_or(lint, "rules", none)) {
    const std::string where = "lint.rules." + value_text(member_or(rule, "code", none));
    check_diagnostic(rule, where, problems);
    if (rule.is_object() && !rule.contains("when")) problems.push_back(where + ": 'when' is missing");
  }
}

Problems check_engine(const Json& engine) {
  static const std::array kMembers = {
      Member{"name", kText, true},          Member{"aliases", kTexts},      Member{"summary", kText, true},
      Member{"source", kObject, true},      Member{"version", kText, true}, Member{"entries", kTextMap, true},
      Member{"entry", kText, true},         Member{"flags", kList, true},   Member{"removed_flags", kObject},
      Member{"unknown_flags", kTextMap},    Member{"method_flag", kText},   Member{"dtype_flag", kText},
      Member{"parallel_flag", kText},       Member{"method_facts", kTexts}, Member{"methods", kObject, true},
      Member{"checkpoints", kList, true},   Member{"before", kList},        Member{"after", kList},
      Member{"overridden_by", kObject},     Member{"map", kObject, true},   Member{"checks", kList, true},
      Member{"already_quantized", kObject}, Member{"memory", kObject},      Member{"facts", kObject},
      Member{"config_file", kText},         Member{"packages", kTexts},     Member{"lint", kObject},
      Member{"parallel", kObject},          Member{"negation", kText}};
  static const std::array kParallel = {Member{"tensor", kText, true}, Member{"pipeline", kText},
                                       Member{"expert", kText}, Member{"expert_is_switch", kFlag},
                                       Member{"source", kText, true}};
  Problems problems;
  check_members(engine, kMembers, "engine", problems);
  check_flags(engine, problems);
  check_methods(engine, problems);
  check_checkpoints(engine, problems);
  check_map(engine, problems);
  check_choices(engine, "before", "before", problems);
  check_choices(engine, "after", "after", problems);
  check_tables(engine, problems);
  if (engine.is_object() && engine.contains("parallel"))
    check_members(engine["parallel"], kParallel, "parallel", problems);
  if (engine.is_object() && engine.contains("lint")) check_lint(engine["lint"], problems);
  const Json none = Json::array();
  for (const Json& rule : member_or(engine, "checks", none))
    check_diagnostic(rule, "checks." + value_text(member_or(rule, "when", none)), problems);
  if (problems.empty() && !engine["entries"].contains(engine["entry"].get_ref<const std::string&>()))
    problems.emplace_back("entry: it is none of 'entries'");
  if (problems.empty()) check_derived_flags(engine, problems);
  return problems;
}

Problems check_hardware(const Json& hardware) {
  static const std::array kMembers = {Member{"name", kText, true},    Member{"aliases", kTexts},
                                      Member{"vendor", kText, true},  Member{"kind", kText, true},
                                      Member{"architecture", kText},  Member{"sm", kWhole},
                                      Member{"memory_gib", kReal},    Member{"bandwidth_gbps", kReal},
                                      Member{"unified", kFlag},       Member{"dtypes", kTexts, true},
                                      Member{"source", kText, true},  Member{"note", kText},
                                      Member{"instructions", kTexts}, Member{"gfx", kText}};
  Problems problems;
  check_members(hardware, kMembers, "hardware", problems);
  if (problems.empty() && hardware["vendor"] == "nvidia" && !hardware.contains("sm"))
    problems.emplace_back("sm: an NVIDIA device has one");
  if (problems.empty() && hardware["kind"] == "gpu" &&
      !(hardware.contains("memory_gib") && hardware.contains("bandwidth_gbps")))
    problems.emplace_back("memory_gib and bandwidth_gbps: a GPU has them");
  return problems;
}

Problems check_kinds(const Json& document) {
  static const std::array kMembers = {Member{"name", kText, true}, Member{"source", kText},
                                      Member{"first", kList, true}};
  static const std::array kFirst = {Member{"when", kObject, true}, Member{"kinds", kTexts, true}};
  Problems problems;
  check_members(document, kMembers, "checkpoints", problems);
  const Json none = Json::array();
  for (const Json& row : member_or(document, "first", none)) {
    check_members(row, kFirst, "first", problems);
    check_when(row, "first", problems);
  }
  return problems;
}

/// The containers that quantized weights are written in, the likelier first.
Problems check_weights(const Json& document) {
  static const std::array kMembers = {Member{"name", kText, true}, Member{"source", kText, true},
                                      Member{"containers", kTexts, true}};
  Problems problems;
  check_members(document, kMembers, "weights", problems);
  return problems;
}

Problems check_modules(const Json& modules) {
  static const std::array kMembers = {Member{"name", kText, true},      Member{"summary", kText},
                                      Member{"source", kText, true},    Member{"cut_inputs", kTexts, true},
                                      Member{"not_cut", kTexts, true},  Member{"not_linear", kTexts, true},
                                      Member{"kv_heads", kTexts, true}, Member{"head", kTexts, true}};
  Problems problems;
  check_members(modules, kMembers, "modules", problems);
  return problems;
}

Problems check_preset(const Json& preset) {
  static const std::array kMembers = {Member{"name", kText, true},    Member{"aliases", kTexts},
                                      Member{"summary", kText},       Member{"gemm_dtype", kText},
                                      Member{"kvcache_dtype", kText}, Member{"attention_dtype", kText},
                                      Member{"moe_dtype", kText}};
  Problems problems;
  check_members(preset, kMembers, "preset", problems);
  return problems;
}

Problems check_backend(const Json& backend) {
  static const std::array kMembers = {Member{"name", kText, true},       Member{"aliases", kTexts},
                                      Member{"runs", kTexts, true},      Member{"four_bits", kText, true},
                                      Member{"eight_bits", kText, true}, Member{"usable_memory", kReal, true},
                                      Member{"fallback", kText, true},   Member{"rules", kList, true},
                                      Member{"source", kText, true},     Member{"eight_bits_below", kReal}};
  Problems problems;
  check_members(backend, kMembers, "backend", problems);
  const Json none = Json::array();
  for (const Json& rule : member_or(backend, "rules", none)) check_diagnostic(rule, "rules", problems);
  return problems;
}

}  // namespace

std::vector<std::string> check_facts(std::string_view kind, const Json& document) {
  struct Kind {
    std::string_view name;
    Problems (*check)(const Json&);
  };
  static constexpr std::array kKinds = {Kind{"engines", check_engine},    Kind{"hardware", check_hardware},
                                        Kind{"checkpoints", check_kinds}, Kind{"presets", check_preset},
                                        Kind{"backends", check_backend},  Kind{"modules", check_modules},
                                        Kind{"weights", check_weights}};
  const auto* row = std::ranges::find(kKinds, kind, &Kind::name);
  if (row == kKinds.end()) return {fmt::format("no facts are called '{}'", kind)};
  return row->check(document);
}

}  // namespace bitwright
