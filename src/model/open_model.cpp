#include "model/open_model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "base/error.hpp"
#include "model/gguf_mapping.hpp"
#include "model/model.hpp"

namespace bitwright {
namespace {

constexpr int64_t kMostHeads = 1 << 16, kMostExperts = 1 << 16;

const Architecture* find_architecture(const GgufFacts& facts) {
  const bool routed = facts.integer("expert_count", 0, kMostExperts, 0) > 0;
  for (const Architecture* row : all_architectures())
    if (row->gguf != nullptr && row->gguf->architecture == facts.architecture() && row->gguf->routed == routed)
      return row;
  return nullptr;
}

/// "blk.3.attn_q.weight" taken apart.
struct GgufName {
  std::string pattern;  ///< "blk.{0}.attn_q"
  int64_t layer = 0;
  std::string_view end;  ///< ".weight"
};

std::optional<GgufName> take_apart(std::string_view name) {
  GgufName out;
  for (const std::string_view end : {".weight", ".bias"})
    if (name.ends_with(end)) out.end = end;
  if (out.end.empty()) return std::nullopt;
  const std::string_view base = name.substr(0, name.size() - out.end.size());
  constexpr std::string_view kBlock = "blk.";
  if (!base.starts_with(kBlock)) {
    out.pattern = base;
    return out;
  }
  const size_t dot = base.find('.', kBlock.size());
  if (dot == std::string_view::npos) return std::nullopt;
  const std::string digits(base.substr(kBlock.size(), dot - kBlock.size()));
  if (digits.empty() || digits.size() > 6 || digits.find_first_not_of("0123456789") != std::string::npos)
    return std::nullopt;
  out.layer = std::stol(digits);
  out.pattern = fmt::format("blk.{{0}}{}", base.substr(dot));
  return out;
}

class GgufTranslation {
 public:
  GgufTranslation(const GgufFacts& facts, const Architecture& row) : facts_(facts), row_(row), mapping_(*row.gguf) {}

  Translation run() {
    Translation out;
    out.config = std::make_shared<const Json>(config());
    for (const ArraySpec* spec : in_file_order(facts_.stored())) add(*spec, out.arrays);
    return out;
  }

  static std::vector<const ArraySpec*> in_file_order(const CheckpointView& stored) {
    std::vector<std::pair<const std::byte*, const ArraySpec*>> placed;
    for (const auto& [name, spec] : stored.arrays) placed.emplace_back(stored.bytes(name).data(), &spec);
    std::stable_sort(placed.begin(), placed.end(),
                     [](const auto& a, const auto& b) { return std::less<>()(a.first, b.first); });
    std::vector<const ArraySpec*> out;
    for (const auto& [begin, spec] : placed) out.push_back(spec);
    return out;
  }

 private:
  Json config() const {
    Json config = {{"architectures", {row_.name}}, {"model_type", row_.model_type}};
    for (const std::span<const GgufKey> keys : {mapping_.keys, mapping_.own_keys})
      for (const GgufKey& key : keys)
        if (const Json* value = facts_.own(key.gguf)) config[key.model] = value_of(key.gguf, *value);
    config["tie_word_embeddings"] = !facts_.has_tensor("output.weight");
    const auto embedding = facts_.stored().arrays.find("token_embd.weight");
    if (embedding != facts_.stored().arrays.end() && !embedding->second.shape.empty())
      config["vocab_size"] = embedding->second.shape[0];
    if (const Json* bos = facts_.find("tokenizer.ggml.bos_token_id"))
      if (bos->is_number_integer()) config["bos_token_id"] = *bos;
    const std::vector<int64_t> ends = end_tokens();
    if (ends.size() == 1) config["eos_token_id"] = ends.front();
    if (ends.size() > 1) config["eos_token_id"] = ends;
    if (mapping_.complete != nullptr) mapping_.complete(facts_, config);
    return config;
  }

  /// Of the text and of a turn, eos first: those that have a key, and those that llama.cpp knows by their text.
  std::vector<int64_t> end_tokens() const {
    static const std::set<std::string_view> kTexts = {
        "<|eot_id|>",         "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
        "<|eom_id|>",         "<EOT>",      "_<EOT>",  "[EOT]",      "[EOS]",    "</s>",          "<|end_of_text|>",
        "<end_of_utterance>", "<eos>",      "<turn|>"};
    std::vector<int64_t> ends;
    const auto add = [&](int64_t id) {
      if (std::ranges::find(ends, id) == ends.end()) ends.push_back(id);
    };
    for (const char* key : {"eos_token_id", "eot_token_id", "eom_token_id"})
      if (const Json* value = facts_.find(fmt::format("tokenizer.ggml.{}", key)))
        if (value->is_number_integer() && *value >= 0) add(value->get<int64_t>());
    const Json* const tokens = facts_.find("tokenizer.ggml.tokens");
    if (tokens == nullptr || !tokens->is_array()) return ends;
    for (size_t id = 0; id < tokens->size(); ++id)
      if ((*tokens)[id].is_string() && kTexts.contains((*tokens)[id].get_ref<const std::string&>()))
        add(static_cast<int64_t>(id));
    return ends;
  }

  /// One number or truth value; a list with one for each layer where all are the same.
  Json value_of(std::string_view key, const Json& value) const {
    if (value.is_array() && !value.empty() && std::ranges::all_of(value, [&](const Json& v) { return v == value[0]; }))
      return value_of(key, value[0]);
    if (!value.is_number() && !value.is_boolean())
      facts_.fail(fmt::format("key '{}' is not one number for all layers", key));
    if (!value.is_number_float()) return value;
    // GGUF's numbers are f32: 1e-05 rather than 9.99999974e-06, which is the same f32
    return std::strtod(fmt::format("{}", value.get<float>()).c_str(), nullptr);
  }

  const GgufTensor* rule_for(const std::string& pattern) const {
    for (const std::span<const GgufTensor> table : {mapping_.tensors, mapping_.shared_tensors})
      if (const auto found = std::ranges::find(table, pattern, &GgufTensor::gguf); found != table.end()) return &*found;
    return nullptr;
  }

  void add(const ArraySpec& spec, std::vector<ArrayView>& out) const {
    if (spec.name.starts_with("rope_")) return;  // factors of positions: in config.json
    const std::optional<GgufName> name = take_apart(spec.name);
    const GgufTensor* const rule = name ? rule_for(name->pattern) : nullptr;
    ArrayView view = {.name = spec.name, .source = spec.name, .shape = spec.shape};
    if (rule == nullptr) return out.push_back(view);  // under its own name; the model will say that it does not know it
    const auto model_name = [&](int64_t expert) {
      return fmt::format(fmt::runtime(rule->model), name->layer, expert) + std::string(name->end);
    };
    if (rule->rows == GgufRows::experts && spec.shape.size() == 3) {
      check_experts(spec);
      view.shape.erase(view.shape.begin());
      for (int64_t i = 0; i < spec.shape[0]; ++i) {
        view.name = model_name(i);
        view.first_row = i * spec.shape[1];
        out.push_back(view);
      }
      return;
    }
    view.name = model_name(0);
    rearrange(rule->rows, spec, view);
    out.push_back(std::move(view));
  }

  void rearrange(GgufRows rows, const ArraySpec& spec, ArrayView& view) const {
    const int64_t heads = facts_.integer("attention.head_count", 1, kMostHeads, 1);
    switch (rows) {
      case GgufRows::same:
      case GgufRows::experts:
        return;
      case GgufRows::pairs_of_heads:
        view.rows = undo_pairs(spec, heads);
        return;
      case GgufRows::pairs_of_kv_heads:
        view.rows = undo_pairs(spec, facts_.integer("attention.head_count_kv", 1, kMostHeads, heads));
        return;
      case GgufRows::parts_of_heads:
        view.rows = undo_parts(spec, heads);
        return;
      case GgufRows::transposed:
        view.transposed = spec.shape.size() == 2;
        if (view.transposed) std::swap(view.shape[0], view.shape[1]);
        return;
      case GgufRows::minus_one:
        if (spec.block != nullptr || !info(spec.dtype).is_float) refuse(spec, "floats");
        view.added = -1;
        return;
    }
  }

  [[noreturn]] void refuse(const ArraySpec& spec, const std::string& needed) const {
    facts_.fail(fmt::format("tensor '{}' has the shape {} and type {}, its metadata asks for {}", printable(spec.name),
                            to_string(spec.shape), spec.block != nullptr ? spec.block->name : info(spec.dtype).name,
                            needed));
  }

  /// Rows that can be taken one by one, a multiple of `parts`.
  int64_t rows_of(const ArraySpec& spec, int64_t parts) const {
    const bool whole = spec.shape.size() == 2 || (spec.shape.size() == 1 && spec.block == nullptr);
    if (!whole || spec.shape[0] % parts != 0 || element_count(spec.shape) == 0)
      refuse(spec, fmt::format("a multiple of {} rows", parts));
    return spec.shape[0];
  }

  std::vector<int64_t> undo_pairs(const ArraySpec& spec, int64_t heads) const {
    return order_of_pairs(rows_of(spec, 2 * heads), heads);
  }

  std::vector<int64_t> undo_parts(const ArraySpec& spec, int64_t heads) const {
    return order_of_parts(rows_of(spec, 3 * heads), heads);
  }

  void check_experts(const ArraySpec& spec) const {
    const int64_t experts = facts_.integer("expert_count", 1, kMostExperts, 1);
    if (spec.shape[0] != experts || element_count(spec.shape) == 0) refuse(spec, fmt::format("{} experts", experts));
  }

  const GgufFacts& facts_;
  const Architecture& row_;
  const GgufMapping& mapping_;
};

/// Of an architecture that is not known: everything as it is.
Translation untranslated(const GgufFacts& facts) {
  Translation out;
  out.config = std::make_shared<const Json>(Json{{"architectures", {facts.architecture()}}});
  for (const ArraySpec* spec : GgufTranslation::in_file_order(facts.stored()))
    out.arrays.push_back({.name = spec->name, .source = spec->name, .shape = spec->shape});
  return out;
}

std::optional<Translation> translate(const CheckpointView& stored) {
  if (stored.facts == nullptr) return std::nullopt;
  const GgufFacts facts(stored);
  const Architecture* const row = find_architecture(facts);
  return row == nullptr ? untranslated(facts) : GgufTranslation(facts, *row).run();
}

}  // namespace

Checkpoint open_model(const std::filesystem::path& path, Checkpoint::Foreign foreign,
                      Checkpoint::Unfinished unfinished) {
  if (LoraAdapter::is_at(path))
    throw Error({.code = "is-adapter",
                 .what = "cannot read model",
                 .where = path.string(),
                 .why = "it is an adapter, which inspect, eval and generate take",
                 .fix = "give its base, or a model that it was merged into (lora.merge of `bitwright train`)"});
  return Checkpoint(path, translate, unfinished, foreign);
}

RunnableModel::RunnableModel(const std::filesystem::path& path)
    : adapter(LoraAdapter::is_at(path) ? std::optional<LoraAdapter>(path) : std::nullopt),
      checkpoint(open_model(adapter ? adapter->base() : path)) {}

std::map<std::string, std::string> names_in_model(const std::filesystem::path& path) {
  std::map<std::string, std::string> names;
  const Checkpoint opened(path, [&](const CheckpointView& stored) {
    for (const auto& [name, spec] : stored.arrays) names[name] = name;
    std::optional<Translation> out = translate(stored);
    if (out)
      for (auto view = out->arrays.rbegin(); view != out->arrays.rend(); ++view) names[view->source] = view->name;
    return out;
  });
  return names;
}

}  // namespace bitwright
