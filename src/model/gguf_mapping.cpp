#include "model/gguf_mapping.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "base/error.hpp"
#include "base/utf8.hpp"

namespace bitwright {
namespace {

constexpr auto kKeys = std::to_array<GgufKey>({
    {"block_count", "num_hidden_layers"},
    {"embedding_length", "hidden_size"},
    {"feed_forward_length", "intermediate_size"},
    {"attention.head_count", "num_attention_heads"},
    {"attention.head_count_kv", "num_key_value_heads"},
    {"attention.key_length", "head_dim"},
    {"attention.layer_norm_rms_epsilon", "rms_norm_eps"},
    {"context_length", "max_position_embeddings"},
    {"rope.freq_base", "rope_theta"},
});

constexpr int64_t kMostNumbers = 1 << 16;  // of a tensor that becomes configuration

constexpr auto kTensors = std::to_array<GgufTensor>({
    {"token_embd", "model.embed_tokens"},
    {"output_norm", "model.norm"},
    {"output", "lm_head"},
    {"blk.{0}.attn_norm", "model.layers.{0}.input_layernorm"},
    {"blk.{0}.attn_q", "model.layers.{0}.self_attn.q_proj"},
    {"blk.{0}.attn_k", "model.layers.{0}.self_attn.k_proj"},
    {"blk.{0}.attn_v", "model.layers.{0}.self_attn.v_proj"},
    {"blk.{0}.attn_output", "model.layers.{0}.self_attn.o_proj"},
    {"blk.{0}.ffn_norm", "model.layers.{0}.post_attention_layernorm"},
    {"blk.{0}.ffn_gate", "model.layers.{0}.mlp.gate_proj"},
    {"blk.{0}.ffn_up", "model.layers.{0}.mlp.up_proj"},
    {"blk.{0}.ffn_down", "model.layers.{0}.mlp.down_proj"},
});

}  // namespace

const std::span<const GgufKey> kGgufLlamaKeys = kKeys;
const std::span<const GgufTensor> kGgufLlamaTensors = kTensors;

const Json* GgufFacts::find(std::string_view key) const {
  const auto found = stored_.facts->find(key);
  return found == stored_.facts->end() ? nullptr : &*found;
}

const Json* GgufFacts::own(std::string_view key) const { return find(fmt::format("{}.{}", architecture(), key)); }

std::string GgufFacts::architecture() const {
  const Json* const name = find("general.architecture");
  const bool proper = name != nullptr && name->is_string() && is_utf8(name->get_ref<const std::string&>());
  return proper ? name->get<std::string>() : "";
}

void GgufFacts::fail(const std::string& why) const {
  throw Error({.code = "bad-config",
               .what = "cannot read model",
               .where = stored_.where,
               .why = why,
               .fix = "convert the model again with a current llama.cpp"});
}

int64_t GgufFacts::integer(std::string_view key, int64_t low, int64_t high, int64_t missing) const {
  const Json* const value = own(key);
  if (value == nullptr) return missing;
  const bool too_large = value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(high);
  if (!value->is_number_integer() || too_large || value->get<int64_t>() < low || value->get<int64_t>() > high)
    fail(fmt::format("key '{}' is no integer from {} to {}", key, low, high));
  return value->get<int64_t>();
}

double GgufFacts::number(std::string_view key, double missing) const {
  const Json* const value = own(key);
  if (value == nullptr) return missing;
  if (!value->is_number()) fail(fmt::format("key '{}' is no number", key));
  return value->get<double>();
}

Json GgufFacts::numbers(const std::string& tensor) const {
  const auto found = stored_.arrays.find(tensor);
  if (found == stored_.arrays.end()) return {};
  const ArraySpec& spec = found->second;
  if (spec.block != nullptr || !info(spec.dtype).is_float) fail(fmt::format("tensor '{}' holds no floats", tensor));
  if (element_count(spec.shape) > kMostNumbers)
    fail(fmt::format("tensor '{}' has the shape {}, at most {} numbers are read", tensor, to_string(spec.shape),
                     kMostNumbers));
  std::vector<float> values(static_cast<size_t>(element_count(spec.shape)));
  to_f32(spec.dtype, stored_.bytes(tensor), values);
  return values;
}

namespace {

constexpr int64_t kMost = int64_t{1} << 40;

/// Elements of a head that turn, where not all do.
void set_partial_rotation(const GgufFacts& facts, Json& config) {
  const int64_t heads = facts.integer("attention.head_count", 1, kMost, 1);
  const int64_t plain = facts.integer("embedding_length", 1, kMost, 1) / heads;
  const int64_t size = facts.integer("attention.key_length", 1, kMost, plain);
  const int64_t turning = facts.integer("rope.dimension_count", 2, kMost, size);
  if (turning != size)
    config["partial_rotary_factor"] = static_cast<double>(turning) / static_cast<double>(std::max<int64_t>(size, 1));
}

}  // namespace

void set_gguf_rope(const GgufFacts& facts, Json& config) {
  set_partial_rotation(facts, config);
  const double factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 0));  // the older name
  const Json* const given = facts.own("rope.scaling.type");
  const Json type = given == nullptr ? Json("linear") : *given;  // as llama.cpp, src/llama-model.cpp
  if (type == "none" || factor == 0) return;
  if (!type.is_string() || !is_utf8(type.get_ref<const std::string&>()))
    facts.fail("key 'rope.scaling.type' is no text");
  if (given == nullptr && factor == 1) return;
  Json& scaling = config["rope_scaling"] = {{"rope_type", type}, {"factor", factor}};
  if (const int64_t original = facts.integer("rope.scaling.original_context_length", 1, kMost, 0))
    scaling["original_max_position_embeddings"] = original;
  for (const auto& [key, name] :
       {std::pair("rope.scaling.yarn_beta_fast", "beta_fast"), std::pair("rope.scaling.yarn_beta_slow", "beta_slow")})
    if (facts.own(key) != nullptr) scaling[name] = facts.number(key, 0);
  // llama.cpp multiplies YaRN's own magnitude by it, and heeds no such factor under other names.
  const double magnitude = facts.number("rope.scaling.attn_factor", 1);
  if (magnitude == 1) return;
  if (type != "yarn") facts.fail("key 'rope.scaling.attn_factor' is not 1, which is not supported");
  scaling["attention_factor"] = magnitude * gguf_yarn_magnitude(factor);
}

double gguf_yarn_magnitude(double factor) { return factor <= 1 ? 1 : 0.1 * std::log(factor) + 1; }

namespace {

/// As transformers and llama.cpp compute them from Llama 3.1's parameters.
std::vector<double> llama3_factors(size_t pairs, double theta, double factor, double original) {
  constexpr double kLow = 1, kHigh = 4;
  std::vector<double> factors;
  for (size_t i = 0; i < pairs; ++i) {
    const double turns =
        original * std::pow(theta, -static_cast<double>(i) / static_cast<double>(pairs)) / (2 * std::numbers::pi);
    const double kept = std::clamp((turns - kLow) / (kHigh - kLow), 0.0, 1.0);
    factors.push_back(1 / (kept + (1 - kept) / factor));
  }
  return factors;
}

}  // namespace

void set_gguf_rope_factors(const GgufFacts& facts, Json& config) {
  const Json factors = facts.numbers("rope_freqs.weight");
  if (factors.is_null() || factors.empty()) return;
  const double theta = facts.number("rope.freq_base", 10000), largest = factors.back().get<double>();
  constexpr double kOriginal = 8192, kClose = 1e-4;  // of Llama 3
  const std::vector<double> known = llama3_factors(factors.size(), theta, largest, kOriginal);
  bool is_llama3 = largest > 1;
  for (size_t i = 0; i < known.size(); ++i)
    is_llama3 = is_llama3 && std::abs(known[i] - factors[i].get<double>()) <= kClose * known[i];
  if (is_llama3) {
    config["rope_scaling"] = {{"rope_type", "llama3"},
                              {"factor", largest},
                              {"low_freq_factor", 1.0},
                              {"high_freq_factor", 4.0},
                              {"original_max_position_embeddings", static_cast<int64_t>(kOriginal)}};
    return;
  }
  config["rope_scaling"] = {{"rope_type", "longrope"},
                            {"long_factor", factors},
                            {"short_factor", factors},
                            {"attention_factor", facts.number("rope.scaling.attn_factor", 1)}};
}

std::vector<int64_t> order_of_pairs(int64_t rows, int64_t heads) {
  const int64_t size = rows / heads, half = size / 2;
  std::vector<int64_t> order(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t within = r % size;
    order[static_cast<size_t>(r)] = r - within + within % half * 2 + within / half;
  }
  return order;
}

std::vector<int64_t> order_of_parts(int64_t rows, int64_t heads) {
  const int64_t size = rows / (3 * heads);
  std::vector<int64_t> order(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t head = r / (3 * size), part = r / size % 3;
    order[static_cast<size_t>(r)] = (part * heads + head) * size + r % size;
  }
  return order;
}

void set_gguf_window(const GgufFacts& facts, Json& config) {
  const int64_t window = facts.integer("attention.sliding_window", 0, int64_t{1} << 32, 0);
  config["sliding_window"] = window == 0 ? Json() : Json(window);
}

}  // namespace bitwright
