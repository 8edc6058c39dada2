#include "engine/detect.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <initializer_list>

#include "engine/condition.hpp"
#include "engine/model_facts.hpp"

namespace bitwright {
namespace {

const Json kNone;
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

void add_names(const Json& names, std::vector<std::string>& to) {
  if (!names.is_array()) return;
  for (const Json& name : names)
    if (name.is_string()) to.push_back(name.get<std::string>());
}
void add_skipped(const Json& names, DetectedQuantization& found) { add_names(names, found.skipped); }

/// A scale and no zero point; activations stay as they are.
void set_kind(DetectedQuantization& found, std::string_view mode, std::optional<bool> symmetric) {
  found.mode = mode;
  found.symmetric = symmetric;
}

void set_bits(DetectedQuantization& found, double bits, int64_t group_size) {
  constexpr double kMost = 64;
  if (!(bits <= kMost)) bits = 0;  // no weight's code
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
  copy(q, found.facts, {"sym", "desc_act", "zero_point", "version", "checkpoint_format"});
  set_kind(found, "weight-only", std::nullopt);
  if (const Json& sym = member(q, "sym"); sym.is_boolean()) found.symmetric = is_true(sym);
  if (const Json& zero = member(q, "zero_point"); zero.is_boolean()) found.symmetric = !is_true(zero);
  // GPTQModel: "-:pattern" leaves modules out
  for (const auto& [pattern, rule] : member(q, "dynamic").items())
    if (pattern.starts_with("-:")) found.skipped.push_back(pattern.substr(2));
}

/// AutoRound: integers unless data_type says floats; extra_config raises layers to 16 bits.
void read_autoround(const Json& q, DetectedQuantization& found) {
  read_integers(q, found);
  const std::string type = text(member(q, "data_type"));
  if (type.starts_with("mx_fp")) found.scheme = found.bits == 8 ? "mxfp8" : "mxfp4";
  if (type.starts_with("nv_fp")) found.scheme = "nvfp4";
  if (type.starts_with("fp8")) found.scheme = "fp8";
  if (found.scheme != "int") found.facts["scheme"] = found.scheme;
  constexpr double kWhole = 16;
  for (const auto& [layer, how] : member(q, "extra_config").items())
    if (number(member(how, "bits")) >= kWhole) found.skipped.push_back(layer);
}

void read_bitsandbytes(const Json& q, DetectedQuantization& found) {
  const bool eight = is_true(first_of(q, {"load_in_8bit", "_load_in_8bit"}));
  set_bits(found, eight ? 8 : 4, eight ? -1 : 64);
  found.facts.erase("group_size");
  found.scheme = eight ? "int" : text(member(q, "bnb_4bit_quant_type"));
  if (found.scheme.empty()) found.scheme = "fp4";  // transformers' default
  found.facts["load_in_8bit"] = eight;
  set_kind(found, eight ? "dynamic" : "weight-only", true);
  if (!eight) found.facts["quant_type"] = found.scheme;
  add_skipped(member(q, "llm_int8_skip_modules"), found);
}

/// Does ModelOpt's list of layers have some in NVFP4?
void find_nvfp4_layers(const Json& q, DetectedQuantization& found) {
  for (const auto& [layer, how] : member(q, "quantized_layers").items())
    if (text(member(how, "quant_algo")).find("NVFP4") != std::string::npos) found.facts["nvfp4_layers"] = true;
}

void read_fp8(const Json& q, DetectedQuantization& found) {
  const Json& block = member(q, "weight_block_size");
  const bool blocks = block.is_array() && !block.empty();
  set_bits(found, 8, blocks ? integer(block.back()) : 0);
  found.facts.erase("group_size");
  found.scheme =
      blocks && block.size() == 2 ? fmt::format("fp8 block {}x{}", integer(block[0]), integer(block[1])) : "fp8";
  if (blocks) found.facts["weight_block_size"] = block;
  copy(q, found.facts, {"activation_scheme", "fmt", "scale_fmt", "kv_cache_scheme"});
  set_kind(found, text(member(q, "activation_scheme")), true);
  // ModelOpt over fp8 weights: some layers, the experts, are quantized again; "ignore" are those that were not
  if (!q.contains("quant_algo")) return;
  copy(q, found.facts, {"quant_algo", "moe_quant_algo"});
  find_nvfp4_layers(q, found);
  add_skipped(member(q, "exclude_modules"), found);
  add_skipped(member(q, "ignore"), found);
}

void read_fbgemm(const Json& q, DetectedQuantization& found) {
  read_fp8(q, found);
  found.group_size = -1;  // a scale for each row
}

void read_mxfp4(const Json&, DetectedQuantization& found) {
  set_bits(found, 4, 32);  // the format's only block
  found.scheme = "mxfp4";
  set_kind(found, "weight-only", true);
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

/// Of one group: how activations are quantized, and whether there are zero points.
void read_kind(const Json& group, DetectedQuantization& found) {
  const Json& activations = member(group, "input_activations");
  const Json& weights = member(group, "weights");
  const Json& symmetric = member(weights, "symmetric");
  const Json& dynamic = member(activations, "dynamic");  // "local": scales of groups are found at run time
  const bool at_run_time = is_true(dynamic) || dynamic == "local";
  set_kind(found,
           !activations.is_object() ? "weight-only"
           : at_run_time            ? "dynamic"
                                    : "static",
           symmetric.is_boolean()               ? std::optional(is_true(symmetric))
           : member(weights, "type") == "float" ? std::optional(true)
                                                : std::nullopt);
}

void read_compressed_tensors(const Json& q, DetectedQuantization& found) {
  add_skipped(member(q, "ignore"), found);
  copy(q, found.facts, {"format"});
  if (const Json& kv = member(q, "kv_cache_scheme"); !kv.is_null()) found.facts["kv_cache_scheme"] = kv;
  const Json& groups = member(q, "config_groups");
  if (!groups.is_object()) return;
  std::vector<std::string> schemes;  // each with its bits: W4 and W8 beside each other are mixed as well
  for (const Json& group : groups) {
    const Json& weights = member(group, "weights");
    if (!weights.is_object()) continue;
    const std::string scheme = compressed_scheme(weights, member(group, "input_activations"));
    add_names(member(group, "targets"), found.affected);
    const std::string kind = fmt::format("{} {}", scheme, integer(member(weights, "num_bits")));
    if (std::ranges::find(schemes, kind) == schemes.end()) schemes.push_back(kind);
    if (schemes.size() > 1) continue;
    read_kind(group, found);
    const std::string strategy = text(member(weights, "strategy"));
    const Json& block = member(weights, "block_structure");
    const bool blocks = strategy == "block" && block.is_array() && !block.empty();
    set_bits(found, number(member(weights, "num_bits")),
             strategy == "channel" ? -1
             : blocks              ? integer(block.back())
                                   : integer(member(weights, "group_size")));
    copy(weights, found.facts, {"num_bits", "type", "strategy"});
    if (const Json& act = member(group, "input_activations"); act.is_object())
      if (const std::string how = text(member(act, "strategy")); !how.empty()) found.facts["activation"] = how;
    if (const Json& symmetric = member(weights, "symmetric"); !symmetric.is_null()) found.facts["sym"] = symmetric;
    found.facts["scheme"] = scheme;
  }
  found.scheme = schemes.size() > 1 ? "mixed" : text(member(found.facts, "scheme"));
  if (schemes.size() > 1) {
    set_bits(found, 0, 0);
    set_kind(found, "", std::nullopt);
    for (const char* name : {"scheme", "bits", "num_bits", "type", "strategy", "group_size"}) found.facts.erase(name);
  }
}

/// ModelOpt's names of formats: what they store per weight.
struct Algo {
  std::string_view name;
  double bits;
  int64_t group_size;
  std::string_view mode;
};
constexpr std::array<Algo, 12> kAlgos = {{{"FP8", 8, 0, "static"},
                                          {"FP8_PER_CHANNEL_PER_TOKEN", 8, -1, "dynamic"},
                                          {"FP8_PB_WO", 8, 128, "weight-only"},
                                          {"FP8_BLOCK_SCALES", 8, 128, "dynamic"},
                                          {"MXFP8", 8, 32, "dynamic"},
                                          {"NVFP4", 4, 16, "static"},
                                          {"NVFP4_AWQ", 4, 16, "static"},
                                          {"W4A16_NVFP4", 4, 16, "weight-only"},
                                          {"W4A16_MXFP4", 4, 32, "weight-only"},
                                          {"W4A16_AWQ", 4, 128, "weight-only"},
                                          {"W4A8_AWQ", 4, 128, "static"},
                                          {"W8A16", 8, -1, "weight-only"}}};

void read_modelopt(const Json& q, DetectedQuantization& found) {
  found.scheme = text(member(q, "quant_algo"));
  add_skipped(member(q, "exclude_modules"), found);
  add_skipped(member(q, "ignore"), found);
  if (const auto* row = std::ranges::find(kAlgos, found.scheme, &Algo::name); row != kAlgos.end()) {
    set_bits(found, row->bits, row->group_size);
    set_kind(found, row->mode, true);
  }
  if (const int64_t group = integer(member(q, "group_size")); group != 0 && found.bits != 0)
    set_bits(found, found.bits, group);
  if (!found.scheme.empty()) found.facts["quant_algo"] = found.scheme;
  std::string kv = text(member(q, "kv_cache_quant_algo"));
  const Json& scheme = member(q, "kv_cache_scheme");  // the same in config.json: a name, or bits and type
  if (scheme.is_string()) kv = text(scheme);
  if (scheme.is_object()) kv = integer(member(scheme, "num_bits")) == 4 ? "NVFP4" : "FP8";
  if (!kv.empty()) found.facts["kv_cache_quant_algo"] = kv;
  for (const auto& [layer, how] : member(q, "quantized_layers").items()) found.affected.push_back(layer);
  find_nvfp4_layers(q, found);
}

void read_mlx(const Json& q, DetectedQuantization& found) {
  set_bits(found, number(member(q, "bits")), integer(member(q, "group_size")));
  found.scheme = text(member(q, "mode"));
  if (found.scheme.empty()) found.scheme = "affine";
  found.facts["mode"] = found.scheme;
  set_kind(found, "weight-only", found.scheme != "affine");
  for (const auto& [layer, how] : q.items())
    if (how.is_boolean() && !how.get<bool>()) found.skipped.push_back(layer);
}

void read_hqq(const Json& q, DetectedQuantization& found) {
  // transformers nests quant_config.weight_quant_params; the library's own files have one for each part of the model
  std::vector<const Json*> parts;
  for (const Json* at : {&q, &member(q, "quant_config")}) {
    if (const Json& weights = member(*at, "weight_quant_params"); weights.is_object()) parts.push_back(&weights);
    if (!at->is_object()) continue;
    for (const auto& [name, part] : at->items())
      if (const Json& weights = member(part, "weight_quant_params"); weights.is_object() && name != "quant_config")
        parts.push_back(&weights);
  }
  if (parts.empty() && (q.contains("nbits") || q.contains("bits"))) parts.push_back(&q);
  found.scheme = "int";
  set_kind(found, "weight-only", false);
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
  if (weights.starts_with("float")) found.facts["scheme"] = "fp8";
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
  set_kind(found, "weight-only", std::nullopt);
  add_skipped(member(q, "linear_weights_not_to_quantize"), found);
}

/// MLC's "q4f16_1": bits, the type of the rest, the layout; 3 bits fill words of 32 by tens, in groups of 40.
void read_mlc(const Json& q, DetectedQuantization& found) {
  const std::string name = text(q);
  found.scheme = name;
  if (name.starts_with("e4m3") || name.starts_with("e5m2")) return set_bits(found, 8, 0);
  if (!name.starts_with('q') || name.size() < 2 || name[1] < '1' || name[1] > '8') return;
  set_bits(found, name[1] - '0', name.ends_with("_ft") ? -1 : name.ends_with("awq") ? 128 : name[1] == '3' ? 40 : 32);
}

/// VPTQ: indices into two codebooks stand for vectors of weights; each layer says so for itself.
void read_vptq(const Json& q, DetectedQuantization& found) {
  found.scheme = "codebook";
  set_kind(found, "weight-only", std::nullopt);
  const auto last = [](const Json& list) { return list.is_array() && !list.empty() ? integer(list.back()) : 0; };
  for (const Json& layer : member(q, "config_for_layers")) {
    const int64_t length = last(member(layer, "vector_lens"));
    if (length <= 0) continue;
    double bits = 0;
    for (const char* book : {"num_centroids", "num_res_centroids"})
      if (const int64_t centroids = last(member(layer, book)); centroids > 1)
        bits += std::log2(static_cast<double>(centroids));
    return set_bits(found, bits / static_cast<double>(length), length);
  }
}

void read_spqr(const Json& q, DetectedQuantization& found) {
  set_bits(found, number(member(q, "bits")), integer(member(q, "beta1")));
  found.scheme = "int";
  set_kind(found, "weight-only", std::nullopt);
}

void read_fp_quant(const Json& q, DetectedQuantization& found) {
  found.scheme = text(member(q, "forward_dtype"));
  found.facts["scheme"] = found.scheme;
  set_bits(found, 4, found.scheme == "nvfp4" ? 16 : 32);
}

/// Quark names its types: "fp8_e4m3", "fp4", "int4", "uint4", "int8", for all layers and for some by name.
void read_quark(const Json& q, DetectedQuantization& found) {
  if (q.contains("config_groups")) return read_compressed_tensors(q, found);
  const Json& all = member(q, "global_quant_config");
  // a list is a pipeline, fp8 and then int4: what is stored is its last
  const auto weight_of = [](const Json& config) -> const Json& {
    const Json& weight = member(config, "weight");
    return weight.is_array() && !weight.empty() ? weight.back() : weight;
  };
  const auto type_of = [&](const Json& config) { return text(member(weight_of(config), "dtype")); };
  const std::string type = type_of(all);
  found.scheme = type;
  add_skipped(member(q, "exclude"), found);
  for (const char* by : {"layer_quant_config", "layer_type_quant_config"})
    for (const Json& layer : member(q, by))
      if (const std::string own = type_of(layer); !own.empty() && own != type) found.scheme = "mixed";
  const size_t digit = type.find_first_of("0123456789");
  if (found.scheme == "mixed" || digit == std::string::npos) return;
  const Json& weight = weight_of(all);
  const bool rows = text(member(weight, "qscheme")) == "per_channel";
  set_bits(found, type[digit] - '0', rows ? -1 : integer(member(weight, "group_size")));
  found.facts["num_bits"] = static_cast<int>(found.bits);
  found.facts["type"] = type.starts_with("fp") ? "float" : "int";
  if (type.starts_with("fp4")) found.scheme = found.group_size == 16 ? "nvfp4" : "mxfp4";
  if (type.starts_with("fp4")) found.facts["scheme"] = found.scheme;
}

/// TorchAO: "int4_weight_only", or a configuration object's class, Int8DynamicActivationInt4WeightConfig: the last
/// number before "weight" is the weights'.
void read_torchao(const Json& q, DetectedQuantization& found) {
  const Json& type = member(q, "quant_type");
  const Json& whole = type.is_object() && type.contains("default") ? type["default"] : type;
  // a map from modules to configurations has one for all others
  const Json& others = member(member(member(whole, "_data"), "module_fqn_to_config"), "_default");
  const Json& config = others.is_object() ? others : whole;
  std::string name = config.is_object() ? text(member(config, "_type")) : text(config);
  const Json& data = config.is_object() ? member(config, "_data") : member(q, "quant_type_kwargs");
  for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  found.scheme = name.find("float8") != std::string::npos ? "fp8" : "int";
  const bool weight_only = name.find("only") != std::string::npos;
  set_kind(found,
           weight_only                                 ? "weight-only"
           : name.find("dynamic") != std::string::npos ? "dynamic"
                                                       : "",
           std::nullopt);
  if (found.scheme == "fp8") found.facts["scheme"] = "fp8";
  const Json& type_of_weights =
      member(data, "weight_dtype");  // "torch.int4" or an object around it, of Intx... classes
  const std::string packed = text(type_of_weights.is_object() ? member(type_of_weights, "_data") : type_of_weights);
  const std::string from =
      name.find("intx") != std::string::npos && !packed.empty() ? packed : name.substr(0, name.rfind("weight"));
  const size_t digit = from.find_last_of("12345678");
  if (digit == std::string::npos) return;
  const double bits = from[digit] - '0';
  if (name.starts_with("nvfp4")) {
    found.scheme = "nvfp4";
    found.facts["scheme"] = "nvfp4";
    return set_bits(found, bits, 16);
  }
  const Json& granularity = member(member(data, "weight_granularity"), "_data");
  const int64_t group = integer(member(data.contains("group_size") ? data : granularity, "group_size"));
  constexpr int64_t kInt4Group = 128, kDynamicGroup = 32;
  const bool dynamic = name.find("dynamic") != std::string::npos;
  set_bits(found, bits, group != 0 ? group : bits < 8 ? (dynamic ? kDynamicGroup : kInt4Group) : -1);
}

/// QuIP# and QTIP put their block at the top of config.json.
void read_quip(const Json& q, DetectedQuantization& found) {
  const std::string book = text(member(q, "codebook"));
  const double bits = number(member(q, "K"));
  found.scheme = "codebook";
  set_bits(found,
           bits > 0                                           ? bits
           : book.ends_with("3B")                             ? 3
           : book.ends_with("4B") || book.starts_with("HI4B") ? 4
                                                              : 2,
           integer(member(q, "codesz")));
}

/// What transformers.js' converter leaves beside its ONNX files.
void read_onnx(const Json& q, DetectedQuantization& found) {
  set_bits(found, 8, is_true(member(q, "per_channel")) ? -1 : 0);
  found.scheme = "int";
}

void read_mxfp8(const Json&, DetectedQuantization& found) {
  set_bits(found, 8, 32);
  found.scheme = "mxfp8";
  set_kind(found, "", true);
}

void read_w4afp8(const Json& q, DetectedQuantization& found) {
  const int64_t group = integer(member(q, "group_size"));
  set_bits(found, 4, group != 0 ? group : 128);
  found.scheme = "w4afp8";
  set_kind(found, "", true);
}

/// vLLM's and SGLang's names for 8 bits with a scale for each row.
void read_row_fp8(const Json&, DetectedQuantization& found) {
  set_bits(found, 8, -1);
  found.scheme = "fp8";
  set_kind(found, "dynamic", true);
}

void read_eight_bits(const Json& q, DetectedQuantization& found) {
  set_bits(found, 8, -1);
  found.scheme = text(member(q, "quant_dtype")).starts_with("f") ? "fp8" : "int";  // LMDeploy's smooth_quant has both
}

void read_bitnet(const Json&, DetectedQuantization& found) {
  set_bits(found, std::log2(3.0), 0);
  found.scheme = "ternary";
}

void read_other(const Json& q, DetectedQuantization& found) {
  set_bits(found, number(first_of(q, {"bits", "nbits", "w_bit", "wbits", "num_bits"})),
           integer(first_of(q, {"group_size", "q_group_size"})));
  copy(q, found.facts, {"sym"});
}

struct Method {
  std::string_view declared, name;
  Reader read;
};
constexpr std::array<Method, 43> kMethods = {{
    {"gptq", "gptq", read_integers},
    {"awq", "awq", read_integers},
    {"auto-round", "auto-round", read_autoround},
    {"intel/auto-round", "auto-round", read_autoround},
    {"auto_round", "auto-round", read_autoround},
    {"autoround", "auto-round", read_autoround},
    {"onnx", "onnx", read_onnx},
    {"inc", "auto-round", read_autoround},
    {"bitsandbytes", "bitsandbytes", read_bitsandbytes},
    {"bitsandbytes_4bit", "bitsandbytes", read_bitsandbytes},
    {"bitsandbytes_8bit", "bitsandbytes", read_bitsandbytes},
    {"fp8", "fp8", read_fp8},
    {"fbgemm_fp8", "fbgemm_fp8", read_fbgemm},
    {"mxfp8", "mxfp8", read_mxfp8},
    {"w8a8_fp8", "w8a8_fp8", read_row_fp8},
    {"ptpc_fp8", "ptpc_fp8", read_row_fp8},
    {"w8a8_int8", "w8a8_int8", read_eight_bits},
    {"smooth_quant", "smooth_quant", read_eight_bits},
    {"w4afp8", "w4afp8", read_w4afp8},
    {"fp_quant", "fp_quant", read_fp_quant},
    {"torchao", "torchao", read_torchao},
    {"vptq", "vptq", read_vptq},
    {"quip", "quip", read_quip},
    {"mxfp4", "mxfp4", read_mxfp4},
    {"compressed-tensors", "compressed-tensors", read_compressed_tensors},
    {"compressed_tensors", "compressed-tensors", read_compressed_tensors},
    {"modelopt", "modelopt", read_modelopt},
    {"modelopt_fp4", "modelopt_fp4", read_modelopt},
    {"modelopt_fp8", "modelopt_fp8", read_modelopt},
    {"modelopt_mixed", "modelopt_mixed", read_modelopt},
    {"mlx", "mlx", read_mlx},
    {"hqq", "hqq", read_hqq},
    {"quanto", "quanto", read_quanto},
    {"aqlm", "aqlm", read_aqlm},
    {"eetq", "eetq", read_eight_bits},
    {"mlc", "mlc", read_mlc},
    {"bitnet", "bitnet", read_bitnet},
    {"higgs", "higgs", read_other},
    {"spqr", "spqr", read_spqr},
    {"quark", "quark", read_quark},
    {"marlin", "marlin", read_integers},
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
  if (q.contains("per_model_config")) return "onnx";
  if (q.contains("wbits")) return "squeezellm";
  if (q.contains("bits") && q.contains("group_size")) return "mlx";
  return {};
}

DetectedQuantization read_config(const Json& q, const std::string& evidence) {
  if (!q.is_object() || q.empty()) return {};
  std::string declared = text(member(q, "quant_method"));
  if (declared.empty()) declared = unnamed_method(q);
  return declared.empty() ? DetectedQuantization{} : read_as(declared, q, evidence);
}

/// The block at the top of a config.json, or of the nearest model within a multimodal one; the text models first.
DetectedQuantization from_nested(const Json& config, const std::string& file, int depth) {
  for (const char* name : {"quantization_config", "compression_config"})
    if (DetectedQuantization found = read_config(member(config, name), file + " " + name); !found.method.empty())
      return found;
  constexpr int kDeepest = 4;
  if (depth == kDeepest || !config.is_object()) return {};
  for (const bool text_models : {true, false})
    for (const auto& [name, inner] : config.items()) {
      const bool is_text = name == "text_config" || name == "llm_config" || name == "language_config";
      if (is_text != text_models || !name.ends_with("_config")) continue;
      if (DetectedQuantization found = from_nested(inner, file, depth + 1); !found.method.empty()) return found;
    }
  return {};
}

/// config.json and what is shaped like it: quantization_config, at the top or of the text model, and older names.
DetectedQuantization from_config(const Json& config, const std::string& file) {
  // MLX writes the same block under both names; "quantization" marks it as MLX's
  if (const Json& q = member(config, "quantization");
      q.is_object() && q.contains("bits") && !q.contains("quant_method"))
    return read_as("mlx", q, file + " quantization");
  if (DetectedQuantization found = from_nested(config, file, 0); !found.method.empty()) return found;
  if (const Json& q = member(config, "quantization"); q.is_string()) return read_as("mlc", q, file + " quantization");
  if (const Json& q = member(config, "aqlm"); q.is_object()) return read_as("aqlm", q, file + " aqlm");
  if (const Json& q = member(config, "quip_params"); q.is_object()) return read_as("quip", q, file + " quip_params");
  return {};
}

DetectedQuantization from_modelopt(const Json& document, const std::string& file) {
  const Json& q = member(document, "quantization");
  return q.is_object() && q.contains("quant_algo") ? read_as("modelopt", q, file + " quantization")
                                                   : DetectedQuantization{};
}

DetectedQuantization from_whole(const Json& document, const std::string& file) { return read_config(document, file); }

/// MLC's file; the older ones name the quantization only at the end of the model's name, "Llama-2-7b-chat-hf-q4f16_1".
DetectedQuantization from_mlc(const Json& document, const std::string& file) {
  if (DetectedQuantization found = from_config(document, file); !found.method.empty()) return found;
  for (const char* key : {"local_id", "model_lib"}) {
    const std::string name = text(member(document, key));
    const size_t dash = name.rfind("-q");
    if (dash == std::string::npos || dash + 3 >= name.size() || name[dash + 2] < '0' || name[dash + 2] > '8') continue;
    return read_as("mlc", Json(name.substr(dash + 1)), file + " " + key);
  }
  return {};
}

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
    {"mlc-chat-config.json", from_mlc},
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

namespace {

int64_t fact(const Json& facts, const char* name) {
  const auto found = facts.find(name);
  return found == facts.end() ? 0 : found->get<int64_t>();
}

/// Layers of a model of experts that have none: listed, every so many, or at the start.
void add_dense_layers(const Json& frequency, const Json& listed, const Json& step, Json& facts) {
  int64_t dense = 0;
  if (frequency.is_array()) dense = std::ranges::count(frequency, Json(0));
  if (listed.is_array()) dense = std::max(dense, static_cast<int64_t>(listed.size()));
  if (const int64_t every = integer(step); every > 1) dense = fact(facts, "layers") - fact(facts, "layers") / every;
  if (dense > 0 && !facts.contains("dense_layers")) facts["dense_layers"] = dense;
}

/// How many layers attend within a window, and how many keep a state instead of keys and values.
template <class Get>
void add_layer_kinds(const Get& get, Json& facts) {
  const int64_t layers = fact(facts, "layers"), window = fact(facts, "sliding_window");
  const auto tell = [&](const char* name, int64_t number) {
    if (number > 0 && number <= layers) facts[name] = number;
  };
  const auto all_but_every = [&](int64_t every) { return every > 0 ? layers - layers / every : 0; };
  if (const Json& types = get({"layer_types"}); types.is_array() && !types.empty()) {
    const auto of = [&](const char* type) { return std::ranges::count(types, Json(type)); };
    tell("sliding_layers", of("sliding_attention") + of("chunked_attention"));
    tell("linear_layers", of("linear_attention") + of("mamba"));
    if (const int64_t chunk = integer(get({"attention_chunk_size"})); chunk > 0 && of("chunked_attention") > 0)
      facts["sliding_window"] = chunk;
    return;
  }
  if (const Json& pattern = get({"hybrid_override_pattern"}); pattern.is_string())  // Nemotron-H: M mamba, * attention
    return tell("linear_layers", layers - std::ranges::count(pattern.get_ref<const std::string&>(), '*'));
  if (const Json& pattern = get({"hybrid_layer_pattern"}); pattern.is_array())
    return tell("sliding_layers", std::ranges::count(pattern, Json(1)));
  if (facts.contains("linear_value_heads"))
    return tell("linear_layers", all_but_every(integer(get({"full_attention_interval"}))));
  const Json& use = get({"use_sliding_window"});
  if (use.is_boolean() && !use.get<bool>()) facts.erase("sliding_window");
  if (window == 0 || !facts.contains("sliding_window")) return;
  const std::string type = text(get({"model_type"}));
  const int64_t every = integer(get({"sliding_window_pattern"}));
  if (is_true(use)) return tell("sliding_layers", layers - std::min(layers, integer(get({"max_window_layers"}))));
  if (every > 1) return tell("sliding_layers", all_but_every(every));
  if (type == "gemma2") return tell("sliding_layers", all_but_every(2));
  if (type.starts_with("gemma3")) return tell("sliding_layers", all_but_every(6));
  for (const char* all : {"mistral", "mixtral", "phi3", "starcoder2"})
    if (type == all) tell("sliding_layers", layers);
}

/// What transformers' class of a model type means and its config.json need not say.
void add_family(std::string_view type, const Json& tied, Json& facts) {
  constexpr std::array<std::string_view, 12> kUngated = {"gpt2",        "gpt_neo", "gpt_neox",   "gptj",
                                                         "gpt_bigcode", "opt",     "phi",        "falcon",
                                                         "bloom",       "mpt",     "starcoder2", "nemotron"};
  constexpr std::array<std::string_view, 9> kTied = {"gpt2",   "gpt_neo", "gpt_bigcode", "opt",   "bloom",
                                                     "falcon", "mpt",     "gemma",       "gemma2"};
  const auto is_one_of = [&](const auto& types) { return std::ranges::find(types, type) != types.end(); };
  if (is_one_of(kUngated)) facts["ungated"] = true;
  if (tied.is_null() && (is_one_of(kTied) || type.starts_with("gemma3"))) facts["tied"] = true;
  if (type == "gpt2" || type == "opt" || type == "gpt_bigcode") facts["learned_positions"] = true;
  if (!facts.contains("intermediate_size") && facts.contains("ungated") && facts.contains("hidden_size"))
    facts["intermediate_size"] = 4 * fact(facts, "hidden_size");
  if (type == "qwen" && facts.contains("intermediate_size"))  // counts gate and up together
    facts["intermediate_size"] = fact(facts, "intermediate_size") / 2;
}

}  // namespace

void add_derived_facts(Json& facts) {
  if (!facts.contains("head_dim") && facts.contains("hidden_size") && facts.contains("heads"))
    facts["head_dim"] = facts["hidden_size"].get<uint64_t>() / facts["heads"].get<uint64_t>();
  facts["moe"] = facts.contains("experts") && facts["experts"].get<uint64_t>() > 1;
  facts["mla"] = facts.contains("kv_lora_rank");
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
  put("experts_per_token", get({"num_experts_per_tok", "top_k_experts", "moe_topk"}), is_count);
  put("shared_intermediate_size", get({"shared_expert_intermediate_size", "shared_intermediate_size"}), is_count);
  put("index_head_dim", get({"index_head_dim"}), is_count);
  put("index_heads", get({"index_n_heads"}), is_count);
  put("linear_key_heads", get({"linear_num_key_heads"}), is_count);
  put("linear_value_heads", get({"linear_num_value_heads"}), is_count);
  put("linear_key_dim", get({"linear_key_head_dim"}), is_count);
  put("linear_value_dim", get({"linear_value_head_dim"}), is_count);
  put("linear_kernel", get({"linear_conv_kernel_dim"}), is_count);
  put("sliding_kv_heads", get({"swa_num_key_value_heads"}), is_count);
  put("full_kv_heads", get({"num_global_key_value_heads"}), is_count);
  put("full_head_dim", get({"global_head_dim"}), is_count);
  if (is_true(get({"attn_output_gate"}))) facts["output_gate"] = true;
  if (is_true(get({"enable_moe_block"}))) facts["dense_beside_experts"] = true;
  add_dense_layers(get({"moe_layer_freq"}), get({"mlp_only_layers"}), get({"decoder_sparse_step"}), facts);
  add_layer_kinds(get, facts);
  add_family(text(get({"model_type"})), get({"tie_word_embeddings"}), facts);
  if (!facts.contains("kv_heads") && is_true(get({"multi_query"}))) facts["kv_heads"] = 1;
  add_derived_facts(facts);
  return facts;
}

}  // namespace bitwright
