#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.hpp"
#include "container/container.hpp"
#include "container/group_rounding.hpp"
#include "container/row_parts.hpp"
#include "container/stored_arrays.hpp"
#include "container/words.hpp"

namespace bitwright {
namespace {

// qint8, qfloat8: LAYER.weight._data I8 or F8 [N, K], LAYER.weight._scale [N, 1].
// qint4, qint2: the weight as [groups, size] (axis 0, a row at least one group), packed along these rows:
// LAYER.weight._data._data U8 with the first part of the rows in the lowest bits; LAYER.weight._scale and ._shift
// [groups, 1], the shift a float that is subtracted or an integer zero point. The library's functions know axis -1 too:
// [size, groups], where K columns have their groups one after the other; parameters [1, groups].
// LAYER.input_scale and .output_scale, numbers: for activations, which quanto_qmap.json says for each module.

constexpr std::string_view kBytes = "._data", kPacked = "._data._data", kScale = "._scale", kShift = "._shift";
constexpr std::string_view kInput = "input_scale", kOutput = "output_scale";
constexpr std::string_view kMap = "quanto_qmap.json";
constexpr std::string_view kMapShape = "shape";  ///< our addition, where the configuration does not tell it

RowParts parts_of(int bits) { return {.bits = bits, .parts = 8 / bits, .first_high = false}; }

bool is_packed(const Scheme& scheme) { return scheme.element->bits < 8; }
bool by_columns(const Scheme& scheme) {
  const Grouping& grouping = scheme.scale->grouping;
  return grouping.kind == Grouping::Kind::axis && grouping.axis == -2;
}

/// Groups of a weight, as its packed matrix has them.
struct Groups {
  int64_t count, size;
};
Groups groups_of(const Scheme& scheme, const Shape& shape) {
  const Grouping& grouping = scheme.scale->grouping;
  const int64_t size = grouping.size != 0 ? grouping.size : shape[by_columns(scheme) ? 0 : 1];
  return {element_count(shape) / size, size};
}

// ---- types ----

struct Type {
  std::string_view name;
  DType dtype;  ///< of what is stored
  int bits;
};
constexpr auto kTypes = std::to_array<Type>({{"qint8", DType::i8, 8},
                                             {"qfloat8_e4m3fn", DType::f8_e4m3, 8},
                                             {"qfloat8_e5m2", DType::f8_e5m2, 8},
                                             {"qfloat8", DType::f8_e4m3, 8},
                                             {"qint4", DType::u8, 4},
                                             {"qint2", DType::u8, 2}});

const Type& type_of(const Scheme& scheme) {
  const auto dtype = scheme.element->bits == 8 ? dtype_of(*scheme.element) : DType::u8;
  const auto* const found = std::ranges::find_if(
      kTypes, [&](const Type& type) { return type.dtype == dtype && type.bits == scheme.element->bits; });
  BW_ASSERT(found != kTypes.end());
  return *found;
}

Scheme bytes_scheme(const ElementType& element, const Grouping& grouping, DType scale) {
  return {.element = &element, .scale = parameter(grouping, plain(scale))};
}
/// shift: of a float, or u8 and i8 for a zero point.
Scheme packed_scheme(int bits, const Grouping& grouping, DType scale, DType shift) {
  const bool is_float = info(shift).is_float;
  return {.element = &integer_element(bits, false),
          .scale = parameter(grouping, plain(scale)),
          .offset_kind = is_float ? OffsetKind::minimum : OffsetKind::zero_point,
          .offset = parameter(grouping,
                              is_float ? plain(shift) : Scheme{.element = &integer_element(8, shift == DType::i8)})};
}

/// What QModuleMixin chooses for a row of so many weights; no group is a group of the whole row.
int64_t usual_group(int64_t columns) {
  constexpr int64_t kMost = 128, kLeast = 32, kStep = 32;
  if (columns <= kMost) return columns;
  int64_t size = kMost;
  while (columns % size != 0 && size > kLeast) size -= kStep;
  return columns % size == 0 ? size : columns;
}

// ---- the shape of a packed weight, which no array has ----

/// Nothing: it is no dimension.
std::optional<int64_t> dimension(const Json& value) {
  if (!value.is_number_integer() || value < 1 || value > INT32_MAX) return std::nullopt;
  return value.get<int64_t>();
}

/// The width of the model, 0 where the configuration does not say it.
int64_t model_width(const Json& config) {
  constexpr auto kNames = std::to_array<std::string_view>({"hidden_size", "n_embd", "d_model", "dim"});
  const Json text = config.value("text_config", Json());
  for (const Json* at : {&config, &text})
    for (const std::string_view name : kNames) {
      if (at->is_object() && at->contains(name))
        if (const auto width = dimension((*at)[name])) return *width;
    }
  return 0;
}

/// Do a layer's outputs go back into the stream that has the model's width? Of the others the inputs come from it.
bool writes_to_stream(std::string_view layer) {
  constexpr auto kNames = std::to_array<std::string_view>(
      {"o_proj", "down_proj", "out_proj", "wo", "w2", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out"});
  const std::string_view last = layer.substr(layer.rfind('.') == std::string_view::npos ? 0 : layer.rfind('.') + 1);
  return std::ranges::find(kNames, last) != kNames.end();
}

/// Of `count` weights, groups lying within rows. Nothing: it cannot be told.
std::optional<Shape> shape_in_model(std::string_view layer, int64_t count, int64_t group, int64_t width) {
  if (width == 0 || count % width != 0) return std::nullopt;
  const int64_t other = count / width;
  const Shape in = {other, width}, out = {width, other};
  const bool written = writes_to_stream(layer);
  for (const Shape& shape : {written ? out : in, written ? in : out})
    if (shape[1] % group == 0) return shape;
  return std::nullopt;
}

// ---- reading ----

class Layer {
 public:
  Layer(const CheckpointView& checkpoint, std::string weight)
      : checkpoint_(checkpoint), name_(std::move(weight)), layer_(layer_of(name_)) {}

  StoredTensor read() const {
    const bool packed = checkpoint_.arrays.contains(name_ + std::string(kPacked));
    StoredTensor t = packed ? read_packed() : read_bytes();
    check_type(t);
    read_activations(t);
    return t;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { bad_container(checkpoint_, name_, why); }
  const ArraySpec& need(std::string_view suffix) const {
    return need_array(checkpoint_, name_, name_ + std::string(suffix));
  }
  /// What the map says of the module; null: nothing.
  Json mapped() const {
    const Json& map = checkpoint_.document(kMap);
    return map.is_object() ? map.value(layer_, Json()) : Json();
  }

  StoredTensor read_bytes() const;
  StoredTensor read_packed() const;
  Shape packed_shape(const Groups& groups, bool columns) const;
  void check_type(const StoredTensor& t) const;
  void read_activations(StoredTensor& t) const;
  std::optional<ActivationScheme> activation(const ArraySpec& scale, const std::string& type) const;

  const CheckpointView& checkpoint_;
  std::string name_, layer_;
};

StoredTensor Layer::read_bytes() const {
  const ArraySpec &data = need(kBytes), &scale = need(kScale);
  const bool known = data.dtype == DType::i8 || data.dtype == DType::f8_e4m3 || data.dtype == DType::f8_e5m2;
  if (!known || data.shape.size() != 2 || element_count(data.shape) == 0)
    fail(fmt::format("'{}' is {} {}, expected a matrix of I8, F8_E4M3 or F8_E5M2", printable(data.name),
                     info(data.dtype).name, to_string(data.shape)));
  const int64_t rows = data.shape[0], columns = data.shape[1];
  Grouping grouping = Grouping::channel();
  if (scale.shape.empty())
    grouping = Grouping::tensor();
  else if (scale.shape == Shape{1, columns} && rows != 1)
    grouping.axis = -2;
  else if (scale.shape != Shape{rows, 1})
    fail(fmt::format("'{}' has shape {}, expected {}", printable(scale.name), to_string(scale.shape),
                     to_string({rows, 1})));
  if (!is_plain_float(scale.dtype)) fail(fmt::format("'{}' is {}", printable(scale.name), info(scale.dtype).name));
  const ElementType& element = data.dtype == DType::i8 ? integer_element(8, true) : float_element(data.dtype);
  return {.name = name_,
          .shape = data.shape,
          .scheme = bytes_scheme(element, grouping, scale.dtype),
          .value_dtype = scale.dtype,
          .arrays = {data.name, scale.name}};
}

StoredTensor Layer::read_packed() const {
  const ArraySpec &data = need(kPacked), &scale = need(kScale), &shift = need(kShift);
  const bool columns = scale.shape.size() == 2 && scale.shape[0] == 1 && scale.shape[1] != 1;
  if (scale.shape.size() != 2 || (!columns && scale.shape[1] != 1) || element_count(scale.shape) == 0 ||
      shift.shape != scale.shape)
    fail(fmt::format("'{}' has shape {} and '{}' {}, expected one number a group", printable(scale.name),
                     to_string(scale.shape), printable(shift.name), to_string(shift.shape)));
  const bool known_shift = shift.dtype == scale.dtype || shift.dtype == DType::u8 || shift.dtype == DType::i8;
  if (!is_plain_float(scale.dtype) || !known_shift)
    fail(fmt::format("its scales are {} and its shifts {}", info(scale.dtype).name, info(shift.dtype).name));
  const int64_t count = element_count(scale.shape);
  if (data.dtype != DType::u8 || data.shape.size() != 2 || element_count(data.shape) == 0)
    fail(fmt::format("'{}' is {} {}, expected a matrix of U8", printable(data.name), info(data.dtype).name,
                     to_string(data.shape)));
  // Of axis 0 the rows are known, and with them the bits; of axis -1 only the map says them.
  const Json type = mapped().is_object() ? mapped().value("weights", Json()) : Json();
  int bits = type == "qint2" ? 2 : 4;
  if (!columns && parts_of(4).packed_rows(count) != data.shape[0]) bits = 2;
  const RowParts parts = parts_of(bits);
  const Groups groups = {count, columns ? data.shape[0] * parts.parts : data.shape[1]};
  const int64_t packed_rows = columns ? data.shape[0] : parts.packed_rows(count);
  if (packed_rows != data.shape[0] || (columns && data.shape[1] != count) ||
      !checked_element_count({groups.count, groups.size}))
    fail(fmt::format("'{}' has shape {}, which does not go with {} groups", printable(data.name), to_string(data.shape),
                     count));
  const Shape shape = packed_shape(groups, columns);
  const Grouping grouping = columns ? Grouping::along(groups.size, -2) : Grouping::flat(groups.size);
  return {.name = name_,
          .shape = shape,
          .scheme = packed_scheme(bits, grouping, scale.dtype, shift.dtype),
          .value_dtype = scale.dtype,
          .arrays = {data.name, scale.name, shift.name}};
}

/// The map where we wrote it, else the bias, else the model's width. Where nothing is said the groups stand for rows.
Shape Layer::packed_shape(const Groups& groups, bool columns) const {
  const int64_t count = groups.count * groups.size;
  Shape shape = columns ? Shape{groups.size, groups.count} : Shape{groups.count, groups.size};
  const int64_t width = model_width(checkpoint_.config);
  const auto bias = checkpoint_.arrays.find(member(layer_, "bias"));
  const Json entry = mapped();
  const Json said = entry.is_object() ? entry.value(std::string(kMapShape), Json()) : Json();
  if (!said.is_null()) {
    const bool both = said.is_array() && said.size() == 2 && dimension(said[0]) && dimension(said[1]);
    if (!both) fail(fmt::format("{} says shape {}", kMap, printable(said.dump())));
    shape = {*dimension(said[0]), *dimension(said[1])};
  } else if (columns) {
    if (width > 0 && count % width == 0) shape = {count / width, width};
  } else if (bias != checkpoint_.arrays.end() && bias->second.shape.size() == 1 && bias->second.shape[0] > 0 &&
             count % bias->second.shape[0] == 0) {
    shape = {bias->second.shape[0], count / bias->second.shape[0]};
  } else if (width > 0) {
    const auto found = shape_in_model(layer_, count, groups.size, width);
    if (!found)
      fail(fmt::format("{} weights in groups of {} make no matrix of a model of width {}", count, groups.size, width));
    shape = *found;
  }
  const bool fits = shape[0] > 0 && shape[1] > 0 && checked_element_count(shape) == count &&
                    (columns ? shape[0] : shape[1]) % groups.size == 0;
  if (!fits) fail(fmt::format("{} groups of {} do not make a matrix {}", groups.count, groups.size, to_string(shape)));
  return shape;
}

void Layer::check_type(const StoredTensor& t) const {
  const Json entry = mapped();
  if (!entry.is_object()) return;
  const Json said = entry.value("weights", Json());
  const Type& type = type_of(t.scheme);
  const auto* const known = std::ranges::find_if(kTypes, [&](const Type& each) { return said == each.name; });
  if (known == kTypes.end() || known->dtype != type.dtype || known->bits != type.bits)
    fail(fmt::format("{} says {}, its arrays are those of {}", kMap, printable(said.dump()), type.name));
}

std::optional<ActivationScheme> Layer::activation(const ArraySpec& scale, const std::string& type) const {
  const auto* const known = std::ranges::find(kTypes, type, &Type::name);
  if (known == kTypes.end() || known->bits != 8) fail(fmt::format("{} says activations {}", kMap, printable(type)));
  const ElementType& element = known->dtype == DType::i8 ? integer_element(8, true) : float_element(known->dtype);
  const auto data = checkpoint_.bytes(scale.name);
  return ActivationScheme{.scheme = bytes_scheme(element, Grouping::tensor(), scale.dtype),
                          .dynamic = false,
                          .scale = numbers(plain(scale.dtype), {}, data)};
}

/// Where activations stay as they are the two scales mean nothing.
void Layer::read_activations(StoredTensor& t) const {
  const Json entry = mapped();
  const Json said = entry.is_object() ? entry.value("activations", Json()) : Json();
  const std::string type = said.is_string() ? said.get<std::string>() : "none";
  for (const std::string_view name : {kInput, kOutput}) {
    const auto found = checkpoint_.arrays.find(member(layer_, name));
    if (found == checkpoint_.arrays.end()) continue;
    const ArraySpec& scale = found->second;
    if (!scale.shape.empty() || !is_plain_float(scale.dtype))
      fail(fmt::format("'{}' is {} {}, expected one float", printable(scale.name), info(scale.dtype).name,
                       to_string(scale.shape)));
    t.arrays.push_back(scale.name);
    const auto data = checkpoint_.bytes(scale.name);
    t.notes.push_back({scale, {data.begin(), data.end()}});
    if (type != "none") (name == kInput ? t.linear.input : t.linear.output) = activation(scale, type);
  }
}

template <class Visit>
void for_each_weight(const CheckpointView& checkpoint, const Visit& visit) {
  for (const auto& [name, spec] : checkpoint.arrays) {
    const std::string_view suffix = name.ends_with(kPacked) ? kPacked : kBytes;
    if (!name.ends_with(suffix) || name.size() == suffix.size()) continue;
    std::string weight = name.substr(0, name.size() - suffix.size());
    if (checkpoint.arrays.contains(weight + std::string(kScale))) visit(std::move(weight));
  }
}

bool detect(const CheckpointView& checkpoint) {
  bool found = !checkpoint.document(kMap).empty();
  for_each_weight(checkpoint, [&](const std::string&) { found = true; });
  return found;
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> out;
  for_each_weight(checkpoint, [&](std::string weight) { out.push_back(Layer(checkpoint, std::move(weight)).read()); });
  const Json& map = checkpoint.document(kMap);
  for (const auto& [module, entry] : map.items()) {
    const Json type = entry.is_object() ? entry.value("weights", Json()) : Json();
    const auto is_it = [&, name = member(module, "weight")](const StoredTensor& t) { return t.name == name; };
    if (type != "none" && std::ranges::none_of(out, is_it))
      bad_container(checkpoint, member(module, "weight"),
                    fmt::format("{} says {}, its arrays are missing", kMap, printable(type.dump())));
  }
  return out;
}

/// Norms whose outputs are quantized have the two scales, too.
QuantizedModel model(const CheckpointView& checkpoint) {
  QuantizedModel found;
  const Json& map = checkpoint.document(kMap);
  for (const auto& [module, entry] : map.items()) {
    if (!entry.is_object() || entry.value("weights", Json()) != "none") continue;
    for (const std::string_view name : {kInput, kOutput})
      if (checkpoint.arrays.contains(member(module, name))) found.arrays.push_back(member(module, name));
  }
  return found;
}

// ---- layout ----

Fit fit_bytes(const Scheme& scheme) {
  const Grouping& grouping = scheme.scale->grouping;
  const auto dtype = dtype_of(*scheme.element);
  const bool known = dtype == DType::i8 || dtype == DType::f8_e4m3 || dtype == DType::f8_e5m2;
  const bool whole =
      grouping.kind == Grouping::Kind::tensor || (grouping.kind == Grouping::Kind::axis && grouping.size == 0);
  if (known && whole && scheme.offset_kind == OffsetKind::none) return {Verdict::exact};
  return {Verdict::impossible, "Quanto holds 8 bits as int8 and float8 with one scale a row and no zero point"};
}

Fit fit(const Scheme& scheme, const Shape& shape) {
  const auto no = [](std::string why) { return Fit{Verdict::impossible, std::move(why)}; };
  if (shape.size() != 2) return no("Quanto quantizes the matrices of linear layers only");
  if (!scheme.scale)
    return no(
        "Quanto holds 2 and 4 bits in groups with a minimum each, and 8 bits as int8 and float8 with a scale a row");
  if (!is_plain_float(*scheme.scale->scheme) || scheme.scale->divides || scheme.factor != 1)
    return no("Quanto stores scales as float32, float16 or bfloat16");
  if (scheme.element->bits == 8) return fit_bytes(scheme);
  const int bits = scheme.element->bits;
  const bool integer = scheme.element->kind == ElementKind::integer && scheme.element->lowest == 0;
  const bool shifted = scheme.offset_kind == OffsetKind::minimum && is_plain_float(*scheme.offset->scheme);
  const bool pointed = scheme.offset_kind == OffsetKind::zero_point && scheme.offset->scheme->is_plain() &&
                       scheme.offset->scheme->element->kind == ElementKind::integer &&
                       scheme.offset->scheme->element->bits == 8;
  if (!integer || (bits != 4 && bits != 2) || (!shifted && !pointed) ||
      scheme.offset->grouping != scheme.scale->grouping)
    return no("Quanto holds integers of 4 and 2 bits with a scale and a shift a group");
  const Grouping& grouping = scheme.scale->grouping;
  const bool flat = grouping.kind == Grouping::Kind::flat && !grouping.interleaved;
  if ((!flat && !by_columns(scheme)) || grouping.size <= 0)
    return no("Quanto groups neighbours within a row by their number");
  const int64_t line = shape[flat ? 1 : 0];
  if (line % grouping.size != 0) return no(fmt::format("the group size {} is no divisor of {}", grouping.size, line));
  if (!flat && grouping.size % parts_of(bits).parts != 0)
    return no(fmt::format("groups along columns of {} do not fill bytes", grouping.size));
  return {Verdict::exact};
}

Shape scale_shape(const StoredTensor& t) {
  if (!is_packed(t.scheme)) {
    if (t.scheme.scale->grouping.kind == Grouping::Kind::tensor) return {};
    return by_columns(t.scheme) ? Shape{1, t.shape[1]} : Shape{t.shape[0], 1};
  }
  const Groups groups = groups_of(t.scheme, t.shape);
  return by_columns(t.scheme) ? Shape{1, groups.count} : Shape{groups.count, 1};
}

/// The packed matrix: the groups are its rows or its columns.
Shape packed_matrix(const StoredTensor& t) {
  const Groups groups = groups_of(t.scheme, t.shape);
  return by_columns(t.scheme) ? Shape{groups.size, groups.count} : Shape{groups.count, groups.size};
}

/// The two scales of activations that stay as they are.
std::vector<NamedArray> new_notes(const StoredTensor& t) {
  std::vector<NamedArray> notes;
  const DType dtype = *dtype_of(*t.scheme.scale->scheme->element);
  for (const std::string_view name : {kInput, kOutput}) {
    const float one = 1;
    notes.push_back({{.name = member(layer_of(t.name), name), .dtype = dtype, .shape = {}}, {}});
    notes.back().data.resize(size_bytes(dtype));
    from_f32(dtype, std::span(&one, 1), notes.back().data);
  }
  return notes;
}
std::vector<NamedArray> notes_of(const StoredTensor& t) { return t.arrays.empty() ? new_notes(t) : t.notes; }

std::vector<ArraySpec> layout(const StoredTensor& t) {
  const auto name = [&](std::string_view suffix) { return t.name + std::string(suffix); };
  const DType scale = *dtype_of(*t.scheme.scale->scheme->element);
  std::vector<ArraySpec> specs;
  if (is_packed(t.scheme)) {
    const Shape matrix = packed_matrix(t);
    specs.push_back({name(kPacked), DType::u8, {parts_of(t.scheme.element->bits).packed_rows(matrix[0]), matrix[1]}});
    specs.push_back({name(kScale), scale, scale_shape(t)});
    specs.push_back({name(kShift), *dtype_of(*t.scheme.offset->scheme->element), scale_shape(t)});
  } else {
    specs.push_back({name(kBytes), type_of(t.scheme).dtype, t.shape});
    specs.push_back({name(kScale), scale, scale_shape(t)});
  }
  for (const NamedArray& note : notes_of(t)) specs.push_back(note.spec);
  return specs;
}

/// Axis -1: element (g * size + i, column) is element (i, column * groups a column + g) of the packed matrix.
template <class Visit>
void for_each_transposed(const StoredTensor& t, const Visit& visit) {
  const Groups groups = groups_of(t.scheme, t.shape);
  const int64_t columns = t.shape[1], in_column = groups.count / columns;
  for (int64_t g = 0; g < in_column; ++g)
    for (int64_t i = 0; i < groups.size; ++i)
      for (int64_t c = 0; c < columns; ++c)
        visit(static_cast<size_t>((g * groups.size + i) * columns + c),
              static_cast<size_t>(i * groups.count + c * in_column + g));
}

std::vector<std::byte> pack_codes(const StoredTensor& t, const QuantizedTensor& values) {
  if (!is_packed(t.scheme)) return values.codes;
  const RowParts parts = parts_of(t.scheme.element->bits);
  const Shape matrix = packed_matrix(t);
  if (!by_columns(t.scheme)) return pack_row_parts(parts, values.codes, matrix[0], matrix[1]);
  std::vector<std::byte> grouped(values.codes.size());
  for_each_transposed(t, [&](size_t own, size_t packed) { grouped[packed] = values.codes[own]; });
  return pack_row_parts(parts, grouped, matrix[0], matrix[1]);
}

std::vector<std::byte> pack_parameter(const StoredTensor& t, const QuantizedTensor& values) {
  if (!is_packed(t.scheme) || !by_columns(t.scheme)) return values.codes;
  // [groups a column, columns] here, [columns, groups a column] there.
  const auto columns = static_cast<size_t>(t.shape[1]);
  return transposed_bytes(values.codes, static_cast<size_t>(groups_of(t.scheme, t.shape).count) / columns, columns,
                          values.scheme.element->code_bytes());
}

std::vector<NamedArray> pack(const StoredTensor& t, const QuantizedTensor& values) {
  std::vector<ArraySpec> specs = layout(t);
  std::vector<NamedArray> arrays =
      moved({{specs[0], pack_codes(t, values)}, {specs[1], pack_parameter(t, *values.scale)}});
  if (values.offset) arrays.push_back({specs[2], pack_parameter(t, *values.offset)});
  for (NamedArray& note : notes_of(t)) arrays.push_back(std::move(note));
  return arrays;
}

std::shared_ptr<const QuantizedTensor> unpack_parameter(const StoredTensor& t, const Parameter& parameter,
                                                        std::span<const std::byte> data) {
  const Shape shape = parameter_shape(parameter.grouping, t.shape);
  if (!is_packed(t.scheme) || !by_columns(t.scheme)) return numbers(*parameter.scheme, shape, data);
  const auto columns = static_cast<size_t>(t.shape[1]);
  return numbers(*parameter.scheme, shape,
                 transposed_bytes(data, columns, static_cast<size_t>(groups_of(t.scheme, t.shape).count) / columns,
                                  parameter.scheme->element->code_bytes()));
}

std::vector<std::byte> unpack_codes(const StoredTensor& t, std::span<const std::byte> data) {
  if (!is_packed(t.scheme)) return {data.begin(), data.end()};
  const Shape matrix = packed_matrix(t);
  std::vector<std::byte> grouped = unpack_row_parts(parts_of(t.scheme.element->bits), data, matrix[0], matrix[1]);
  if (!by_columns(t.scheme)) return grouped;
  std::vector<std::byte> codes(grouped.size());
  for_each_transposed(t, [&](size_t own, size_t packed) { codes[own] = grouped[packed]; });
  return codes;
}

QuantizedTensor unpack(const StoredTensor& t, const CheckpointView& checkpoint) {
  QuantizedTensor out = {.scheme = t.scheme,
                         .shape = t.shape,
                         .codes = unpack_codes(t, checkpoint.bytes(t.arrays.at(0))),
                         .scale = unpack_parameter(t, *t.scheme.scale, checkpoint.bytes(t.arrays.at(1)))};
  if (t.scheme.offset) out.offset = unpack_parameter(t, *t.scheme.offset, checkpoint.bytes(t.arrays.at(2)));
  return out;
}

// ---- rounding: every step in the weight's own type ----

void round_all(DType dtype, std::span<float> values) {
  if (dtype == DType::f32) return;
  for (float& value : values) value = round_to(dtype, value);
}

/// AbsmaxOptimizer, quantize_symmetric. A row of zeros is 0 / 0, which becomes 0 as an integer; as float8 it would be
/// NaN, which the library writes and we do not.
GroupParameters round_symmetric(const ElementType& type, DType dtype, std::span<const float> values,
                                std::span<std::byte> codes) {
  constexpr size_t kStride = 256;
  std::array<float, kStride> scaled;
  float absmax = 0;
  for (const float value : values) absmax = std::max(absmax, std::fabs(value));
  const float scale = round_to(dtype, absmax / type.highest);
  for (size_t begin = 0; begin < values.size(); begin += kStride) {
    const size_t count = std::min(kStride, values.size() - begin);
    for (size_t i = 0; i < count; ++i) scaled[i] = values[begin + i] / scale;
    round_all(dtype, std::span(scaled).first(count));
    if (scale == 0)
      for (size_t i = 0; i < count; ++i) scaled[i] = std::isnan(scaled[i]) ? 0 : scaled[i];
    if (type.kind == ElementKind::integer) {
      for (size_t i = 0; i < count; ++i)
        codes[begin + i] = static_cast<std::byte>(nearest_within(scaled[i], type.lowest, type.highest));
    } else {
      for (size_t i = 0; i < count; ++i) scaled[i] = std::clamp(scaled[i], type.lowest, type.highest);
      from_f32(*dtype_of(type), std::span(scaled).first(count), codes.subspan(begin, count));
    }
  }
  return {.scale = scale};
}

/// MaxOptimizer, quantize_affine. Where all are equal (w + shift) / scale is 0 / 0 and becomes 0.
GroupParameters round_affine(const Scheme& scheme, DType dtype, std::span<const float> values,
                             std::span<std::byte> codes) {
  const float highest = scheme.element->highest;
  const auto own = [dtype](float value) { return round_to(dtype, value); };
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  GroupParameters p = {.scale = own(own(*high - *low) / highest), .offset = -*low};
  const bool integer_shift = scheme.offset_kind == OffsetKind::zero_point;
  if (integer_shift) p.offset = static_cast<float>(nearest_within(own(p.offset / p.scale), 0, highest));
  constexpr size_t kStride = 256;
  std::array<float, kStride> scaled;
  for (size_t begin = 0; begin < values.size(); begin += kStride) {
    const size_t count = std::min(kStride, values.size() - begin);
    const auto part = std::span(scaled).first(count);
    for (size_t i = 0; i < count; ++i) part[i] = values[begin + i] + (integer_shift ? 0 : p.offset);
    round_all(dtype, part);
    for (float& value : part) value /= p.scale;
    round_all(dtype, part);
    if (integer_shift)
      for (float& value : part) value = own(std::nearbyint(value) + p.offset);
    for (size_t i = 0; i < count; ++i) codes[begin + i] = static_cast<std::byte>(nearest_within(part[i], 0, highest));
  }
  return p;
}

QuantizedTensor encode(const Scheme& scheme, const Shape& shape, WeightView weight) {
  const DType dtype = *dtype_of(*scheme.scale->scheme->element);
  return round_groups(scheme, shape, weight, dtype, [&](std::span<const float> values, std::span<std::byte> codes) {
    return is_packed(scheme) ? round_affine(scheme, dtype, values, codes)
                             : round_symmetric(*scheme.element, dtype, values, codes);
  });
}

// ---- what quantize writes ----

constexpr std::array<SchemeChoice, 5> kChoices = {
    {{.bits = 8, .symmetric = true, .granularity = "channel"},
     {.bits = 4, .group_size = 128},
     {.bits = 2, .group_size = 128},
     {.quant_type = "e4m3", .bits = 8, .symmetric = true, .granularity = "channel"},
     {.quant_type = "e5m2", .bits = 8, .symmetric = true, .granularity = "channel"}}};

Scheme scheme_of(const SchemeChoice& choice, DType weight) {
  const DType dtype = scale_dtype_of(choice, weight);
  const bool grouped = choice.granularity == "group" || choice.granularity == "flat";
  if (!choice.nested_scales && !choice.symmetric && grouped && choice.bits < 8)
    return packed_scheme(choice.bits, Grouping::flat(choice.group_size), dtype, dtype);
  if (!choice.nested_scales && choice.symmetric && choice.bits == 8 && choice.granularity == "channel")
    return bytes_scheme(choice.quant_type == "int"
                            ? integer_element(8, true)
                            : float_element(choice.quant_type == "e4m3" ? DType::f8_e4m3 : DType::f8_e5m2),
                        Grouping::channel(), dtype);
  return {.element = &integer_element(choice.bits, choice.symmetric)};  // which `fit` refuses
}

int64_t group_size(const SchemeChoice& /*choice*/, const Shape& shape) { return usual_group(shape.back()); }

/// The file does not say the group size: the loader takes its own.
Fit fit_model(std::span<const StoredTensor> tensors) {
  for (const StoredTensor& t : tensors) {
    if (!is_packed(t.scheme)) continue;
    const int64_t size = groups_of(t.scheme, t.shape).size, usual = usual_group(t.shape[1]);
    if (by_columns(t.scheme) || size != usual)
      return {Verdict::impossible,
              fmt::format("Quanto's loader expects groups of {} in rows of {}, not of {}", usual, t.shape[1], size)};
  }
  return {Verdict::exact};
}

void write_metadata(const WrittenModel& model, const Metadata& out) {
  OrderedJson& map = out.files[std::string(kMap)] = OrderedJson::object();
  const int64_t width = model_width(Json::parse(out.config.dump()));
  for (const StoredTensor& t : model.tensors) {
    const std::string layer = layer_of(t.name);
    const std::string activations =
        t.linear.input ? std::string(type_of(t.linear.input->scheme).name) : std::string("none");
    OrderedJson& entry = map[layer] = {{"weights", type_of(t.scheme).name}, {"activations", activations}};
    if (!is_packed(t.scheme)) continue;
    const auto told = shape_in_model(layer, element_count(t.shape), groups_of(t.scheme, t.shape).size, width);
    if (told != t.shape) entry[std::string(kMapShape)] = t.shape;
  }
}

constexpr std::array<std::string_view, 1> kFiles = {kMap};

}  // namespace

extern const Container quanto_container;
const Container quanto_container = {
    .name = "quanto",
    .summary = "qint8, qfloat8 (e4m3fn, e5m2), qint4 and qint2; scales of activations kept",
    .source = "optimum-quanto e33f820, optimum/quanto/tensor, nn/qmodule.py, models/transformers_models.py",
    .only_read = "groups along columns (axis -1), integer zero points, quantized activations",
    .rounding =
        "as modules do by default: MaxOptimizer for qint4 and qint2, AbsmaxOptimizer for 8 bits, every step in the "
        "weight's type; a row of zeros as float8, of which Quanto makes NaN, becomes zeros",
    .detect = detect,
    .list = list,
    .model = model,
    .fit = fit,
    .layout = layout,
    .pack = pack,
    .unpack = unpack,
    .write_metadata = write_metadata,
    .fit_model = fit_model,
    .choices = kChoices,
    .make_scheme = scheme_of,
    .group_size = group_size,
    .encode = encode,
    .files = kFiles};

}  // namespace bitwright
