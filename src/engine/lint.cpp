#include "engine/lint.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "base/error.hpp"
#include "engine/condition.hpp"
#include "engine/parallel.hpp"
#include "engine/parameters.hpp"

namespace bitwright {
namespace {

/// The last part of a name, and what stands before it with its dot.
std::string_view last_of(std::string_view name) { return name.substr(name.rfind('.') + 1); }
std::string_view prefix_of(std::string_view name) { return name.substr(0, name.rfind('.') + 1); }

/// Does the name end with these whole parts?
bool ends_with_parts(std::string_view name, std::string_view parts) {
  return name.ends_with(parts) && (name.size() == parts.size() || name[name.size() - parts.size() - 1] == '.');
}
bool is_listed(const Json& list, std::string_view name) {
  return std::ranges::any_of(list,
                             [&](const Json& one) { return ends_with_parts(name, one.get_ref<const std::string&>()); });
}
const Json& module_facts(const Facts& facts) { return facts.get("modules", "decoder"); }

/// "model.layers.0.mlp.experts" of "model.layers.0.mlp.experts.7.up_proj", with its number; empty: no expert of many.
std::string_view experts_of(std::string_view name) {
  constexpr std::string_view kExperts = ".experts.";
  const size_t at = name.find(kExperts);
  if (at == std::string_view::npos) return {};
  const size_t digit = at + kExperts.size();
  return digit < name.size() && name[digit] >= '0' && name[digit] <= '9' ? name.substr(0, digit - 1)
                                                                         : std::string_view{};
}

class Linter {
 public:
  Linter(const PlanRequest& request, const EnginePlan& plan, const Facts& known)
      : lint_(member(known.get("engines", plan.engine), "lint")), names_(module_facts(known)) {
    facts_ = {{"engine", plan.engine},
              {"version", plan.version},
              {"entry", plan.entry},
              {"model", request.model},
              {"hardware", request.hardware},
              {"tp", plan.tensor_parallel},
              {"ep", parallelism_of(plan, known).expert},
              {"ckpt", request.checkpoint}};
    for (const char* name : {"sm", "vendor"})
      if (request.hardware.contains(name)) facts_[name] = request.hardware[name];
    if (!facts_.contains("vendor") && facts_.contains("sm")) facts_["vendor"] = "nvidia";
    for (const Argument& argument : plan.args)
      facts_["arg"][std::string(without_dashes(argument.flag))] = argument.value;
  }

  std::vector<Diagnostic> run(std::span<const LinearModule> modules) {
    if (lint_.empty()) return {};
    find_fused(modules);
    for (const LinearModule& module : modules) judge(module);
    std::vector<Diagnostic> all;
    for (Found& found : found_) {
      if (found.others > 0)
        found.diagnostic.message += fmt::format("; so for {} more layer{}", found.others, found.others > 1 ? "s" : "");
      all.push_back(std::move(found.diagnostic));
    }
    return all;
  }

 private:
  /// What a layer is fused with.
  struct Fused {
    std::string as;
    const LinearModule* first = nullptr;  ///< the one that the others must be like
    size_t members = 0;
    const LinearModule* last = nullptr;
  };
  struct Found {
    const Json* rule;
    Diagnostic diagnostic;
    int64_t others = 0;
  };

  void find_fused(std::span<const LinearModule> modules);
  /// The name of the fused layer that this one becomes part of, whole: "model.layers.0.self_attn.qkv_proj"; or empty.
  std::string fused_name(const LinearModule& module) const;
  void judge(const LinearModule& module);
  std::string description(const LinearModule& module) const;
  Diagnostic filled(const Json& rule) const;
  Json facts_of(const LinearModule& module) const;
  void add_sizes(const LinearModule& module, Json& m) const;
  void add_fused(const LinearModule& module, Json& m) const;

  const Json& lint_;   ///< of the engine
  const Json& names_;  ///< of modules
  Json facts_;
  std::map<std::string, Fused, std::less<>> fused_;
  std::vector<Found> found_;  ///< in the order in which they were met
  /// Which of found_ hold for layers of this description: models repeat the same few, some by the ten thousand.
  std::map<std::string, std::vector<size_t>, std::less<>> judged_;
};

std::string Linter::fused_name(const LinearModule& module) const {
  if (const std::string_view experts = experts_of(module.name); !experts.empty()) {
    const std::string share = member(lint_, "experts").is_string() ? lint_["experts"].get<std::string>() : "";
    if (share == "all") return std::string(experts);
    if (share == "projection") return fmt::format("{}.{}", experts, last_of(module.name));
  }
  for (const Json& row : member(lint_, "fused")) {
    if (row.contains("when") && !holds(row["when"], facts_)) continue;
    const Json& parts = row["of"];
    if (std::ranges::find(parts, Json(std::string(last_of(module.name)))) != parts.end())
      return fmt::format("{}{}", prefix_of(module.name), row["as"].get_ref<const std::string&>());
  }
  return {};
}

void Linter::find_fused(std::span<const LinearModule> modules) {
  for (const LinearModule& module : modules) {
    const std::string name = fused_name(module);
    if (name.empty()) continue;
    Fused& fused = fused_[name];
    fused.as = std::string(last_of(name));
    if (fused.first == nullptr) fused.first = &module;
    fused.last = &module;
    ++fused.members;
  }
}

/// Sizes on one device, and whether the cut goes through what belongs together.
void Linter::add_sizes(const LinearModule& module, Json& m) const {
  const int64_t parts = facts_["tp"].get<int64_t>();
  const bool placed = facts_["ep"].get<int64_t>() > 1 && !experts_of(module.name).empty();  // an expert on one device
  const bool whole = parts == 1 || placed || is_listed(names_["not_cut"], module.name);
  const bool by_inputs = is_listed(names_["cut_inputs"], module.name);
  m["cut"] = whole ? "none" : by_inputs ? "inputs" : "outputs";
  // key and value heads are given to several devices where there are fewer heads than devices
  int64_t row_parts = whole || by_inputs ? 1 : parts;
  const Json& kv = member(facts_["model"], "kv_heads");
  if (row_parts > 1 && is_listed(names_["kv_heads"], module.name) && kv.is_number_integer())
    row_parts = std::min(parts, std::max<int64_t>(1, kv.get<int64_t>()));
  const int64_t column_parts = whole || !by_inputs ? 1 : parts;
  const bool even = module.rows % row_parts == 0 && module.columns % column_parts == 0;
  m["even"] = even;
  const int64_t rows = module.rows / row_parts, columns = module.columns / column_parts;
  m["part_rows"] = rows;
  m["part_columns"] = columns;
  if (!module.form || !even) return;
  const WeightForm& form = *module.form;
  m["cuts_group"] = form.group > 0 && form.group < module.columns && columns % form.group != 0 && column_parts > 1;
  if (form.block_rows > 0 && form.block_columns > 0)
    m["cuts_block"] =
        (column_parts > 1 && columns % form.block_columns != 0) || (row_parts > 1 && rows % form.block_rows != 0);
}

void Linter::add_fused(const LinearModule& module, Json& m) const {
  const auto found = fused_.find(fused_name(module));
  if (found == fused_.end() || found->second.members < 2) return;
  const Fused& fused = found->second;
  m["fused"] = {{"as", fused.as}, {"with", fused.first->name}, {"last", fused.last == &module}};
  if (module.form.has_value() != fused.first->form.has_value())
    m["fused"]["partly_kept"] = true;
  else if (module.form && *module.form != *fused.first->form)
    m["fused"]["mismatch"] = true;
  m["fused"]["other_form"] = fused.first->form ? describe(*fused.first->form) : "floating point";
  if (module.form && module.form->block_rows > 0)
    m["fused"]["splits_block"] = m["part_rows"].get<int64_t>() % module.form->block_rows != 0;
}

Json Linter::facts_of(const LinearModule& module) const {
  Json m = {{"name", module.name},
            {"last", last_of(module.name)},
            {"rows", module.rows},
            {"columns", module.columns},
            {"quantized", module.form.has_value()},
            {"expert", module.name.find(".experts") != std::string::npos},
            {"head", is_listed(names_["head"], module.name)},
            {"form", module.form ? describe(*module.form) : "floating point"}};
  if (module.form) {
    const WeightForm& form = *module.form;
    m.update({{"type", form.type},
              {"bits", form.bits},
              {"group", form.group},
              {"symmetric", form.symmetric},
              {"act_order", form.act_order}});
    if (form.block_rows > 0) m.update({{"block_rows", form.block_rows}, {"block_columns", form.block_columns}});
  }
  if (module.rows > 0 && module.columns > 0) add_sizes(module, m);
  add_fused(module, m);
  return m;
}

/// All that a condition may ask of a layer but its name.
std::string Linter::description(const LinearModule& module) const {
  std::string text = fmt::format("{}|{}x{}|{}|{}", last_of(module.name), module.rows, module.columns,
                                 module.form ? describe(*module.form) : "", experts_of(module.name).empty());
  if (const auto found = fused_.find(fused_name(module)); found != fused_.end()) {
    const LinearModule& first = *found->second.first;
    text += fmt::format("|{}|{}|{}", first.form ? describe(*first.form) : "", found->second.members > 1,
                        found->second.last == &module);
  }
  return text;
}

void Linter::judge(const LinearModule& module) {
  const auto [known, is_new] = judged_.try_emplace(description(module));
  if (!is_new) {
    for (const size_t at : known->second) ++found_[at].others;
    return;
  }
  facts_["module"] = facts_of(module);
  for (const Json& rule : member(lint_, "rules")) {
    if (!holds(rule["when"], facts_)) continue;
    const auto before = std::ranges::find(found_, &rule, &Found::rule);
    known->second.push_back(static_cast<size_t>(before - found_.begin()));
    if (before != found_.end())
      ++before->others;
    else
      found_.push_back({&rule, filled(rule)});
  }
}

Diagnostic Linter::filled(const Json& rule) const {
  const Json& severity = member(rule, "severity");
  Diagnostic diagnostic{.code = rule["code"].get<std::string>(),
                        .severity = severity == "note"      ? Severity::note
                                    : severity == "warning" ? Severity::warning
                                                            : Severity::error,
                        .message = fill_text(rule["say"].get_ref<const std::string&>(), facts_)};
  for (const Json& one : member(rule, "instead"))
    diagnostic.instead.push_back(fill_text(one.get_ref<const std::string&>(), facts_));
  return diagnostic;
}

}  // namespace

std::optional<WeightForm> form_of(const Scheme& scheme) {
  if (scheme.element == nullptr) return std::nullopt;
  const bool narrow_float = scheme.element->kind == ElementKind::floating && scheme.element->bits <= 8;
  if (scheme.is_plain() && !narrow_float) return std::nullopt;
  WeightForm form{.bits = scheme.element->bits, .symmetric = scheme.offset_kind == OffsetKind::none};
  switch (scheme.element->kind) {
    case ElementKind::integer:
      form.type = "int";
      break;
    case ElementKind::floating:
      form.type = "float";
      break;
    case ElementKind::table:
      form.type = std::string(scheme.element->name);
      break;
    case ElementKind::block_code:
      form.type = "block";
      break;
  }
  if (!scheme.scale) return form;
  const Grouping& grouping = scheme.scale->grouping;
  using Kind = Grouping::Kind;
  form.act_order = grouping.kind == Kind::index;
  if (grouping.kind == Kind::axis || grouping.kind == Kind::index) form.group = grouping.size == 0 ? -1 : grouping.size;
  if (grouping.kind == Kind::block) {
    form.block_rows = grouping.block_rows;
    form.block_columns = grouping.block_columns;
  }
  return form;
}

std::string describe(const WeightForm& form) {
  std::string text = fmt::format("{}-bit {}", form.bits, form.type);
  if (form.block_rows > 0)
    text += fmt::format(", blocks of {}x{}", form.block_rows, form.block_columns);
  else if (form.group > 0)
    text += fmt::format(", groups of {}", form.group);
  else
    text += form.group < 0 ? ", a scale each row" : ", one scale";
  if (!form.symmetric) text += ", asymmetric";
  return form.act_order ? text + ", act-order" : text;
}

std::optional<LinearModule> linear_module(std::string_view tensor, const Shape& shape, const Scheme* scheme,
                                          const Facts& facts) {
  if (shape.size() != 2 && shape.size() != 3) return std::nullopt;
  constexpr std::string_view kWeight = ".weight";
  const std::string name(tensor.ends_with(kWeight) ? tensor.substr(0, tensor.size() - kWeight.size()) : tensor);
  if (is_listed(module_facts(facts)["not_linear"], name)) return std::nullopt;
  LinearModule module{.name = name, .rows = shape[shape.size() - 2], .columns = shape.back()};
  if (scheme != nullptr) module.form = form_of(*scheme);
  return module;
}

std::vector<Diagnostic> lint_modules(std::span<const LinearModule> modules, const PlanRequest& request,
                                     const EnginePlan& plan, const Facts& facts) {
  return Linter(request, plan, facts).run(modules);
}

std::vector<LinearModule> planned_modules(const Recipe& recipe, std::span<const TensorFacts> tensors,
                                          const Facts& facts) {
  BW_ASSERT(recipe.tensors.size() == tensors.size());
  std::vector<LinearModule> modules;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::optional<Scheme>& scheme = recipe.tensors[i].scheme;
    if (auto module = linear_module(tensors[i].name, tensors[i].shape, scheme ? &*scheme : nullptr, facts))
      modules.push_back(std::move(*module));
  }
  return modules;
}

void add_diagnostics(std::vector<Diagnostic> diagnostics, EnginePlan& plan) {
  for (Diagnostic& diagnostic : diagnostics) {
    if (diagnostic.severity == Severity::error) plan.outcome = "error";
    if (diagnostic.severity == Severity::warning && plan.outcome == "ok") plan.outcome = "warning";
    plan.diagnostics.push_back(std::move(diagnostic));
  }
}

}  // namespace bitwright
