#include "engine/container_tables.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "base/error.hpp"
#include "container/container.hpp"
#include "engine/describe.hpp"
#include "engine/detect.hpp"
#include "recipe/config.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {
namespace {

// ---- asking ----

/// A weight of a model of some type.
struct Weight {
  std::string_view model_type, name;
  Shape shape;
};
const Weight& matrix() {
  static const Weight weight = {"llama", "model.layers.0.mlp.up_proj.weight", {1024, 1024}};
  return weight;
}
const Weight& experts() {
  static const Weight weight = {"gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", {8, 1024, 1024}};
  return weight;
}

/// Such a one as the container takes.
const Weight& usual_weight(const Container& container) {
  const bool taken = container.takes == nullptr || container.takes(matrix().name, matrix().shape);
  return taken ? matrix() : experts();
}

/// What becomes of it: a tensor and the documents beside it, or why there is none.
struct Answer {
  std::optional<StoredTensor> tensor{};
  ModelDocuments documents{};
  std::string refusal{};
};

/// Options as a user types them: "--method int4 --group-size 32".
QuantizationRequest request_of(std::string_view options) {
  OrderedJson config = OrderedJson::object();
  const auto word = [&] {
    const size_t end = std::min(options.find(' '), options.size());
    const std::string_view first = options.substr(0, end);
    options.remove_prefix(std::min(end + 1, options.size()));
    return first;
  };
  while (!options.empty()) {
    const std::string option(word());
    const auto keys = config_keys();
    const auto key = std::ranges::find(keys, option, option_of);
    BW_ASSERT(key != keys.end());
    set_config_value(config, key->path, parse_config_value(word(), option));
  }
  check_config(config, "");
  return read_request(config);
}

ModelDocuments documents_of(const Container& container, const StoredTensor& tensor, const Weight& weight) {
  const std::vector<std::string> kept = {"lm_head"};
  const OrderedJson record = OrderedJson::object();
  OrderedJson config = {{"model_type", weight.model_type}};
  std::map<std::string, OrderedJson> files;
  container.write_metadata({std::span(&tensor, 1), kept, record}, {config, files});
  ModelDocuments documents = {{"config.json", Json::parse(config.dump())}};
  for (const auto& [name, file] : files) documents[name] = Json::parse(file.dump());
  return documents;
}

/// As `quantize` goes about it.
Answer ask(const Container& container, std::string_view options, const Weight& weight) {
  constexpr DType kDType = DType::bf16;
  try {
    const TensorFacts facts = {.name = std::string(weight.name), .shape = weight.shape, .dtype = kDType};
    const TensorPlan plan = resolve(request_of(options), std::span(&facts, 1), &container).tensors.front();
    if (!plan.scheme) return {.refusal = plan.reason};
    StoredTensor tensor = {.name = facts.name,
                           .shape = weight.shape,
                           .scheme = *plan.scheme,
                           .value_dtype = kDType,
                           .linear = plan.linear};
    Fit fit = container.fit(tensor.scheme, tensor.shape);
    if (fit.verdict != Verdict::impossible && container.fit_model != nullptr)
      fit = container.fit_model(std::span(&tensor, 1));
    if (fit.verdict == Verdict::impossible) {
      const std::string named = facts.name + ": ";
      return {.refusal = fit.reason.starts_with(named) ? fit.reason.substr(named.size()) : fit.reason};
    }
    ModelDocuments documents = documents_of(container, tensor, weight);
    return {.tensor = std::move(tensor), .documents = std::move(documents)};
  } catch (const Error& error) {
    const bool kept = error.code() == "nothing-to-quantize";
    return {.refusal = kept ? "kept in floats, the owner does not store such weights so" : error.report().why};
  }
}

bool same(const StoredTensor& a, const StoredTensor& b) {
  const auto inputs = [](const StoredTensor& t) { return t.linear.input ? &t.linear.input->scheme : nullptr; };
  const Scheme *const of_a = inputs(a), *const of_b = inputs(b);
  return a.scheme == b.scheme && (of_a == nullptr) == (of_b == nullptr) && (of_a == nullptr || *of_a == *of_b);
}

// ---- what is written ----

/// Choices that differ by bits, zero points and types of scales alone: a line of the table.
struct Line {
  std::vector<const SchemeChoice*> choices;
  std::string options;  ///< the fewest by which the first is asked for
  Answer first;
};

std::string_view truth(bool value) { return value ? "true" : "false"; }

std::string joined(std::string_view a, std::string_view b) {
  return fmt::format("{}{}{}", a, a.empty() || b.empty() ? "" : " ", b);
}

/// The fewest options that give what naming everything gives.
std::string fewest_options(const Container& container, const SchemeChoice& c, const Weight& weight, Answer& answer) {
  if (!c.name.empty()) {
    std::string options = fmt::format("--gguf-type {}", c.name);
    answer = ask(container, options, weight);
    return options;
  }
  const std::string kind = fmt::format("--quant-type {}", c.quant_type), bits = fmt::format("--bits {}", c.bits);
  const std::array<std::string, 3> rest = {fmt::format("--granularity {}", c.granularity),
                                           fmt::format("--symmetric {}", truth(c.symmetric)),
                                           fmt::format("--weight-only {}", truth(c.weight_only))};
  answer = ask(container, fmt::format("{} {} {}", kind, bits, fmt::join(rest, " ")), weight);
  std::vector<std::string> kinds;
  const auto keys = config_keys();
  for (const std::string& method : std::ranges::find(keys, "quantization.method", &ConfigKey::path)->values)
    if (method != "none" && method != "auto") kinds.push_back("--method " + method);
  for (const std::string& each : {bits, kind, joined(kind, bits), std::string()}) kinds.push_back(each);
  std::vector<std::string> candidates;
  for (const std::string& first : kinds)
    for (size_t mask = 0; mask < size_t{1} << rest.size(); ++mask) {
      std::string options = first;
      for (size_t i = 0; i < rest.size(); ++i)
        if ((mask >> i & 1) != 0) options = joined(options, rest.at(i));
      candidates.push_back(std::move(options));
    }
  std::ranges::stable_sort(candidates, {}, [](const std::string& o) { return std::ranges::count(o, ' '); });
  for (const std::string& options : candidates) {
    Answer found = ask(container, options, weight);
    const bool alike = answer.tensor ? found.tensor && same(*found.tensor, *answer.tensor)
                                     : !found.tensor && found.refusal == answer.refusal;
    if (alike) return options;
  }
  return candidates.back();
}

std::vector<Line> lines_of(const Container& container) {
  std::vector<Line> lines;
  const auto alike = [](const SchemeChoice& a, const SchemeChoice& b) {
    return a.name == b.name && a.quant_type == b.quant_type && a.granularity == b.granularity &&
           a.group_size == b.group_size && a.nested_scales == b.nested_scales && a.weight_only == b.weight_only;
  };
  for (const SchemeChoice& choice : container.choices) {
    const auto found = std::ranges::find_if(lines, [&](const Line& l) { return alike(*l.choices.front(), choice); });
    if (found != lines.end())
      found->choices.push_back(&choice);
    else
      lines.push_back({.choices = {&choice}, .options = {}, .first = {}});
  }
  for (Line& line : lines)
    line.options = fewest_options(container, *line.choices.front(), usual_weight(container), line.first);
  return lines;
}

std::string code(std::string_view text) { return text.empty() ? "`--format` alone" : fmt::format("`{}`", text); }

/// The values of a member of the line's choices, each once.
template <class Value>
std::vector<std::string> values_of(const Line& line, const Value& value_of) {
  std::vector<std::string> values;
  for (const SchemeChoice* choice : line.choices)
    if (std::string value = value_of(*choice); std::ranges::find(values, value) == values.end())
      values.push_back(std::move(value));
  return values;
}

/// What the line's other choices are asked for by.
std::string variants(const Line& line) {
  const std::array<std::pair<std::string_view, std::vector<std::string>>, 3> options = {
      {{"--bits", values_of(line, [](const SchemeChoice& c) { return std::to_string(c.bits); })},
       {"--symmetric", values_of(line, [](const SchemeChoice& c) { return std::string(truth(c.symmetric)); })},
       {"--scale-dtype", values_of(line, [](const SchemeChoice& c) { return std::string(c.scale_dtype); })}}};
  std::string text;
  size_t combinations = 1;
  for (const auto& [option, values] : options) {
    combinations *= values.size();
    if (values.size() > 1)
      text += fmt::format("{}`{}` {}", text.empty() ? "" : "; ", option, fmt::join(std::span(values).subspan(1), ", "));
  }
  BW_ASSERT(combinations == line.choices.size());  // each value goes with each other
  return text;
}

std::string scheme_text(const StoredTensor& t) {
  std::string text = describe(t.scheme);
  if (t.linear.input) text += fmt::format("; inputs {}", describe(t.linear.input->scheme));
  return text;
}

double bits_a_weight(const Container& container, const StoredTensor& t) {
  uint64_t bytes = 0;
  for (const ArraySpec& array : container.layout(t)) bytes += array.bytes();
  return static_cast<double>(bytes) * 8 / static_cast<double>(element_count(t.shape));
}

std::string written_table(const Container& container, std::span<const Line> lines) {
  std::string table = "| asked for by | written | bits a weight | with |\n|---|---|---|---|\n";
  for (const Line& line : lines)
    if (line.first.tensor)
      table += fmt::format("| {} | {} | {:.4g} | {} |\n", code(line.options), scheme_text(*line.first.tensor),
                           bits_a_weight(container, *line.first.tensor), variants(line));
  return table + "\n";
}

/// Of many arrays those of the numbers, not those that say how it was done.
std::string arrays_text(const Container& container, const StoredTensor& t) {
  constexpr size_t kMost = 6;
  constexpr uint64_t kSmall = 100;
  const std::string prefix = t.name.substr(0, t.name.rfind("mlp.") + 4);
  const std::vector<ArraySpec> arrays = container.layout(t);
  std::string text;
  size_t left_out = 0;
  for (const ArraySpec& array : arrays) {
    const bool shown = arrays.size() <= kMost || array.bytes() > kSmall;
    left_out += shown ? 0 : 1;
    if (!shown) continue;
    text += fmt::format("{}`{}` {} {}", text.empty() ? "" : ", ", array.name.substr(prefix.size()),
                        info(array.dtype).name, to_string(array.shape));
  }
  if (left_out != 0) text += fmt::format(" and {} small ones that say how it was done", left_out);
  return fmt::format("`{}` {} becomes {}.", t.name.substr(prefix.size()), to_string(t.shape), text);
}

// ---- engines ----

std::string engines_text(const Facts& facts, std::string_view method, const Json& model) {
  std::string text;
  for (const Json* engine : facts.all("engines")) {
    const auto name = (*engine)["name"].get<std::string>();
    const Takes takes = takes_checkpoint(name, method, facts, model);
    if (!takes.taken) continue;
    text += (text.empty() ? "" : ", ") + name;
    if (takes.min_sm != 0) text += fmt::format(" ({}+)", capability_text(takes.min_sm));
  }
  return text;
}

std::string engines_text(const Facts& facts, const ModelDocuments& documents) {
  const DetectedQuantization found = detect_model_quantization(documents);
  Json model = model_facts(documents.at("config.json"));
  model.update(found.facts);
  return engines_text(facts, found.method, model);
}

/// The members of each group under what they have in common, both in the order they come in.
using Groups = std::vector<std::pair<std::string, std::vector<std::string>>>;
void add_to_group(Groups& groups, const std::string& common, std::string member) {
  auto found = std::ranges::find(groups, common, &Groups::value_type::first);
  if (found == groups.end()) found = groups.insert(groups.end(), {common, {}});
  found->second.push_back(std::move(member));
}

/// The options by which a line's choice is asked for that differs from its first in one thing; empty: in more.
std::string one_option(const Line& line, const SchemeChoice& choice) {
  const SchemeChoice& first = *line.choices.front();
  std::vector<std::string> options;
  if (choice.bits != first.bits) options.push_back(fmt::format("--bits {}", choice.bits));
  if (choice.symmetric != first.symmetric) options.push_back(fmt::format("--symmetric {}", truth(choice.symmetric)));
  if (choice.scale_dtype != first.scale_dtype) options.push_back(fmt::format("--scale-dtype {}", choice.scale_dtype));
  return options.size() == 1 ? joined(line.options, options.front()) : "";
}

/// Who loads the first of each line, and the others of it where that differs.
std::string engines_of_lines(const Container& container, std::span<const Line> lines, const Facts& facts) {
  Groups groups;
  for (const Line& line : lines) {
    if (!line.first.tensor) continue;
    const std::string engines = engines_text(facts, line.first.documents);
    add_to_group(groups, engines, code(line.options));
    for (const SchemeChoice* choice : line.choices) {
      const std::string options = one_option(line, *choice);
      const Answer answer = options.empty() ? Answer() : ask(container, options, usual_weight(container));
      if (!answer.tensor) continue;
      if (const std::string others = engines_text(facts, answer.documents); others != engines)
        add_to_group(groups, others, code(options));
    }
  }
  if (groups.size() == 1) return fmt::format("Engines: {}.\n\n", groups.front().first);
  std::string text = "Engines:\n\n";
  for (const auto& [engines, options] : groups) text += fmt::format("- {}: {}\n", fmt::join(options, ", "), engines);
  return text + "\n";
}

// ---- what is refused ----

/// What is tried on a usual weight; where the options name no kind of code, on the container's own.
constexpr auto kRequests = std::to_array<std::string_view>({"--bits 1",
                                                            "--bits 2",
                                                            "--bits 3",
                                                            "--bits 4",
                                                            "--bits 5",
                                                            "--bits 6",
                                                            "--bits 7",
                                                            "--bits 8",
                                                            "--bits 4 --symmetric true",
                                                            "--bits 4 --symmetric false",
                                                            "--bits 8 --symmetric false",
                                                            "--method nf4",
                                                            "--method fp4",
                                                            "--method fp8",
                                                            "--quant-type e5m2",
                                                            "--method mxfp4",
                                                            "--method mxfp8",
                                                            "--method nvfp4",
                                                            "--granularity tensor",
                                                            "--granularity channel",
                                                            "--granularity block",
                                                            "--granularity flat",
                                                            "--method fp8 --granularity tensor",
                                                            "--method fp8 --granularity block",
                                                            "--group-size 16",
                                                            "--group-size 32",
                                                            "--group-size 64",
                                                            "--group-size 128",
                                                            "--group-size 256",
                                                            "--group-size 48",
                                                            "--scale-dtype float32",
                                                            "--scale-dtype float16",
                                                            "--scale-dtype bfloat16",
                                                            "--nested-scales true",
                                                            "--weight-only false"});

/// What is tried on weights, with the options of the first line.
struct Trial {
  std::string_view what;
  Weight weight;
};
std::vector<Trial> trials() {
  constexpr std::string_view kExperts = "model.layers.0.mlp.experts.gate_up_proj", kMatrix = "a matrix";
  return {{kMatrix, matrix()},
          {"1000 outputs", {"llama", matrix().name, {1000, 1024}}},
          {"1000 inputs", {"llama", matrix().name, {1024, 1000}}},
          {"1001 inputs", {"llama", matrix().name, {1024, 1001}}},
          {"experts in one tensor", experts()},
          {"such experts with 1000 inputs", {"gpt_oss", kExperts, {8, 1000, 1024}}},
          {"such experts of another model than gpt-oss", {"llama4", kExperts, {8, 1024, 1024}}},
          {"GPT-2's matrices", {"gpt2", "transformer.h.0.attn.c_attn.weight", {1024, 3072}}},
          {"experts of Qwen3-MoE", {"qwen3_moe", "model.layers.0.mlp.experts.0.up_proj.weight", {768, 1024}}}};
}

/// A container without choices of its own is asked for integers of 4 bits.
std::string_view base_of(const Container& container) { return container.choices.empty() ? "--method int4" : ""; }

bool names_kind(std::string_view options) {
  return options.starts_with("--method") || options.starts_with("--quant-type") || options.starts_with("--bits");
}

/// A reason up to ", not 48": what was asked for stands before it, and the rest is often the same.
std::string without_asked(const std::string& reason) { return reason.substr(0, reason.rfind(", not ")); }

std::string as_list(const Groups& groups, std::string_view title) {
  std::string text = groups.empty() ? "" : fmt::format("{}\n\n", title);
  for (const auto& [reason, members] : groups) text += fmt::format("- {}: {}\n", fmt::join(members, ", "), reason);
  return text + (groups.empty() ? "" : "\n");
}

/// All that a line of the table says, one by one.
std::vector<StoredTensor> said_in(const Container& container, std::span<const Line> lines) {
  std::vector<StoredTensor> said;
  for (const Line& line : lines)
    for (const SchemeChoice* c : line.choices) {
      const bool named = c->scale_dtype == "float16" || c->scale_dtype == "bfloat16" || c->scale_dtype == "float32";
      const std::string scales = named ? fmt::format(" --scale-dtype {}", c->scale_dtype) : "";
      const std::string options =
          fmt::format("--quant-type {} --bits {} --symmetric {} --granularity {} --weight-only {}", c->quant_type,
                      c->bits, truth(c->symmetric), c->granularity, truth(c->weight_only));
      Answer answer = ask(container, options + (c->nested_scales ? "" : scales), usual_weight(container));
      if (answer.tensor) said.push_back(std::move(*answer.tensor));
    }
  return said;
}

std::string tried(const Container& container, std::span<const Line> lines) {
  Groups refused, taken;
  std::vector<StoredTensor> known = said_in(container, lines);
  const Weight& usual = usual_weight(container);
  for (const std::string_view asked : kRequests) {
    const std::string options = names_kind(asked) ? std::string(asked) : joined(base_of(container), asked);
    Answer answer = ask(container, options, usual);
    if (!answer.tensor) {
      add_to_group(refused, without_asked(answer.refusal), code(options));
    } else if (std::ranges::none_of(known, [&](const StoredTensor& t) { return same(t, *answer.tensor); })) {
      add_to_group(taken, scheme_text(*answer.tensor), code(options));
      known.push_back(std::move(*answer.tensor));
    }
  }
  for (const Trial& trial : trials())
    if (const Answer answer = ask(container, base_of(container), trial.weight); !answer.tensor)
      add_to_group(refused, without_asked(answer.refusal), std::string(trial.what));
  return as_list(taken, lines.empty() ? "What options give:" : "Further options, and what they give:") +
         as_list(refused, "Refused, before anything is written:");
}

/// The container's JSON files beside config.json.
std::string files_text(const Container& container, const ModelDocuments& written) {
  std::string text;
  for (const std::string_view file : container.files)
    text += fmt::format("{}`{}`{}", text.empty() ? "" : ", ", file, written.contains(file) ? "" : " (read only)");
  return text.empty() ? "" : fmt::format("Beside config.json: {}.\n\n", text);
}

std::string section(const Container& container, const Facts& facts) {
  std::string text =
      fmt::format("## {}\n\nRead: {}. After: {}.\n\n", container.name, container.summary, container.source);
  if (!container.only_read.empty()) text += fmt::format("Read, not written: {}.\n\n", container.only_read);
  if (container.write_metadata == nullptr)
    return text + fmt::format("Engines: {}.\n\n", engines_text(facts, method_of(container), Json::object()));
  const std::vector<Line> lines = lines_of(container);
  if (!lines.empty()) text += written_table(container, lines);
  const Answer first = ask(container, base_of(container), usual_weight(container));
  text += arrays_text(container, *first.tensor) + "\n\n";
  text += files_text(container, first.documents);
  text += fmt::format("Rounding: {}.\n\n", container.rounding);
  text += lines.empty() ? fmt::format("Engines: {}.\n\n", engines_text(facts, first.documents))
                        : engines_of_lines(container, lines, facts);
  return text + tried(container, lines);
}

}  // namespace

std::string containers_table(const Facts& facts) {
  std::string table =
      "| container | read | `--format` alone writes | read, not written | engines |\n|---|---|---|---|---|\n";
  for (const Container* c : all_containers()) {
    const bool written = c->write_metadata != nullptr;
    const std::string first =
        c->choices.empty() ? "what `--method` says" : scheme_text(*ask(*c, "", usual_weight(*c)).tensor);
    table += fmt::format("| [{0}](#{0}) | {1} | {2} | {3} | {4} |\n", c->name, c->summary, written ? first : "nothing",
                         written ? c->only_read : "all", engines_text(facts, method_of(*c), Json::object()));
  }
  return table;
}

std::string containers_sections(const Facts& facts) {
  std::string text;
  for (const Container* container : all_containers()) text += section(*container, facts);
  text.pop_back();  // of the empty line after the last
  return text;
}

}  // namespace bitwright
