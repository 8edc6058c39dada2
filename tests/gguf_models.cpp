#include "tests/gguf_models.hpp"

#include <fmt/format.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <regex>
#include <stdexcept>

#include "checkpoint/checkpoint.hpp"

namespace bitwright::test {
namespace {

struct Values {
  Shape shape;
  std::vector<float> data;
};

const std::map<std::string, std::string> kArchitectures = {
    {"LlamaForCausalLM", "llama"},   {"MistralForCausalLM", "llama"}, {"MixtralForCausalLM", "llama"},
    {"Qwen2ForCausalLM", "qwen2"},   {"Qwen3ForCausalLM", "qwen3"},   {"Qwen3MoeForCausalLM", "qwen3moe"},
    {"Phi3ForCausalLM", "phi3"},     {"GPT2LMHeadModel", "gpt2"},     {"GPTNeoXForCausalLM", "gptneox"},
    {"Gemma2ForCausalLM", "gemma2"}, {"Gemma3ForCausalLM", "gemma3"}};

const std::map<std::string, std::string> kNames = {
    {"embed_tokens", "token_embd"},
    {"wte", "token_embd"},
    {"embed_in", "token_embd"},
    {"wpe", "position_embd"},
    {"norm", "output_norm"},
    {"ln_f", "output_norm"},
    {"final_layer_norm", "output_norm"},
    {"lm_head", "output"},
    {"embed_out", "output"},
    {"input_layernorm", "attn_norm"},
    {"ln_1", "attn_norm"},
    {"ln_2", "ffn_norm"},
    {"pre_feedforward_layernorm", "ffn_norm"},
    {"post_feedforward_layernorm", "post_ffw_norm"},
    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"},
    {"self_attn.q_norm", "attn_q_norm"},
    {"self_attn.k_norm", "attn_k_norm"},
    {"self_attn.qkv_proj", "attn_qkv"},
    {"attn.c_attn", "attn_qkv"},
    {"attention.query_key_value", "attn_qkv"},
    {"attn.c_proj", "attn_output"},
    {"attention.dense", "attn_output"},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.gate_up_proj", "ffn_up"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.c_fc", "ffn_up"},
    {"mlp.dense_h_to_4h", "ffn_up"},
    {"mlp.down_proj", "ffn_down"},
    {"mlp.c_proj", "ffn_down"},
    {"mlp.dense_4h_to_h", "ffn_down"},
    {"mlp.gate", "ffn_gate_inp"},
    {"block_sparse_moe.gate", "ffn_gate_inp"},
};
const std::map<std::string, std::string> kExperts = {{"w1", "ffn_gate_exps"}, {"gate_proj", "ffn_gate_exps"},
                                                     {"w2", "ffn_down_exps"}, {"down_proj", "ffn_down_exps"},
                                                     {"w3", "ffn_up_exps"},   {"up_proj", "ffn_up_exps"}};

class Converter {
 public:
  explicit Converter(const Checkpoint& model)
      : config_(model.config()), architecture_(kArchitectures.at(config_["architectures"][0])) {
    for (const TensorEntry& entry : model.tensors())
      if (info(entry.dtype).is_float) convert(entry.name, {entry.shape, model.read_f32(entry)});
    add_rope_factors();
  }

  const std::map<std::string, Values>& tensors() const { return tensors_; }

  void add_metadata(GgufMetadata& out) const {
    out.add("general.architecture", architecture_);
    const auto own = [&](const std::string& key) { return architecture_ + "." + key; };
    const auto integer = [&](const std::string& key, std::initializer_list<const char*> names) {
      for (const char* name : names)
        if (config_.contains(name) && !config_[name].is_null()) return out.add(own(key), config_[name].get<uint32_t>());
    };
    integer("block_count", {"num_hidden_layers", "n_layer"});
    integer("embedding_length", {"hidden_size", "n_embd"});
    integer("attention.head_count", {"num_attention_heads", "n_head"});
    integer("attention.head_count_kv", {"num_key_value_heads"});
    integer("attention.key_length", {"head_dim"});
    integer("context_length", {"max_position_embeddings", "n_positions"});
    integer("attention.sliding_window", {"sliding_window"});
    integer("expert_count", {"num_local_experts", "num_experts"});
    integer("expert_used_count", {"num_experts_per_tok"});
    integer("expert_feed_forward_length", {"moe_intermediate_size"});
    integer("rope.scaling.original_context_length", {"original_max_position_embeddings"});
    if (architecture_ == "gpt2" && config_["n_inner"].is_null())
      out.add(own("feed_forward_length"), 4 * config_["n_embd"].get<uint32_t>());
    else
      integer("feed_forward_length", {"intermediate_size", "n_inner"});
    add_numbers(out);
  }

 private:
  void add_numbers(GgufMetadata& out) const {
    const auto own = [&](const std::string& key) { return architecture_ + "." + key; };
    const auto number = [&](const std::string& key, const char* name) {
      if (config_.contains(name) && !config_[name].is_null()) out.add(own(key), config_[name].get<float>());
    };
    number("attention.layer_norm_rms_epsilon", "rms_norm_eps");
    number("attention.layer_norm_epsilon", "layer_norm_eps");
    number("attention.layer_norm_epsilon", "layer_norm_epsilon");
    number("rope.freq_base", "rope_theta");
    number("rope.freq_base", "rotary_emb_base");
    number("attn_logit_softcapping", "attn_logit_softcapping");
    number("final_logit_softcapping", "final_logit_softcapping");
    if (config_.contains("use_parallel_residual"))
      out.add(own("use_parallel_residual"), config_["use_parallel_residual"].get<bool>());
    for (const char* share : {"rotary_pct", "partial_rotary_factor"})
      if (config_.contains(share))
        out.add(own("rope.dimension_count"),
                static_cast<uint32_t>(config_[share].get<double>() * static_cast<double>(head_size())));
    const Json scaling = config_.value("rope_scaling", Json());
    const std::string type = scaling.is_object() ? scaling.value("type", scaling.value("rope_type", "")) : "";
    if (type == "longrope") {
      const double original = config_["original_max_position_embeddings"], whole = config_["max_position_embeddings"];
      out.add(own("rope.scaling.attn_factor"),
              static_cast<float>(std::sqrt(1 + std::log(whole / original) / std::log(original))));
    }
    if (type == "linear") {
      out.add(own("rope.scaling.type"), "linear");
      out.add(own("rope.scaling.factor"), scaling["factor"].get<float>());
    }
  }

  int64_t integer(const char* key) const { return config_.at(key).get<int64_t>(); }
  int64_t heads() const { return integer(architecture_ == "gpt2" ? "n_head" : "num_attention_heads"); }
  int64_t head_size() const {
    return config_.contains("head_dim") ? integer("head_dim") : integer("hidden_size") / heads();
  }

  void convert(const std::string& name, Values values) {
    for (const char* buffer : {".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias"})
      if (name.ends_with(buffer)) return;
    std::smatch part;
    static const std::regex layered(R"(^(?:.*\.)?(?:layers|h)\.(\d+)\.(.+)\.(weight|bias)$)");
    static const std::regex expert(R"(^(.*)\.experts\.(\d+)\.(\w+)$)"),
        stack(R"(^(.*layers\.(\d+)\.mlp)\.experts\.(\w+)$)");
    if (std::regex_match(name, part, stack)) return add_stack(part[2], part[3], values);
    if (!std::regex_match(name, part, layered)) {
      static const std::regex plain(R"(^(?:.*\.)?(\w+)\.(weight|bias)$)");
      if (!std::regex_match(name, part, plain)) throw std::runtime_error("unexpected tensor " + name);
      const std::string gguf = kNames.at(part[1]);
      if (gguf == "output_norm") values = add_one(std::move(values));
      tensors_[gguf + "." + part[2].str()] = std::move(values);
      return;
    }
    const std::string layer = part[1], module = part[2], end = part[3];
    if (std::regex_match(module, part, expert))
      return add_expert(fmt::format("blk.{}.{}.weight", layer, kExperts.at(part[3])), values);
    const bool is_gemma = architecture_.starts_with("gemma");
    const std::string gguf = module != "post_attention_layernorm" ? kNames.at(module)
                             : is_gemma                           ? "post_attention_norm"
                                                                  : "ffn_norm";
    if (gguf.ends_with("norm")) values = add_one(std::move(values));
    if (architecture_ == "llama" && gguf == "attn_q") values = pair_rows(values, heads());
    if (architecture_ == "llama" && gguf == "attn_k") values = pair_rows(values, integer("num_key_value_heads"));
    if (architecture_ == "gptneox" && gguf == "attn_qkv") values = split_heads(values, heads());
    if (architecture_ == "gpt2" && values.shape.size() == 2) values = transpose(values);
    tensors_[fmt::format("blk.{}.{}.{}", layer, gguf, end)] = std::move(values);
  }

  Values add_one(Values values) const {
    if (architecture_.starts_with("gemma"))
      for (float& value : values.data) value += 1;
    return values;
  }

  /// The converter's reshape(heads, 2, size / 2, columns).swapaxes(1, 2).
  static Values pair_rows(const Values& in, int64_t heads) {
    Values out = in;
    const int64_t columns = in.shape.size() == 2 ? in.shape[1] : 1, half = in.shape[0] / heads / 2;
    size_t to = 0;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t i = 0; i < half; ++i)
        for (int64_t side = 0; side < 2; ++side)
          for (int64_t c = 0; c < columns; ++c)
            out.data[to++] = in.data[static_cast<size_t>((head * 2 * half + side * half + i) * columns + c)];
    return out;
  }

  /// reshape(heads, 3, size, columns), then q, k and v one after the other.
  static Values split_heads(const Values& in, int64_t heads) {
    Values out = in;
    const int64_t columns = in.shape.size() == 2 ? in.shape[1] : 1, size = in.shape[0] / heads / 3;
    size_t to = 0;
    for (int64_t part = 0; part < 3; ++part)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < size * columns; ++i)
          out.data[to++] = in.data[static_cast<size_t>((head * 3 + part) * size * columns + i)];
    return out;
  }

  static Values transpose(const Values& in) {
    Values out = {{in.shape[1], in.shape[0]}, {}};
    for (int64_t c = 0; c < in.shape[1]; ++c)
      for (int64_t r = 0; r < in.shape[0]; ++r) out.data.push_back(in.data[static_cast<size_t>(r * in.shape[1] + c)]);
    return out;
  }

  /// Experts come in rising order, as safetensors keeps them here: checked by their number.
  void add_expert(const std::string& name, const Values& values) {
    Values& all = tensors_[name];
    if (all.shape.empty()) all.shape = {0, values.shape[0], values.shape[1]};
    ++all.shape[0];
    all.data.insert(all.data.end(), values.data.begin(), values.data.end());
  }

  /// Of all experts; gate above up.
  void add_stack(const std::string& layer, const std::string& kind, const Values& values) {
    const std::string prefix = "blk." + layer + ".";
    if (kind == "down_proj") {
      tensors_[prefix + "ffn_down_exps.weight"] = values;
      return;
    }
    const int64_t half = values.shape[1] / 2 * values.shape[2];
    for (const char* name : {"ffn_gate_exps.weight", "ffn_up_exps.weight"}) {
      Values& part = tensors_[prefix + name];
      part.shape = {values.shape[0], values.shape[1] / 2, values.shape[2]};
      const int64_t first = std::string(name).starts_with("ffn_up") ? half : 0;
      for (int64_t e = 0; e < values.shape[0]; ++e) {
        const auto begin = values.data.begin() + 2 * e * half + first;
        part.data.insert(part.data.end(), begin, begin + half);
      }
    }
  }

  void add_rope_factors() {
    const Json scaling = config_.value("rope_scaling", Json());
    if (!scaling.is_object()) return;
    const std::string type = scaling.value("rope_type", scaling.value("type", ""));
    if (type == "longrope")
      for (const auto& [name, key] : {std::pair("rope_factors_long.weight", "long_factor"),
                                      std::pair("rope_factors_short.weight", "short_factor")}) {
        const auto factors = scaling[key].get<std::vector<float>>();
        tensors_[name] = {{static_cast<int64_t>(factors.size())}, factors};
      }
    if (type != "llama3") return;
    const double factor = scaling["factor"], low = scaling["low_freq_factor"], high = scaling["high_freq_factor"],
                 context = scaling["original_max_position_embeddings"], theta = config_["rope_theta"];
    Values factors;
    for (int64_t i = 0; i < head_size(); i += 2) {
      const double wavelength =
          2 * std::numbers::pi * std::pow(theta, static_cast<double>(i) / static_cast<double>(head_size()));
      const double smooth = (context / wavelength - low) / (high - low);
      factors.data.push_back(static_cast<float>(wavelength < context / high  ? 1
                                                : wavelength > context / low ? factor
                                                                             : 1 / ((1 - smooth) / factor + smooth)));
    }
    factors.shape = {head_size() / 2};
    tensors_["rope_freqs.weight"] = factors;
  }

  Json config_;
  std::string architecture_;
  std::map<std::string, Values> tensors_;
};

const Scheme* scheme_of(std::string_view type) {
  static const Scheme q8_0 = {.element = &integer_element(8, true),
                              .scale = parameter(Grouping::along(32), plain(DType::f16))};
  return type == "Q8_0" ? &q8_0 : nullptr;
}

}  // namespace

void write_gguf_model(const std::filesystem::path& model, const std::filesystem::path& out, std::string_view type,
                      GgufMetadata more) {
  const Converter converter{Checkpoint(model)};
  converter.add_metadata(more);
  std::vector<ArraySpec> specs;
  for (const auto& [name, values] : converter.tensors()) {
    const GgufType* wanted = find_gguf_type(values.shape.size() < 2 ? "F32" : type);
    if (values.shape.back() % wanted->block.elements != 0) wanted = find_gguf_type("F32");
    specs.push_back({name, wanted->dtype.value_or(DType::u8), values.shape, wanted->dtype ? nullptr : &wanted->block});
  }
  GgufWriter writer(out, more, specs);
  for (const ArraySpec& spec : specs) {
    const Values& values = converter.tensors().at(spec.name);
    if (spec.block != nullptr) {
      const Scheme& scheme = *scheme_of(type);
      const StoredTensor stored = {.name = spec.name, .shape = spec.shape, .scheme = scheme};
      writer.add(find_container("gguf")->pack(stored, encode(scheme, spec.shape, values.data)).front().data);
      continue;
    }
    std::vector<std::byte> bytes(spec.bytes());
    from_f32(spec.dtype, values.data, bytes);
    writer.add(bytes);
  }
  writer.finish();
}

}  // namespace bitwright::test
