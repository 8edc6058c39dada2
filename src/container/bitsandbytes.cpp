#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/bits.hpp"
#include "base/error.hpp"
#include "container/bitsandbytes_rounding.hpp"
#include "container/container.hpp"
#include "container/stored_arrays.hpp"

namespace bitwright {
namespace {

// WEIGHT U8 [(n + 1) / 2, 1], the first of two codes in the high nibble (labelled BF16 or F32 with quant_storage);
// WEIGHT.absmax F32, or U8 codes of the dynamic map with WEIGHT.nested_absmax and WEIGHT.nested_quant_map;
// WEIGHT.quant_map F32 [16]; WEIGHT.quant_state.bitsandbytes__nf4 (or fp4): JSON as U8.
// LLM.int8: LAYER.weight I8 [N, K], LAYER.SCB F32 [N] the rows' absmax, LAYER.weight_format U8 [] 0 ("row"; older files
// have none). One model is either of the two.

constexpr std::string_view kState = ".quant_state.bitsandbytes__";
constexpr std::array<std::string_view, 2> kTypes = {"nf4", "fp4"};
constexpr std::string_view kRowMaxima = "SCB", kFormat = "weight_format";
constexpr int64_t kMaxBlock = 4096;
constexpr int64_t kUsualBlock = 64, kUsualNestedBlock = 256;
constexpr float kUsualThreshold = 6;               ///< transformers' default
constexpr float kOver127 = 7.874015718698502e-3f;  ///< as int8_vectorwise_dequant writes it

Scheme absmax_scheme(int64_t nested_block) {
  return {.element = find_element("dynamic8"),
          .scale = parameter(Grouping::flat(nested_block), plain(DType::f32)),
          .offset_kind = OffsetKind::bias,
          .offset = parameter(Grouping::tensor(), plain(DType::f32))};
}

Scheme make_scheme(std::string_view type, int64_t block, std::optional<int64_t> nested_block) {
  return {.element = find_element(type),
          .scale = parameter(Grouping::flat(block), nested_block ? absmax_scheme(*nested_block) : plain(DType::f32))};
}

Scheme int8_scheme() {
  return {.element = &integer_element(8, true),
          .scale = parameter(Grouping::channel(), plain(DType::f32)),
          .factor = kOver127};
}
bool is_int8(const Scheme& scheme) { return scheme.element->kind == ElementKind::integer; }

bool is_nested(const Scheme& scheme) { return !scheme.scale->scheme->is_plain(); }

bool known_block(int64_t block) { return block >= 32 && block <= kMaxBlock && (block & (block - 1)) == 0; }

std::vector<std::byte> table_bytes(const ElementType& type) {
  std::vector<std::byte> bytes(sizeof(float) << type.bits);
  for (uint32_t code = 0; code < 1u << type.bits; ++code) {
    const float value = type.decode(type, code);
    std::memcpy(bytes.data() + code * sizeof value, &value, sizeof value);
  }
  return bytes;
}

struct Fields {
  const CheckpointView& checkpoint;
  const std::string& name;
  Json json;

  int64_t integer(const char* key) const {
    if (!json.contains(key) || !json[key].is_number_unsigned() || json[key].get<uint64_t>() > INT64_MAX)
      bad_container(checkpoint, name, fmt::format("quant_state has no valid '{}'", key));
    return json[key].get<int64_t>();
  }
  DType dtype(const char* key) const {
    const auto known =
        json.contains(key) && json[key].is_string() ? dtype_from_name(json[key].get<std::string>()) : std::nullopt;
    if (!known || !info(*known).is_float || size_bytes(*known) < 2)
      bad_container(checkpoint, name, fmt::format("quant_state has no known '{}'", key));
    return *known;
  }
};

Shape state_shape(const Fields& state) {
  Shape shape;
  const Json& dims = state.json.contains("shape") ? state.json["shape"] : Json();
  if (!dims.is_array() || dims.empty() || dims.size() > 8)
    bad_container(state.checkpoint, state.name, "quant_state has no valid 'shape'");
  for (const Json& dim : dims) {
    if (!dim.is_number_unsigned() || dim.get<uint64_t>() > INT64_MAX)
      bad_container(state.checkpoint, state.name, "quant_state has no valid 'shape'");
    shape.push_back(dim.get<int64_t>());
  }
  if (!checked_element_count(shape)) bad_container(state.checkpoint, state.name, "its shape overflows");
  return shape;
}

void check_map(const CheckpointView& checkpoint, const std::string& name, const std::string& array,
               const ElementType& type) {
  const auto expected = table_bytes(type);
  need_array(checkpoint, name, array);
  if (!std::ranges::equal(checkpoint.bytes(array), expected))
    bad_container(checkpoint, name, fmt::format("'{}' is not the {} table", printable(array), type.name));
}

void check_array(const CheckpointView& checkpoint, const std::string& name, const ArraySpec& expected) {
  const ArraySpec& found = need_array(checkpoint, name, expected.name);
  if (found.dtype != expected.dtype || element_count(found.shape) != element_count(expected.shape))
    wrong_array(checkpoint, name, found, expected);
}

std::vector<ArraySpec> layout_with_state(const StoredTensor& t, int64_t state_bytes) {
  const int64_t bytes = (element_count(t.shape) + 1) / 2;
  const auto storage = static_cast<int64_t>(size_bytes(t.storage_dtype));
  const int64_t blocks = parameter_shape(t.scheme.scale->grouping, t.shape).at(0);
  const bool nested = is_nested(t.scheme);
  const auto fixed = [&](std::string_view suffix, DType dtype, int64_t count) {
    return ArraySpec{
        .name = t.name + std::string(suffix), .dtype = dtype, .shape = {count}, .row_axis = ArraySpec::kNoRows};
  };
  std::vector<ArraySpec> specs = {{t.name, t.storage_dtype, {bytes / storage, 1}},
                                  {t.name + ".absmax", nested ? DType::u8 : DType::f32, {blocks}},
                                  fixed(".quant_map", DType::f32, 16)};
  if (nested) {
    const Scheme& absmax = *t.scheme.scale->scheme;
    specs.push_back({t.name + ".nested_absmax", DType::f32, parameter_shape(absmax.scale->grouping, {blocks})});
    specs.push_back(fixed(".nested_quant_map", DType::f32, 256));
  }
  specs.push_back(fixed(std::string(kState) + std::string(t.scheme.element->name), DType::u8, state_bytes));
  specs.back().sized_by_value = nested;  // the offset as text
  return specs;
}

StoredTensor read_tensor(const CheckpointView& checkpoint, const std::string& name, std::string_view type) {
  const std::string state_name = name + std::string(kState) + std::string(type);
  const ArraySpec& blob = need_array(checkpoint, name, state_name);
  const std::span<const std::byte> bytes = checkpoint.bytes(state_name);
  const Fields state = {checkpoint, name,
                        parse_json({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, state_name)};
  if (!state.json.is_object()) bad_container(checkpoint, name, "quant_state is no object");
  const int64_t block = state.integer("blocksize");
  const bool nested = checkpoint.arrays.contains(name + ".nested_absmax");
  const auto nested_block = nested ? std::optional(state.integer("nested_blocksize")) : std::nullopt;
  if (!known_block(block) || (nested && !known_block(*nested_block)))
    bad_container(checkpoint, name, fmt::format("unknown blocksize {}", block));
  StoredTensor t = {.name = name,
                    .shape = state_shape(state),
                    .scheme = make_scheme(type, block, nested_block),
                    .value_dtype = state.dtype("dtype"),
                    .storage_dtype = need_array(checkpoint, name, name).dtype};
  if ((element_count(t.shape) + 1) / 2 % static_cast<int64_t>(size_bytes(t.storage_dtype)) != 0)
    bad_container(checkpoint, name, "its packed bytes are no whole number of storage elements");
  if (state.json.value("quant_type", Json()) != type)
    bad_container(checkpoint, name, fmt::format("quant_state is named {} and says otherwise", type));
  if (nested && (!state.json.contains("nested_offset") || !state.json["nested_offset"].is_number() ||
                 !std::isfinite(state.json["nested_offset"].get<float>())))
    bad_container(checkpoint, name, "quant_state has no valid 'nested_offset'");
  for (const ArraySpec& spec : layout_with_state(t, element_count(blob.shape))) {
    check_array(checkpoint, name, spec);
    t.arrays.push_back(spec.name);
  }
  check_map(checkpoint, name, name + ".quant_map", *t.scheme.element);
  if (nested) check_map(checkpoint, name, name + ".nested_quant_map", *t.scheme.scale->scheme->element);
  return t;
}

/// visit(name of the weight, type) for each state, of whatever type it says to be.
template <class Visit>
void for_each_state(const CheckpointView& checkpoint, const Visit& visit) {
  for (const auto& [array, spec] : checkpoint.arrays)
    if (const size_t at = array.rfind(kState); at != std::string::npos)
      visit(array.substr(0, at), array.substr(at + kState.size()));
}

/// visit(layer) for each that LLM.int8 stores.
template <class Visit>
void for_each_int8(const CheckpointView& checkpoint, const Visit& visit) {
  for (const auto& [array, spec] : checkpoint.arrays)
    if (array == kRowMaxima)
      visit(std::string());
    else if (array.ends_with("." + std::string(kRowMaxima)))
      visit(array.substr(0, array.size() - kRowMaxima.size() - 1));
}

bool declares(const CheckpointView& checkpoint) {
  return quantization_config(checkpoint).value("quant_method", Json()) == "bitsandbytes";
}

bool detect(const CheckpointView& checkpoint) {
  bool found = false;
  for_each_state(checkpoint, [&](const std::string&, const std::string&) { found = true; });
  if (!found) for_each_int8(checkpoint, [&](const std::string&) { found = true; });
  return found;
}

std::vector<ArraySpec> int8_layout(const StoredTensor& t) {
  const std::string layer = layer_of(t.name), format = member(layer, kFormat);
  std::vector<ArraySpec> specs = {{t.name, DType::i8, t.shape},
                                  {member(layer, kRowMaxima), DType::f32, {t.shape.front()}}};
  const bool is_new = t.arrays.empty();
  if (is_new || std::ranges::find(t.arrays, format) != t.arrays.end())
    specs.push_back({.name = format, .dtype = DType::u8, .shape = {}, .row_axis = ArraySpec::kNoRows});
  return specs;
}

float threshold_of(const CheckpointView& checkpoint) {
  if (!declares(checkpoint)) return kUsualThreshold;
  const Json threshold = quantization_config(checkpoint).value("llm_int8_threshold", Json());
  return threshold.is_number() ? threshold.get<float>() : kUsualThreshold;
}

StoredTensor read_int8(const CheckpointView& checkpoint, const std::string& layer) {
  const std::string name = member(layer, "weight");
  const ArraySpec& weight = need_array(checkpoint, name, name);
  if (weight.dtype != DType::i8 || weight.shape.size() != 2)
    bad_container(
        checkpoint, name,
        fmt::format("LLM.int8 stores a matrix of I8, this is {} {}", info(weight.dtype).name, to_string(weight.shape)));
  if (element_count(weight.shape) == 0) bad_container(checkpoint, name, "it is empty");
  StoredTensor t = {.name = name, .shape = weight.shape, .scheme = int8_scheme(), .value_dtype = DType::f16};
  t.linear.outlier_threshold = threshold_of(checkpoint);
  for (const ArraySpec& spec : int8_layout(t)) {
    if (spec.name.ends_with(kFormat) && !checkpoint.arrays.contains(spec.name)) continue;
    check_array(checkpoint, name, spec);
    t.arrays.push_back(spec.name);
  }
  constexpr std::byte kRowFormat{0};
  if (t.arrays.size() > 2 && checkpoint.bytes(t.arrays.back())[0] != kRowFormat)
    bad_container(checkpoint, name,
                  fmt::format("weight_format is {}, only 0 (row) is known",
                              std::to_integer<int>(checkpoint.bytes(t.arrays.back())[0])));
  return t;
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> out;
  for_each_state(checkpoint, [&](const std::string& name, const std::string& type) {
    if (std::ranges::find(kTypes, type) == kTypes.end())
      bad_container(checkpoint, name, fmt::format("unknown type '{}', known are nf4 and fp4", printable(type)));
    out.push_back(read_tensor(checkpoint, name, type));
  });
  for_each_int8(checkpoint, [&](const std::string& layer) { out.push_back(read_int8(checkpoint, layer)); });
  return out;
}

QuantizedModel model(const CheckpointView& checkpoint) {
  if (!declares(checkpoint)) return {};
  return {.skipped = string_list(quantization_config(checkpoint), "llm_int8_skip_modules")};
}

Fit fit(const Scheme& scheme, const Shape& shape) {
  if (shape.size() != 2) return {Verdict::impossible, "transformers loads matrices of linear layers this way only"};
  if (scheme == int8_scheme()) return {Verdict::exact};
  const bool known_type = std::ranges::find(kTypes, scheme.element->name) != kTypes.end();
  if (!known_type || !scheme.scale || scheme.scale->grouping.kind != Grouping::Kind::flat ||
      !known_block(scheme.scale->grouping.size))
    return {Verdict::impossible,
            "bitsandbytes holds nf4 and fp4 in flat blocks of 32, 64 … 4096, and int8 with one f32 maximum a row"};
  const Scheme& absmax = *scheme.scale->scheme;
  const bool nested = absmax.scale && absmax == absmax_scheme(absmax.scale->grouping.size);
  if (!nested && absmax != plain(DType::f32))
    return {Verdict::impossible, "bitsandbytes stores absmax as float32 or through its dynamic map"};
  return {Verdict::exact};
}

float nested_offset(const QuantizedTensor& values) { return decode(*values.scale->offset).at(0); }

/// The JSON as Python's json.dumps writes it. fmt's shortest form of a double is Python's repr, but for whole numbers.
std::string quant_state(const StoredTensor& t, float offset) {
  const Scheme& absmax = *t.scheme.scale->scheme;
  std::string dims;
  for (const int64_t dim : t.whole_shape()) dims += fmt::format("{}{}", dims.empty() ? "" : ", ", dim);
  std::string text = fmt::format(R"({{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}])",
                                 t.scheme.element->name, t.scheme.scale->grouping.size, info(t.value_dtype).name, dims);
  if (is_nested(t.scheme)) {
    std::string repr = fmt::format("{}", static_cast<double>(offset));
    if (repr.find_first_of(".en") == std::string::npos) repr += ".0";
    text += fmt::format(R"(, "nested_blocksize": {}, "nested_dtype": "float32", "nested_offset": {})",
                        absmax.scale->grouping.size, repr);
  }
  return text + "}";
}

std::vector<ArraySpec> layout(const StoredTensor& tensor) {
  if (is_int8(tensor.scheme)) return int8_layout(tensor);
  // The length of the offset's text is known only with its value; 0 stands for it until pack.
  return layout_with_state(tensor, static_cast<int64_t>(quant_state(tensor, 0).size()));
}

std::vector<std::byte> pack_codes(const StoredTensor& tensor, const QuantizedTensor& values) {
  const ElementType& element = *tensor.scheme.element;
  return pack_high_first(values.codes, static_cast<std::byte>(element.nearest(element, 0)));
}

std::vector<NamedArray> pack_int8(const StoredTensor& tensor, const QuantizedTensor& values) {
  std::vector<ArraySpec> specs = int8_layout(tensor);
  std::vector<NamedArray> arrays = moved({{specs[0], values.codes}, {specs[1], values.scale->codes}});
  if (specs.size() > 2) arrays.push_back({specs[2], {std::byte{0}}});
  return arrays;
}

std::vector<NamedArray> pack(const StoredTensor& tensor, const QuantizedTensor& values) {
  if (is_int8(tensor.scheme)) return pack_int8(tensor, values);
  const bool nested = is_nested(tensor.scheme);
  const std::string state = quant_state(tensor, nested ? nested_offset(values) : 0);
  const auto blob = std::as_bytes(std::span(state));
  std::vector<std::vector<std::byte>> data;
  data.push_back(pack_codes(tensor, values));
  data.push_back(values.scale->codes);
  data.push_back(table_bytes(*tensor.scheme.element));
  if (nested) {
    data.push_back(values.scale->scale->codes);
    data.push_back(table_bytes(*values.scale->scheme.element));
  }
  data.emplace_back(blob.begin(), blob.end());
  std::vector<NamedArray> arrays;
  for (const ArraySpec& spec : layout_with_state(tensor, static_cast<int64_t>(blob.size())))
    arrays.push_back({spec, std::move(data[arrays.size()])});
  return arrays;
}

std::shared_ptr<QuantizedTensor> unpack_absmax(const StoredTensor& tensor, const CheckpointView& checkpoint) {
  const Scheme& scheme = *tensor.scheme.scale->scheme;
  const Shape shape = parameter_shape(tensor.scheme.scale->grouping, tensor.shape);
  auto absmax = numbers(scheme, shape, checkpoint.bytes(tensor.name + ".absmax"));
  if (scheme.is_plain()) return absmax;
  absmax->scale = numbers(plain(DType::f32), parameter_shape(scheme.scale->grouping, shape),
                          checkpoint.bytes(tensor.name + ".nested_absmax"));
  const std::span<const std::byte> blob = checkpoint.bytes(tensor.arrays.back());
  const Json state = parse_json({reinterpret_cast<const char*>(blob.data()), blob.size()}, tensor.arrays.back());
  const auto offset = state["nested_offset"].get<float>();
  absmax->offset = numbers(plain(DType::f32), {}, std::as_bytes(std::span(&offset, 1)));
  return absmax;
}

QuantizedTensor unpack(const StoredTensor& tensor, const CheckpointView& checkpoint) {
  QuantizedTensor t = {.scheme = tensor.scheme, .shape = tensor.shape};
  const std::span<const std::byte> packed = checkpoint.bytes(tensor.name);
  if (is_int8(tensor.scheme)) {
    t.codes.assign(packed.begin(), packed.end());
    t.scale = numbers(plain(DType::f32), parameter_shape(tensor.scheme.scale->grouping, tensor.shape),
                      checkpoint.bytes(tensor.arrays.at(1)));
    return t;
  }
  t.codes = unpack_high_first(packed, static_cast<uint64_t>(element_count(tensor.shape)));
  t.scale = unpack_absmax(tensor, checkpoint);
  return t;
}

// ---- what quantize writes ----

constexpr std::array<SchemeChoice, 3> kChoices = {
    {{.quant_type = "nf4", .symmetric = true, .group_size = kUsualBlock, .scale_dtype = "float32"},
     {.quant_type = "fp4", .symmetric = true, .group_size = kUsualBlock, .scale_dtype = "float32"},
     {.quant_type = "int", .bits = 8, .symmetric = true, .granularity = "channel", .scale_dtype = "float32"}}};

Scheme scheme_of(const SchemeChoice& choice, DType /*weight*/) {
  if (choice.quant_type != "int")
    return make_scheme(choice.quant_type, choice.group_size,
                       choice.nested_scales ? std::optional(kUsualNestedBlock) : std::nullopt);
  const bool rows = choice.bits == 8 && choice.symmetric && choice.granularity == "channel" && !choice.nested_scales;
  if (rows && choice.scale_dtype == "float32") return int8_scheme();
  return {.element = &integer_element(choice.bits, choice.symmetric)};  // which `fit` refuses
}

QuantizedTensor encode(const Scheme& scheme, const Shape& shape, WeightView weight) {
  return is_int8(scheme) ? encode_bitsandbytes8(scheme, shape, weight) : encode_bitsandbytes4(scheme, shape, weight);
}

/// transformers decides for the whole model which of the two layers it makes.
Fit fit_model(std::span<const StoredTensor> tensors) {
  const auto eight = std::ranges::count_if(tensors, [](const StoredTensor& t) { return is_int8(t.scheme); });
  if (eight == 0 || eight == static_cast<std::ptrdiff_t>(tensors.size())) return {Verdict::exact};
  return {Verdict::impossible, "a model of bitsandbytes is all 4-bit or all 8-bit"};
}

/// BitsAndBytesConfig as transformers serialises it. A list of modules, even an empty one, replaces what it would
/// guess.
void write_metadata(const WrittenModel& model, const Metadata& out) {
  BW_ASSERT(!model.tensors.empty());
  const StoredTensor& first = model.tensors.front();
  const bool eight = is_int8(first.scheme);
  const auto is_nested_tensor = [](const StoredTensor& t) { return is_nested(t.scheme); };
  OrderedJson skipped = OrderedJson::array();
  for (const std::string& name : model.kept) skipped.push_back(name);
  out.config["quantization_config"] = {
      {"_load_in_4bit", !eight},
      {"_load_in_8bit", eight},
      {"bnb_4bit_compute_dtype", eight ? "float32" : std::string(info(first.value_dtype).name)},
      {"bnb_4bit_quant_storage", "uint8"},
      {"bnb_4bit_quant_type", eight ? "fp4" : std::string(first.scheme.element->name)},
      {"bnb_4bit_use_double_quant", !eight && std::ranges::any_of(model.tensors, is_nested_tensor)},
      {"llm_int8_enable_fp32_cpu_offload", false},
      {"llm_int8_has_fp16_weight", false},
      {"llm_int8_skip_modules", std::move(skipped)},
      {"llm_int8_threshold", kUsualThreshold},
      {"load_in_4bit", !eight},
      {"load_in_8bit", eight},
      {"quant_method", "bitsandbytes"}};
}

}  // namespace

extern const Container bitsandbytes_container;
const Container bitsandbytes_container = {
    .name = "bitsandbytes",
    .summary = "nf4 and fp4, blocks of 32 to 4096, with and without double quantization; LLM.int8",
    .source = "bitsandbytes 0.50.2.dev0 (95f9af3), functional.py QuantState, nn/modules.py, csrc/kernels.cu",
    .only_read = "codes labelled as floats (`bnb_4bit_quant_storage`), absmax quantized in blocks other than 256",
    .rounding =
        "as on CUDA, where nearly all users quantize: the thresholds of kernels.cu in IEEE arithmetic, and code 0 for "
        "blocks of zeros. The CPU back end is another: exact midpoints, the code of 0.0 for blocks of zeros, a "
        "division in a short last block. LLM.int8 rounds the weight to float16 first",
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
    .encode = encode,
    .inputs_first = InputsFirst::transposed};

}  // namespace bitwright
