#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "container/bits.hpp"
#include "container/container.hpp"

namespace bitwright {
namespace {

// LAYER.weight U32 [N, K * bits / 32]: one dense stream of codes a row, least significant bits first;
// LAYER.scales and LAYER.biases [N, K / group_size] in the dtype of the weights; value = code * scale + bias.
// config.json: "quantization": {group_size, bits, mode, "LAYER": {…} or false}.

struct Settings {
  int64_t bits, group_size;
};

std::string_view layer_of(std::string_view weight) {
  constexpr std::string_view kSuffix = ".weight";
  return weight.ends_with(kSuffix) ? weight.substr(0, weight.size() - kSuffix.size()) : weight;
}

Settings settings_for(const CheckpointView& checkpoint, const std::string& layer) {
  Settings s = {0, 0};
  const auto quantization = checkpoint.config.find("quantization");
  const auto read = [&](const Json& block) {
    const auto take = [&](const char* key, int64_t& value) {
      if (block.contains(key) && block[key].is_number_integer()) value = block[key].get<int64_t>();
    };
    take("bits", s.bits);
    take("group_size", s.group_size);
    if (block.contains("mode") && block["mode"] != "affine")
      bad_container(checkpoint, layer, fmt::format("mode {} is not supported", printable(block["mode"].dump())));
  };
  if (quantization != checkpoint.config.end() && quantization->is_object()) {
    read(*quantization);
    if (quantization->contains(layer) && (*quantization)[layer].is_object()) read((*quantization)[layer]);
  }
  return s;
}

Scheme scheme_for(const Settings& s, DType dtype) {
  const Parameter p = parameter(Grouping::along(s.group_size), plain(dtype));
  return {.element = &integer_element(static_cast<int>(s.bits), false),
          .scale = p,
          .offset_kind = OffsetKind::bias,
          .offset = p};
}

bool known_bits(int64_t bits) { return bits >= 2 && bits <= 8 && bits != 7; }
bool known_group(int64_t group_size) { return group_size == 32 || group_size == 64 || group_size == 128; }

bool is_quantized(const CheckpointView& checkpoint, const std::string& layer) {
  const auto weight = checkpoint.arrays.find(layer + ".weight");
  return weight != checkpoint.arrays.end() && weight->second.dtype == DType::u32 &&
         checkpoint.arrays.contains(layer + ".biases");
}

template <class Visit>
void for_each_layer(const CheckpointView& checkpoint, const Visit& visit) {
  for (const auto& [name, spec] : checkpoint.arrays) {
    constexpr std::string_view kScales = ".scales";
    if (!name.ends_with(kScales)) continue;
    const std::string layer = name.substr(0, name.size() - kScales.size());
    if (is_quantized(checkpoint, layer)) visit(layer, spec);
  }
}

bool detect(const CheckpointView& checkpoint) {
  bool found = false;
  for_each_layer(checkpoint, [&](const std::string&, const ArraySpec&) { found = true; });
  return found;
}

StoredTensor read_layer(const CheckpointView& checkpoint, const std::string& layer, const ArraySpec& scales) {
  const ArraySpec& weight = need_array(checkpoint, layer, layer + ".weight");
  const ArraySpec& biases = need_array(checkpoint, layer, layer + ".biases");
  const Settings s = settings_for(checkpoint, layer);
  const auto fail = [&](const std::string& why) { bad_container(checkpoint, layer, why); };
  if (!known_bits(s.bits) || !known_group(s.group_size))
    fail(fmt::format("config.json gives {} bits in groups of {}; known are 2, 3, 4, 5, 6, 8 bits in 32, 64, 128",
                     s.bits, s.group_size));
  if (!info(scales.dtype).is_float || size_bytes(scales.dtype) < 2 || scales.dtype == DType::f64 ||
      biases.dtype != scales.dtype || biases.shape != scales.shape)
    fail("scales and biases are not of one floating type and shape");
  if (weight.shape.size() < 2 || scales.shape.size() != weight.shape.size()) fail("too few dimensions");
  StoredTensor t = {.name = layer + ".weight", .shape = weight.shape, .value_dtype = scales.dtype};
  t.shape.back() = scales.shape.back() * s.group_size;
  Shape packed = t.shape, groups = t.shape;
  packed.back() = t.shape.back() / 32 * s.bits;
  groups.back() = scales.shape.back();
  if (packed != weight.shape || groups != scales.shape)
    fail(fmt::format("weight {} and scales {} disagree for {} bits in groups of {}", to_string(weight.shape),
                     to_string(scales.shape), s.bits, s.group_size));
  t.scheme = scheme_for(s, scales.dtype);
  t.arrays = {weight.name, scales.name, biases.name};
  return t;
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> out;
  for_each_layer(checkpoint, [&](const std::string& layer, const ArraySpec& scales) {
    out.push_back(read_layer(checkpoint, layer, scales));
  });
  return out;
}

Fit fit(const Scheme& scheme, const Shape& shape) {
  const ElementType& element = *scheme.element;
  if (element.kind != ElementKind::integer || element.lowest != 0 || !known_bits(element.bits))
    return {Verdict::impossible, "MLX affine holds unsigned integers of 2, 3, 4, 5, 6 or 8 bits"};
  if (scheme.offset_kind != OffsetKind::bias || !scheme.scale || !scheme.scale->scheme->is_plain() ||
      *scheme.offset != *scheme.scale)
    return {Verdict::impossible, "MLX affine needs one plain scale and one bias a group, of one type"};
  const Grouping& grouping = scheme.scale->grouping;
  if (grouping.kind != Grouping::Kind::axis || grouping.axis != -1 || !known_group(grouping.size))
    return {Verdict::impossible, "MLX groups 32, 64 or 128 elements of a row"};
  if (shape.size() < 2 || shape.back() % grouping.size != 0)
    return {Verdict::impossible, fmt::format("rows of {} are no multiple of {}", to_string(shape), grouping.size)};
  return {Verdict::exact};
}

std::vector<ArraySpec> layout(const StoredTensor& tensor) {
  const std::string layer(layer_of(tensor.name));
  Shape packed = tensor.shape;
  packed.back() = packed.back() / 32 * tensor.scheme.element->bits;
  const Shape groups = parameter_shape(tensor.scheme.scale->grouping, tensor.shape);
  const DType dtype = *dtype_of(*tensor.scheme.scale->scheme->element);
  return {
      {layer + ".weight", DType::u32, packed}, {layer + ".scales", dtype, groups}, {layer + ".biases", dtype, groups}};
}

std::vector<NamedArray> pack(const StoredTensor& tensor, const QuantizedTensor& values) {
  std::vector<ArraySpec> specs = layout(tensor);
  return {{specs[0], pack_bits(values.codes, tensor.scheme.element->bits)},
          {specs[1], values.scale->codes},
          {specs[2], values.offset->codes}};
}

QuantizedTensor unpack(const StoredTensor& tensor, const CheckpointView& checkpoint) {
  const auto plain_part = [&](const Parameter& p, const std::string& array) {
    const std::span<const std::byte> data = checkpoint.bytes(array);
    return std::make_shared<QuantizedTensor>(QuantizedTensor{
        .scheme = *p.scheme, .shape = parameter_shape(p.grouping, tensor.shape), .codes = {data.begin(), data.end()}});
  };
  return {.scheme = tensor.scheme,
          .shape = tensor.shape,
          .codes = unpack_bits(checkpoint.bytes(tensor.arrays.at(0)), tensor.scheme.element->bits,
                               static_cast<uint64_t>(element_count(tensor.shape))),
          .scale = plain_part(*tensor.scheme.scale, tensor.arrays.at(1)),
          .offset = plain_part(*tensor.scheme.offset, tensor.arrays.at(2))};
}

}  // namespace

extern const Container mlx_container;
const Container mlx_container = {
    .name = "mlx",
    .summary = "affine, 2, 3, 4, 5, 6, 8 bits, groups of 32, 64, 128",
    .source = "mlx 0.32.2 (846d176), backend/cpu/quantized.cpp; mlx-lm (d78bf58), utils.py",
    .detect = detect,
    .list = list,
    .fit = fit,
    .layout = layout,
    .pack = pack,
    .unpack = unpack,
    .write_metadata = nullptr,
    .by_rows = true};

}  // namespace bitwright
