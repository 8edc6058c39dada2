#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "base/error.hpp"
#include "container/container.hpp"
#include "container/group_rounding.hpp"
#include "container/row_parts.hpp"
#include "container/stored_arrays.hpp"

namespace bitwright {
namespace {

// The weight is reshaped to [groups, size] (axis 1) or [size, groups] (axis 0), groups running over the ends of rows,
// and packed along its rows: LAYER.W_q, 4, 2 and 1 bits U8 with the first part of the rows in the highest bits, 3 bits
// I32 (rows padded to a multiple of 10), 8, 6 and 5 bits U8. view_as_float labels these bytes as compute_dtype.
// LAYER.scale and LAYER.zero [groups, 1], [1, groups], or one number. How that was done stands beside it, in
// safetensors as arrays: numbers I32, truths U8, texts U8 in ASCII, LAYER.shape I64 [2]; in .pt files as values, in
// older ones with scale and zero in LAYER.meta.

constexpr std::string_view kCodes = "W_q", kScale = "scale", kZero = "zero", kOldMeta = "meta.";
constexpr std::string_view kTorch = "torch.";
constexpr double kTernary = 1.58;  ///< bits of three values, packed as 2
constexpr int64_t kMostNote = 64;  ///< bytes

/// What HQQLinear.state_dict has beside codes, scales, zeros and bias, in the order we write it.
constexpr auto kNotes = std::to_array<std::string_view>({"axis", "channel_wise", "compute_dtype", "encoded_state_dict",
                                                         "group_size", "nbits", "offload_meta", "optimize", "packing",
                                                         "quant_scale", "quant_zero", "round_zero", "shape",
                                                         "stores_quant_config", "unpack_view_dtype", "view_as_float"});

struct Packing {
  std::string_view name;
  DType word;
  RowParts parts;
};
const Packing& packing_of(int bits) {
  static constexpr Packing k8 = {"8bit_u8", DType::u8, {.bits = 8, .parts = 1, .first_high = true}};
  static constexpr Packing k4 = {"4bit_u8", DType::u8, {.bits = 4, .parts = 2, .first_high = true}};
  static constexpr Packing k3 = {"3bit_32", DType::i32, {.bits = 3, .parts = 10, .first_high = true, .word_bytes = 4}};
  static constexpr Packing k2 = {"2bit_u8", DType::u8, {.bits = 2, .parts = 4, .first_high = true}};
  static constexpr Packing k1 = {"1bit_u8", DType::u8, {.bits = 1, .parts = 8, .first_high = true}};
  constexpr std::array<const Packing*, 9> kByBits = {nullptr, &k1, &k2, &k3, &k4, &k8, &k8, nullptr, &k8};
  BW_ASSERT(bits > 0 && bits < 9 && kByBits.at(static_cast<size_t>(bits)) != nullptr);
  return *kByBits.at(static_cast<size_t>(bits));
}
bool known_bits(int bits) { return bits >= 1 && bits <= 8 && bits != 7; }

/// The codes as the matrix that is packed: the groups are its rows or its columns.
struct Grid {
  int64_t rows, columns;
};
Grid grid_of(const Scheme& scheme, const Shape& shape) {
  const Grouping& grouping = scheme.scale->grouping;
  if (grouping.kind == Grouping::Kind::tensor) return {shape[0], shape[1]};
  const int64_t groups = element_count(shape) / grouping.size;
  return grouping.interleaved ? Grid{grouping.size, groups} : Grid{groups, grouping.size};
}

Shape parameter_array(const Scheme& scheme, const Shape& shape) {
  const Grouping& grouping = scheme.scale->grouping;
  if (grouping.kind == Grouping::Kind::tensor) return {};
  const Grid grid = grid_of(scheme, shape);
  return grouping.interleaved ? Shape{1, grid.columns} : Shape{grid.rows, 1};
}

Scheme make_scheme(int bits, const Grouping& grouping, DType scale, DType zero) {
  return {.element = &integer_element(bits, false),
          .scale = parameter(grouping, plain(scale)),
          .offset_kind = OffsetKind::float_zero,
          .offset = parameter(grouping, plain(zero))};
}

// ---- what stands beside the codes ----

template <class T>
NamedArray note(const std::string& layer, std::string_view name, DType dtype, const Shape& shape,
                std::span<const T> values) {
  const auto bytes = std::as_bytes(values);
  return {{.name = member(layer, name), .dtype = dtype, .shape = shape}, {bytes.begin(), bytes.end()}};
}

/// Those of a layer that was quantized without optimisation, by HQQ's own defaults otherwise.
std::vector<NamedArray> new_notes(const StoredTensor& t) {
  const std::string layer = layer_of(t.name);
  const Grouping& grouping = t.scheme.scale->grouping;
  const int bits = t.scheme.element->bits;
  const bool by_tensor = grouping.kind == Grouping::Kind::tensor, by_columns = grouping.interleaved;
  const Packing& packing = packing_of(bits);
  const auto number = [&](std::string_view name, int64_t value) {
    const auto narrow = static_cast<int32_t>(value);
    return note(layer, name, DType::i32, {}, std::span(&narrow, 1));
  };
  const auto truth = [&](std::string_view name, bool value) {
    const auto byte = static_cast<uint8_t>(value ? 1 : 0);
    return note(layer, name, DType::u8, {}, std::span(&byte, 1));
  };
  const auto text = [&](std::string_view name, const std::string& value) {
    return note(layer, name, DType::u8, {static_cast<int64_t>(value.size())}, std::span(value));
  };
  const auto type = [&](std::string_view name, DType dtype) {
    return text(name, fmt::format("{}{}", kTorch, info(dtype).name));
  };
  return {number("axis", by_columns ? 0 : 1),
          truth("channel_wise", !by_tensor),
          type("compute_dtype", t.value_dtype),
          truth("encoded_state_dict", true),
          number("group_size", by_tensor ? t.shape[1] : grouping.size),
          number("nbits", bits),
          truth("offload_meta", false),
          truth("optimize", false),
          text("packing", std::string(packing.name)),
          truth("quant_scale", false),
          truth("quant_zero", false),
          truth("round_zero", bits == 4),
          note(layer, "shape", DType::i64, {2}, std::span<const int64_t>(t.shape)),
          truth("stores_quant_config", true),
          type("unpack_view_dtype", packing.word),
          truth("view_as_float", info(t.storage_dtype).is_float)};
}

/// The facts of one layer, whichever file they come from.
class Layer {
 public:
  Layer(const CheckpointView& checkpoint, std::string layer)
      : checkpoint_(checkpoint), layer_(std::move(layer)), name_(member(layer_, "weight")) {}

  StoredTensor read() const;

 private:
  [[noreturn]] void fail(const std::string& why) const { bad_container(checkpoint_, name_, why); }
  /// An array of the layer, or of its older "meta"; null: there is none.
  const ArraySpec* find(std::string_view name) const {
    for (const std::string_view prefix : {std::string_view(), kOldMeta}) {
      const auto found = checkpoint_.arrays.find(member(layer_, std::string(prefix) + std::string(name)));
      if (found != checkpoint_.arrays.end()) return &found->second;
    }
    return nullptr;
  }
  const ArraySpec& need(std::string_view name) const {
    const std::string own = member(layer_, name), older = member(layer_, std::string(kOldMeta) + std::string(name));
    const bool is_older = !checkpoint_.arrays.contains(own) && checkpoint_.arrays.contains(older);
    return need_array(checkpoint_, name_, is_older ? older : own);
  }
  /// What an array or a value says: numbers and truths as numbers, texts, lists; null: it is not there.
  Json fact(std::string_view name) const;
  std::optional<double> number(std::string_view name) const;
  int64_t whole_number(std::string_view name, std::optional<int64_t> otherwise = std::nullopt) const;
  std::optional<std::string> text(std::string_view name) const;

  int read_bits() const;
  Shape read_shape() const;
  Grouping read_grouping(const Shape& shape) const;
  void check_codes(const StoredTensor& t) const;

  const CheckpointView& checkpoint_;
  std::string layer_, name_;
};

Json Layer::fact(std::string_view name) const {
  if (const ArraySpec* spec = find(name)) {
    const int64_t count = element_count(spec->shape);
    if (count > kMostNote) fail(fmt::format("'{}' has {} elements", name, count));
    const std::span<const std::byte> data = checkpoint_.bytes(spec->name);
    if (spec->dtype == DType::u8 && !spec->shape.empty())
      return std::string(reinterpret_cast<const char*>(data.data()), data.size());
    if (spec->dtype == DType::i64) {
      std::vector<int64_t> values(static_cast<size_t>(count));
      std::memcpy(values.data(), data.data(), data.size());
      return values;
    }
    const bool is_number = spec->dtype == DType::i32 || spec->dtype == DType::u8 || spec->dtype == DType::f32;
    if (count != 1 || !is_number)
      fail(fmt::format("'{}' is {} {}, expected a number", name, info(spec->dtype).name, to_string(spec->shape)));
    std::vector<float> values(1);
    to_f32(spec->dtype, data, values);
    return values[0];
  }
  if (checkpoint_.values == nullptr) return nullptr;
  for (const std::string_view prefix : {std::string_view(), kOldMeta}) {
    const auto found = checkpoint_.values->find(member(layer_, std::string(prefix) + std::string(name)));
    if (found != checkpoint_.values->end()) return found->is_boolean() ? Json(found->get<bool>() ? 1 : 0) : *found;
  }
  return nullptr;
}

std::optional<double> Layer::number(std::string_view name) const {
  const Json value = fact(name);
  if (value.is_null()) return std::nullopt;
  if (!value.is_number()) fail(fmt::format("'{}' is no number", name));
  return value.get<double>();
}

int64_t Layer::whole_number(std::string_view name, std::optional<int64_t> otherwise) const {
  const std::optional<double> value = number(name);
  if (!value && otherwise) return *otherwise;
  constexpr double kMost = 1 << 24;  // exact where a fact passes through f32
  if (!value || *value < 0 || *value > kMost || *value != std::floor(*value))
    fail(value ? fmt::format("'{}' is {}", name, *value) : fmt::format("'{}' is missing", name));
  return static_cast<int64_t>(*value);
}

std::optional<std::string> Layer::text(std::string_view name) const {
  const Json value = fact(name);
  if (value.is_null()) return std::nullopt;
  if (!value.is_string()) fail(fmt::format("'{}' is no text", name));
  return value.get<std::string>();
}

/// 1.58 is a float, which a pickle's reader does not keep.
int Layer::read_bits() const {
  const double bits = number("nbits").value_or(kTernary);
  constexpr double kNear = 0.005;
  if (std::isnan(bits)) fail("'nbits' is no number");
  const int whole = std::fabs(bits - kTernary) < kNear ? 2 : static_cast<int>(std::clamp(bits, 0.0, 9.0));
  const bool is_ternary = whole == 2 && bits != 2;
  if (!known_bits(whole) || (!is_ternary && bits != whole))
    fail(fmt::format("{} bits are unknown, HQQ has 8, 6, 5, 4, 3, 2, 1.58 and 1", bits));
  const Packing& packing = packing_of(whole);
  const std::string named = text("packing").value_or(std::string(packing.name));
  if (named != packing.name)
    fail(fmt::format("{} bits are packed as '{}', expected {}", bits, printable(named), packing.name));
  return whole;
}

Shape Layer::read_shape() const {
  const Json dims = fact("shape");
  if (!dims.is_array() || dims.size() != 2) fail("it has no 'shape' of two dimensions");
  Shape shape;
  for (const Json& dim : dims)
    if (dim.is_number_integer()) shape.push_back(dim.get<int64_t>());
  if (shape.size() != 2 || shape[0] <= 0 || shape[1] <= 0 || !checked_element_count(shape))
    fail(fmt::format("'shape' is {}", dims.dump()));
  return shape;
}

Grouping Layer::read_grouping(const Shape& shape) const {
  if (whole_number("channel_wise", 1) == 0) return Grouping::tensor();
  const int64_t axis = whole_number("axis");
  if (axis > 1) fail(fmt::format("axis {}, known are 0 and 1", axis));
  const int64_t size = whole_number("group_size", axis == 0 ? shape[0] : shape[1]), count = element_count(shape);
  if (size == 0 || count % size != 0) fail(fmt::format("{} weights are no groups of {}", count, size));
  Grouping grouping = Grouping::flat(size);
  grouping.interleaved = axis == 0;
  return grouping;
}

ArraySpec codes_array(const StoredTensor& t) {
  const Packing& packing = packing_of(t.scheme.element->bits);
  const Grid grid = grid_of(t.scheme, t.shape);
  const DType label = info(t.storage_dtype).is_float ? t.storage_dtype : packing.word;
  const auto bytes = grid.columns * static_cast<int64_t>(packing.parts.word_bytes);
  return {.name = member(layer_of(t.name), kCodes),
          .dtype = label,
          .shape = {packing.parts.packed_rows(grid.rows), bytes / static_cast<int64_t>(size_bytes(label))}};
}

void Layer::check_codes(const StoredTensor& t) const {
  const Grid grid = grid_of(t.scheme, t.shape);
  const RowParts& parts = packing_of(t.scheme.element->bits).parts;
  if (parts.word_bytes == 1 && grid.rows % parts.parts != 0)
    fail(fmt::format("{} rows of groups are no multiple of {}", grid.rows, parts.parts));
  const ArraySpec expected = codes_array(t), &found = need(kCodes);
  if (found.dtype != expected.dtype || found.shape != expected.shape ||
      static_cast<int64_t>(found.bytes()) !=
          parts.packed_rows(grid.rows) * grid.columns * static_cast<int64_t>(parts.word_bytes))
    wrong_array(checkpoint_, name_, found, expected);
}

StoredTensor Layer::read() const {
  if (whole_number("quant_scale", 0) != 0 || whole_number("quant_zero", 0) != 0)
    fail("its scales or zeros are quantized themselves, which HQQ gave up");
  StoredTensor t = {.name = name_, .shape = read_shape()};
  const int bits = read_bits();
  const ArraySpec &scale = need(kScale), &zero = need(kZero);
  for (const ArraySpec* parameter : {&scale, &zero})
    if (!is_plain_float(parameter->dtype))
      fail(fmt::format("'{}' is {}", printable(parameter->name), info(parameter->dtype).name));
  t.scheme = make_scheme(bits, read_grouping(t.shape), scale.dtype, zero.dtype);
  for (const ArraySpec* parameter : {&scale, &zero})
    if (const Shape expected = parameter_array(t.scheme, t.shape); parameter->shape != expected)
      fail(fmt::format("'{}' has shape {}, expected {}", printable(parameter->name), to_string(parameter->shape),
                       to_string(expected)));
  const std::string type = text("compute_dtype").value_or("torch.float16");
  const auto value_dtype =
      type.starts_with(kTorch) ? dtype_from_name(std::string_view(type).substr(kTorch.size())) : std::nullopt;
  if (!value_dtype || !info(*value_dtype).is_float) fail(fmt::format("'compute_dtype' is '{}'", printable(type)));
  t.value_dtype = *value_dtype;
  const ArraySpec& codes = need(kCodes);
  if (whole_number("view_as_float", 0) != 0) {
    if (!info(codes.dtype).is_float) fail(fmt::format("viewed as floats, '{}' is {}", kCodes, info(codes.dtype).name));
    t.storage_dtype = codes.dtype;
  }
  check_codes(t);
  t.arrays = {codes.name, scale.name, zero.name};
  for (const std::string_view name : kNotes) {
    const auto spec = checkpoint_.arrays.find(member(layer_, name));
    if (spec == checkpoint_.arrays.end()) continue;
    if (spec->second.bytes() > kMostNote * sizeof(int64_t)) fail(fmt::format("'{}' is too long", name));
    const auto data = checkpoint_.bytes(spec->first);
    t.arrays.push_back(spec->first);
    t.notes.push_back({spec->second, {data.begin(), data.end()}});
  }
  return t;
}

// ---- the row's functions ----

bool is_codes(std::string_view array) {
  return array == kCodes || (array.ends_with(kCodes) && array.ends_with(".W_q"));
}

bool detect(const CheckpointView& checkpoint) {
  return std::ranges::any_of(checkpoint.arrays, [](const auto& array) { return is_codes(array.first); });
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> out;
  for (const auto& [name, spec] : checkpoint.arrays) {
    if (!is_codes(name)) continue;
    out.push_back(Layer(checkpoint, name == kCodes ? "" : name.substr(0, name.size() - kCodes.size() - 1)).read());
  }
  return out;
}

QuantizedModel model(const CheckpointView& checkpoint) {
  return {.skipped = string_list(quantization_config(checkpoint), "skip_modules")};
}

Fit fit(const Scheme& scheme, const Shape& shape) {
  const auto no = [](std::string why) { return Fit{Verdict::impossible, std::move(why)}; };
  if (shape.size() != 2) return no("HQQ quantizes the matrices of linear layers only");
  const ElementType& type = *scheme.element;
  if (type.kind != ElementKind::integer || type.lowest < 0 || !known_bits(type.bits) ||
      scheme.offset_kind != OffsetKind::float_zero || !scheme.scale || !is_plain_float(*scheme.scale->scheme) ||
      !is_plain_float(*scheme.offset->scheme) || scheme.offset->grouping != scheme.scale->grouping)
    return no("HQQ holds integers of 8, 6, 5, 4, 3, 2 and 1 bits with a scale and a zero, both floats, a group");
  const Grouping& grouping = scheme.scale->grouping;
  const bool flat = grouping.kind == Grouping::Kind::flat && grouping.size > 0;
  if (!flat && grouping.kind != Grouping::Kind::tensor) return no("HQQ groups by a number of weights, or not at all");
  if (flat && element_count(shape) % grouping.size != 0)
    return no(fmt::format("{} weights are no multiple of the group size {}", element_count(shape), grouping.size));
  constexpr int64_t kMultiple = 8;
  if (flat && grouping.size % kMultiple != 0 && grouping.size != shape[grouping.interleaved ? 0 : 1])
    return no(fmt::format("HQQ takes group sizes that are multiples of {}", kMultiple));
  const RowParts& parts = packing_of(type.bits).parts;
  const Grid grid = grid_of(scheme, shape);
  if (parts.word_bytes == 1 && grid.rows % parts.parts != 0)
    return no(fmt::format("{} bits are packed {} rows together, and it has {} rows of groups", type.bits, parts.parts,
                          grid.rows));
  return {Verdict::exact};
}

std::vector<ArraySpec> parameter_arrays(const StoredTensor& t) {
  const std::string layer = layer_of(t.name);
  const Shape shape = parameter_array(t.scheme, t.shape);
  return {{.name = member(layer, kScale), .dtype = *dtype_of(*t.scheme.scale->scheme->element), .shape = shape},
          {.name = member(layer, kZero), .dtype = *dtype_of(*t.scheme.offset->scheme->element), .shape = shape}};
}

std::vector<ArraySpec> layout(const StoredTensor& t) {
  std::vector<ArraySpec> specs = {codes_array(t)};
  for (ArraySpec& parameter : parameter_arrays(t)) specs.push_back(std::move(parameter));
  const std::vector<NamedArray> notes = t.notes.empty() ? new_notes(t) : t.notes;
  for (const NamedArray& each : notes) specs.push_back(each.spec);
  return specs;
}

std::vector<NamedArray> pack(const StoredTensor& t, const QuantizedTensor& values) {
  const Grid grid = grid_of(t.scheme, t.shape);
  const std::vector<ArraySpec> parameters = parameter_arrays(t);
  std::vector<NamedArray> arrays = moved({{codes_array(t), pack_row_parts(packing_of(t.scheme.element->bits).parts,
                                                                          values.codes, grid.rows, grid.columns)},
                                          {parameters[0], values.scale->codes},
                                          {parameters[1], values.offset->codes}});
  const std::vector<NamedArray> notes = t.notes.empty() ? new_notes(t) : t.notes;
  arrays.insert(arrays.end(), notes.begin(), notes.end());
  return arrays;
}

std::shared_ptr<const QuantizedTensor> unpack_parameter(const StoredTensor& t, const Parameter& parameter,
                                                        std::span<const std::byte> data) {
  return numbers(*parameter.scheme, parameter_shape(parameter.grouping, t.shape), data);
}

QuantizedTensor unpack(const StoredTensor& t, const CheckpointView& checkpoint) {
  const Grid grid = grid_of(t.scheme, t.shape);
  return {.scheme = t.scheme,
          .shape = t.shape,
          .codes = unpack_row_parts(packing_of(t.scheme.element->bits).parts, checkpoint.bytes(t.arrays.at(0)),
                                    grid.rows, grid.columns),
          .scale = unpack_parameter(t, *t.scheme.scale, checkpoint.bytes(t.arrays.at(1))),
          .offset = unpack_parameter(t, *t.scheme.offset, checkpoint.bytes(t.arrays.at(2)))};
}

// ---- what quantize writes ----

constexpr std::array<SchemeChoice, 7> kChoices = {{{.bits = 4, .group_size = 64},
                                                   {.bits = 8, .group_size = 64},
                                                   {.bits = 3, .group_size = 64},
                                                   {.bits = 2, .group_size = 64},
                                                   {.bits = 1, .group_size = 64},
                                                   {.bits = 5, .group_size = 64},
                                                   {.bits = 6, .group_size = 64}}};

Scheme scheme_of(const SchemeChoice& choice, DType weight) {
  const bool grouped = choice.granularity == "group" || choice.granularity == "flat";
  if (choice.symmetric || choice.nested_scales || (!grouped && choice.granularity != "tensor"))
    return {.element = &integer_element(choice.bits, choice.symmetric)};  // which `fit` refuses
  const DType dtype = scale_dtype_of(choice, weight);
  return make_scheme(choice.bits, grouped ? Grouping::flat(choice.group_size) : Grouping::tensor(), dtype, dtype);
}

/// Quantizer.quantize with optimize=False: it works with the inverse of the scale, in f32 whatever the weight's type,
/// and rounds the zero of 4 bits.
QuantizedTensor encode(const Scheme& scheme, const Shape& shape, WeightView weight) {
  const float highest = scheme.element->highest;
  const bool round_zero = scheme.element->bits == 4;
  return round_groups(scheme, shape, weight, DType::f32, [=](std::span<const float> values, std::span<std::byte> out) {
    constexpr float kLeastRange = 1e-4f, kMostInverse = 2e4f;
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    const float range = *high - *low;
    const float inverse = std::min(range <= kLeastRange ? 1.0f : 1.0f / range * highest, kMostInverse);
    const float exact_zero = -*low * inverse, zero = round_zero ? std::nearbyint(exact_zero) : exact_zero;
    for (size_t i = 0; i < values.size(); ++i)
      out[i] = static_cast<std::byte>(nearest_within(values[i] * inverse + zero, 0, highest));
    return GroupParameters{.scale = 1.0f / inverse, .offset = zero};
  });
}

/// "model.layers.3.self_attn.q_proj" as transformers tags it: "self_attn.q_proj".
std::string linear_tag(const std::string& layer) {
  std::string tag;
  for (size_t begin = 0; begin <= layer.size();) {
    const size_t end = std::min(layer.find('.', begin), layer.size());
    const std::string part = layer.substr(begin, end - begin);
    const bool is_number = !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
    if (part != "model" && part != "layers" && !is_number) tag += (tag.empty() ? "" : ".") + part;
    begin = end + 1;
  }
  return tag;
}

OrderedJson quant_config(const StoredTensor& t) {
  const Grouping& grouping = t.scheme.scale->grouping;
  const bool by_tensor = grouping.kind == Grouping::Kind::tensor;
  const int bits = t.scheme.element->bits;
  return {{"weight_quant_params",
           {{"nbits", bits},
            {"channel_wise", !by_tensor},
            {"group_size", by_tensor ? t.shape[1] : grouping.size},
            {"optimize", false},
            {"round_zero", bits == 4},
            {"axis", grouping.interleaved ? 0 : 1},
            {"view_as_float", info(t.storage_dtype).is_float}}},
          {"scale_quant_params", nullptr},
          {"zero_quant_params", nullptr},
          {"offload_meta", false}};
}

/// HqqConfig as transformers serialises it: one configuration for all layers, or one for each kind of layer. Where
/// layers of one kind differ, the first speaks for them; each layer's arrays say what it is.
void write_metadata(const WrittenModel& model, const Metadata& out) {
  BW_ASSERT(!model.tensors.empty());
  OrderedJson by_tag = OrderedJson::object();
  std::set<std::string> kinds;
  for (const StoredTensor& t : model.tensors) {
    OrderedJson one = quant_config(t);
    kinds.insert(one.dump());
    const std::string tag = linear_tag(layer_of(t.name));
    if (!by_tag.contains(tag)) by_tag[tag] = std::move(one);
  }
  OrderedJson skipped = OrderedJson::array();
  for (const std::string& name : model.kept) skipped.push_back(name);
  out.config["quantization_config"] = {
      {"quant_config", kinds.size() == 1 ? quant_config(model.tensors.front()) : std::move(by_tag)},
      {"quant_method", "hqq"},
      {"skip_modules", std::move(skipped)}};
}

}  // namespace

extern const Container hqq_container;
const Container hqq_container = {
    .name = "hqq",
    .summary = "8 to 1 bits (but 7), groups of either axis or none, .safetensors and .pt; written along axis 1",
    .source = "hqq e0b1d00, hqq/core/quantize.py and bitpack.py; transformers 0de4bbd, quantizer_hqq.py",
    .only_read =
        "groups along axis 0, three values a weight (1.58 bits), codes labelled as floats (`view_as_float`), `.pt`",
    .rounding =
        "as Quantizer.quantize with `optimize=False`, in float32; the zero of 4 bits is rounded. HQQ's default "
        "(`optimize=True`) iterates the zero, with a result that depends on the device and the order of sums; it is "
        "read, not made",
    .detect = detect,
    .list = list,
    .model = model,
    .fit = fit,
    .layout = layout,
    .pack = pack,
    .unpack = unpack,
    .write_metadata = write_metadata,
    .choices = kChoices,
    .make_scheme = scheme_of,
    .encode = encode};

}  // namespace bitwright
