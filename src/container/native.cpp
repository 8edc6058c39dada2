#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/bits.hpp"
#include "base/error.hpp"
#include "container/container.hpp"
#include "container/stored_arrays.hpp"

namespace bitwright {
namespace {

// NAME.codes; NAME.scales, or NAME.scales.codes … where scales are quantized themselves; NAME.zeros, NAME.biases or
// NAME.minimums likewise; NAME.group_index. 8-bit codes keep their type and shape; narrower ones are one dense stream,
// least significant bits first, shaped by rows where rows are whole bytes.

constexpr int kMajor = 1;  ///< of quantization_metadata.json; a newer one is refused
constexpr int kMinor = 0;

std::string offset_suffix(OffsetKind kind) {
  if (kind == OffsetKind::bias) return ".biases";
  if (kind == OffsetKind::minimum) return ".minimums";
  return ".zeros";
}

ArraySpec code_array(const std::string& name, const ElementType& element, const Shape& shape) {
  if (const auto dtype = dtype_of(element)) return {name, *dtype, shape};
  const int64_t count = element_count(shape);
  const int64_t row = shape.empty() ? 1 : shape.back();
  if (!shape.empty() && row * element.bits % 8 == 0) {
    Shape packed = shape;
    packed.back() = row * element.bits / 8;
    return {name, DType::u8, packed};
  }
  return {name, DType::u8, {static_cast<int64_t>(packed_bytes(static_cast<uint64_t>(count), element.bits))}};
}

/// Visits every array of a tensor in the order of the file: visit(spec, part), part being where its bytes live.
template <class Visit>
void for_each_array(const std::string& name, const Scheme& scheme, const Shape& shape, const QuantizedTensor* t,
                    const Visit& visit) {
  const bool nested = !scheme.is_plain();
  visit(code_array(nested ? name + ".codes" : name, *scheme.element, shape), scheme, t);
  const auto parameter = [&](const std::optional<Parameter>& p, const std::string& suffix, const auto& stored) {
    if (p)
      for_each_array(name + suffix, *p->scheme, parameter_shape(p->grouping, shape), t ? stored() : nullptr, visit);
  };
  parameter(scheme.scale, ".scales", [&] { return t->scale.get(); });
  parameter(scheme.offset, offset_suffix(scheme.offset_kind), [&] { return t->offset.get(); });
}

bool is_indexed(const Scheme& scheme) { return scheme.scale && scheme.scale->grouping.kind == Grouping::Kind::index; }

ArraySpec index_array(const std::string& name, const Shape& shape) {
  return {.name = name + ".group_index", .dtype = DType::i32, .shape = {shape.back()}, .row_axis = ArraySpec::kNoRows};
}

Fit fit(const Scheme& scheme, const Shape& shape) {
  if (scheme.element->kind == ElementKind::block_code)
    return {Verdict::impossible, "block codes are kept in their own container"};
  try {
    for (const auto& p : {scheme.scale, scheme.offset})
      if (p) parameter_shape(p->grouping, shape);
  } catch (const Error& error) {
    return {Verdict::impossible, error.what()};
  }
  return {Verdict::exact};
}

std::vector<ArraySpec> layout(const StoredTensor& tensor) {
  std::vector<ArraySpec> specs;
  for_each_array(tensor.name, tensor.scheme, tensor.shape, nullptr,
                 [&](const ArraySpec& spec, const Scheme&, const QuantizedTensor*) { specs.push_back(spec); });
  if (is_indexed(tensor.scheme)) specs.push_back(index_array(tensor.name, tensor.shape));
  return specs;
}

std::vector<NamedArray> pack(const StoredTensor& tensor, const QuantizedTensor& values) {
  std::vector<NamedArray> arrays;
  for_each_array(tensor.name, tensor.scheme, tensor.shape, &values,
                 [&](const ArraySpec& spec, const Scheme& scheme, const QuantizedTensor* part) {
                   arrays.push_back(
                       {spec, dtype_of(*scheme.element) ? part->codes : pack_bits(part->codes, scheme.element->bits)});
                   BW_ASSERT(arrays.back().data.size() == spec.bytes());
                 });
  if (is_indexed(tensor.scheme)) {
    const auto bytes = std::as_bytes(std::span(values.group_index));
    arrays.push_back({index_array(tensor.name, tensor.shape), {bytes.begin(), bytes.end()}});
  }
  return arrays;
}

std::shared_ptr<QuantizedTensor> unpack_part(const std::string& name, const Scheme& scheme, const Shape& shape,
                                             const CheckpointView& checkpoint) {
  auto t = std::make_shared<QuantizedTensor>();
  t->scheme = scheme;
  t->shape = shape;
  const ArraySpec spec = code_array(scheme.is_plain() ? name : name + ".codes", *scheme.element, shape);
  const std::span<const std::byte> data = checkpoint.bytes(spec.name);
  if (dtype_of(*scheme.element)) {
    t->codes.assign(data.begin(), data.end());
  } else {
    t->codes = unpack_bits(data, scheme.element->bits, static_cast<uint64_t>(element_count(shape)));
  }
  const auto parameter = [&](const std::optional<Parameter>& p, const std::string& suffix) {
    return p ? unpack_part(name + suffix, *p->scheme, parameter_shape(p->grouping, shape), checkpoint) : nullptr;
  };
  t->scale = parameter(scheme.scale, ".scales");
  t->offset = parameter(scheme.offset, offset_suffix(scheme.offset_kind));
  return t;
}

QuantizedTensor unpack(const StoredTensor& tensor, const CheckpointView& checkpoint) {
  const std::shared_ptr<QuantizedTensor> t = unpack_part(tensor.name, tensor.scheme, tensor.shape, checkpoint);
  if (is_indexed(tensor.scheme)) {
    const std::span<const std::byte> data = checkpoint.bytes(index_array(tensor.name, tensor.shape).name);
    t->group_index.resize(data.size() / sizeof(int32_t));
    std::copy(data.begin(), data.end(), std::as_writable_bytes(std::span(t->group_index)).begin());
  }
  return std::move(*t);
}

bool detect(const CheckpointView& checkpoint) { return !checkpoint.quantization_metadata.empty(); }

[[noreturn]] void bad_metadata(const CheckpointView& checkpoint, const std::string& why, const std::string& fix) {
  throw Error({.code = "bad-metadata",
               .what = "cannot read model",
               .where = checkpoint.where + "/quantization_metadata.json",
               .why = why,
               .fix = fix});
}

void check_version(const CheckpointView& checkpoint) {
  const Json& metadata = checkpoint.quantization_metadata;
  const auto version = metadata.find("format_version");
  const std::string again = "write the model again with this version of bitwright";
  if (version == metadata.end() || !version->is_string()) bad_metadata(checkpoint, "it has no format_version", again);
  int major = 0, minor = 0;
  char rest = 0;
  const auto& text = version->get_ref<const std::string&>();
  if (std::sscanf(text.c_str(), "%5d.%5d%c", &major, &minor, &rest) != 2 || major < 1 || minor < 0)
    bad_metadata(checkpoint, fmt::format("format_version '{}' is no version", printable(text)), again);
  if (major > kMajor)
    bad_metadata(checkpoint, fmt::format("format_version is {}, this program knows up to {}.x", text, kMajor),
                 "use a newer bitwright");
}

StoredTensor read_entry(const CheckpointView& checkpoint, const std::string& name, const Json& entry) {
  StoredTensor tensor = {.name = name};
  const auto fail = [&](const std::string& why) {
    bad_metadata(checkpoint, fmt::format("tensor '{}': {}", printable(name), why), "fetch or write the model again");
  };
  if (!entry.is_object() || !entry.contains("shape") || !entry.contains("scheme") || !entry.contains("dtype"))
    fail("shape, dtype or scheme is missing");
  if (!entry["shape"].is_array() || entry["shape"].empty() || entry["shape"].size() > 8) fail("its shape is no list");
  for (const Json& dim : entry["shape"]) {
    if (!dim.is_number_unsigned() || dim.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) fail("bad shape");
    tensor.shape.push_back(dim.get<int64_t>());
  }
  if (!checked_element_count(tensor.shape)) fail(fmt::format("shape {} overflows", to_string(tensor.shape)));
  const auto dtype = entry["dtype"].is_string() ? dtype_from_name(entry["dtype"].get<std::string>()) : std::nullopt;
  if (!dtype) fail("unknown dtype");
  tensor.value_dtype = *dtype;
  if (!info(*dtype).is_float || size_bytes(*dtype) < 2) fail(fmt::format("its values cannot be {}", info(*dtype).name));
  tensor.scheme = scheme_from_json(entry["scheme"], fmt::format("tensor '{}'", printable(name)));
  if (tensor.scheme.is_plain()) fail("its scheme is that of a tensor that is not quantized");
  for (const ArraySpec& spec : layout(tensor)) {
    const ArraySpec& found = need_array(checkpoint, name, spec.name);
    if (found.dtype != spec.dtype || found.shape != spec.shape) wrong_array(checkpoint, name, found, spec);
    tensor.arrays.push_back(spec.name);
  }
  return tensor;
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  check_version(checkpoint);
  const auto tensors = checkpoint.quantization_metadata.find("tensors");
  if (tensors == checkpoint.quantization_metadata.end() || !tensors->is_object())
    bad_metadata(checkpoint, "it lists no tensors", "write the model again");
  std::vector<StoredTensor> out;
  for (const auto& [name, entry] : tensors->items()) out.push_back(read_entry(checkpoint, name, entry));
  return out;
}

void write_metadata(const WrittenModel& model, const Metadata& out) {
  out.config["quantization_config"] = {{"quant_method", "bitwright"},
                                       {"format_version", fmt::format("{}.{}", kMajor, kMinor)}};
  OrderedJson metadata = {{"format_version", fmt::format("{}.{}", kMajor, kMinor)}};
  metadata.update(model.record);
  OrderedJson& listed = metadata["tensors"] = OrderedJson::object();
  // Appended, not looked up: an ordered object looks through all its members, and there may be very many.
  auto& members = listed.get_ref<OrderedJson::object_t&>();
  for (const StoredTensor& tensor : model.tensors)
    members.push_back(
        {tensor.name,
         {{"shape", tensor.shape}, {"dtype", info(tensor.value_dtype).name}, {"scheme", to_json(tensor.scheme)}}});
  out.files["quantization_metadata.json"] = std::move(metadata);
}

}  // namespace

extern const Container native_container;
const Container native_container = {.name = "native",
                                    .summary = "every elementwise scheme; safetensors and quantization_metadata.json",
                                    .source = "docs/native-container.md",
                                    .method = "bitwright",
                                    .rounding =
                                        "to the nearest code, of integers with ties to even; ranges by least squared "
                                        "error below 8 bits, else by extremes (`--range`)",
                                    .detect = detect,
                                    .list = list,
                                    .fit = fit,
                                    .layout = layout,
                                    .pack = pack,
                                    .unpack = unpack,
                                    .write_metadata = write_metadata,
                                    .by_rows = true,
                                    .inputs_first = InputsFirst::as_it_is,
                                    .embeddings = true};

}  // namespace bitwright
