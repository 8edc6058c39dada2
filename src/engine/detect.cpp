#include "engine/detect.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <initializer_list>

namespace bitwright {
namespace {

const Json kNone;
const Json& member(const Json& object, std::string_view name) {
  if (!object.is_object()) return kNone;
  const auto found = object.find(name);
  return found == object.end() ? kNone : *found;
}
/// The first of several names that is there and not null.
const Json& first_of(const Json& object, std::initializer_list<std::string_view> names) {
  for (const std::string_view name : names)
    if (const Json& value = member(object, name); !value.is_null()) return value;
  return kNone;
}
std::string text(const Json& value) { return value.is_string() ? value.get<std::string>() : std::string(); }
double number(const Json& value) { return value.is_number() ? value.get<double>() : 0; }
bool is_true(const Json& value) { return value.is_boolean() && value.get<bool>(); }
int64_t integer(const Json& value) {
  constexpr double kMost = 1 << 30;  // a group, a block: more is nonsense
  return value.is_number() && std::abs(value.get<double>()) < kMost ? static_cast<int64_t>(value.get<double>()) : 0;
}

void copy(const Json& from, Json& facts, std::initializer_list<std::string_view> names) {
  for (const std::string_view name : names)
    if (const Json& value = member(from, name); !value.is_null()) facts[std::string(name)] = value;
}

void add_skipped(const Json& names, DetectedQuantization& found) {
  if (!names.is_array()) return;
  for (const Json& name : names)
    if (name.is_string()) found.skipped.push_back(name.get<std::string>());
}

void set_bits(DetectedQuantization& found, double bits, int64_t group_size) {
  found.bits = bits;
  found.group_size = group_size;
  if (bits > 0 && bits == std::floor(bits)) found.facts["bits"] = static_cast<int>(bits);
  if (group_size != 0) found.facts["group_size"] = group_size;
}

// ---- one reader for each family of declarations ----

using Reader = void (*)(const Json& q, DetectedQuantization& found);

/// GPTQ, AWQ, AutoRound and what looks like them: integers in groups along the input.
void read_integers(const Json& q, DetectedQuantization& found) {
  set_bits(found, number(first_of(q, {"bits", "w_bit", "nbits"})),
           integer(first_of(q, {"group_size", "q_group_size"})));
  found.scheme = "int";
  copy(q, found.facts, {"sym", "desc_act", "zero_point", "version"});
  // GPTQModel: "-:pattern" leaves modules out
  for (const auto& [pattern, rule] : member(q, "dynamic").items())
    if (pattern.starts_with("-:")) found.skipped.push_back(pattern.substr(2));
}

void read_bitsandbytes(const Json& q, DetectedQuantization& found) {
  const bool eight = is_true(first_of(q, {"load_in_8bit", "_load_in_8bit"}));
  set_bits(found, eight ? 8 : 4, eight ? -1 : 64);
  found.facts.erase("group_size");
  found.scheme = eight ? "int" : text(member(q, "bnb_4bit_quant_type"));
  if (found.scheme.empty()) found.scheme = "fp4";  // transformers' default
  found.facts["load_in_8bit"] = eight;
  if (!eight) found.facts["quant_type"] = found.scheme;
  add_skipped(member(q, "llm_int8_skip_modules"), found);
}

void read_fp8(const Json& q, DetectedQuantization& found) {
  const Json& block = member(q, "weight_block_size");
  const bool blocks = block.is_array() && !block.empty();
  set_bits(found, 8, blocks ? integer(block.back()) : 0);
  found.facts.erase("group_size");
  found.scheme =
      blocks && block.size() == 2 ? fmt::format("fp8 block {}x{}", integer(block[0]), integer(block[1])) : "fp8";
  if (blocks) found.facts["weight_block_size"] = block;
  copy(q, found.facts, {"activation_scheme", "fmt", "scale_fmt"});
}

void read_mxfp4(const Json&, DetectedQuantization& found) {
  set_bits(found, 4, 32);  // the format's only block
  found.scheme = "mxfp4";
}

/// "w8a8_fp8", "wNa16" ...: how compressed-tensors' weights and activations make a scheme of an engine.
std::string compressed_scheme(const Json& weights, const Json& activations) {
  const int64_t bits = integer(member(weights, "num_bits")), act = integer(member(activations, "num_bits"));
  const bool is_float = member(weights, "type") == "float", act_float = member(activations, "type") == "float";
  const int64_t group = integer(member(weights, "group_size"));
  if (bits == 4 && is_float && group == 32) return act == 0 ? "w4a16_mxfp4" : "w4a4_mxfp4";
  if (bits == 4 && is_float) return act == 0 ? "w4a16_nvfp4" : "w4a4_nvfp4";
  if (bits == 8 && is_float && group == 32 && act != 0) return "w8a8_mxfp8";
  if (bits == 8 && is_float) return act == 0 ? "w8a16_fp8" : "w8a8_fp8";
  if (bits == 4 && act == 8) return act_float ? "w4a8_fp8" : "w4a8_int";
  if (bits == 8 && act == 8) return "w8a8_int8";
  return act == 0 ? "wNa16" : fmt::format("wNa{}", act);
}

void read_compressed_tensors(const Json& q, DetectedQuantization& found) {
  add_skipped(member(q, "ignore"), found);
  copy(q, found.facts, {"format"});
  if (const Json& kv = member(q, "kv_cache_scheme"); !kv.is_null()) found.facts["kv_cache_scheme"] = kv;
  const Json& groups = member(q, "config_groups");
  if (!groups.is_object()) return;
  std::vector<std::string> schemes;
  for (const Json& group : groups) {
    const Json& weights = member(group, "weights");
    if (!weights.is_object()) continue;
    const std::string scheme = compressed_scheme(weights, member(group, "input_activations"));
    if (std::ranges::find(schemes, scheme) == schemes.end()) schemes.push_back(scheme);
    if (schemes.size() > 1) continue;
    const std::string strategy = text(member(weights, "strategy"));
    set_bits(found, number(member(weights, "num_bits")),
             strategy == "channel" ? -1 : integer(member(weights, "group_size")));
    copy(weights, found.facts, {"num_bits", "type", "strategy"});
    if (const Json& act = member(group, "input_activations"); act.is_object())
      if (const std::string how = text(member(act, "strategy")); !how.empty()) found.facts["activation"] = how;
    if (const Json& symmetric = member(weights, "symmetric"); !symmetric.is_null()) found.facts["sym"] = symmetric;
    found.facts["scheme"] = scheme;
  }
  found.scheme = schemes.size() == 1 ? schemes[0] : schemes.empty() ? "" : "mixed";
  if (schemes.size() > 1) {
    set_bits(found, 0, 0);
    for (const char* name : {"scheme", "bits", "num_bits", "type", "strategy", "group_size"}) found.facts.erase(name);
  }
}

/// ModelOpt's names of formats: what they store per weight.
struct Algo {
  std::string_view name;
  double bits;
  int64_t group_size;
};
constexpr std::array<Algo, 12> kAlgos = {{{"FP8", 8, 0},
                                          {"FP8_PER_CHANNEL_PER_TOKEN", 8, -1},
                                          {"FP8_PB_WO", 8, 128},
                                          {"FP8_BLOCK_SCALES", 8, 128},
                                          {"MXFP8", 8, 32},
                                          {"NVFP4", 4, 16},
                                          {"NVFP4_AWQ", 4, 16},
                                          {"W4A16_NVFP4", 4, 16},
                                          {"W4A16_MXFP4", 4, 32},
                                          {"W4A16_AWQ", 4, 128},
                                          {"W4A8_AWQ", 4, 128},
                                          {"W8A16", 8, -1}}};

void read_modelopt(const Json& q, DetectedQuantization& found) {
  found.scheme = text(member(q, "quant_algo"));
  if (const auto* row = std::ranges::find(kAlgos, found.scheme, &Algo::name); row != kAlgos.end())
    set_bits(found, row->bits, row->group_size);
  if (const int64_t group = integer(member(q, "group_size")); group != 0) set_bits(found, found.bits, group);
  if (found.scheme.empty()) return;
  found.facts["quant_algo"] = found.scheme;
  std::string kv = text(member(q, "kv_cache_quant_algo"));
  const Json& scheme = member(q, "kv_cache_scheme");  // the same in config.json: a name, or bits and type
  if (scheme.is_string()) kv = text(scheme);
  if (scheme.is_object()) kv = integer(member(scheme, "num_bits")) == 4 ? "NVFP4" : "FP8";
  if (!kv.empty()) found.facts["kv_cache_quant_algo"] = kv;
  for (const auto& [layer, how] : member(q, "quantized_layers").items())
    if (text(member(how, "quant_algo")).find("NVFP4") != std::string::npos) found.facts["nvfp4_layers"] = true;
  add_skipped(member(q, "exclude_modules"), found);
  add_skipped(member(q, "ignore"), found);
}

void read_mlx(const Json& q, DetectedQuantization& found) {
  set_bits(found, number(member(q, "bits")), integer(member(q, "group_size")));
  found.scheme = text(member(q, "mode"));
  if (found.scheme.empty()) found.scheme = "affine";
  found.facts["mode"] = found.scheme;
  for (const auto& [layer, how] : q.items())
    if (how.is_boolean() && !how.get<bool>()) found.skipped.push_back(layer);
}

void read_hqq(const Json& q, DetectedQuantization& found) {
  // transformers nests quant_config.weight_quant_params; the library's own files have one for each part of the model
  std::vector<const Json*> parts;
  for (const Json* at : {&q, &member(q, "quant_config")})
    if (const Json& weights = member(*at, "weight_quant_params"); weights.is_object()) parts.push_back(&weights);
  if (q.is_object())
    for (const Json& part : q)
      if (const Json& weights = member(part, "weight_quant_params"); weights.is_object()) parts.push_back(&weights);
  if (parts.empty() && (q.contains("nbits") || q.contains("bits"))) parts.push_back(&q);
  found.scheme = "int";
  add_skipped(member(q, "skip_modules"), found);
  if (parts.empty()) return;
  const double bits = number(first_of(*parts[0], {"nbits", "bits"}));
  const bool mixed = std::ranges::any_of(parts, [&](const Json* p) {
    return number(first_of(*p, {"nbits", "bits"})) != bits;
  });
  set_bits(found, mixed ? 0 : bits, integer(member(*parts[0], "group_size")));
  if (mixed) found.scheme = "mixed";
}

void read_quanto(const Json& q, DetectedQuantization& found) {
  const std::string weights = text(member(q, "weights"));
  found.scheme = weights;
  const size_t digit = weights.find_first_of("0123456789");
  if (digit != std::string::npos)
    set_bits(found, weights[digit] - '0', weights.starts_with("int") && weights[digit] != '8' ? 128 : -1);
}

void read_aqlm(const Json& q, DetectedQuantization& found) {
  const double in = number(member(q, "in_group_size")), out = std::max(1.0, number(member(q, "out_group_size")));
  if (in > 0)
    set_bits(found, number(member(q, "nbits_per_codebook")) * number(member(q, "num_codebooks")) / (in * out),
             integer(member(q, "in_group_size")));
  found.scheme = "codebook";
  add_skipped(member(q, "linear_weights_not_to_quantize"), found);
}

/// MLC's "q4f16_1": bits, the type of the rest, the layout (0: column-major, groups of 40 or 32).
void read_mlc(const Json& q, DetectedQuantization& found) {
  const std::string name = text(q);
  found.scheme = name;
  if (name.size() > 1 && name[1] >= '1' && name[1] <= '8') set_bits(found, name[1] - '0', 32);
}

void read_eight_bits(const Json&, DetectedQuantization& found) {
  set_bits(found, 8, -1);
  found.scheme = "int";
}

void read_bitnet(const Json&, DetectedQuantization& found) {
  set_bits(found, std::log2(3.0), 0);
  found.scheme = "ternary";
}

void read_other(const Json& q, DetectedQuantization& found) {
  set_bits(found, number(first_of(q, {"bits", "nbits", "w_bit", "num_bits"})),
           integer(first_of(q, {"group_size", "q_group_size"})));
  copy(q, found.facts, {"sym"});
}

struct Method {
  std::string_view declared, name;
  Reader read;
};
constexpr std::array<Method, 27> kMethods = {{
    {"gptq", "gptq", read_integers},
    {"awq", "awq", read_integers},
    {"auto-round", "auto-round", read_integers},
    {"intel/auto-round", "auto-round", read_integers},
    {"auto_round", "auto-round", read_integers},
    {"bitsandbytes", "bitsandbytes", read_bitsandbytes},
    {"bitsandbytes_4bit", "bitsandbytes", read_bitsandbytes},
    {"bitsandbytes_8bit", "bitsandbytes", read_bitsandbytes},
    {"fp8", "fp8", read_fp8},
    {"fbgemm_fp8", "fbgemm_fp8", read_fp8},
    {"mxfp4", "mxfp4", read_mxfp4},
    {"compressed-tensors", "compressed-tensors", read_compressed_tensors},
    {"compressed_tensors", "compressed-tensors", read_compressed_tensors},
    {"modelopt", "modelopt", read_modelopt},
    {"modelopt_fp4", "modelopt_fp4", read_modelopt},
    {"mlx", "mlx", read_mlx},
    {"hqq", "hqq", read_hqq},
    {"quanto", "quanto", read_quanto},
    {"aqlm", "aqlm", read_aqlm},
    {"eetq", "eetq", read_eight_bits},
    {"mlc", "mlc", read_mlc},
    {"bitnet", "bitnet", read_bitnet},
    {"higgs", "higgs", read_other},
    {"spqr", "spqr", read_other},
    {"quark", "quark", read_compressed_tensors},
    {"default", "openvino", read_other},  // optimum-intel's name for its own
    {"openvino", "openvino", read_other},
}};

DetectedQuantization read_as(std::string_view declared, const Json& q, std::string evidence) {
  DetectedQuantization found;
  const auto* row = std::ranges::find(kMethods, declared, &Method::declared);
  found.method = row != kMethods.end() ? row->name : declared;
  found.evidence = std::move(evidence);
  (row != kMethods.end() ? row->read : read_other)(q, found);
  add_skipped(first_of(q, {"modules_to_not_convert", "ignored_layers"}), found);
  return found;
}

/// What a quantization_config that names no method must be, from its members.
std::string_view unnamed_method(const Json& q) {
  if (member(member(q, "producer"), "name") == "modelopt" || q.contains("quant_algo")) return "modelopt";
  if (is_true(member(q, "load_in_8bit")) || is_true(member(q, "load_in_4bit"))) return "bitsandbytes";
  if (q.contains("config_groups")) return "compressed-tensors";
  if (q.contains("weight_quant_params") || q.contains("attn_config")) return "hqq";
  if (q.contains("w_bit") || (q.contains("zero_point") && q.contains("bits"))) return "awq";
  if (q.contains("desc_act") || q.contains("damp_percent")) return "gptq";
  if (q.contains("in_group_size")) return "aqlm";
  if (q.contains("bits") && q.contains("group_size")) return "mlx";
  return {};
}

DetectedQuantization read_config(const Json& q, const std::string& evidence) {
  if (!q.is_object() || q.empty()) return {};
  std::string declared = text(member(q, "quant_method"));
  if (declared.empty()) declared = unnamed_method(q);
  return declared.empty() ? DetectedQuantization{} : read_as(declared, q, evidence);
}

/// config.json and what is shaped like it: quantization_config, at the top or of the text model, and older names.
DetectedQuantization from_config(const Json& config, const std::string& file) {
  // MLX writes the same block under both names; "quantization" marks it as MLX's
  if (const Json& q = member(config, "quantization");
      q.is_object() && q.contains("bits") && !q.contains("quant_method"))
    return read_as("mlx", q, file + " quantization");
  for (const Json* at : {&config, &member(config, "text_config"), &member(config, "llm_config")})
    for (const char* name : {"quantization_config", "compression_config"})
      if (DetectedQuantization found = read_config(member(*at, name), file + " " + name); !found.method.empty())
        return found;
  if (const Json& q = member(config, "quantization"); q.is_string()) return read_as("mlc", q, file + " quantization");
  if (const Json& q = member(config, "aqlm"); q.is_object()) return read_as("aqlm", q, file + " aqlm");
  return {};
}

DetectedQuantization from_modelopt(const Json& document, const std::string& file) {
  const Json& q = member(document, "quantization");
  return q.is_object() && q.contains("quant_algo") ? read_as("modelopt", q, file + " quantization")
                                                   : DetectedQuantization{};
}

DetectedQuantization from_whole(const Json& document, const std::string& file) { return read_config(document, file); }

DetectedQuantization from_modelslim(const Json&, const std::string& file) {
  return {.method = "modelslim", .bits = 0, .group_size = 0, .scheme = "", .evidence = file};
}

/// A module's name with "weights": "qint4" for each; modules that keep their weights say "none".
DetectedQuantization from_quanto_map(const Json& map, const std::string& file) {
  if (!map.is_object()) return {};
  std::vector<std::string> types;
  for (const Json& module : map)
    if (const std::string type = text(member(module, "weights")); type.starts_with('q'))
      types.push_back(type.substr(1));
  if (types.empty()) return {};
  DetectedQuantization found = read_as("quanto", {{"weights", types.front()}}, file);
  if (std::ranges::any_of(types, [&](const std::string& type) { return type != types.front(); })) {
    set_bits(found, 0, 0);
    found.scheme = "mixed";
  }
  return found;
}

/// Where the engines look, in their order.
struct Place {
  std::string_view file;
  DetectedQuantization (*read)(const Json& document, const std::string& file);
};
constexpr std::array<Place, 9> kPlaces = {{
    {"quant_model_description.json", from_modelslim},
    {"config.json", from_config},
    {"hf_quant_config.json", from_modelopt},
    {"quantize_config.json", from_whole},
    {"quant_config.json", from_whole},
    {"quantization_config.json", from_whole},
    {"openvino_config.json", from_config},
    {"mlc-chat-config.json", from_config},
    {"quanto_qmap.json", from_quanto_map},
}};

/// Hints in names, as people write them; the longer first.
std::string hint_of(std::string_view name) {
  constexpr std::array<std::string_view, 14> kHints = {"compressed-tensors",
                                                       "w4a16",
                                                       "w8a8",
                                                       "gptq",
                                                       "awq",
                                                       "gguf",
                                                       "nvfp4",
                                                       "mxfp4",
                                                       "fp8",
                                                       "fp4",
                                                       "bnb",
                                                       "hqq",
                                                       "exl2",
                                                       "mlx"};
  std::string lower(name);
  for (char& c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  for (const std::string_view hint : kHints)
    if (lower.find(hint) != std::string::npos) return std::string(hint == "bnb" ? "bitsandbytes" : hint);
  return {};
}

}  // namespace

DetectedQuantization detect_model_quantization(const ModelDocuments& documents, std::string_view name) {
  for (const Place& place : kPlaces) {
    const auto document = documents.find(place.file);
    if (document == documents.end()) continue;
    if (DetectedQuantization found = place.read(document->second, std::string(place.file)); !found.method.empty())
      return found;
  }
  DetectedQuantization nothing;
  nothing.hint = hint_of(name);
  return nothing;
}

Json model_facts(const Json& config) {
  Json facts = Json::object();
  const Json& inner = member(config, "text_config");
  const auto get = [&](std::initializer_list<std::string_view> names) -> const Json& {
    const Json& own = first_of(config, names);
    return own.is_null() ? first_of(inner, names) : own;
  };
  const auto put = [&](const char* name, const Json& value, auto is_good) {
    if (is_good(value)) facts[name] = value;
  };
  const auto is_count = [](const Json& v) {
    return v.is_number_unsigned() && v.get<uint64_t>() > 0 && v.get<uint64_t>() < (1ULL << 31);
  };
  const auto is_text = [](const Json& v) { return v.is_string(); };
  if (const Json& arch = member(config, "architectures"); arch.is_array() && !arch.empty())
    put("arch", arch[0], is_text);
  put("model_type", get({"model_type"}), is_text);
  put("layers", get({"num_hidden_layers", "n_layer", "num_layers", "n_layers"}), is_count);
  put("hidden_size", get({"hidden_size", "n_embd", "d_model"}), is_count);
  put("heads", get({"num_attention_heads", "n_head", "num_heads"}), is_count);
  put("kv_heads", get({"num_key_value_heads", "multi_query_group_num", "num_kv_heads"}), is_count);
  put("head_dim", get({"head_dim", "kv_channels"}), is_count);
  put("kv_lora_rank", get({"kv_lora_rank"}), is_count);
  put("qk_rope_head_dim", get({"qk_rope_head_dim"}), is_count);
  put("sliding_window", get({"sliding_window"}), is_count);
  put("context", get({"max_position_embeddings", "n_positions", "max_seq_len"}), is_count);
  put("vocabulary", get({"vocab_size"}), is_count);
  put("intermediate_size", get({"intermediate_size", "n_inner", "ffn_hidden_size"}), is_count);
  put("experts", get({"n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"}), is_count);
  put("moe_intermediate_size", get({"moe_intermediate_size", "expert_intermediate_size"}), is_count);
  put("shared_experts", get({"n_shared_experts"}), is_count);
  put("dense_layers", get({"first_k_dense_replace"}), is_count);
  put("q_lora_rank", get({"q_lora_rank"}), is_count);
  put("qk_nope_head_dim", get({"qk_nope_head_dim"}), is_count);
  put("v_head_dim", get({"v_head_dim"}), is_count);
  if (is_true(get({"tie_word_embeddings"}))) facts["tied"] = true;
  put("dtype", get({"torch_dtype", "dtype"}), is_text);
  if (const Json& types = get({"layer_types"}); types.is_array()) {
    const auto sliding = std::ranges::count(types, Json("sliding_attention"));
    if (sliding > 0) facts["sliding_layers"] = sliding;
    const auto linear = std::ranges::count(types, Json("linear_attention"));
    if (linear > 0) facts["linear_layers"] = linear;
  }
  if (!facts.contains("kv_heads") && is_true(get({"multi_query"}))) facts["kv_heads"] = 1;
  if (!facts.contains("head_dim") && facts.contains("hidden_size") && facts.contains("heads"))
    facts["head_dim"] = facts["hidden_size"].get<uint64_t>() / facts["heads"].get<uint64_t>();
  facts["moe"] = facts.contains("experts") && facts["experts"].get<uint64_t>() > 1;
  facts["mla"] = facts.contains("kv_lora_rank");
  return facts;
}

}  // namespace bitwright
