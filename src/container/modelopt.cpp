#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "base/bits.hpp"
#include "base/error.hpp"
#include "container/container.hpp"
#include "container/float_rounding.hpp"
#include "container/stored_arrays.hpp"

namespace bitwright {
namespace {

// FP8                        LAYER.weight F8_E4M3 [N, K], weight_scale F32 [], input_scale F32 []
// FP8_PER_CHANNEL_PER_TOKEN  likewise, weight_scale [N]; activations are scaled as they come
// FP8_PB_WO                  likewise, weight_scale [N/128, 1, K/128, 1]
// MXFP8                      likewise, weight_scale U8 exponents [N, K/32]
// NVFP4                      LAYER.weight U8 [N, K/2], the first of two codes in the low nibble; weight_scale F8_E4M3
//                            [N, K/16], weight_scale_2 F32 [] that multiplies it; input_scale F32 [], which the scales
//                            of 16 activations are multiplied with
// W4A16_NVFP4                likewise without input_scale: activations stay in floats
// KV cache: k_proj.k_scale, v_proj.v_scale F32 [].
// hf_quant_config.json's "quantization", and config.json's "quantization_config", say which; MIXED_PRECISION: for each
// layer, in "quantized_layers".

constexpr std::string_view kMethod = "modelopt", kFile = "hf_quant_config.json", kMixed = "MIXED_PRECISION";
constexpr std::string_view kWeight = "weight", kScale = "weight_scale", kScale2 = "weight_scale_2";
constexpr std::string_view kInput = "input_scale";
constexpr std::array<std::string_view, 1> kFiles = {kFile};
constexpr std::array<std::string_view, 5> kCache = {"k_scale", "v_scale", "kv_scale", "q_scale", "prob_scale"};
constexpr std::string_view kVersion = "0.45.0";  ///< of ModelOpt, whose files these are like
constexpr int64_t kGroup = 16, kMicro = 32, kBlock = 128;

Scheme e4m3(const Grouping& grouping, const Scheme& scales = plain(DType::f32)) {
  return {.element = &float_element(DType::f8_e4m3), .scale = parameter(grouping, scales)};
}
Scheme nvfp4() {
  return {.element = find_element("float4_e2m1"),
          .scale = parameter(Grouping::along(kGroup), e4m3(Grouping::tensor()))};
}
Grouping blocks() { return {.kind = Grouping::Kind::block, .block_rows = kBlock, .block_columns = kBlock}; }

/// How ModelOpt stores a layer: a row of a table.
struct Algorithm {
  std::string_view name;
  Scheme weights;
  std::optional<ActivationScheme> input{};  ///< its scale is that of the layer
  bool stores_input = false;                ///< is that scale stored?
};

std::span<const Algorithm> algorithms() {
  static const std::array<Algorithm, 6> all = {
      {{"FP8", e4m3(Grouping::tensor()), ActivationScheme{.scheme = e4m3(Grouping::tensor()), .dynamic = false}, true},
       {"FP8_PER_CHANNEL_PER_TOKEN", e4m3(Grouping::channel()), ActivationScheme{.scheme = e4m3(Grouping::channel())}},
       {"FP8_PB_WO", e4m3(blocks())},
       {"MXFP8", e4m3(Grouping::along(kMicro), plain(DType::f8_e8m0)),
        ActivationScheme{.scheme = e4m3(Grouping::along(kMicro), plain(DType::f8_e8m0))}},
       {"NVFP4", nvfp4(), ActivationScheme{.scheme = nvfp4()}, true},
       {"W4A16_NVFP4", nvfp4()}}};
  return all;
}

bool is_fp4(const Scheme& scheme) { return scheme.element->bits == 4; }

/// The row that stores a layer so; null: none.
const Algorithm* algorithm_of(const StoredTensor& t) {
  const bool has_input = t.linear.input && t.linear.input->scale != nullptr;
  for (const Algorithm& row : algorithms())
    if (row.weights == t.scheme && row.stores_input == has_input) return &row;
  return nullptr;
}

std::string beside(const StoredTensor& t, std::string_view array) {
  return prefix_of_weight(t.name) + std::string(array);
}

// ---- arrays ----

ArraySpec scale_array(const StoredTensor& t) {
  const Scheme& scales = *t.scheme.scale->scheme;
  const Grouping& grouping = t.scheme.scale->grouping;
  ArraySpec spec = {
      .name = beside(t, kScale), .dtype = *dtype_of(*scales.element), .shape = parameter_shape(grouping, t.shape)};
  if (spec.dtype == DType::f8_e8m0) spec.dtype = DType::u8;
  if (grouping.kind == Grouping::Kind::tensor) spec.row_axis = ArraySpec::kNoRows;
  if (grouping == Grouping::channel()) spec.shape = {t.shape[0]};
  if (grouping.kind == Grouping::Kind::block) spec.shape = {spec.shape[0], 1, spec.shape[1], 1};
  return spec;
}

std::vector<ArraySpec> layout(const StoredTensor& t) {
  BW_ASSERT(t.shape.size() == 2);
  std::vector<ArraySpec> specs = {is_fp4(t.scheme) ? ArraySpec{t.name, DType::u8, {t.shape[0], t.shape[1] / 2}}
                                                   : ArraySpec{t.name, DType::f8_e4m3, t.shape},
                                  scale_array(t)};
  if (is_fp4(t.scheme))
    specs.push_back({.name = beside(t, kScale2), .dtype = DType::f32, .shape = {}, .row_axis = ArraySpec::kNoRows});
  if (t.linear.input && t.linear.input->scale != nullptr)
    specs.push_back(static_scale_array(beside(t, kInput), *t.linear.input->scale));
  return specs;
}

std::vector<NamedArray> pack(const StoredTensor& t, const QuantizedTensor& values) {
  std::vector<std::vector<std::byte>> data;
  if (is_fp4(t.scheme))
    data.push_back(pack_bits(values.codes, 4));
  else
    data.push_back(values.codes);
  data.push_back(values.scale->codes);
  if (is_fp4(t.scheme)) data.push_back(values.scale->scale->codes);
  if (t.linear.input && t.linear.input->scale != nullptr) data.push_back(t.linear.input->scale->codes);
  std::vector<NamedArray> arrays;
  for (ArraySpec& spec : layout(t)) {
    std::vector<std::byte>& bytes = data.at(arrays.size());
    BW_ASSERT(bytes.size() == spec.bytes());
    arrays.push_back({std::move(spec), std::move(bytes)});
  }
  return arrays;
}

QuantizedTensor unpack(const StoredTensor& t, const CheckpointView& checkpoint) {
  const std::span<const std::byte> stored = checkpoint.bytes(t.name);
  QuantizedTensor values = {.scheme = t.scheme, .shape = t.shape};
  if (is_fp4(t.scheme))
    values.codes = unpack_bits(stored, 4, static_cast<uint64_t>(element_count(t.shape)));
  else
    values.codes.assign(stored.begin(), stored.end());
  const Scheme& scales = *t.scheme.scale->scheme;
  const Shape groups = parameter_shape(t.scheme.scale->grouping, t.shape);
  const auto scale = numbers(scales, groups, checkpoint.bytes(beside(t, kScale)));
  if (!scales.is_plain())
    scale->scale = numbers(*scales.scale->scheme, parameter_shape(scales.scale->grouping, groups),
                           checkpoint.bytes(beside(t, kScale2)));
  values.scale = scale;
  return values;
}

// ---- reading ----

bool is_text(const Json& object, const char* key) {
  return object.is_object() && object.contains(key) && object[key].is_string();
}

/// What says how the model is quantized: config.json's member, else that of the file of its own. Null: nothing does.
const Json* declared(const CheckpointView& checkpoint) {
  const auto own = [](const Json& file, const char* key) -> const Json* {
    const auto found = file.is_object() ? file.find(key) : file.end();
    return found != file.end() && is_text(*found, "quant_algo") ? &*found : nullptr;
  };
  const Json* const config = own(checkpoint.config, "quantization_config");
  const bool is_other = config != nullptr && is_text(*config, "quant_method") &&
                        !(*config)["quant_method"].get<std::string>().starts_with(kMethod);
  if (config != nullptr && !is_other) return config;
  return own(checkpoint.document(kFile), "quantization");
}

bool detect(const CheckpointView& checkpoint) { return declared(checkpoint) != nullptr; }

/// ModelOpt writes some names in small letters.
std::string upper_case(std::string text) {
  for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return text;
}

class LayerReader {
 public:
  LayerReader(const CheckpointView& checkpoint, const Json& config, const std::string& prefix)
      : checkpoint_(checkpoint), config_(config) {
    t_.name = prefix + std::string(kWeight);
  }

  StoredTensor read() {
    const Algorithm& row = find_algorithm();
    const ArraySpec& weight = need_array(checkpoint_, t_.name, t_.name);
    if (weight.shape.size() != 2) fail("it is no matrix: " + to_string(weight.shape));
    if (element_count(weight.shape) == 0) fail("it is empty");
    t_.shape = weight.shape;
    if (is_fp4(row.weights)) {
      if (t_.shape[1] > INT64_MAX / 2 / t_.shape[0]) fail("its shape overflows");
      t_.shape[1] *= 2;
    }
    t_.scheme = row.weights;
    t_.value_dtype = model_dtype(checkpoint_.config);
    if (checkpoint_.arrays.contains(prefix() + "pre_quant_scale"))
      unsupported("its inputs are scaled (pre_quant_scale, of AWQ)");
    t_.linear.input = row.input;
    if (row.stores_input) t_.linear.input->scale = static_scale(checkpoint_, t_.name, prefix() + std::string(kInput));
    if (const Fit fits = fit_shape(t_.scheme, t_.shape); fits.verdict == Verdict::impossible) fail(fits.reason);
    for (const ArraySpec& spec : layout(t_)) {
      check_stored(checkpoint_, t_.name, as_found(spec));
      t_.arrays.push_back(spec.name);
    }
    return std::move(t_);
  }

  /// The owner's grounds for refusing a shape.
  static Fit fit_shape(const Scheme& scheme, const Shape& shape) {
    const Grouping& grouping = scheme.scale->grouping;
    const bool whole = grouping.size == 0 || shape[1] % grouping.size == 0;
    if (!whole)
      return {Verdict::impossible, fmt::format("ModelOpt wants rows of whole groups, {} columns are no multiple of {}",
                                               shape[1], grouping.size)};
    return {Verdict::exact};
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { bad_container(checkpoint_, t_.name, why); }
  [[noreturn]] void unsupported(const std::string& why) const {
    throw Error({.code = "unsupported-container",
                 .what = "cannot read model",
                 .where = checkpoint_.where,
                 .why = fmt::format("quantized tensor '{}': {}", printable(t_.name), why),
                 .fix = "of ModelOpt's formats the table of `bitwright formats` is supported"});
  }
  std::string prefix() const { return prefix_of_weight(t_.name); }

  /// Some files have blocks as [N/128, K/128], rows as [N, 1]; their bytes are the same.
  ArraySpec as_found(ArraySpec spec) const {
    const auto found = checkpoint_.arrays.find(spec.name);
    if (spec.name != beside(t_, kScale) || found == checkpoint_.arrays.end()) return spec;
    if (found->second.shape == parameter_shape(t_.scheme.scale->grouping, t_.shape)) spec.shape = found->second.shape;
    return spec;
  }

  const Algorithm& find_algorithm() const {
    const std::string name = algorithm_name();
    for (const Algorithm& row : algorithms())
      if (row.name == name) return row;
    unsupported(fmt::format("it is stored as '{}'", printable(name)));
  }

  std::string algorithm_name() const {
    std::string name = upper_case(config_["quant_algo"].get<std::string>());
    if (name != kMixed) return name;
    std::string layer = prefix();
    if (!layer.empty()) layer.pop_back();
    const auto layers = config_.find("quantized_layers");
    if (layers == config_.end() || !layers->is_object()) fail("quantized_layers is missing");
    const auto found = layers->find(layer);
    if (found == layers->end() || !is_text(*found, "quant_algo")) fail("quantized_layers does not name it");
    return upper_case((*found)["quant_algo"].get<std::string>());
  }

  const CheckpointView& checkpoint_;
  const Json& config_;
  StoredTensor t_;
};

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  const Json& config = *declared(checkpoint);
  std::vector<StoredTensor> out;
  for (const auto& [array, spec] : checkpoint.arrays)
    if (array == kScale || array.ends_with("." + std::string(kScale)))
      out.push_back(LayerReader(checkpoint, config, array.substr(0, array.size() - kScale.size())).read());
  constexpr std::array kTypes = {DType::f8_e4m3, DType::u8};
  check_no_weight_is_left(checkpoint, out, kTypes);
  return out;
}

QuantizedModel model(const CheckpointView& checkpoint) {
  const Json& config = *declared(checkpoint);
  QuantizedModel found = {.skipped = string_list(config, "ignore")};
  if (found.skipped.empty()) found.skipped = string_list(config, "exclude_modules");
  for (const auto& [array, spec] : checkpoint.arrays)
    if (std::ranges::find(kCache, std::string_view(array).substr(array.rfind('.') + 1)) != kCache.end())
      found.arrays.push_back(array);
  const bool four = is_text(config, "kv_cache_quant_algo") && config["kv_cache_quant_algo"] == "NVFP4";
  const bool named = config.contains("kv_cache_quant_algo") && !config["kv_cache_quant_algo"].is_null();
  const bool described = config.contains("kv_cache_scheme") && !config["kv_cache_scheme"].is_null();
  if (named || described || !found.arrays.empty())
    found.kv_cache = ActivationScheme{.scheme = four ? nvfp4() : e4m3(Grouping::tensor()), .dynamic = four};
  return found;
}

// ---- what it holds ----

Fit fit(const Scheme& scheme, const Shape& shape) {
  if (shape.size() != 2) return {Verdict::impossible, "ModelOpt holds the matrices of linear layers"};
  const auto known = [&](const Algorithm& row) { return row.weights == scheme; };
  if (!std::ranges::any_of(algorithms(), known))
    return {Verdict::impossible,
            "ModelOpt holds e4m3 with a scale a tensor, row or block of 128x128, NVFP4 and MXFP8; scales of float32"};
  return LayerReader::fit_shape(scheme, shape);
}

/// An engine that multiplies in fp8 by one scale a tensor needs that of the activations, too.
Fit fit_model(std::span<const StoredTensor> tensors) {
  for (const StoredTensor& t : tensors)
    if (algorithm_of(t) == nullptr)
      return {Verdict::impossible,
              fmt::format("{}: ModelOpt's FP8 with one scale a tensor has a calibrated scale of the activations, too; "
                          "--granularity channel or block needs none",
                          t.name)};
  return {Verdict::exact};
}

// ---- what quantize writes ----

constexpr SchemeChoice floats(std::string_view granularity, int64_t size = 0) {
  return {.quant_type = "e4m3",
          .bits = 8,
          .symmetric = true,
          .granularity = granularity,
          .group_size = size,
          .scale_dtype = "float32"};
}
constexpr std::array<SchemeChoice, 4> kChoices = {{{.quant_type = "nvfp4",
                                                    .bits = 4,
                                                    .symmetric = true,
                                                    .group_size = kGroup,
                                                    .scale_dtype = "float32",
                                                    .nested_scales = true},
                                                   floats("channel"),
                                                   floats("block", kBlock),
                                                   floats("tensor")}};

/// What ModelOpt does not hold is made all the same, for `fit` to refuse.
Scheme make_scheme(const SchemeChoice& choice, DType weight) {
  const Scheme scales = plain(scale_dtype_of(choice, weight));
  Scheme scheme = choice.quant_type == "nvfp4"
                      ? nvfp4()
                      : e4m3(Grouping::channel(), choice.nested_scales ? e4m3(Grouping::tensor()) : scales);
  Grouping& grouping = scheme.scale->grouping;
  if (choice.granularity == "tensor") grouping = Grouping::tensor();
  if (choice.granularity == "channel") grouping = Grouping::channel();
  if (choice.granularity == "group") grouping = Grouping::along(choice.group_size);
  if (choice.granularity == "flat") grouping = Grouping::flat(choice.group_size);
  if (choice.granularity == "block")
    grouping = {.kind = Grouping::Kind::block, .block_rows = choice.group_size, .block_columns = choice.group_size};
  return scheme;
}

/// to_quantized_weight: the largest over 448. A scale of a tensor is a number to torch, and leaves the quotient in the
/// weight's type.
Fp8Rule::Scale over_448(float largest, DType /*weight*/) {
  const float scale = largest / 448;
  return scale > 0 ? Fp8Rule::Scale{scale, scale} : Fp8Rule::Scale{1, 1};  // where ModelOpt would write NaN
}
constexpr Fp8Rule kTensor = {.scale = over_448, .divides = true, .in_weight_type = true};
constexpr Fp8Rule kParts = {.scale = over_448, .divides = true};

QuantizedTensor encode_fused(const Scheme& scheme, const Shape& shape, WeightView weight, float largest) {
  if (is_fp4(scheme)) return encode_nvfp4(scheme, shape, weight, largest);
  const bool whole = scheme.scale->grouping.kind == Grouping::Kind::tensor;
  return encode_fp8(scheme, shape, weight, whole ? kTensor : kParts);
}

QuantizedTensor encode(const Scheme& scheme, const Shape& shape, WeightView weight) {
  return encode_fused(scheme, shape, weight, 0);
}

/// As config_groups says it; null: floats.
OrderedJson arguments_of(const std::optional<Scheme>& scheme, bool dynamic) {
  if (!scheme) return nullptr;
  OrderedJson json = {{"dynamic", dynamic}, {"num_bits", scheme->element->bits}, {"type", "float"}};
  if (scheme->scale->grouping.size != 0) json["group_size"] = scheme->scale->grouping.size;
  return json;
}

/// hf_quant_config.json, and the same in config.json.
void write_metadata(const WrittenModel& model, const Metadata& out) {
  BW_ASSERT(!model.tensors.empty());
  OrderedJson layers = OrderedJson::object();
  std::vector<const Algorithm*> used;
  std::map<std::string_view, OrderedJson> modules;
  for (const StoredTensor& t : model.tensors) {
    const Algorithm& row = *algorithm_of(t);
    if (std::ranges::find(used, &row) == used.end()) used.push_back(&row);
    std::string layer = prefix_of_weight(t.name);
    if (!layer.empty()) layer.pop_back();
    OrderedJson& how = layers[layer] = {{"quant_algo", row.name}};
    if (t.scheme.scale->grouping.size != 0) how["group_size"] = t.scheme.scale->grouping.size;
    modules[row.name].push_back(layer);
  }
  const bool mixed = used.size() > 1;
  const OrderedJson algorithm = mixed ? kMixed : used.front()->name;
  const OrderedJson producer = {{"name", kMethod}, {"version", kVersion}};
  OrderedJson file = {{"quant_algo", algorithm}, {"kv_cache_quant_algo", nullptr}};
  if (!mixed && is_fp4(used.front()->weights)) file["group_size"] = kGroup;
  if (mixed) file["quantized_layers"] = layers;
  file["exclude_modules"] = model.kept;
  out.files[std::string(kFile)] = {{"producer", producer}, {"quantization", std::move(file)}};

  OrderedJson config = OrderedJson::object();
  for (const Algorithm* row : used) {
    OrderedJson& group = config["config_groups"][fmt::format("group_{}", config["config_groups"].size())];
    if (row->input) group["input_activations"] = arguments_of(row->input->scheme, row->input->dynamic);
    group["weights"] = arguments_of(row->weights, false);
    group["targets"] = mixed ? modules.at(row->name) : OrderedJson{"Linear"};
  }
  if (mixed) config["quantized_layers"] = std::move(layers);
  config["ignore"] = model.kept;
  config["quant_algo"] = algorithm;
  config["producer"] = producer;
  config["quant_method"] = kMethod;
  out.config["quantization_config"] = std::move(config);
}

}  // namespace

extern const Container modelopt_container;
const Container modelopt_container = {
    .name = "modelopt",
    .summary = "NVFP4, FP8 by tensor, row and block, MXFP8, mixed by layer; calibrated activations, KV cache",
    .source =
        "TensorRT Model Optimizer 0.45, torch/export and torch/quantization/qtensor; vLLM quantization/modelopt.py",
    .only_read = "MXFP8, calibrated activations (FP8 with a scale a tensor, NVFP4), scales of the KV cache",
    .rounding =
        "NVFP4 as NVFP4QTensor, ties to even; e4m3 by the largest magnitude over 448; zeros get the scale 1, where "
        "ModelOpt writes NaN",
    .detect = detect,
    .list = list,
    .model = model,
    .fit = fit,
    .layout = layout,
    .pack = pack,
    .unpack = unpack,
    .write_metadata = write_metadata,
    .by_rows = true,
    .fit_model = fit_model,
    .choices = kChoices,
    .make_scheme = make_scheme,
    .encode = encode,
    .encode_fused = encode_fused,
    .files = kFiles};

}  // namespace bitwright
