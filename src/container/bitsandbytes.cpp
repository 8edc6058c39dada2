#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.hpp"
#include "container/container.hpp"

namespace bitwright {
namespace {

// WEIGHT U8 [(n + 1) / 2, 1], the first of two codes in the high nibble (labelled BF16 or F32 with quant_storage);
// WEIGHT.absmax F32, or U8 codes of the dynamic map with WEIGHT.nested_absmax and WEIGHT.nested_quant_map;
// WEIGHT.quant_map F32 [16]; WEIGHT.quant_state.bitsandbytes__nf4 (or fp4): JSON as U8.

constexpr std::string_view kState = ".quant_state.bitsandbytes__";
constexpr std::array<std::string_view, 2> kTypes = {"nf4", "fp4"};
constexpr int64_t kMaxBlock = 4096;

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
    bad_container(checkpoint, name,
                  fmt::format("array '{}' is {} {}, expected {} {}", printable(expected.name), info(found.dtype).name,
                              to_string(found.shape), info(expected.dtype).name, to_string(expected.shape)));
}

std::vector<ArraySpec> layout_with_state(const StoredTensor& t, int64_t state_bytes) {
  const int64_t bytes = (element_count(t.shape) + 1) / 2;
  const auto storage = static_cast<int64_t>(size_bytes(t.storage_dtype));
  const int64_t blocks = parameter_shape(t.scheme.scale->grouping, t.shape).at(0);
  const bool nested = is_nested(t.scheme);
  std::vector<ArraySpec> specs = {{t.name, t.storage_dtype, {bytes / storage, 1}},
                                  {t.name + ".absmax", nested ? DType::u8 : DType::f32, {blocks}},
                                  {t.name + ".quant_map", DType::f32, {16}}};
  if (nested) {
    const Scheme& absmax = *t.scheme.scale->scheme;
    specs.push_back({t.name + ".nested_absmax", DType::f32, parameter_shape(absmax.scale->grouping, {blocks})});
    specs.push_back({t.name + ".nested_quant_map", DType::f32, {256}});
  }
  specs.push_back({t.name + std::string(kState) + std::string(t.scheme.element->name), DType::u8, {state_bytes}});
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
  if (nested && (!state.json.contains("nested_offset") || !state.json["nested_offset"].is_number()))
    bad_container(checkpoint, name, "quant_state has no valid 'nested_offset'");
  for (const ArraySpec& spec : layout_with_state(t, element_count(blob.shape))) {
    check_array(checkpoint, name, spec);
    t.arrays.push_back(spec.name);
  }
  check_map(checkpoint, name, name + ".quant_map", *t.scheme.element);
  if (nested) check_map(checkpoint, name, name + ".nested_quant_map", *t.scheme.scale->scheme->element);
  return t;
}

template <class Visit>
void for_each_state(const CheckpointView& checkpoint, const Visit& visit) {
  for (const auto& [array, spec] : checkpoint.arrays)
    for (const std::string_view type : kTypes) {
      const std::string suffix = std::string(kState) + std::string(type);
      if (array.ends_with(suffix)) visit(array.substr(0, array.size() - suffix.size()), type);
    }
}

bool detect(const CheckpointView& checkpoint) {
  bool found = false;
  for_each_state(checkpoint, [&](const std::string&, std::string_view) { found = true; });
  return found;
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> out;
  for_each_state(checkpoint, [&](const std::string& name, std::string_view type) {
    out.push_back(read_tensor(checkpoint, name, type));
  });
  return out;
}

Fit fit(const Scheme& scheme, const Shape&) {
  const bool known_type = std::ranges::find(kTypes, scheme.element->name) != kTypes.end();
  if (!known_type || !scheme.scale || scheme.scale->grouping.kind != Grouping::Kind::flat ||
      !known_block(scheme.scale->grouping.size))
    return {Verdict::impossible, "bitsandbytes holds nf4 and fp4 in flat blocks of 32, 64 … 4096"};
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
  for (const int64_t dim : t.shape) dims += fmt::format("{}{}", dims.empty() ? "" : ", ", dim);
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
  // The length of the offset's text is known only with its value; 0 stands for it until pack.
  return layout_with_state(tensor, static_cast<int64_t>(quant_state(tensor, 0).size()));
}

std::vector<std::byte> pack_codes(const StoredTensor& tensor, const QuantizedTensor& values) {
  std::vector<std::byte> out((values.codes.size() + 1) / 2);
  for (size_t i = 0; i < values.codes.size(); i += 2) {
    const bool last = i + 1 == values.codes.size();
    const auto low =
        last ? static_cast<std::byte>(tensor.scheme.element->nearest(*tensor.scheme.element, 0)) : values.codes[i + 1];
    out[i / 2] = values.codes[i] << 4 | low;
  }
  return out;
}

std::vector<NamedArray> pack(const StoredTensor& tensor, const QuantizedTensor& values) {
  const bool nested = is_nested(tensor.scheme);
  const std::string state = quant_state(tensor, nested ? nested_offset(values) : 0);
  const auto blob = std::as_bytes(std::span(state));
  std::vector<std::vector<std::byte>> data = {pack_codes(tensor, values), values.scale->codes,
                                              table_bytes(*tensor.scheme.element)};
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

std::shared_ptr<QuantizedTensor> numbers(const Scheme& scheme, const Shape& shape, std::span<const std::byte> data) {
  return std::make_shared<QuantizedTensor>(
      QuantizedTensor{.scheme = scheme, .shape = shape, .codes = {data.begin(), data.end()}});
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
  t.codes.resize(static_cast<size_t>(element_count(tensor.shape)));
  for (size_t i = 0; i < t.codes.size(); ++i)
    t.codes[i] = i % 2 == 0 ? packed[i / 2] >> 4 : packed[i / 2] & std::byte{15};
  t.scale = unpack_absmax(tensor, checkpoint);
  return t;
}

}  // namespace

extern const Container bitsandbytes_container;
const Container bitsandbytes_container = {
    .name = "bitsandbytes",
    .summary = "nf4 and fp4, blocks of 32 to 4096, with and without double quantization",
    .source = "bitsandbytes 0.50.2.dev0 (95f9af3), functional.py QuantState",
    .detect = detect,
    .list = list,
    .fit = fit,
    .layout = layout,
    .pack = pack,
    .unpack = unpack,
    .write_metadata = nullptr};

}  // namespace bitwright
