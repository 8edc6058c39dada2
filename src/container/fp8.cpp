#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.hpp"
#include "container/container.hpp"
#include "container/float_rounding.hpp"
#include "container/stored_arrays.hpp"

namespace bitwright {
namespace {

// WEIGHT F8_E4M3 (or F8_E5M2) [N, K], of experts that are one tensor [E, N, K]; what its codes are multiplied with:
//   WEIGHT_scale_inv [ceil(N / b), ceil(K / b)] of blocks ("weight_block_size": [b, b]), [] of a tensor: transformers,
//   DeepSeek. F32; BF16 in some, F8_E8M0 where "scale_fmt" is "ue8m0".
//   WEIGHT_scale F32 [] or [1] of a tensor (AutoFP8, vLLM), [N, 1] of rows ("quant_method": "fbgemm_fp8").
// Activations: LAYER.input_scale (vLLM) or LAYER.activation_scale (transformers) [] where they are static, else scales
// come from the values; LAYER.input_scale_ub [1], the largest scale of a token, in some of fbgemm.

constexpr std::string_view kInverse = "_scale_inv", kScale = "_scale";
constexpr std::string_view kWeightScale = "weight_scale";
constexpr std::array<std::string_view, 2> kStatic = {"input_scale", "activation_scale"};
constexpr std::string_view kUpperBound = "input_scale_ub";
constexpr std::array<std::string_view, 5> kCache = {"k_scale", "v_scale", "kv_scale", "q_scale", "prob_scale"};
constexpr std::string_view kFp8 = "fp8", kFbgemm = "fbgemm_fp8";
constexpr int64_t kBlock = 128;
constexpr double kUpperBoundOfTokens = 1200;  ///< transformers' and FBGEMM's default

bool is_fp8(DType dtype) { return dtype == DType::f8_e4m3 || dtype == DType::f8_e5m2; }

/// quantization_config where it is of this kind; null otherwise.
const Json* declared(const CheckpointView& checkpoint) {
  const Json& config = quantization_config(checkpoint);
  const Json method = config.value("quant_method", Json());
  return method == kFp8 || method == kFbgemm ? &config : nullptr;
}

bool stores(const StoredTensor& t, const std::string& array) {
  return std::ranges::find(t.arrays, array) != t.arrays.end();
}

/// "LAYER.input_scale" of "LAYER.weight", "EXPERTS.gate_up_proj_input_scale" of "EXPERTS.gate_up_proj".
std::string of_layer(const std::string& weight, std::string_view suffix) {
  const bool is_module = weight == "weight" || weight.ends_with(".weight");
  return (is_module ? prefix_of_weight(weight) : weight + "_") + std::string(suffix);
}

ArraySpec scale_array(const StoredTensor& t) {
  const Grouping& grouping = t.scheme.scale->grouping;
  const std::string inverse = t.name + std::string(kInverse), scale = t.name + std::string(kScale);
  const bool blocks = grouping.kind == Grouping::Kind::block;
  ArraySpec spec = {.name = (t.arrays.empty() ? blocks : stores(t, inverse)) ? inverse : scale,
                    .dtype = *dtype_of(*t.scheme.scale->scheme->element),
                    .shape = parameter_shape(grouping, t.shape)};
  if (grouping.kind == Grouping::Kind::tensor) spec.row_axis = ArraySpec::kNoRows;
  return spec;
}

std::optional<ArraySpec> input_array(const StoredTensor& t) {
  if (!t.linear.input || t.linear.input->scale == nullptr) return std::nullopt;
  std::string name = of_layer(t.name, t.linear.input->dynamic ? kUpperBound : kStatic[0]);
  if (const std::string other = of_layer(t.name, kStatic[1]); stores(t, other)) name = other;
  return static_scale_array(name, *t.linear.input->scale);
}

std::vector<ArraySpec> layout(const StoredTensor& t) {
  std::vector<ArraySpec> specs = {{t.name, *dtype_of(*t.scheme.element), t.shape}, scale_array(t)};
  if (const auto input = input_array(t)) specs.push_back(*input);
  return specs;
}

std::vector<NamedArray> pack(const StoredTensor& t, const QuantizedTensor& values) {
  std::vector<ArraySpec> specs = layout(t);
  std::vector<NamedArray> arrays = moved({{specs[0], values.codes}, {specs[1], values.scale->codes}});
  if (specs.size() > 2) arrays.push_back({specs[2], t.linear.input->scale->codes});
  for (const NamedArray& array : arrays) BW_ASSERT(array.data.size() == array.spec.bytes());
  return arrays;
}

QuantizedTensor unpack(const StoredTensor& t, const CheckpointView& checkpoint) {
  const std::span<const std::byte> codes = checkpoint.bytes(t.name);
  QuantizedTensor values = {.scheme = t.scheme, .shape = t.shape, .codes = {codes.begin(), codes.end()}};
  values.scale = numbers(*t.scheme.scale->scheme, parameter_shape(t.scheme.scale->grouping, t.shape),
                         checkpoint.bytes(scale_array(t).name));
  return values;
}

// ---- reading ----

/// visit(weight's name, its scale's).
template <class Visit>
void for_each_scale(const CheckpointView& checkpoint, const Visit& visit) {
  for (const auto& [array, spec] : checkpoint.arrays) {
    const bool of_weight = array == kWeightScale || array.ends_with("." + std::string(kWeightScale));
    if (array.ends_with(kInverse))
      visit(array.substr(0, array.size() - kInverse.size()), array);
    else if (of_weight)
      visit(array.substr(0, array.size() - kScale.size()), array);
  }
}

bool detect(const CheckpointView& checkpoint) {
  if (declared(checkpoint) != nullptr) return true;
  // DeepSeek's weights alone, without a configuration.
  return std::ranges::any_of(checkpoint.arrays, [](const auto& array) { return array.first.ends_with(kInverse); });
}

class WeightReader {
 public:
  WeightReader(const CheckpointView& checkpoint, std::string weight, const std::string& scale)
      : checkpoint_(checkpoint), scale_(scale) {
    t_.name = std::move(weight);
    t_.arrays = {t_.name, scale};
  }

  StoredTensor read() {
    const ArraySpec& weight = need_array(checkpoint_, t_.name, t_.name);
    if (!is_fp8(weight.dtype) || weight.block != nullptr)
      fail(fmt::format("it has a scale, and is {}", info(weight.dtype).name));
    if (weight.shape.size() < 2 || weight.shape.size() > 3) fail("it is no matrix: " + to_string(weight.shape));
    if (element_count(weight.shape) == 0) fail("it is empty");
    if (checkpoint_.arrays.contains(t_.name + std::string(kScale)) &&
        checkpoint_.arrays.contains(t_.name + std::string(kInverse)))
      fail("it has two scales");
    t_.shape = weight.shape;
    t_.value_dtype = model_dtype(checkpoint_.config);
    read_scheme(float_element(weight.dtype));
    read_input();
    t_.arrays.clear();
    for (const ArraySpec& spec : specs_) {
      check_stored(checkpoint_, t_.name, spec);
      t_.arrays.push_back(spec.name);
    }
    return std::move(t_);
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { bad_container(checkpoint_, t_.name, why); }

  void read_scheme(const ElementType& element) {
    const ArraySpec& scale = need_array(checkpoint_, t_.name, scale_);
    const DType type = scale.dtype;
    if (type != DType::f32 && type != DType::bf16 && type != DType::f16 && type != DType::f8_e8m0)
      fail(fmt::format("array '{}' is {}", printable(scale_), info(type).name));
    const Shape rows = parameter_shape(Grouping::channel(), t_.shape);
    Grouping grouping = Grouping::tensor();
    const bool single = scale.shape == parameter_shape(grouping, t_.shape) || scale.shape == Shape{1};
    if (!single && scale.shape == rows && !scale_.ends_with(kInverse))
      grouping = Grouping::channel();
    else if (!single || block_size())
      grouping = blocks(scale.shape);
    t_.scheme = {.element = &element, .scale = parameter(grouping, plain(type))};
  }

  /// weight_block_size, where there is one.
  std::optional<std::array<int64_t, 2>> block_size() const {
    const Json* const config = declared(checkpoint_);
    const Json sides = config == nullptr ? Json() : config->value("weight_block_size", Json());
    if (sides.is_null() || !scale_.ends_with(kInverse)) return std::nullopt;
    const auto is_side = [](const Json& side) {
      constexpr int64_t kMost = int64_t{1} << 20;
      return side.is_number_integer() && side.get<int64_t>() > 0 && side.get<int64_t>() <= kMost;
    };
    if (!sides.is_array() || sides.size() != 2 || !is_side(sides[0]) || !is_side(sides[1]))
      fail("weight_block_size in config.json is no pair of sizes");
    return std::array{sides[0].get<int64_t>(), sides[1].get<int64_t>()};
  }

  /// Never guessed from shapes: of ragged blocks they do not tell.
  Grouping blocks(const Shape& scales) const {
    const auto sides = block_size();
    if (!sides)
      fail(fmt::format("array '{}' has shape {}, and config.json names no weight_block_size", printable(scale_),
                       to_string(scales)));
    return {.kind = Grouping::Kind::block, .block_rows = (*sides)[0], .block_columns = (*sides)[1]};
  }

  void read_input() {
    const auto has = [&](std::string_view suffix) {
      return checkpoint_.arrays.contains(of_layer(t_.name, suffix)) ? of_layer(t_.name, suffix) : std::string();
    };
    ActivationScheme input = {.scheme = {.element = &float_element(DType::f8_e4m3),
                                         .scale = parameter(Grouping::tensor(), plain(DType::f32))}};
    if (t_.scheme.scale->grouping.kind != Grouping::Kind::tensor) input.scheme.scale->grouping = Grouping::channel();
    if (t_.scheme.scale->grouping.kind == Grouping::Kind::block)
      input.scheme.scale->grouping = Grouping::along(t_.scheme.scale->grouping.block_columns);
    for (const std::string_view suffix : {kStatic[0], kStatic[1], kUpperBound}) {
      const std::string array = has(suffix);
      if (array.empty()) continue;
      if (input.scale != nullptr) fail("its activations have two scales");
      input.dynamic = suffix == kUpperBound;
      input.scale = static_scale(checkpoint_, t_.name, array);
      t_.arrays.push_back(array);
    }
    const Json* const config = declared(checkpoint_);
    const bool is_static = config != nullptr && config->value("activation_scheme", Json()) == "static";
    if (is_static && input.scale == nullptr) fail("its activations are static, and no input_scale is stored");
    t_.linear.input = std::move(input);
    specs_ = layout(t_);
  }

  const CheckpointView& checkpoint_;
  const std::string& scale_;
  StoredTensor t_;
  std::vector<ArraySpec> specs_;
};

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> out;
  for_each_scale(checkpoint, [&](const std::string& weight, const std::string& scale) {
    out.push_back(WeightReader(checkpoint, weight, scale).read());
  });
  constexpr std::array kTypes = {DType::f8_e4m3, DType::f8_e5m2};
  check_no_weight_is_left(checkpoint, out, kTypes);
  return out;
}

QuantizedModel model(const CheckpointView& checkpoint) {
  QuantizedModel found;
  if (const Json* config = declared(checkpoint)) {
    found.skipped = string_list(*config, "modules_to_not_convert");
    if (found.skipped.empty()) found.skipped = string_list(*config, "ignored_layers");
  }
  for (const auto& [array, spec] : checkpoint.arrays)
    if (std::ranges::find(kCache, std::string_view(array).substr(array.rfind('.') + 1)) != kCache.end())
      found.arrays.push_back(array);
  if (!found.arrays.empty())
    found.kv_cache = ActivationScheme{.scheme = {.element = &float_element(DType::f8_e4m3),
                                                 .scale = parameter(Grouping::tensor(), plain(DType::f32))},
                                      .dynamic = false};
  return found;
}

// ---- what it holds ----

Fit fit(const Scheme& scheme, const Shape& shape) {
  const auto impossible = [](const std::string& why) { return Fit{Verdict::impossible, why}; };
  if (shape.size() < 2 || shape.size() > 3) return impossible("fp8 holds the matrices of linear layers and experts");
  const auto dtype = scheme.element == nullptr ? std::nullopt : dtype_of(*scheme.element);
  const bool multiplied = scheme.scale && !scheme.scale->divides && scheme.factor == 1 &&
                          scheme.offset_kind == OffsetKind::none && scheme.scale->scheme->is_plain();
  if (!dtype || !is_fp8(*dtype) || !multiplied) return impossible("fp8 holds e4m3 with scales that multiply");
  const Grouping& grouping = scheme.scale->grouping;
  const bool blocks = grouping.kind == Grouping::Kind::block, rows = grouping == Grouping::channel();
  if (!blocks && !rows && grouping.kind != Grouping::Kind::tensor)
    return impossible("fp8 has a scale a tensor, row or block");
  if (!blocks && shape.size() != 2) return impossible("transformers has stacked experts with scales of blocks alone");
  const Scheme& scales = *scheme.scale->scheme;
  const bool known = scales == plain(DType::f32) || scales == plain(DType::bf16) || scales == plain(DType::f16) ||
                     scales == plain(DType::f8_e8m0);
  if (!known) return impossible("fp8 stores scales as float32, float16, bfloat16 or e8m0");
  return {Verdict::exact};
}

/// One configuration says of all weights what their scales are of.
Fit fit_model(std::span<const StoredTensor> tensors) {
  const auto differs = [&](const StoredTensor& t) {
    return t.scheme.scale->grouping != tensors.front().scheme.scale->grouping;
  };
  if (std::ranges::any_of(tensors, differs))
    return {Verdict::impossible, "a model in fp8 has scales of one kind: a tensor, rows or blocks of one size"};
  return {Verdict::exact};
}

// ---- what quantize writes ----

constexpr std::array<SchemeChoice, 3> kChoices = {
    {{.quant_type = "e4m3",
      .bits = 8,
      .symmetric = true,
      .granularity = "block",
      .group_size = kBlock,
      .scale_dtype = "float32"},
     {.quant_type = "e4m3", .bits = 8, .symmetric = true, .granularity = "tensor", .scale_dtype = "float32"},
     {.quant_type = "e4m3", .bits = 8, .symmetric = true, .granularity = "channel", .scale_dtype = "float32"}}};

Scheme scheme_of(const SchemeChoice& choice, DType weight) {
  Grouping grouping = Grouping::flat(choice.group_size);  // which `fit` refuses
  if (choice.granularity == "tensor") grouping = Grouping::tensor();
  if (choice.granularity == "channel") grouping = Grouping::channel();
  if (choice.granularity == "block")
    grouping = {.kind = Grouping::Kind::block, .block_rows = choice.group_size, .block_columns = choice.group_size};
  Scheme stored = plain(scale_dtype_of(choice, weight));
  if (choice.nested_scales) stored.scale = parameter(Grouping::tensor(), plain(DType::f32));  // likewise
  return {.element = &float_element(DType::f8_e4m3), .scale = parameter(grouping, std::move(stored))};
}

constexpr float kTop = 448;

/// transformers (Fp8Quantize): in torch a number over a tensor is the tensor's reciprocal times the number.
constexpr Fp8Rule kTransformers = {.scale = [](float largest, DType) -> Fp8Rule::Scale {
  const float by = 1.0f / largest * kTop;
  // Of zeros 1; and of what is so small that the reciprocal is infinite, where transformers writes NaN.
  if (!std::isfinite(by)) return {.by = 1, .stored = 1};
  return {.by = by, .stored = 1.0f / by};
}};

/// AutoFP8 (per_tensor_quantize), every step but the last in the weight's type.
constexpr Fp8Rule kAutoFp8 = {.scale = [](float largest, DType weight) -> Fp8Rule::Scale {
                                constexpr float kLeast = 1e-12f;
                                const float by =
                                    round_to(weight, round_to(weight, 1.0f / std::max(largest, kLeast)) * kTop);
                                // Of less than f16 has a reciprocal for.
                                if (!std::isfinite(by)) return {.by = 1, .stored = 1};
                                return {.by = by, .stored = 1.0f / by};
                              },
                              .in_weight_type = true};

/// FBGEMM (quantize_fp8_per_row).
constexpr Fp8Rule kFbgemmRows = {.scale = [](float largest, DType) -> Fp8Rule::Scale {
                                   const float scale = std::max(largest / kTop, 1.0f / (kTop * 512));
                                   return {.by = scale, .stored = scale};
                                 },
                                 .divides = true};

QuantizedTensor encode(const Scheme& scheme, const Shape& shape, WeightView weight) {
  const Grouping& grouping = scheme.scale->grouping;
  if (grouping.kind == Grouping::Kind::block) return encode_fp8(scheme, shape, weight, kTransformers);
  return encode_fp8(scheme, shape, weight, grouping.kind == Grouping::Kind::tensor ? kAutoFp8 : kFbgemmRows);
}

void write_metadata(const WrittenModel& model, const Metadata& out) {
  BW_ASSERT(!model.tensors.empty());
  const StoredTensor& first = model.tensors.front();
  const Grouping& grouping = first.scheme.scale->grouping;
  const bool rows = grouping.kind == Grouping::Kind::axis;
  const bool is_static = first.linear.input && !first.linear.input->dynamic;
  OrderedJson config = OrderedJson::object();
  if (rows) {
    config["activation_scale_ub"] = kUpperBoundOfTokens;
  } else {
    config["activation_scheme"] = is_static ? "static" : "dynamic";
    config["fmt"] = "e4m3";
  }
  config["modules_to_not_convert"] = model.kept;
  config["quant_method"] = rows ? kFbgemm : kFp8;
  if (grouping.kind == Grouping::Kind::block)
    config["weight_block_size"] = {grouping.block_rows, grouping.block_columns};
  out.config["quantization_config"] = std::move(config);
}

}  // namespace

extern const Container fp8_container;
const Container fp8_container = {
    .name = "fp8",
    .summary =
        "e4m3 with scales of 128x128 blocks (transformers, DeepSeek), a tensor (AutoFP8) or rows (FBGEMM); "
        "static activations, KV cache",
    .source =
        "transformers integrations/finegrained_fp8.py and quantizer_finegrained_fp8.py; AutoFP8 quantize.py; "
        "vLLM quantization/fp8.py, fbgemm_fp8.py",
    .only_read = "e5m2, scales of bfloat16 and powers of two (ue8m0), calibrated activations, scales of the KV cache",
    .rounding =
        "blocks as transformers (Fp8Quantize), a tensor as AutoFP8 (per_tensor_quantize, in the weight's type), rows "
        "as FBGEMM (quantize_fp8_per_row); a block of zeros gets the scale 1, where transformers writes NaN",
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
    .make_scheme = scheme_of,
    .encode = encode};

}  // namespace bitwright
