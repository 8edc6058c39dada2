#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/container.hpp"
#include "container/float_rounding.hpp"
#include "container/rows.hpp"
#include "container/stored_arrays.hpp"
#include "container/words.hpp"

namespace bitwright {
namespace {

// EXPERTS_blocks U8 [E, N, K/32, 16], the first of two codes in the low nibble; EXPERTS_scales U8 exponents
// [E, N, K/32]: rows of outputs. The model has these weights as [E, K, N], to be multiplied from the right: that is
// what transformers loads, what a file without quantization holds, and so the tensor here, its groups along K.
// Biases stay beside, as they are.

constexpr std::string_view kBlocks = "_blocks", kScales = "_scales", kMethod = "mxfp4";
constexpr std::array<std::string_view, 2> kNames = {"gate_up_proj", "down_proj"};
constexpr std::string_view kExperts = ".experts.";
constexpr int64_t kGroup = 32;
constexpr size_t kBytes = kGroup / 2;  ///< of a group's codes

Scheme scheme() {
  return {.element = find_element("float4_e2m1"),
          .scale = parameter(Grouping::along(kGroup, -2), plain(DType::f8_e8m0))};
}

/// Matrices of a tensor or of a piece of one, and their sides.
struct Sizes {
  int64_t experts, inputs, outputs;

  explicit Sizes(const StoredTensor& t)
      : experts(row_count(t.shape) / t.whole_shape().at(1)), inputs(t.whole_shape().at(1)), outputs(t.shape.back()) {}
  int64_t groups() const { return inputs / kGroup; }
};

std::vector<ArraySpec> layout(const StoredTensor& t) {
  const Sizes s(t);
  return {{t.name + std::string(kBlocks), DType::u8, {s.experts, s.outputs, s.groups(), kBytes}},
          {t.name + std::string(kScales), DType::u8, {s.experts, s.outputs, s.groups()}}};
}

/// Each expert's [rows, columns] of bytes -> [columns, rows].
std::vector<std::byte> turned(std::span<const std::byte> scales, int64_t experts, int64_t rows, int64_t columns) {
  std::vector<std::byte> out;
  const auto size = static_cast<size_t>(rows * columns);
  for (size_t e = 0; e < static_cast<size_t>(experts); ++e) {
    const auto one =
        transposed_bytes(scales.subspan(e * size, size), static_cast<size_t>(rows), static_cast<size_t>(columns), 1);
    out.insert(out.end(), one.begin(), one.end());
  }
  return out;
}

std::vector<NamedArray> pack(const StoredTensor& t, const QuantizedTensor& values) {
  const Sizes s(t);
  const std::vector<ArraySpec> specs = layout(t);
  return moved({{specs[0], pack_interleaved(kPlainOrder, values.codes, static_cast<size_t>(s.experts),
                                            static_cast<size_t>(s.inputs), static_cast<size_t>(s.outputs))},
                {specs[1], turned(values.scale->codes, s.experts, s.groups(), s.outputs)}});
}

QuantizedTensor unpack(const StoredTensor& t, const CheckpointView& checkpoint) {
  const Sizes s(t);
  const auto scales = turned(checkpoint.bytes(t.name + std::string(kScales)), s.experts, s.outputs, s.groups());
  return {.scheme = t.scheme,
          .shape = t.shape,
          .codes = unpack_interleaved(kPlainOrder, checkpoint.bytes(t.name + std::string(kBlocks)),
                                      static_cast<size_t>(s.experts), static_cast<size_t>(s.inputs),
                                      static_cast<size_t>(s.outputs)),
          .scale = numbers(*t.scheme.scale->scheme, parameter_shape(t.scheme.scale->grouping, t.shape), scales)};
}

// ---- reading ----

const Json* declared(const CheckpointView& checkpoint) {
  const Json& config = quantization_config(checkpoint);
  return config.value("quant_method", Json()) == kMethod ? &config : nullptr;
}

bool detect(const CheckpointView& checkpoint) {
  return declared(checkpoint) != nullptr || std::ranges::any_of(checkpoint.arrays, [](const auto& array) {
           return array.first.ends_with(kBlocks) && array.second.shape.size() == 4;
         });
}

StoredTensor read_tensor(const CheckpointView& checkpoint, const std::string& name) {
  const std::string array = name + std::string(kBlocks);
  const ArraySpec& blocks = need_array(checkpoint, name, array);
  const Shape& shape = blocks.shape;
  if (blocks.dtype != DType::u8 || shape.size() != 4 || shape[3] != kBytes ||
      checked_element_count(shape).value_or(0) == 0)
    bad_container(checkpoint, name,
                  fmt::format("array '{}' is {} {}, expected uint8 [experts, rows, columns / 32, 16]", printable(array),
                              info(blocks.dtype).name, to_string(shape)));
  const auto elements = checked_element_count({shape[0], shape[1], shape[2], kGroup});
  if (!elements) bad_container(checkpoint, name, "its shape overflows");
  StoredTensor t = {.name = name,
                    .shape = {shape[0], shape[2] * kGroup, shape[1]},
                    .scheme = scheme(),
                    .value_dtype = model_dtype(checkpoint.config)};
  for (const ArraySpec& spec : layout(t)) {
    check_stored(checkpoint, name, spec);
    t.arrays.push_back(spec.name);
  }
  return t;
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::set<std::string> names;  // by either array, so that the other is missed
  for (const auto& [array, spec] : checkpoint.arrays)
    for (const std::string_view suffix : {kBlocks, kScales})
      if (array.ends_with(suffix)) names.insert(array.substr(0, array.size() - suffix.size()));
  std::vector<StoredTensor> out;
  for (const std::string& name : names) out.push_back(read_tensor(checkpoint, name));
  return out;
}

QuantizedModel model(const CheckpointView& checkpoint) {
  const Json* const config = declared(checkpoint);
  if (config == nullptr) return {};
  return {.skipped = string_list(*config, "modules_to_not_convert")};
}

// ---- what it holds and what quantize writes ----

bool takes(std::string_view name, const Shape& shape) {
  const auto named = [&](std::string_view end) {
    return name.size() > kExperts.size() + end.size() && name.ends_with(end) &&
           name.substr(0, name.size() - end.size()).ends_with(kExperts);
  };
  return shape.size() == 3 && std::ranges::any_of(kNames, named);
}

Fit fit(const Scheme& asked, const Shape& shape) {
  if (asked != scheme())
    return {Verdict::impossible, "gpt-oss's MXFP4 is e2m1 in groups of 32 inputs with power-of-two scales"};
  if (shape.size() != 3) return {Verdict::impossible, "gpt-oss's MXFP4 holds experts, all of a layer in one tensor"};
  if (shape[1] % kGroup != 0 || shape[1] == 0)
    return {Verdict::impossible, fmt::format("{} inputs are no multiple of {}", shape[1], kGroup)};
  return {Verdict::exact};
}

constexpr std::array<SchemeChoice, 1> kChoices = {
    {{.quant_type = "mxfp4", .bits = 4, .symmetric = true, .group_size = kGroup, .scale_dtype = "float8_e8m0"}}};

Scheme make_scheme(const SchemeChoice& choice, DType /*weight*/) {
  Scheme made = scheme();
  const bool usual = choice.granularity == "group" && choice.group_size == kGroup &&
                     choice.scale_dtype == "float8_e8m0" && !choice.nested_scales;
  if (!usual) made.scale->grouping = Grouping::flat(std::max<int64_t>(choice.group_size, 1));  // which `fit` refuses
  return made;
}

/// Other models have experts of these names with their axes the other way round.
void write_metadata(const WrittenModel& model, const Metadata& out) {
  const OrderedJson type = out.config.value("model_type", OrderedJson());
  if (type.is_string() && type != "gpt_oss")
    throw Error({.code = "does-not-fit",
                 .what = "cannot quantize",
                 .where = "config.json",
                 .why = fmt::format("the model is of type '{}', only gpt_oss is loaded with experts in MXFP4",
                                    printable(type.get<std::string>())),
                 .fix = "choose another --format"});
  out.config["quantization_config"] = {{"modules_to_not_convert", model.kept}, {"quant_method", kMethod}};
}

}  // namespace

extern const Container mxfp4_container;
const Container mxfp4_container = {
    .name = "mxfp4",
    .summary = "experts of gpt-oss in MXFP4, all of a layer in one tensor",
    .source = "openai/gpt-oss model.safetensors; transformers integrations/mxfp4.py; triton_kernels downcast_to_mxfp",
    .rounding = "as triton_kernels' downcast_to_mxfp, which transformers calls: scales rounded up, ties to even",
    .detect = detect,
    .list = list,
    .model = model,
    .takes = takes,
    .fit = fit,
    .layout = layout,
    .pack = pack,
    .unpack = unpack,
    .write_metadata = write_metadata,
    .by_rows = true,
    .choices = kChoices,
    .make_scheme = make_scheme,
    .encode = encode_mxfp4_columns};

}  // namespace bitwright
