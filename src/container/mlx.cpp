#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/bits.hpp"
#include "base/error.hpp"
#include "container/container.hpp"
#include "container/mlx_rounding.hpp"
#include "container/stored_arrays.hpp"

namespace bitwright {
namespace {

// LAYER.weight U32 [N, K * bits / 32]: one dense stream of codes a row, least significant bits first;
// affine: LAYER.scales and LAYER.biases [N, K / group_size] in the dtype of the weights; value = code * scale + bias.
// mxfp4, mxfp8, nvfp4: LAYER.scales U8 [N, K / group_size], e8m0 or e4m3; value = code * scale. Of nvfp4 maybe
// LAYER.global_scale F32, the tensor's largest magnitude, under which scales are scale * (global_scale / 2688).
// config.json: "quantization" (and the same as "quantization_config"): {group_size, bits, mode, "LAYER": {…}, true or
// false}. What is said of a layer stands alone: what it lacks is its mode's default, not the model's.

constexpr std::string_view kWeight = ".weight", kScales = ".scales", kBiases = ".biases", kGlobal = ".global_scale";
constexpr float kGlobalRange = 448 * 6;
constexpr int64_t kMostElements = INT64_MAX / 1024;  ///< of a row, so that its bits can be counted

struct Mode {
  std::string_view name;
  std::string_view element;  ///< empty: integers
  DType scales;
  int64_t group_size, bits;  ///< affine: the defaults, else the only ones
};
constexpr std::array<Mode, 4> kModes = {{{"affine", "", DType::f32, 64, 4},
                                         {"mxfp4", "float4_e2m1", DType::f8_e8m0, 32, 4},
                                         {"mxfp8", "float8_e4m3", DType::f8_e8m0, 32, 8},
                                         {"nvfp4", "float4_e2m1", DType::f8_e4m3, 16, 4}}};
constexpr const Mode& kAffine = kModes[0];

const Mode* find_mode(std::string_view name) {
  const auto* const found = std::ranges::find(kModes, name, &Mode::name);
  return found == kModes.end() ? nullptr : found;
}

struct Settings {
  const Mode* mode = &kAffine;
  int64_t bits = kAffine.bits, group_size = kAffine.group_size;
  bool operator==(const Settings&) const = default;
  bool is_affine() const { return mode == &kAffine; }
};

bool known_bits(int64_t bits) { return bits >= 2 && bits <= 8 && bits != 7; }
bool known_group(int64_t group_size) { return group_size == 32 || group_size == 64 || group_size == 128; }

/// Why MLX takes no such settings; empty if it does.
std::string refusal(const Settings& s) {
  if (!s.is_affine() && (s.bits != s.mode->bits || s.group_size != s.mode->group_size))
    return fmt::format("{} has {} bits in groups of {}, not {} in {}", s.mode->name, s.mode->bits, s.mode->group_size,
                       s.bits, s.group_size);
  if (s.is_affine() && (!known_bits(s.bits) || !known_group(s.group_size)))
    return fmt::format("affine has 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, not {} in {}", s.bits,
                       s.group_size);
  return "";
}

std::string operator+(const std::string& layer, std::string_view suffix) { return std::string(layer).append(suffix); }

// ---- the configuration ----

/// "quantization", which mlx-lm reads; else "quantization_config", if no other library's.
const Json* declared(const CheckpointView& checkpoint) {
  if (const auto found = checkpoint.config.find("quantization"); found != checkpoint.config.end())
    return found->is_object() ? &*found : nullptr;
  const auto found = checkpoint.config.find("quantization_config");
  const bool ours = found != checkpoint.config.end() && found->is_object() && !found->contains("quant_method") &&
                    found->contains("group_size") && found->contains("bits");
  return ours ? &*found : nullptr;
}

/// A block of the configuration, the model's or a layer's. Its mode's defaults where it says nothing (or null).
Settings read_settings(const CheckpointView& checkpoint, const std::string& layer, const Json& block) {
  const auto says = [&](const char* key) { return block.contains(key) && !block[key].is_null(); };
  Settings s;
  if (says("mode")) {
    s.mode = block["mode"].is_string() ? find_mode(block["mode"].get_ref<const std::string&>()) : nullptr;
    if (s.mode == nullptr)
      bad_container(
          checkpoint, layer,
          fmt::format("mode {} is not known; known are affine, mxfp4, mxfp8, nvfp4", printable(block["mode"].dump())));
  }
  const auto number = [&](const char* key, int64_t fallback) {
    if (!says(key)) return fallback;
    if (!block[key].is_number_integer() || block[key].get<int64_t>() < 0)
      bad_container(checkpoint, layer, fmt::format("its {} in config.json is {}", key, printable(block[key].dump())));
    return block[key].get<int64_t>();
  };
  s.bits = number("bits", s.mode->bits);
  s.group_size = number("group_size", s.mode->group_size);
  if (const std::string why = refusal(s); !why.empty()) bad_container(checkpoint, layer, why);
  return s;
}

Settings settings_for(const CheckpointView& checkpoint, const std::string& layer) {
  const Json* const block = declared(checkpoint);
  if (block == nullptr) bad_container(checkpoint, layer, "config.json has no 'quantization' that says how");
  const auto own = block->find(layer);
  if (own == block->end() || *own == true) return read_settings(checkpoint, layer, *block);
  if (*own == false) bad_container(checkpoint, layer, "config.json says that it is not quantized");
  if (!own->is_object())
    bad_container(checkpoint, layer, fmt::format("config.json says {} of it", printable(own->dump())));
  return read_settings(checkpoint, layer, *own);
}

/// mlx-lm: inputs of nvfp4 and mxfp8 layers are quantized as the weights are.
bool quantizes_inputs(const CheckpointView& checkpoint, const Settings& s) {
  return (s.mode->name == "nvfp4" || s.mode->name == "mxfp8") &&
         checkpoint.config.value("quantize_activations", Json()) == true;
}

// ---- schemes ----

Scheme affine_scheme(int64_t bits, int64_t group_size, DType dtype) {
  const Parameter p = parameter(Grouping::along(group_size), plain(dtype));
  return {.element = &integer_element(static_cast<int>(bits), false),
          .scale = p,
          .offset_kind = OffsetKind::bias,
          .offset = p};
}

Scheme float_scheme(const Mode& mode, bool global) {
  Scheme scales = plain(mode.scales);
  if (global) {
    Parameter range = parameter(Grouping::tensor(), plain(DType::f32));
    range.divides = true;
    const Scheme divided = {.element = &float_element(DType::f32), .scale = range};
    scales.scale = parameter(Grouping::tensor(), divided);
  }
  return {.element = find_element(mode.element), .scale = parameter(Grouping::along(mode.group_size), scales)};
}

bool is_global(const Scheme& scheme) { return scheme.scale->scheme->scale.has_value(); }

/// What of MLX's a scheme is, or why it is nothing of the kind.
struct Recognized {
  std::optional<Settings> settings{};
  std::string reason{};
};
Recognized recognize(const Scheme& scheme) {
  for (const Mode& mode : std::span(kModes).subspan(1)) {
    if (scheme.element->name != mode.element || !scheme.scale) continue;
    const bool global = mode.name == "nvfp4" && is_global(scheme);
    if (scheme == float_scheme(mode, global)) return {.settings = Settings{&mode, mode.bits, mode.group_size}};
  }
  const ElementType& element = *scheme.element;
  if (element.kind != ElementKind::integer)
    return {.reason =
                "MLX holds integers, and floats as mxfp4, mxfp8 (e8m0 scales, groups of 32) and nvfp4 (e4m3 "
                "scales, groups of 16)"};
  const Parameter& scale = scheme.scale ? *scheme.scale : parameter({}, {});
  const Scheme& stored = *scale.scheme;
  const bool plain_floats = stored.element != nullptr && is_plain_float(stored);
  if (element.lowest != 0 || scheme.offset_kind != OffsetKind::bias || !plain_floats || *scheme.offset != scale ||
      scheme.factor != 1 || scale.divides)
    return {.reason = "MLX's integers are unsigned, with a scale and a bias a group, both of one type"};
  const Settings s = {.bits = element.bits, .group_size = scale.grouping.size};
  if (scale.grouping != Grouping::along(s.group_size)) return {.reason = "MLX groups elements of a row"};
  if (std::string why = refusal(s); !why.empty()) return {.reason = "MLX " + why};
  return {.settings = s};
}

Settings settings_of(const StoredTensor& tensor) {
  const Recognized found = recognize(tensor.scheme);
  BW_ASSERT(found.settings.has_value());
  return *found.settings;
}

// ---- reading ----

const ArraySpec* find_array(const CheckpointView& checkpoint, const std::string& name) {
  const auto found = checkpoint.arrays.find(name);
  return found == checkpoint.arrays.end() ? nullptr : &found->second;
}

/// visit(layer) for each that has packed weights or scales of its weight: either without the other is an error.
template <class Visit>
void for_each_layer(const CheckpointView& checkpoint, const Visit& visit) {
  const bool is_ours = declared(checkpoint) != nullptr;
  for (const auto& [name, spec] : checkpoint.arrays) {
    if (!name.ends_with(kWeight)) continue;
    const std::string layer = layer_of(name);
    const bool scaled = checkpoint.arrays.contains(layer + kScales), packed = spec.dtype == DType::u32;
    if (is_ours ? packed || scaled : packed && scaled) visit(layer);
  }
}

bool detect(const CheckpointView& checkpoint) {
  bool found = false;
  for_each_layer(checkpoint, [&](const std::string& layer) {
    found = found ||
            (checkpoint.arrays.at(layer + kWeight).dtype == DType::u32 && checkpoint.arrays.contains(layer + kScales));
  });
  return found;
}

void check_parameters(const CheckpointView& checkpoint, const std::string& layer, const Settings& s,
                      const ArraySpec& scales) {
  const auto fail = [&](const std::string& why) { bad_container(checkpoint, layer, why); };
  if (s.is_affine()) {
    const ArraySpec& biases = need_array(checkpoint, layer, layer + kBiases);
    if (!is_plain_float(scales.dtype) || biases.dtype != scales.dtype || biases.shape != scales.shape)
      fail("scales and biases are not of one floating type and shape");
  } else if (scales.dtype != DType::u8) {
    fail(fmt::format("scales of {} are U8, these are {}", s.mode->name, info(scales.dtype).name));
  } else if (find_array(checkpoint, layer + kBiases) != nullptr) {
    fail(fmt::format("{} has no biases", s.mode->name));
  }
  const ArraySpec* const global = find_array(checkpoint, layer + kGlobal);
  if (global != nullptr && s.mode->name != "nvfp4") fail("only nvfp4 has a global scale");
  if (global != nullptr && (global->dtype != DType::f32 || !global->shape.empty() || scales.shape.size() != 2))
    fail("its global scale is not one number of F32 for one matrix");
}

StoredTensor read_layer(const CheckpointView& checkpoint, const std::string& layer) {
  const ArraySpec& weight = need_array(checkpoint, layer, layer + kWeight);
  const ArraySpec& scales = need_array(checkpoint, layer, layer + kScales);
  const auto fail = [&](const std::string& why) { bad_container(checkpoint, layer, why); };
  const Settings s = settings_for(checkpoint, layer);
  if (weight.dtype != DType::u32) fail(fmt::format("its codes are U32, these are {}", info(weight.dtype).name));
  if (weight.shape.size() < 2 || scales.shape.size() != weight.shape.size()) fail("too few dimensions");
  check_parameters(checkpoint, layer, s, scales);
  const int64_t words = weight.shape.back(), groups = scales.shape.back();
  Shape rows = weight.shape, scale_rows = scales.shape;
  rows.pop_back();
  scale_rows.pop_back();
  if (words > kMostElements || groups > kMostElements || rows != scale_rows ||
      words * 32 != groups * s.group_size * s.bits)
    fail(fmt::format("weight {} and scales {} disagree for {} bits in groups of {}", to_string(weight.shape),
                     to_string(scales.shape), s.bits, s.group_size));
  const bool global = find_array(checkpoint, layer + kGlobal) != nullptr;
  StoredTensor t = {
      .name = weight.name,
      .shape = std::move(rows),
      .scheme = s.is_affine() ? affine_scheme(s.bits, s.group_size, scales.dtype) : float_scheme(*s.mode, global),
      .value_dtype = s.is_affine() ? scales.dtype : model_dtype(checkpoint.config),
      .arrays = {weight.name, scales.name}};
  t.shape.push_back(groups * s.group_size);
  if (!checked_element_count(t.shape)) fail("its shape overflows");
  if (s.is_affine()) t.arrays.push_back(layer + kBiases);
  if (global) t.arrays.push_back(layer + kGlobal);
  if (quantizes_inputs(checkpoint, s)) t.linear.input = ActivationScheme{.scheme = float_scheme(*s.mode, false)};
  return t;
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> out;
  for_each_layer(checkpoint, [&](const std::string& layer) { out.push_back(read_layer(checkpoint, layer)); });
  return out;
}

QuantizedModel model(const CheckpointView& checkpoint) {
  QuantizedModel found;
  if (const Json* const block = declared(checkpoint))
    for (const auto& [layer, own] : block->items())
      if (own == false) found.skipped.push_back(layer);
  return found;
}

QuantizedTensor unpack(const StoredTensor& tensor, const CheckpointView& checkpoint) {
  const Scheme& scheme = tensor.scheme;
  const auto parameter_of = [&](const Parameter& p, size_t array) {
    return numbers(*p.scheme, parameter_shape(p.grouping, tensor.shape), checkpoint.bytes(tensor.arrays.at(array)));
  };
  QuantizedTensor t = {.scheme = scheme,
                       .shape = tensor.shape,
                       .codes = unpack_bits(checkpoint.bytes(tensor.arrays.at(0)), scheme.element->bits,
                                            static_cast<uint64_t>(element_count(tensor.shape)))};
  auto scale = parameter_of(*scheme.scale, 1);
  if (scheme.offset) t.offset = parameter_of(*scheme.offset, 2);
  if (is_global(scheme)) {
    const Scheme& divided = *scheme.scale->scheme->scale->scheme;
    auto global = numbers(divided, {}, checkpoint.bytes(tensor.arrays.at(2)));
    global->scale = numbers(*divided.scale->scheme, {}, std::as_bytes(std::span(&kGlobalRange, 1)));
    scale->scale = std::move(global);
  }
  t.scale = std::move(scale);
  return t;
}

// ---- writing ----

Fit fit(const Scheme& scheme, const Shape& shape) {
  const Recognized found = recognize(scheme);
  if (!found.settings) return {Verdict::impossible, found.reason};
  if (shape.size() < 2) return {Verdict::impossible, "MLX quantizes matrices"};
  if (shape.back() % found.settings->group_size != 0)
    return {Verdict::impossible,
            fmt::format("rows of {} are no multiple of {}", to_string(shape), found.settings->group_size)};
  if (is_global(scheme) && shape.size() != 2) return {Verdict::impossible, "a global scale is one matrix's"};
  return {Verdict::exact};
}

std::vector<ArraySpec> layout(const StoredTensor& tensor) {
  const std::string layer = layer_of(tensor.name);
  Shape packed = tensor.shape;
  packed.back() = packed.back() * tensor.scheme.element->bits / 32;
  const Parameter& scale = *tensor.scheme.scale;
  const Shape groups = parameter_shape(scale.grouping, tensor.shape);
  const bool affine = tensor.scheme.offset.has_value();
  const DType dtype = affine ? *dtype_of(*scale.scheme->element) : DType::u8;
  std::vector<ArraySpec> specs = {{layer + kWeight, DType::u32, packed}, {layer + kScales, dtype, groups}};
  if (affine) specs.push_back({layer + kBiases, dtype, groups});
  if (is_global(tensor.scheme))
    specs.push_back({.name = layer + kGlobal, .dtype = DType::f32, .shape = {}, .row_axis = ArraySpec::kNoRows});
  return specs;
}

std::vector<NamedArray> pack(const StoredTensor& tensor, const QuantizedTensor& values) {
  std::vector<ArraySpec> specs = layout(tensor);
  std::vector<NamedArray> arrays =
      moved({{specs[0], pack_bits(values.codes, tensor.scheme.element->bits)}, {specs[1], values.scale->codes}});
  if (values.offset != nullptr) arrays.push_back({specs[2], values.offset->codes});
  if (is_global(tensor.scheme)) arrays.push_back({specs[2], values.scale->scale->codes});
  return arrays;
}

constexpr SchemeChoice affine(int bits) { return {.bits = bits, .group_size = kAffine.group_size}; }
constexpr SchemeChoice floats(const Mode& mode) {
  return {
      .quant_type = mode.name, .bits = static_cast<int>(mode.bits), .symmetric = true, .group_size = mode.group_size};
}
constexpr std::array kChoices = {affine(4), affine(8),         affine(6),         affine(5),        affine(3),
                                 affine(2), floats(kModes[1]), floats(kModes[2]), floats(kModes[3])};

/// What MLX does not hold is made all the same, for `fit` to refuse.
Scheme make_scheme(const SchemeChoice& choice, DType weight) {
  const Mode* const mode = find_mode(choice.quant_type);
  const auto named = dtype_from_name(choice.scale_dtype);
  Scheme scheme;
  if (mode != nullptr) {
    scheme = float_scheme(*mode, choice.nested_scales);
    if (named) scheme.scale->scheme = std::make_shared<const Scheme>(plain(*named));
    scheme.scale->grouping.size = choice.group_size;
  } else {
    scheme = affine_scheme(choice.bits, choice.group_size, scale_dtype_of(choice, weight));
    if (choice.symmetric || choice.nested_scales)
      scheme = {.element = &integer_element(choice.bits, choice.symmetric), .scale = scheme.scale};
  }
  if (choice.granularity != "group") scheme.scale->grouping = Grouping::tensor();
  return scheme;
}

/// mlx-lm's QuantizedLinear and QuantizedEmbedding: LAYER.weight, LAYER.scales, LAYER.biases.
Fit fit_model(std::span<const StoredTensor> tensors) {
  for (const StoredTensor& t : tensors) {
    if (!t.name.ends_with(kWeight))
      return {Verdict::impossible, fmt::format("mlx-lm quantizes the weights of layers, '{}' is none", t.name)};
    if (is_global(t.scheme)) return {Verdict::impossible, "mlx-lm loads no global scales"};
  }
  return {Verdict::exact};
}

/// Models whose weights of experts mlx-lm stacks when it loads them, but not their scales (their `sanitize`): such a
/// checkpoint would not load.
void check_loadable(const WrittenModel& model, const OrderedJson& config) {
  constexpr std::array<std::string_view, 6> kStacked = {"qwen3_moe", "qwen3_next", "ernie4_5_moe",
                                                        "lfm2_moe",  "minimax",    "nemotron_h"};
  const auto type = config.find("model_type");
  if (type == config.end() || !type->is_string()) return;
  const std::string& name = type->get_ref<const std::string&>();
  if (std::ranges::find(kStacked, name) == kStacked.end()) return;
  for (const StoredTensor& t : model.tensors)
    if (t.name.find(".experts.") != std::string::npos)
      throw Error({.code = "not-loadable",
                   .what = "cannot write a checkpoint for MLX",
                   .where = t.name,
                   .why = fmt::format(
                       "for {} mlx-lm stacks the weights of experts when it loads them, but not their scales", name),
                   .fix = "convert the plain model by mlx_lm.convert, or choose another --format"});
}

OrderedJson to_json(const Settings& s) {
  return {{"group_size", s.group_size}, {"bits", s.bits}, {"mode", std::string(s.mode->name)}};
}

/// The settings most tensors have, and the others' by layer. A layer without scales is one that is not quantized.
void write_metadata(const WrittenModel& model, const Metadata& out) {
  BW_ASSERT(!model.tensors.empty());
  check_loadable(model, out.config);
  std::vector<std::pair<Settings, size_t>> counts;
  bool inputs = false;
  for (const StoredTensor& t : model.tensors) {
    const Settings s = settings_of(t);
    auto found = std::ranges::find(counts, s, &std::pair<Settings, size_t>::first);
    if (found == counts.end()) found = counts.insert(counts.end(), {s, 0});
    ++found->second;
    inputs = inputs || t.linear.input.has_value();
  }
  const Settings usual = std::ranges::max_element(counts, {}, &std::pair<Settings, size_t>::second)->first;
  OrderedJson block = to_json(usual);
  for (const StoredTensor& t : model.tensors)
    if (const Settings s = settings_of(t); s != usual) block[layer_of(t.name)] = to_json(s);
  out.config["quantization"] = block;
  out.config["quantization_config"] = std::move(block);  // where Hugging Face's pages look for it
  if (inputs) out.config["quantize_activations"] = true;
}

}  // namespace

extern const Container mlx_container;
const Container mlx_container = {
    .name = "mlx",
    .summary = "affine, 2, 3, 4, 5, 6, 8 bits, groups of 32, 64, 128; mxfp4, mxfp8, nvfp4",
    .source =
        "mlx 0.32.2 (846d176), ops.cpp, backend/metal/kernels/quantized.h, fp_quantized.h; mlx-lm (d78bf58), utils.py",
    .only_read = "nvfp4 with a global scale, `.npz`",
    .rounding =
        "as MLX's kernels for Metal, in float32: what `mlx_lm.convert` writes on a Mac (affine: on CUDA, too). MLX's "
        "CPU rounds ties to even instead of away from zero, begins a group's maximum at its first value instead of at "
        "0, and works in the weight's type",
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
    .encode = encode_mlx,
    .embeddings = true,
    .weights_format = "mlx"};

}  // namespace bitwright
