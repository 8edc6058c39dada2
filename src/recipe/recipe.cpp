#include "recipe/recipe.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <nlohmann/json.hpp>
#include <set>
#include <span>

#include "container/stored_arrays.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

constexpr std::string_view kWeight = ".weight";
constexpr std::string_view kNeoxHead = "embed_out";  // what GPT-NeoX calls its lm_head
constexpr int64_t kGroupSize = 64;
constexpr int64_t kNestedBlock = 256;  // bitsandbytes' block of absmax values

template <class T>
void take(const OrderedJson& settings, const char* key, std::optional<T>& value) {
  if (settings.contains(key) && !settings[key].is_null()) value = settings[key].get<T>();
}

void read_settings(const OrderedJson& scheme, const OrderedJson& rest, QuantizationSettings& s) {
  take(rest, "method", s.method);
  take(rest, "gguf_type", s.gguf_type);
  take(rest, "algorithm", s.algorithm);
  take(rest, "range", s.range);
  take(rest, "weight_only", s.weight_only);
  take(scheme, "bits", s.bits);
  take(scheme, "symmetric", s.symmetric);
  take(scheme, "granularity", s.granularity);
  take(scheme, "group_size", s.group_size);
  take(scheme, "scale_dtype", s.scale_dtype);
  take(scheme, "nested_scales", s.nested_scales);
  take(scheme, "quant_type", s.quant_type);
}

/// Explicit values of `over` win.
QuantizationSettings merge(QuantizationSettings base, const QuantizationSettings& over) {
  const auto set = [](auto& value, const auto& with) {
    if (with) value = with;
  };
  if (over.method || over.bits || over.quant_type) base.gguf_type.reset();
  // A layer's own method starts from that method's defaults, not from what was set for the model's.
  if (over.method) base = {.algorithm = base.algorithm, .range = base.range};
  // Of a granularity and a group size, one set for the layer replaces the other set for the model.
  if (over.granularity) base.group_size.reset();
  if (over.group_size && base.granularity != "flat") base.granularity.reset();
  set(base.method, over.method);
  set(base.gguf_type, over.gguf_type);
  set(base.algorithm, over.algorithm);
  set(base.range, over.range);
  set(base.granularity, over.granularity);
  set(base.scale_dtype, over.scale_dtype);
  set(base.quant_type, over.quant_type);
  set(base.bits, over.bits);
  set(base.group_size, over.group_size);
  set(base.symmetric, over.symmetric);
  set(base.nested_scales, over.nested_scales);
  set(base.weight_only, over.weight_only);
  return base;
}

[[noreturn]] void contradiction(const std::string& why, const std::string& fix) {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = "quantization",
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

/// The request for one tensor with every default filled in.
struct Resolved {
  std::string name, quant_type, granularity, scale_dtype, range;
  int64_t bits, group_size;
  bool symmetric, nested_scales, weight_only;
};

/// What a method means: its kind of code and its bits; 0: those of the kind.
struct Meaning {
  std::string_view method, quant_type;
  int64_t bits;
};
constexpr auto kMeanings = std::to_array<Meaning>({{"int8", "int", 8},
                                                   {"int4", "int", 4},
                                                   {"int3", "int", 3},
                                                   {"int2", "int", 2},
                                                   {"nf4", "nf4", 4},
                                                   {"fp4", "fp4", 4},
                                                   {"fp8", "e4m3", 8},
                                                   {"mxfp4", "mxfp4", 4},
                                                   {"mxfp8", "mxfp8", 8},
                                                   {"nvfp4", "nvfp4", 4}});
const Meaning* meaning_of(const QuantizationSettings& s) {
  const auto found = std::ranges::find(kMeanings, s.method.value_or(""), &Meaning::method);
  return found == kMeanings.end() ? nullptr : &*found;
}

/// Bits of a kind of code other than "int".
int64_t bits_of(std::string_view quant_type) {
  return std::ranges::find(kMeanings, quant_type, &Meaning::quant_type) != kMeanings.end()
             ? std::ranges::find(kMeanings, quant_type, &Meaning::quant_type)->bits
             : 8;  // e5m2
}

std::span<const SchemeChoice> choices_of(const Container* container) {
  return container == nullptr ? std::span<const SchemeChoice>() : container->choices;
}

bool asks_for_something(const QuantizationSettings& s, const Container* container) {
  if (s.gguf_type && container != nullptr && !container->model_file.empty()) return true;
  if (s.method) return *s.method != "none";
  return s.bits || s.quant_type || !choices_of(container).empty();
}

bool is_sized(std::string_view granularity) {
  return granularity == "group" || granularity == "flat" || granularity == "block";
}

[[noreturn]] void unknown_type(const std::string& name, std::span<const SchemeChoice> choices) {
  std::vector<std::string_view> known;
  for (const SchemeChoice& choice : choices) known.push_back(choice.name);
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = "quantization",
               .why = fmt::format("gguf_type: '{}' is not known; valid: {}", printable(name), fmt::join(known, ", ")),
               .status = ExitStatus::usage});
}

/// The container's choice that a request begins from: the first that has all it says, else the first of its kind and
/// bits, else of its kind (what it says is then laid over it, and `fit` speaks). A request that leaves kind and bits
/// open is for what the first choice of all is. Null: the container leaves the choice open, or has no such kind.
const SchemeChoice* choose(const QuantizationSettings& s, const Container* container) {
  const std::span<const SchemeChoice> choices = choices_of(container);
  if (choices.empty()) return nullptr;
  if (s.gguf_type && !container->model_file.empty()) return named_choice(*s.gguf_type, *container);
  const Meaning* const meaning = meaning_of(s);
  std::optional<std::string> kind = s.quant_type;
  std::optional<int64_t> bits = s.bits;
  if (meaning != nullptr && !kind) kind = meaning->quant_type;
  if (meaning != nullptr && !bits) bits = meaning->bits;
  if (!kind && !bits) {
    kind = choices.front().quant_type;
    bits = choices.front().bits;
  }
  const auto is_kind = [&](const SchemeChoice& choice) { return !kind || *kind == choice.quant_type; };
  const auto has_bits = [&](const SchemeChoice& choice) { return is_kind(choice) && (!bits || *bits == choice.bits); };
  const auto has_all = [&](const SchemeChoice& choice) {
    return has_bits(choice) && (!s.symmetric || *s.symmetric == choice.symmetric) &&
           (!s.weight_only || *s.weight_only == choice.weight_only) &&
           (!s.nested_scales || *s.nested_scales == choice.nested_scales) &&
           (!s.granularity || *s.granularity == choice.granularity) &&
           (!s.group_size || is_sized(s.granularity.value_or(std::string(choice.granularity)))) &&
           (!s.scale_dtype || choice.scale_dtype == SchemeChoice::kWeightDtype || *s.scale_dtype == choice.scale_dtype);
  };
  auto found = std::ranges::find_if(choices, has_all);
  if (found == choices.end()) found = std::ranges::find_if(choices, has_bits);
  if (found == choices.end()) found = std::ranges::find(choices, kind.value_or("int"), &SchemeChoice::quant_type);
  return found == choices.end() ? nullptr : &*found;
}

/// What a method means where no container says otherwise.
SchemeChoice common_choice(const QuantizationSettings& s) {
  const Meaning* const meaning = meaning_of(s);
  SchemeChoice c;
  c.quant_type = s.quant_type ? std::string_view(*s.quant_type) : meaning != nullptr ? meaning->quant_type : "int";
  const bool integer = c.quant_type == "int", table = c.quant_type == "nf4" || c.quant_type == "fp4";
  const int64_t bits = integer ? s.bits.value_or(meaning != nullptr ? meaning->bits : 4) : bits_of(c.quant_type);
  c.bits = static_cast<int>(bits);
  c.symmetric = !integer || bits == 8;
  c.granularity = table || s.group_size || bits < 8 ? "group" : "channel";
  c.group_size = kGroupSize;
  c.scale_dtype = integer ? "float16" : "float32";
  return c;
}

/// A kind of code that the container's table does not know cannot be made into a scheme to ask `fit` about.
void check_kind(std::string_view quant_type, const Container* container) {
  const std::span<const SchemeChoice> choices = choices_of(container);
  if (choices.empty() || std::ranges::find(choices, quant_type, &SchemeChoice::quant_type) != choices.end()) return;
  std::set<std::string_view> known;
  for (const SchemeChoice& choice : choices) known.insert(choice.quant_type);
  contradiction(fmt::format("{} holds {}, not {}", container->name, fmt::join(known, ", "), quant_type),
                "choose another method or --format");
}

/// shape: of the weight, null where all weights are spoken of.
Resolved fill_in(const QuantizationSettings& s, const Container* container, const Shape* shape = nullptr) {
  const SchemeChoice* const chosen = choose(s, container);
  const SchemeChoice c = chosen != nullptr ? *chosen : common_choice(s);
  check_kind(c.quant_type, container);
  Resolved r;
  r.name = c.name;
  r.quant_type = c.quant_type;
  const Meaning* const meaning = meaning_of(s);
  r.bits = s.bits.value_or(meaning != nullptr && !s.quant_type && !s.gguf_type ? meaning->bits : c.bits);
  const int64_t own_bits = chosen != nullptr ? chosen->bits : bits_of(r.quant_type);
  if (r.quant_type != "int" && r.bits != own_bits)
    contradiction(fmt::format("{} has {} bits, not {}", r.quant_type, own_bits, r.bits), "");
  r.symmetric = s.symmetric.value_or(c.symmetric);
  if (r.quant_type != "int" && !r.symmetric)
    contradiction(fmt::format("{} has no zero point", r.quant_type), "leave 'symmetric' out");
  r.granularity = s.granularity.value_or(std::string(c.granularity));
  if (s.group_size && !is_sized(r.granularity))
    contradiction(fmt::format("group_size {} and granularity {} exclude each other", *s.group_size, r.granularity),
                  "give one of them");
  r.group_size = is_sized(r.granularity) ? s.group_size.value_or(c.group_size != 0 ? c.group_size : kGroupSize) : 0;
  if (shape != nullptr && chosen != nullptr && !s.group_size && is_sized(r.granularity) &&
      container->group_size != nullptr)
    r.group_size = container->group_size(c, *shape);
  r.scale_dtype = s.scale_dtype.value_or(std::string(c.scale_dtype));
  r.nested_scales = s.nested_scales.value_or(c.nested_scales);
  if (r.nested_scales && s.scale_dtype && *s.scale_dtype != "float32")
    contradiction("nested scales are 8-bit codes under float32", "leave 'scale_dtype' out");
  r.weight_only = s.weight_only.value_or(c.weight_only);
  if (!r.weight_only && (container == nullptr || container->make_linear == nullptr))
    contradiction(fmt::format("{} holds weights alone", container == nullptr ? "this container" : container->name),
                  "leave 'weight_only' out, or choose --format compressed-tensors");
  const std::string range = s.range.value_or("auto");
  const bool searches = r.quant_type == "int" && r.bits < 8 && (container == nullptr || container->encode == nullptr);
  r.range = range == "auto" ? (searches ? "mse" : "minmax") : range;
  return r;
}

Grouping grouping_of(const Resolved& r) {
  if (r.granularity == "tensor") return Grouping::tensor();
  if (r.granularity == "channel") return Grouping::channel();
  if (r.granularity == "block")
    return {.kind = Grouping::Kind::block, .block_rows = r.group_size, .block_columns = r.group_size};
  // bitsandbytes' types are defined over the flattened weight.
  const bool across_rows = r.granularity == "flat" || r.quant_type == "nf4" || r.quant_type == "fp4";
  return across_rows ? Grouping::flat(r.group_size) : Grouping::along(r.group_size);
}

/// Scales that are 8-bit codes. bitsandbytes' own for its types, which cluster around a mean that it takes off; for
/// integers e4m3 under one float32, which keeps every scale positive and its relative error small however far they
/// spread.
Scheme nested_scales(bool like_bitsandbytes) {
  if (!like_bitsandbytes)
    return {.element = &float_element(DType::f8_e4m3), .scale = parameter(Grouping::tensor(), plain(DType::f32))};
  return {.element = find_element("dynamic8"),
          .scale = parameter(Grouping::flat(kNestedBlock), plain(DType::f32)),
          .offset_kind = OffsetKind::bias,
          .offset = parameter(Grouping::tensor(), plain(DType::f32))};
}

/// The element of a kind of code that stands for itself; null for those that say how their scales are made.
const ElementType* element_of(std::string_view quant_type) {
  if (quant_type == "e4m3") return &float_element(DType::f8_e4m3);
  if (quant_type == "e5m2") return &float_element(DType::f8_e5m2);
  return find_element(quant_type);
}

/// Refers to `r`.
SchemeChoice choice_of(const Resolved& r) {
  return {.name = r.name,
          .quant_type = r.quant_type,
          .bits = static_cast<int>(r.bits),
          .symmetric = r.symmetric,
          .granularity = r.granularity,
          .group_size = r.group_size,
          .scale_dtype = r.scale_dtype,
          .nested_scales = r.nested_scales,
          .weight_only = r.weight_only};
}

Scheme scheme_of(const Resolved& r, const Container* container, DType weight) {
  if (container != nullptr && container->make_scheme != nullptr) return container->make_scheme(choice_of(r), weight);
  const Grouping grouping = grouping_of(r);
  Scheme scales = plain(r.nested_scales ? DType::f32 : scale_dtype_of(choice_of(r), weight));
  if (r.nested_scales) scales = nested_scales(r.quant_type != "int");
  Scheme scheme = {.scale = parameter(grouping, std::move(scales))};
  if (r.quant_type != "int") {
    scheme.element = element_of(r.quant_type);
    if (scheme.element == nullptr)
      contradiction(fmt::format("{} is defined by the containers that hold it", r.quant_type),
                    "choose one of them by --format, see `bitwright formats`");
    return scheme;
  }
  scheme.element = &integer_element(static_cast<int>(r.bits), r.symmetric);
  if (!r.symmetric) {
    scheme.offset_kind = OffsetKind::zero_point;
    scheme.offset = parameter(grouping, {.element = scheme.element});
  }
  return scheme;
}

/// has_statistics: of importance, which is heeded where the container has a way to.
const Algorithm* algorithm_of(const QuantizationSettings& s, bool has_statistics, const Container* container) {
  const std::string name = s.algorithm.value_or("auto");
  const bool heeds = container != nullptr && container->encode_weighted != nullptr;
  if (name == "auto") return find_algorithm(has_statistics && heeds ? "imatrix" : "rtn");
  const Algorithm* const found = find_algorithm(name);
  if (found->weighted && !heeds)
    contradiction(fmt::format("{} does not weight errors by importance",
                              container == nullptr ? "this container" : container->name),
                  "use --algorithm auto, or --format gguf");
  return found;
}

OrderedJson to_json(const Resolved& r, const Algorithm& algorithm) {
  OrderedJson json = {{"algorithm", algorithm.name}, {"range", r.range},
                      {"quant_type", r.quant_type},  {"bits", r.bits},
                      {"symmetric", r.symmetric},    {"granularity", r.granularity}};
  if (!r.name.empty()) json["gguf_type"] = r.name;
  if (r.group_size != 0) json["group_size"] = r.group_size;
  json["scale_dtype"] = r.nested_scales ? "float32" : r.scale_dtype;
  json["nested_scales"] = r.nested_scales;
  if (!r.weight_only) json["weight_only"] = false;
  return json;
}

std::string_view module_of(std::string_view tensor) {
  return tensor.ends_with(kWeight) ? tensor.substr(0, tensor.size() - kWeight.size()) : tensor;
}

bool any_matches(std::span<const std::string_view> patterns, std::string_view tensor) {
  return std::ranges::any_of(patterns, [&](std::string_view pattern) { return matches(pattern, tensor); });
}

/// The small matrix that sends a token to its experts: one row an expert, and an error in it changes the expert.
bool is_router(const TensorFacts& t) {
  constexpr auto kNames = std::to_array<std::string_view>({"gate", "router", "shared_expert_gate"});
  constexpr int64_t kMostExperts = 1024;
  return any_matches(kNames, t.name) && t.shape.front() <= kMostExperts && t.shape.front() < t.shape.back();
}

/// Why a tensor cannot be a linear weight, or empty. Of models of unknown kinds nothing but names, types and shapes is
/// known, so what is not surely a matrix that multiplies is kept.
std::string why_not_linear(const TensorFacts& t) {
  if (!t.is_float) return "not floating point";
  if (t.bytes < 2) return "8-bit floats, whose scales are elsewhere";
  const bool experts = t.shape.size() == 3 && matches("experts", t.name);
  if (t.shape.size() < 2) return std::string(kNotMatrix);
  if (t.shape.size() == 3 && !experts) return "three dimensions, and not experts";
  if (t.shape.size() > 3) return fmt::format("a kernel of {} dimensions", t.shape.size());
  if (!std::string_view(t.name).ends_with(kWeight) && !experts) return "not a module's weight";
  if (element_count(t.shape) == 0) return "empty";
  return {};
}

class Resolver {
 public:
  Resolver(const QuantizationRequest& request, const Container* container)
      : request_(request),
        container_(container),
        skip_used_(request.skip_modules.size()),
        rule_used_(request.rules.size()) {}

  TensorPlan plan(const TensorFacts& t) {
    TensorPlan plan = {.name = t.name};
    plan.reason = why_not_linear(t);
    if (!plan.reason.empty()) return plan;
    // A file that is a whole model has the embedding and the head in its own types too.
    const bool whole = container_ != nullptr && !container_->model_file.empty();
    for (size_t i = 0; i < request_.skip_modules.size() && (request_.skips_given || !whole); ++i)
      if (matches(request_.skip_modules[i], t.name) ||
          (request_.skip_modules[i] == "lm_head" && matches(kNeoxHead, t.name))) {
        skip_used_[i] = true;
        plan.reason = "skip_modules";
      }
    QuantizationSettings settings = request_.settings;
    const LayerRule* rule = plan.reason.empty() ? find_rule(t.name) : nullptr;
    if (rule != nullptr) settings = merge(settings, rule->settings);
    if (plan.reason.empty() && rule == nullptr && request_.skip_embeddings && !whole && is_embedding(t.name))
      plan.reason = "embedding";
    if (plan.reason.empty() && rule == nullptr && is_router(t)) plan.reason = "router of experts";
    if (plan.reason.empty() && container_ != nullptr && container_->takes != nullptr &&
        container_->scheme_for == nullptr && !container_->takes(t.name, t.shape))
      plan.reason = fmt::format("{} leaves it in floats", container_->name);
    if (plan.reason.empty() && !asks_for_something(settings, container_)) plan.reason = "method none";
    if (!plan.reason.empty()) return plan;
    const Resolved r = fill_in(settings, container_, &t.shape);
    plan.algorithm = algorithm_of(settings, request_.has_statistics, container_);
    TensorRole role = rule != nullptr ? TensorRole() : t.role;
    role.weighted = plan.algorithm->weighted;
    plan.scheme = container_ != nullptr && container_->scheme_for != nullptr
                      ? container_->scheme_for(choice_of(r), role, t.shape)
                      : scheme_of(r, container_, t.dtype);
    if (plan.scheme->is_plain() && dtype_of(*plan.scheme->element) == t.dtype) {  // it is what was asked for
      plan.scheme.reset();
      plan.reason = fmt::format("{} already", info(t.dtype).name);
      return plan;
    }
    if (container_ != nullptr && container_->note_for != nullptr)
      plan.note = container_->note_for(choice_of(r), role, t.shape);
    if (!r.weight_only) plan.linear = container_->make_linear(choice_of(r));
    plan.options.range = r.range == "mse" ? RangeRule::mse : RangeRule::minmax;
    plan.options.owner = container_ != nullptr ? container_->encode : nullptr;
    plan.options.fused = container_ != nullptr ? container_->encode_fused : nullptr;
    plan.options.weighted_owner = container_ != nullptr ? container_->encode_weighted : nullptr;
    return plan;
  }

  std::vector<Warning> warnings() const {
    std::vector<Warning> out;
    const auto warn = [&](const std::string& key, const std::string& pattern) {
      out.push_back(
          {"UNUSED_PATTERN", fmt::format("{} '{}' matches no weight of this model", key, printable(pattern))});
    };
    for (size_t i = 0; i < skip_used_.size(); ++i)
      if (!skip_used_[i] && request_.skip_modules[i] != "lm_head") warn("skip_modules", request_.skip_modules[i]);
    for (size_t i = 0; i < rule_used_.size(); ++i)
      if (!rule_used_[i]) warn("layer_configs", request_.rules[i].pattern);
    return out;
  }

 private:
  const LayerRule* find_rule(std::string_view tensor) {
    for (size_t i = 0; i < request_.rules.size(); ++i)
      if (matches(request_.rules[i].pattern, tensor)) {
        rule_used_[i] = true;
        return &request_.rules[i];
      }
    return nullptr;
  }

  const QuantizationRequest& request_;
  const Container* container_;
  std::vector<bool> skip_used_, rule_used_;
};

OrderedJson settings_json(const QuantizationRequest& request, const Container* container) {
  OrderedJson json = OrderedJson::object();
  const auto filled_in = [&](const QuantizationSettings& s) {
    return to_json(fill_in(s, container), *algorithm_of(s, request.has_statistics, container));
  };
  if (request.settings.method) json["method"] = *request.settings.method;
  if (asks_for_something(request.settings, container)) json.update(filled_in(request.settings));
  json["skip_modules"] = request.skip_modules;
  OrderedJson& rules = json["layer_configs"] = OrderedJson::object();
  for (const LayerRule& rule : request.rules) {
    const QuantizationSettings merged = merge(request.settings, rule.settings);
    rules[rule.pattern] = asks_for_something(merged, container) ? filled_in(merged) : OrderedJson{{"method", "none"}};
  }
  return json;
}

}  // namespace

const SchemeChoice* named_choice(const std::string& given, const Container& container) {
  std::string name = given;
  std::ranges::transform(name, name.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const auto found = std::ranges::find(container.choices, name, &SchemeChoice::name);
  // llama.cpp's short names
  const auto medium = std::ranges::find(container.choices, name + "_m", &SchemeChoice::name);
  if (found == container.choices.end() && medium == container.choices.end()) unknown_type(given, container.choices);
  return found != container.choices.end() ? &*found : &*medium;
}

Scheme scheme_of(const SchemeChoice& choice, const Container& container, DType weight) {
  const Resolved all = {.name = std::string(choice.name),
                        .quant_type = std::string(choice.quant_type),
                        .granularity = std::string(choice.granularity),
                        .scale_dtype = std::string(choice.scale_dtype),
                        .range = {},
                        .bits = choice.bits,
                        .group_size = choice.group_size,
                        .symmetric = choice.symmetric,
                        .nested_scales = choice.nested_scales,
                        .weight_only = choice.weight_only};
  return scheme_of(all, &container, weight);
}

bool is_embedding(std::string_view tensor) {
  constexpr auto kNames = std::to_array<std::string_view>(
      {"embed_tokens", "embed_in", "tok_embeddings", "word_embeddings", "wte", "wpe", "token_embedding",
       "embed_positions", "position_embedding", "position_embeddings", "pos_embed", "token_type_embeddings",
       "relative_attention_bias", "embedding"});
  return any_matches(kNames, tensor) || tensor == "shared.weight";  // the last: T5's
}

bool is_head(std::string_view tensor) { return matches("lm_head", tensor) || matches(kNeoxHead, tensor); }

bool matches(std::string_view pattern, std::string_view tensor) {
  const std::string_view module = module_of(tensor);
  if (pattern.find_first_of("*?[") != std::string_view::npos) {
    const std::string glob(pattern);
    return fnmatch(glob.c_str(), std::string(tensor).c_str(), 0) == 0 ||
           fnmatch(glob.c_str(), std::string(module).c_str(), 0) == 0;
  }
  const auto at_boundary = [&](size_t begin) {
    const size_t end = begin + pattern.size();
    return (begin == 0 || tensor[begin - 1] == '.') && (end == tensor.size() || tensor[end] == '.');
  };
  if (pattern.empty()) return false;
  for (size_t at = tensor.find(pattern); at != std::string_view::npos; at = tensor.find(pattern, at + 1))
    if (at_boundary(at)) return true;
  return false;
}

QuantizationRequest read_request(const OrderedJson& config) {
  QuantizationRequest request;
  request.skip_modules = {"lm_head"};
  const OrderedJson* section = find_config(config, "quantization");
  if (section == nullptr) return request;
  const OrderedJson* scheme = find_config(config, "quantization.scheme");
  read_settings(scheme != nullptr ? *scheme : OrderedJson::object(), *section, request.settings);
  if (const OrderedJson* skip = find_config(config, "quantization.skip_modules")) {
    request.skip_modules = skip->get<std::vector<std::string>>();
    request.skips_given = true;
  }
  if (const OrderedJson* rules = find_config(config, "quantization.layer_configs"))
    for (const auto& [pattern, settings] : rules->items()) {
      LayerRule rule = {.pattern = pattern, .settings = {}};
      read_settings(settings, settings, rule.settings);
      request.rules.push_back(std::move(rule));
    }
  return request;
}

Recipe resolve(const QuantizationRequest& request, std::span<const TensorFacts> tensors, const Container* container) {
  Recipe recipe;
  recipe.settings = settings_json(request, container);
  Resolver resolver(request, container);
  bool any = false;
  for (const TensorFacts& t : tensors) {
    recipe.tensors.push_back(resolver.plan(t));
    any = any || recipe.tensors.back().scheme.has_value();
  }
  const bool translates = container != nullptr && !container->model_file.empty();  // worth writing in floats too
  if (!any && !translates)
    throw Error({.code = "nothing-to-quantize",
                 .what = "nothing to quantize",
                 .why = asks_for_something(request.settings, container) || !request.rules.empty()
                            ? "every weight of this model is skipped"
                            : "no method is given",
                 .fix = "give --method int8, int4, nf4 …, or see `bitwright methods`",
                 .status = ExitStatus::usage});
  recipe.warnings = resolver.warnings();
  return recipe;
}

}  // namespace bitwright
