#include "model/gguf_export.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/utf8.hpp"
#include "model/config_reader.hpp"
#include "model/gguf_mapping.hpp"
#include "model/model.hpp"
#include "model/open_model.hpp"
#include "model/rope.hpp"

namespace bitwright {
namespace {

constexpr size_t kGemma3Pattern = 6;
constexpr std::array<std::string_view, 2> kEnds = {".weight", ".bias"};

/// "layers.{0}.mlp.experts.{1}.w1" against "layers.3.mlp.experts.7.w1": the numbers.
std::optional<std::array<int64_t, 2>> match(std::string_view pattern, std::string_view name) {
  std::array<int64_t, 2> numbers{};
  while (!pattern.empty()) {
    if (pattern.starts_with("{0}") || pattern.starts_with("{1}")) {
      const size_t digits = std::min(name.find_first_not_of("0123456789"), name.size());
      if (digits == 0 || digits > 6) return std::nullopt;
      numbers.at(static_cast<size_t>(pattern[1] - '0')) = std::stol(std::string(name.substr(0, digits)));
      pattern.remove_prefix(3);
      name.remove_prefix(digits);
    } else {
      if (name.empty() || name.front() != pattern.front()) return std::nullopt;
      pattern.remove_prefix(1);
      name.remove_prefix(1);
    }
  }
  return name.empty() ? std::optional(numbers) : std::nullopt;
}

std::vector<int64_t> inverse(const std::vector<int64_t>& order) {
  std::vector<int64_t> out(order.size());
  for (size_t r = 0; r < order.size(); ++r) out[static_cast<size_t>(order[r])] = static_cast<int64_t>(r);
  return out;
}

class Exporter {
 public:
  explicit Exporter(const Checkpoint& model)
      : model_(model), json_(model.config().contains("text_config") ? model.config()["text_config"] : model.config()) {
    const Architecture* const row = find_architecture(model.config());
    if (row == nullptr || row->gguf == nullptr)
      fail(fmt::format("no mapping is known for the architecture {}",
                       printable(model.config().value("architectures", Json()).dump())));
    mapping_ = row->gguf;
    config_ = row->configure(model.config(), model.path().string());
    out_.architecture = mapping_->architecture;
    find_prefix();
  }

  GgufModel run() {
    if (model_.facts() != nullptr) fail("it is a GGUF file: only directories are read for this yet");
    check_computable();
    out_.metadata.add("general.architecture", out_.architecture);
    add_sizes();
    add_rope();
    add_tensors();
    return std::move(out_);
  }

  std::multimap<MatrixName, GgufMatrix> matrices() {
    add_tensors();
    std::multimap<MatrixName, GgufMatrix> found;
    for (const ArrayView& view : out_.arrays) {
      if (view.shape.size() < 2) continue;
      const int64_t count = view.shape.size() == 3 ? view.shape[0] : 1;
      const bool one_by_one = model_.find(view.source)->shape.size() == 2;  // each in a tensor of its own
      for (int64_t i = 0; i < count; ++i) {
        const std::string& tensor = one_by_one && i > 0 ? view.stacked[static_cast<size_t>(i) - 1] : view.source;
        found.emplace(MatrixName{tensor, one_by_one ? -1 : i}, GgufMatrix{view.name, i, count});
      }
    }
    return found;
  }

 private:
  void add_tensors() {
    for (const TensorEntry& entry : model_.tensors()) add(entry);
    for (auto& [key, view] : stacks_) {
      if (view.source.empty() || std::ranges::any_of(view.stacked, &std::string::empty))
        fail(fmt::format("'{}' lacks some of the {} experts", key, config_.experts));
      out_.arrays.push_back(std::move(view));
    }
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw Error({.code = "no-gguf",
                 .what = "cannot write the model as GGUF",
                 .where = model_.path().string(),
                 .why = why,
                 .fix = "choose another --format"});
  }

  static std::string_view tail(std::string_view pattern) { return pattern.substr(pattern.find('.') + 1); }

  template <class Use>
  void for_each_rule(const Use& use) const {
    for (const std::span<const GgufTensor> table : {mapping_->tensors, mapping_->shared_tensors})
      for (const GgufTensor& rule : table) use(rule);
  }

  /// What stands before "embed_tokens.weight" in this checkpoint: "model.", "transformer.", "", "language_model.model."
  void find_prefix() {
    std::string end;
    for_each_rule([&](const GgufTensor& rule) {
      if (rule.gguf == "token_embd") end = fmt::format("{}.weight", tail(rule.model));
    });
    for (const TensorEntry& entry : model_.tensors())
      if (entry.name == end || entry.name.ends_with("." + end)) {
        prefix_ = entry.name.substr(0, entry.name.size() - end.size());
        return;
      }
    fail(fmt::format("there is no tensor '{}'", end));
  }

  /// What llama.cpp has no key for is refused where the model could not run at all, else told.
  void check_computable() {
    const ModelConfig& c = config_;
    const bool tanh_for_erf = c.activation == Activation::gelu && mapping_->activation == Activation::gelu_tanh;
    if (c.activation != mapping_->activation && !tanh_for_erf) fail("llama.cpp has another activation for it");
    if (tanh_for_erf) out_.differences.emplace_back("gelu is computed by its tanh approximation");
    const auto routed = std::ranges::count(c.kinds, true, &LayerKind::experts);
    if (routed != 0 && routed != c.layers) fail("only some of its layers have experts");
    int64_t windows = 0;
    for (const LayerKind& kind : c.kinds) windows += kind.window != 0 && kind.window < c.context ? 1 : 0;
    const bool gemma3 = out_.architecture == "gemma3";
    if (gemma3 && windows > 0) find_pattern();
    if (out_.architecture == "gemma2" && (c.attention_cap == 0 || c.logit_cap == 0))
      out_.differences.emplace_back("attention scores are capped at 50, logits at 30");
    if (!mapping_->windows && windows > 0)
      out_.differences.emplace_back("the sliding window is ignored: texts longer than it are computed otherwise");
    const auto head = static_cast<float>(1 / std::sqrt(static_cast<double>(c.head_size)));
    const auto hidden = static_cast<float>(1 / std::sqrt(static_cast<double>(c.hidden) / static_cast<double>(c.heads)));
    const bool known = std::abs(c.attention_scale - head) < 1e-6f * head ||
                       std::abs(c.attention_scale - hidden) < 1e-6f * hidden || c.attention_scale == 0;
    if (!known) out_.differences.emplace_back("attention is scaled by the size of a head");
  }

  /// One layer in so many sees all positions.
  void find_pattern() {
    const std::vector<LayerKind>& kinds = config_.kinds;
    const auto whole = std::ranges::find(kinds, 0, &LayerKind::window);
    pattern_ = whole == kinds.end() ? kinds.size() + 1 : static_cast<size_t>(whole - kinds.begin()) + 1;
    for (size_t i = 0; i < kinds.size(); ++i)
      if ((kinds[i].window != 0) != ((i + 1) % pattern_ != 0))
        return out_.differences.emplace_back("every sixth layer sees all positions, the others a window"),
               pattern_ = kGemma3Pattern, void();
  }

  // ---- metadata

  void add_integer(std::string_view key, int64_t value) {
    if (value < 0 || value > std::numeric_limits<uint32_t>::max()) fail(fmt::format("{} is {}", key, value));
    out_.metadata.add(fmt::format("{}.{}", out_.architecture, key), static_cast<uint32_t>(value));
  }
  void add_number(std::string_view key, double value) {
    out_.metadata.add(fmt::format("{}.{}", out_.architecture, key), static_cast<float>(value));
  }
  bool has_key(std::string_view key) const {
    const auto in = [&](std::span<const GgufKey> keys) {
      return std::ranges::find(keys, key, &GgufKey::gguf) != keys.end();
    };
    return in(mapping_->keys) || in(mapping_->own_keys);
  }

  void add_sizes() {
    const ModelConfig& c = config_;
    add_integer("vocab_size", c.vocabulary);
    add_integer("context_length", c.context);
    add_integer("embedding_length", c.hidden);
    add_integer("block_count", c.layers);
    add_integer("feed_forward_length", c.feed_forward);
    add_integer("attention.head_count", c.heads);
    add_integer("attention.head_count_kv", c.kv_heads);
    if (c.head_size * c.heads != c.hidden || json_.contains("head_dim")) {
      add_integer("attention.key_length", c.head_size);
      add_integer("attention.value_length", c.head_size);
    }
    add_number(c.norm == NormKind::rms ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon",
               c.norm_epsilon);
    if (has_key("use_parallel_residual"))
      out_.metadata.add(fmt::format("{}.use_parallel_residual", out_.architecture), c.parallel);
    if (c.experts > 0) {
      add_integer("expert_count", c.experts);
      add_integer("expert_used_count", c.experts_used);
      if (has_key("expert_feed_forward_length")) add_integer("expert_feed_forward_length", c.expert_feed_forward);
      if (!c.normalise_experts) fail("the weights of the experts used do not sum to 1, llama.cpp's always do");
    }
    if (c.attention_cap > 0) add_number("attn_logit_softcapping", c.attention_cap);
    if (c.logit_cap > 0) add_number("final_logit_softcapping", c.logit_cap);
    int64_t window = 0;
    for (const LayerKind& kind : c.kinds) window = std::max(window, kind.window);
    if (mapping_->windows || mapping_->window_key) add_integer("attention.sliding_window", window);
    if (pattern_ != 0 && pattern_ != kGemma3Pattern)
      add_integer("attention.sliding_window_pattern", static_cast<int64_t>(pattern_));
  }

  /// Each frequency is base^(-i / n), but for the scaling, which leaves the ratio of the first two alone.
  static double base_of(const Rope& rope) {
    const size_t n = rope.frequencies.size();
    if (n < 2) return 10000;
    const double base = std::pow(rope.frequencies[1] / rope.frequencies[0], -static_cast<double>(n));
    const double whole = std::round(base);
    return std::abs(base - whole) < 1e-6 * whole ? whole : base;
  }

  double theta() const {
    const Json newer = json_.value("rope_parameters", Json::object());
    const Json of_kind = newer.is_object() ? newer.value("full_attention", newer) : Json::object();
    for (const Json& from : {json_, of_kind})
      for (const char* key : {"rope_theta", "rotary_emb_base"})
        if (from.contains(key) && from[key].is_number()) return from[key];
    return base_of(config_.ropes.front());
  }

  void add_rope() {
    if (config_.ropes.empty()) return;
    const Rope& rope = config_.ropes.front();
    const double base = theta();
    add_number("rope.freq_base", base);
    add_integer("rope.dimension_count", static_cast<int64_t>(2 * rope.frequencies.size()));
    if (config_.ropes.size() > 1) add_number("rope.freq_base_swa", base_of(config_.ropes[1]));
    Json scaling = json_.value("rope_scaling", Json());
    if (!scaling.is_object()) scaling = json_.value("rope_parameters", Json());
    if (!scaling.is_object()) return;
    if (scaling.contains("full_attention")) scaling = scaling["full_attention"];
    std::string type = "default";
    for (const char* key : {"rope_type", "type"})
      if (const auto found = scaling.find(key); found != scaling.end() && found->is_string()) {
        type = found->get<std::string>();
        break;
      }
    if (type == "default") return;
    if (type == "llama3" && mapping_->rope_factors)
      return add_factors("rope_freqs.weight", factors(rope.frequencies, base));
    if ((type == "longrope" || type == "su") && mapping_->window_key) return add_long_rope(scaling);
    if (type == "yarn") return add_yarn(scaling, base);
    if (type != "linear") fail(fmt::format("rope_scaling is '{}'", printable(type)));
    out_.metadata.add(fmt::format("{}.rope.scaling.type", out_.architecture), type);
    add_number("rope.scaling.factor", scaling.at("factor").get<double>());
  }

  /// llama.cpp takes the paper's beta_fast and beta_slow whatever a file says. Frequencies found with others are
  /// written one by one, where it reads such.
  void add_yarn(const Json& scaling, double base) {
    const Rope& rope = config_.ropes.front();
    const double factor = scaling.at("factor").get<double>();
    const Json original = json_.value("original_max_position_embeddings",
                                      scaling.value("original_max_position_embeddings", Json(config_.context)));
    const Json usual = {
        {"rope_theta", base},
        {"rope_scaling", {{"rope_type", "yarn"}, {"factor", factor}, {"original_max_position_embeddings", original}}}};
    const auto size = static_cast<int64_t>(2 * rope.frequencies.size());
    const Rope theirs = read_rope(ConfigReader(usual, ""), size, config_.context, {});
    bool same = true;
    for (size_t i = 0; i < rope.frequencies.size(); ++i)
      same = same && std::abs(rope.frequencies[i] - theirs.frequencies[i]) <= 1e-6 * rope.frequencies[i];
    if (!same && mapping_->rope_factors) {
      add_number("rope.scaling.attn_factor", rope.magnitude);
      return add_factors("rope_freqs.weight", factors(rope.frequencies, base));
    }
    if (!same) out_.differences.emplace_back("YaRN scales by the beta_fast 32 and beta_slow 1 of the paper");
    out_.metadata.add(fmt::format("{}.rope.scaling.type", out_.architecture), "yarn");
    add_number("rope.scaling.factor", factor);
    add_integer("rope.scaling.original_context_length", original.get<int64_t>());
    const double magnitude = rope.magnitude / gguf_yarn_magnitude(factor);
    if (std::abs(magnitude - 1) > 1e-7) add_number("rope.scaling.attn_factor", magnitude);
  }

  /// llama.cpp divides the frequencies by these.
  static std::vector<float> factors(const std::vector<double>& frequencies, double base) {
    std::vector<float> out;
    const auto n = static_cast<double>(frequencies.size());
    for (size_t i = 0; i < frequencies.size(); ++i)
      out.push_back(static_cast<float>(std::pow(base, -static_cast<double>(i) / n) / frequencies[i]));
    return out;
  }

  void add_factors(const std::string& name, std::vector<float> values) {
    const auto count = static_cast<int64_t>(values.size());
    out_.arrays.push_back({.name = name, .source = "", .shape = {count}, .made = std::move(values)});
    out_.names[name] = name;
  }

  void add_long_rope(const Json& scaling) {
    const Json original = json_.value("original_max_position_embeddings",
                                      scaling.value("original_max_position_embeddings", Json(config_.context)));
    add_integer("rope.scaling.original_context_length", original.get<int64_t>());
    add_number("rope.scaling.attn_factor", config_.ropes.front().magnitude);
    add_factors("rope_factors_long.weight", scaling.at("long_factor").get<std::vector<float>>());
    add_factors("rope_factors_short.weight", scaling.at("short_factor").get<std::vector<float>>());
  }

  // ---- tensors

  struct Rule {
    const GgufTensor* rule;
    std::array<int64_t, 2> numbers;
    std::string_view end;
  };

  std::optional<Rule> rule_for(std::string_view name) const {
    for (const std::string_view end : kEnds) {
      if (!name.ends_with(end)) continue;
      const std::string_view module = name.substr(0, name.size() - end.size());
      std::optional<Rule> found;
      for_each_rule([&](const GgufTensor& rule) {
        if (found) return;
        const bool whole = rule.model.find('.') == std::string_view::npos;  // "lm_head" stands beside the rest
        const std::string mine = whole ? std::string(rule.model) : prefix_ + std::string(tail(rule.model));
        if (const auto numbers = match(mine, module)) found = Rule{&rule, *numbers, end};
      });
      if (found) return found;
    }
    return std::nullopt;
  }

  bool without_consequence(std::string_view name) const {
    const TensorPlaces& places = config_.places;
    const auto ends = [&](const std::string& end) { return name.ends_with(end); };
    const auto holds = [&](const std::string& part) { return name.find(part) != std::string_view::npos; };
    return std::ranges::any_of(places.leftovers, ends) || std::ranges::any_of(places.other_modules, holds);
  }

  /// A head that is stored beside the embedding, and the same: llama.cpp shares the one. Another is used, here and
  /// there.
  bool is_embedding_again(const TensorEntry& head) const {
    constexpr uint64_t kPiece = uint64_t{1} << 20;
    const auto is_embedding = [&](const TensorEntry& entry) {
      const std::optional<Rule> found = rule_for(entry.name);
      return found && found->rule->gguf == "token_embd";
    };
    const auto embedding = std::ranges::find_if(model_.tensors(), is_embedding);
    if (embedding == model_.tensors().end() || embedding->shape != head.shape) return false;
    if (head.quantized() || embedding->quantized())
      return head.quantized() && embedding->quantized() && model_.read(head) == model_.read(*embedding);
    if (embedding->dtype != head.dtype) return false;
    const uint64_t bytes = static_cast<uint64_t>(element_count(head.shape)) * size_bytes(head.dtype);
    std::vector<std::byte> a(std::min(bytes, kPiece)), b(a.size());
    for (uint64_t at = 0; at < bytes; at += a.size()) {
      a.resize(std::min<uint64_t>(a.size(), bytes - at));
      b.resize(a.size());
      model_.read_bytes(head, at, a);
      model_.read_bytes(*embedding, at, b);
      if (a != b) return false;
    }
    return true;
  }

  void add(const TensorEntry& entry) {
    if (without_consequence(entry.name)) return;
    const std::optional<Rule> found = rule_for(entry.name);
    if (!found) {
      if (!add_fused_experts(entry)) fail(fmt::format("llama.cpp has no tensor '{}'", printable(entry.name)));
      return;
    }
    const auto& [rule, numbers, end] = *found;
    if (config_.tied_head && rule->gguf == "output" && is_embedding_again(entry)) return;
    const std::string name = fmt::format(fmt::runtime(rule->gguf), numbers[0]) + std::string(end);
    if (rule->rows == GgufRows::experts) return add_expert(name, numbers[1], entry);
    ArrayView view = {.name = name, .source = entry.name, .shape = entry.shape};
    const bool list = entry.shape.size() < 2;
    if (end == ".bias" && !list) fail(fmt::format("tensor '{}' is no list", printable(entry.name)));
    if (end == ".bias" && !mapping_->biases)
      fail(fmt::format("llama.cpp's model of it has no tensor '{}'", printable(name)));
    view.as_f32 =
        list || entry.dtype == DType::f64 || rule->gguf == "position_embd" || rule->gguf.ends_with("ffn_gate_inp");
    rearrange(rule->rows, entry, view);
    out_.names[name] = entry.name;
    out_.arrays.push_back(std::move(view));
  }

  void rearrange(GgufRows rows, const TensorEntry& entry, ArrayView& view) const {
    const int64_t count = entry.shape.empty() ? 0 : entry.shape[0];
    switch (rows) {
      case GgufRows::same:
      case GgufRows::experts:
        return;
      case GgufRows::pairs_of_heads:
        view.rows = inverse(order_of_pairs(rows_of(entry, 2 * config_.heads, count), config_.heads));
        return;
      case GgufRows::pairs_of_kv_heads:
        view.rows = inverse(order_of_pairs(rows_of(entry, 2 * config_.kv_heads, count), config_.kv_heads));
        return;
      case GgufRows::parts_of_heads:
        view.rows = inverse(order_of_parts(rows_of(entry, 3 * config_.heads, count), config_.heads));
        return;
      case GgufRows::transposed:
        view.transposed = entry.shape.size() == 2 && !entry.transposed;
        if (view.transposed) std::swap(view.shape[0], view.shape[1]);
        return;
      case GgufRows::minus_one:
        view.added = 1;
        return;
    }
  }

  int64_t rows_of(const TensorEntry& entry, int64_t parts, int64_t count) const {
    if (count == 0 || entry.shape.size() > 2 || count % parts != 0)
      fail(fmt::format("tensor '{}' has the shape {}", printable(entry.name), to_string(entry.shape)));
    return count;
  }

  /// Matrices one by one: a stack in the order of their numbers.
  void add_expert(const std::string& name, int64_t number, const TensorEntry& entry) {
    ArrayView& view = stacks_[name];
    if (entry.shape.size() != 2 || number >= config_.experts)
      fail(fmt::format("tensor '{}' has the shape {}", printable(entry.name), to_string(entry.shape)));
    if (view.name.empty()) {
      view.name = name;
      view.shape = {config_.experts, entry.shape[0], entry.shape[1]};
      view.stacked.resize(static_cast<size_t>(config_.experts) - 1);
    }
    (number == 0 ? view.source : view.stacked[static_cast<size_t>(number) - 1]) = entry.name;
    if (number == 0) out_.names[name] = entry.name;
  }

  /// All experts in one tensor, gate above up: "mlp.experts.gate_up_proj" [experts, 2 F, H], "… .down_proj".
  bool add_fused_experts(const TensorEntry& entry) {
    for (const TensorPlaces::Experts& places : config_.places.experts) {
      if (places.all_down.empty() || entry.shape.size() != 3 || entry.shape[0] != config_.experts) continue;
      const std::string before = prefix_ + "layers.{0}.";
      if (const auto layer = match(before + places.all_down, entry.name)) {
        const std::string name = fmt::format("blk.{}.ffn_down_exps.weight", (*layer)[0]);
        out_.names[name] = entry.name;
        out_.arrays.push_back({.name = name, .source = entry.name, .shape = entry.shape});
        return true;
      }
      if (const auto layer = match(before + places.all_gate_up, entry.name)) {
        add_half(entry, fmt::format("blk.{}.ffn_gate_exps.weight", (*layer)[0]), 0);
        add_half(entry, fmt::format("blk.{}.ffn_up_exps.weight", (*layer)[0]), entry.shape[1] / 2);
        return true;
      }
    }
    return false;
  }

  void add_half(const TensorEntry& entry, const std::string& name, int64_t first) {
    const int64_t half = entry.shape[1] / 2;
    ArrayView view = {.name = name, .source = entry.name, .shape = {entry.shape[0], half, entry.shape[2]}};
    for (int64_t e = 0; e < entry.shape[0]; ++e)
      for (int64_t r = 0; r < half; ++r) view.rows.push_back(e * entry.shape[1] + first + r);
    out_.names[name] = entry.name;
    out_.arrays.push_back(std::move(view));
  }

  const Checkpoint& model_;
  const Json& json_;
  const GgufMapping* mapping_ = nullptr;
  ModelConfig config_;
  std::string prefix_;
  size_t pattern_ = 0;  ///< Gemma 3's, 0: no layer has a window
  std::map<std::string, ArrayView> stacks_;
  GgufModel out_;
};

}  // namespace

namespace {

/// A GGUF file: all as it is, but for what says how it is quantized.
GgufModel as_it_is(const Checkpoint& model) {
  GgufModel out;
  const auto name = model.facts()->find("general.architecture");
  if (name != model.facts()->end() && name->is_string()) out.architecture = name->get<std::string>();
  const MappedFile file(model.path());
  for (const GgufEntry& entry : parse_gguf(file.bytes(), model.path().string()).metadata)
    if (entry.key != "general.file_type" && entry.key != "general.quantization_version" &&
        !entry.key.starts_with("split.") && !entry.key.starts_with("quantize.imatrix."))
      out.metadata.add(entry);
  out.names = names_in_model(model.path());
  return out;
}

}  // namespace

GgufModel gguf_model(const Checkpoint& model) {
  return model.facts() != nullptr ? as_it_is(model) : Exporter(model).run();
}

std::multimap<MatrixName, GgufMatrix> gguf_matrices(const Checkpoint& model) { return Exporter(model).matrices(); }

Checkpoint open_as_gguf(const Checkpoint& model, const GgufModel& as) {
  if (model.facts() != nullptr) return Checkpoint(model.path());
  const auto translate = [&](const CheckpointView& stored) {
    return std::optional(Translation{.config = std::make_shared<const Json>(stored.config), .arrays = as.arrays});
  };
  return Checkpoint(model.path(), translate);
}

}  // namespace bitwright
