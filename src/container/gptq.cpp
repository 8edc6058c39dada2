#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "container/container.hpp"
#include "container/gptq_rounding.hpp"
#include "container/qlinear.hpp"
#include "container/stored_arrays.hpp"
#include "container/words.hpp"

namespace bitwright {
namespace {

// LAYER.qweight I32 [K * bits / 32, N]: the codes of a column of N lie along K, dense, least significant bits first;
// LAYER.qzeros I32 [G, N * bits / 32]: the groups' zero points, packed the same way along N;
// LAYER.scales F16 [G, N]; LAYER.g_idx I32 [K]: the group of each column; value = (code - zero) * scale.
// "checkpoint_format" says how zero points are stored (kLayouts). Symmetric: every zero point is 2^(bits - 1).

using namespace qlinear;

constexpr int64_t kStretch = 32;  ///< codes and zero points are packed so many at a time
constexpr int64_t kMostGroup = int64_t{1} << 31;
constexpr std::array<std::string_view, 1> kFiles = {"quantize_config.json"};

/// One way of storing codes and zero points.
struct Layout {
  std::string_view variant;  ///< of StoredTensor
  std::string_view format;   ///< "checkpoint_format"
  const WordPacking* packing;
  uint8_t minus = 0;     ///< zero - minus is stored, modulo 2^bits
  bool borrows = false;  ///< … subtracted from the packed word as one number, which borrows from the next zero point
};
/// AutoGPTQ's, whose zeros wrap each by itself; GPTQModel's of the same name, which subtracts from whole words;
/// GPTQModel's own, which store what is meant. The two of the first name differ only where a zero point is 0.
constexpr std::array<Layout, 4> kLayouts = {
    {{.variant = "gptq", .format = "gptq", .packing = &kDensePacking, .minus = 1},
     {.variant = "gptq, borrowing", .format = "gptq", .packing = &kDensePacking, .minus = 1, .borrows = true},
     {.variant = "gptq_v2", .format = "gptq_v2", .packing = &kDensePacking},
     {.variant = "gptq_p", .format = "gptq_p", .packing = &kPlanarPacking}}};
constexpr const Layout &kFirst = kLayouts[0], &kBorrowing = kLayouts[1], &kSecond = kLayouts[2], &kPlanar = kLayouts[3];

bool only_planar(int bits) { return bits >= 5 && bits <= 7; }

bool is_symmetric(const Scheme& scheme) { return scheme.offset_kind == OffsetKind::none; }

/// What is written: the first layout where no zero point is 0, so that all its readers agree, else the second.
const Layout& layout_of(const StoredTensor& t) {
  if (!t.variant.empty()) return *std::ranges::find(kLayouts, t.variant, &Layout::variant);
  if (only_planar(t.scheme.element->bits)) return kPlanar;
  return is_symmetric(t.scheme) ? kFirst : kSecond;
}

Scheme make_scheme(int bits, bool symmetric, const Grouping& grouping, DType scale) {
  Scheme scheme = {.element = &integer_element(bits, symmetric), .scale = parameter(grouping, plain(scale))};
  if (symmetric) return scheme;
  scheme.offset_kind = OffsetKind::zero_point;
  scheme.offset = parameter(grouping, {.element = scheme.element});
  return scheme;
}

// ---- configuration ----

const Json& config_of(const CheckpointView& checkpoint) { return qlinear::config_of(checkpoint, kFiles); }

/// Did GPTQModel write it? "meta": {"quantizer": "gptqmodel:1.4.0"}, or a list of such.
bool by_gptqmodel(const Json& config) {
  const auto meta = config.find("meta");
  if (meta == config.end() || !meta->is_object()) return false;
  const Json names = meta->value("quantizer", Json());
  for (const Json& name : names.is_array() ? names : Json::array({names}))
    if (name.is_string() && name.get<std::string>().starts_with("gptqmodel:")) return true;
  return false;
}

struct Settings {
  const Layout* layout;
  std::optional<int64_t> bits, group_size;  ///< of all layers but those that `dynamic` names
  bool symmetric, dynamic;
};

Settings settings_of(const CheckpointView& checkpoint) {
  const Json& config = config_of(checkpoint);
  std::string format = text_of(config, {"checkpoint_format", "format"});
  if (format.empty()) format = kFirst.format;
  const auto* layout = std::ranges::find(kLayouts, format, &Layout::format);
  if (layout == kLayouts.end())
    bad_setting(checkpoint,
                fmt::format("checkpoint_format '{}' is not known; gptq, gptq_v2 and gptq_p are", printable(format)));
  if (layout == &kFirst && by_gptqmodel(config)) layout = &kBorrowing;
  const auto dynamic = config.find("dynamic");
  return {.layout = layout,
          .bits = number_of(checkpoint, config, {"bits"}),
          .group_size = number_of(checkpoint, config, {"group_size"}),
          .symmetric = config.value("sym", Json()) == true,
          .dynamic = dynamic != config.end() && dynamic->is_object() && !dynamic->empty()};
}

// ---- zero points ----

/// 1 in each zero point of a word. 3 bits straddle words, and GPTQModel too subtracts from each.
uint32_t ones(int bits) { return bits == 2 ? 0x55555555u : bits == 4 ? 0x11111111u : 0x01010101u; }
bool borrows(const Layout& layout, int bits) { return layout.borrows && (bits == 2 || bits == 4 || bits == 8); }

/// Adds to each word, modulo 2^32.
void add_to_words(std::span<std::byte> words, uint32_t value) {
  for (size_t i = 0; i < words.size(); i += sizeof value) {
    uint32_t word = 0;
    std::memcpy(&word, &words[i], sizeof word);
    word += value;
    std::memcpy(&words[i], &word, sizeof word);
  }
}

void add_to_codes(std::span<std::byte> codes, int bits, unsigned value) {
  for (std::byte& code : codes)
    code = static_cast<std::byte>((std::to_integer<unsigned>(code) + value) & ((1u << bits) - 1));
}

/// zeros: one a byte, a multiple of 32 of them or of what fills a word.
std::vector<std::byte> pack_zeros(const Layout& layout, int bits, std::vector<std::byte> zeros) {
  const bool whole_words = borrows(layout, bits);
  if (!whole_words) add_to_codes(zeros, bits, static_cast<unsigned>(-layout.minus));
  std::vector<std::byte> words(zeros.size() * static_cast<size_t>(bits) / 8);
  layout.packing->pack(zeros, bits, words);
  if (whole_words) add_to_words(words, -ones(bits));
  return words;
}

std::vector<std::byte> unpack_zeros(const Layout& layout, int bits, std::span<const std::byte> packed) {
  std::vector<std::byte> words(packed.begin(), packed.end()), zeros(words.size() * 8 / static_cast<size_t>(bits));
  const bool whole_words = borrows(layout, bits);
  if (whole_words) add_to_words(words, ones(bits));
  layout.packing->unpack(words, bits, zeros);
  if (!whole_words) add_to_codes(zeros, bits, layout.minus);
  return zeros;
}

/// 2^(bits - 1) everywhere?
bool all_in_the_middle(const Layout& layout, int bits, std::span<const std::byte> words) {
  const std::vector<std::byte> stretch(kStretch, static_cast<std::byte>(1u << (bits - 1)));
  const std::vector<std::byte> expected = pack_zeros(layout, bits, stretch);
  for (size_t i = 0; i < words.size(); i += expected.size())
    if (const size_t length = std::min(expected.size(), words.size() - i);
        std::memcmp(&words[i], expected.data(), length) != 0)
      return false;
  return true;
}

// ---- reading ----

bool detect(const CheckpointView& checkpoint) {
  return qlinear::is_method(checkpoint, config_of(checkpoint), "gptq", true);
}

/// What the arrays' shapes say; the configuration must agree.
struct Dimensions {
  int bits;
  int64_t rows, columns, groups;
};

Dimensions dimensions_of(const CheckpointView& checkpoint, const std::string& name, const Settings& settings,
                         const ArraySpec& codes, const ArraySpec& zeros, const ArraySpec& scales) {
  const auto fail = [&](const std::string& why) { bad_container(checkpoint, name, why); };
  check_matrices(checkpoint, name, {&codes, &zeros, &scales});
  if (codes.dtype != DType::i32 || zeros.dtype != DType::i32) fail("qweight and qzeros are not both I32");
  if (scales.dtype != DType::f16 && scales.dtype != DType::bf16 && scales.dtype != DType::f32)
    fail(fmt::format("its scales are {}", info(scales.dtype).name));
  const int64_t rows = codes.shape[1], groups = scales.shape[0];
  if (scales.shape[1] != rows || zeros.shape[0] != groups)
    fail(fmt::format("qweight {}, qzeros {} and scales {} disagree", to_string(codes.shape), to_string(zeros.shape),
                     to_string(scales.shape)));
  // No product overflows: the arrays lie in a file, with four bytes an element.
  const int64_t bits = zeros.shape[1] * 32 / rows;
  if (bits < 2 || bits > 8 || zeros.shape[1] * 32 != rows * bits || codes.shape[0] * 32 % bits != 0)
    fail(fmt::format("qweight {} and qzeros {} agree for no width of 2 to 8 bits", to_string(codes.shape),
                     to_string(zeros.shape)));
  if (settings.bits && !settings.dynamic && *settings.bits != bits)
    fail(fmt::format("its arrays have {} bits, the configuration says {}", bits, *settings.bits));
  const Dimensions d = {static_cast<int>(bits), rows, codes.shape[0] * 32 / bits, groups};
  if (d.columns % kStretch != 0 || (only_planar(d.bits) && rows % kStretch != 0))
    fail(fmt::format("a matrix of {} and {} features, which are no multiples of 32", d.rows, d.columns));
  return d;
}

int64_t groups_of(int64_t columns, int64_t group_size) { return (columns - 1) / group_size + 1; }

/// The grouping that the configuration gives, if it fits the arrays. 0: none.
std::optional<Grouping> configured_grouping(const Settings& settings, const Dimensions& d) {
  const int64_t size = settings.group_size.value_or(d.groups == 1 ? -1 : 0);
  if (size == -1 && d.groups == 1) return Grouping::channel();
  if (size > 0 && size <= kMostGroup && groups_of(d.columns, size) == d.groups) return Grouping::along(size);
  if ((settings.dynamic || !settings.group_size) && d.columns % d.groups == 0)
    return Grouping::along(d.columns / d.groups);
  return std::nullopt;
}

/// By g_idx where it is not what the group size says (desc_act).
Grouping grouping_of(const CheckpointView& checkpoint, const std::string& name, const Settings& settings,
                     const Dimensions& d, const ArraySpec* indices) {
  const auto grouping = configured_grouping(settings, d);
  if (!grouping)
    bad_container(checkpoint, name,
                  fmt::format("scales of {} groups for {} columns, the configuration says groups of {}", d.groups,
                              d.columns, settings.group_size.value_or(-1)));
  if (indices == nullptr) return *grouping;
  if (indices->dtype != DType::i32 || indices->shape != Shape{d.columns})
    bad_container(checkpoint, name,
                  fmt::format("g_idx is {} {}, expected int32 [{}]", info(indices->dtype).name,
                              to_string(indices->shape), d.columns));
  const std::span<const std::byte> data = checkpoint.bytes(indices->name);
  const int64_t size = grouping->size == 0 ? d.columns : grouping->size;
  bool in_order = true;
  for (int64_t k = 0; k < d.columns; ++k) {
    int32_t group = 0;
    std::memcpy(&group, &data[static_cast<size_t>(k) * sizeof group], sizeof group);
    if (group < 0 || group >= d.groups)
      bad_container(checkpoint, name, fmt::format("column {} is of group {} of {}", k, group, d.groups));
    in_order = in_order && group == k / size;
  }
  return in_order ? *grouping : Grouping{.kind = Grouping::Kind::index, .size = size};
}

StoredTensor read_layer(const CheckpointView& checkpoint, const Settings& common, const std::string& layer,
                        const ArraySpec& codes) {
  const std::string name = array_of(layer, kWeight);
  const ArraySpec& zeros = need_array(checkpoint, name, array_of(layer, kZeros));
  const ArraySpec& scales = need_array(checkpoint, name, array_of(layer, kScales));
  const auto found = checkpoint.arrays.find(array_of(layer, kGroups));
  const ArraySpec* const indices = found == checkpoint.arrays.end() ? nullptr : &found->second;
  const Dimensions d = dimensions_of(checkpoint, name, common, codes, zeros, scales);
  const Layout& layout = only_planar(d.bits) ? kPlanar : *common.layout;
  const Grouping grouping = grouping_of(checkpoint, name, common, d, indices);
  const bool symmetric = common.symmetric && all_in_the_middle(layout, d.bits, checkpoint.bytes(zeros.name));
  StoredTensor t = {.name = name,
                    .shape = {d.rows, d.columns},
                    .scheme = make_scheme(d.bits, symmetric, grouping, scales.dtype),
                    .value_dtype = scales.dtype,
                    .storage_dtype = DType::i32,
                    .arrays = {codes.name, zeros.name, scales.name},
                    .variant = layout.variant};
  if (indices != nullptr) t.arrays.push_back(indices->name);
  return t;
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  const Settings settings = settings_of(checkpoint);
  std::vector<StoredTensor> out;
  for_each_layer(checkpoint, [&](const std::string& layer, const ArraySpec& codes) {
    out.push_back(read_layer(checkpoint, settings, layer, codes));
  });
  return out;
}

/// "-:PATTERN" of `dynamic`, a regular expression, leaves modules out.
QuantizedModel model(const CheckpointView& checkpoint) {
  QuantizedModel found;
  const Json& config = config_of(checkpoint);
  const auto dynamic = config.find("dynamic");
  if (dynamic == config.end() || !dynamic->is_object()) return found;
  for (const auto& [pattern, rule] : dynamic->items())
    if (pattern.starts_with("-:")) found.skipped.push_back(pattern.substr(2));
  return found;
}

// ---- writing ----

Fit fit(const Scheme& scheme, const Shape& shape) {
  const auto no = [](std::string why) { return Fit{Verdict::impossible, std::move(why)}; };
  if (shape.size() != 2) return no("GPTQ stores matrices of linear layers only");
  const ElementType& element = *scheme.element;
  const bool symmetric = is_symmetric(scheme);
  if (element.kind != ElementKind::integer || element.bits < 2 || element.bits > 8 ||
      (element.lowest < 0) != symmetric || !scheme.scale)
    return no("GPTQ holds integers of 2 to 8 bits, symmetric or with a zero point");
  const auto dtype = dtype_of(*scheme.scale->scheme->element);
  const bool known = dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f32;
  const Grouping& grouping = scheme.scale->grouping;
  if (!known || scheme != make_scheme(element.bits, symmetric, grouping, *dtype))
    return no("GPTQ needs plain scales of 16 or 32 bits and integer zero points of the same groups");
  constexpr std::array<int64_t, 8> kSizes = {0, 16, 32, 64, 128, 256, 512, 1024};  // as GPTQModel has them
  const bool along_rows = grouping.kind == Grouping::Kind::axis && grouping.axis == -1;
  if (!along_rows && grouping.kind != Grouping::Kind::index) return no("GPTQ groups columns of a row");
  if (std::ranges::find(kSizes, grouping.size) == kSizes.end() && grouping.size < shape[1])
    return no(fmt::format("GPTQ groups 16, 32, 64, 128, 256, 512 or 1024 columns or a row, not {}", grouping.size));
  if (shape[0] % kStretch != 0 || shape[1] % kStretch != 0)
    return no(fmt::format("both sides of a matrix must be multiples of 32, {} are not", to_string(shape)));
  return {Verdict::exact};
}

std::vector<ArraySpec> layout(const StoredTensor& t) {
  const std::string layer = layer_of(t.name, kWeight);
  const int64_t rows = t.shape[0], columns = t.shape[1], bits = t.scheme.element->bits;
  const int64_t groups = parameter_shape(t.scheme.scale->grouping, t.shape).back();
  constexpr int kColumns = 1;
  std::vector<ArraySpec> specs = {
      {.name = array_of(layer, kCodes), .dtype = DType::i32, .shape = {columns * bits / 32, rows}},
      {.name = array_of(layer, kZeros), .dtype = DType::i32, .shape = {groups, rows * bits / 32}},
      {.name = array_of(layer, kScales),
       .dtype = *dtype_of(*t.scheme.scale->scheme->element),
       .shape = {groups, rows}}};
  for (ArraySpec& spec : specs) spec.row_axis = kColumns;
  const std::string indices = array_of(layer, kGroups);
  if (t.arrays.empty() || std::ranges::find(t.arrays, indices) != t.arrays.end())
    specs.push_back({.name = indices, .dtype = DType::i32, .shape = {columns}, .row_axis = ArraySpec::kNoRows});
  return specs;
}

std::vector<std::byte> group_indices(const Scheme& scheme, const QuantizedTensor& values) {
  const Grouping& grouping = scheme.scale->grouping;
  const auto columns = static_cast<size_t>(values.shape[1]);
  const size_t size = grouping.size == 0 ? columns : static_cast<size_t>(grouping.size);
  std::vector<int32_t> indices = values.group_index;
  if (grouping.kind != Grouping::Kind::index)
    for (size_t k = 0; k < columns; ++k) indices.push_back(static_cast<int32_t>(k / size));
  const auto bytes = std::as_bytes(std::span(indices));
  return {bytes.begin(), bytes.end()};
}

/// Signed codes are stored with 2^(bits - 1) added: the highest bit turns.
std::byte sign_of(int bits) { return static_cast<std::byte>(1u << (bits - 1)); }

std::vector<NamedArray> pack(const StoredTensor& t, const QuantizedTensor& values) {
  const std::vector<ArraySpec> specs = bitwright::layout(t);
  const Layout& how = layout_of(t);
  const int bits = t.scheme.element->bits;
  const auto rows = static_cast<size_t>(t.shape[0]), columns = static_cast<size_t>(t.shape[1]);
  const auto groups = static_cast<size_t>(specs[1].shape[0]);
  std::vector<std::byte> words, zeros;
  if (is_symmetric(t.scheme)) {
    words = pack_transposed(*how.packing, bits, values.codes, rows, columns, sign_of(bits));
    zeros.assign(rows * groups, sign_of(bits));
  } else {
    words = pack_transposed(*how.packing, bits, values.codes, rows, columns);
    zeros = transposed_bytes(values.offset->codes, rows, groups, 1);
  }
  std::vector<NamedArray> arrays =
      moved({{specs[0], std::move(words)},
             {specs[1], pack_zeros(how, bits, std::move(zeros))},
             {specs[2], transposed_bytes(values.scale->codes, rows, groups, size_bytes(specs[2].dtype))}});
  if (specs.size() > 3) arrays.push_back({specs[3], group_indices(t.scheme, values)});
  return arrays;
}

std::shared_ptr<QuantizedTensor> numbers(const Parameter& p, const Shape& shape, std::vector<std::byte> codes) {
  return std::make_shared<QuantizedTensor>(
      QuantizedTensor{.scheme = *p.scheme, .shape = parameter_shape(p.grouping, shape), .codes = std::move(codes)});
}

QuantizedTensor unpack(const StoredTensor& t, const CheckpointView& checkpoint) {
  const Layout& how = layout_of(t);
  const int bits = t.scheme.element->bits;
  const Parameter& scale = *t.scheme.scale;
  const auto rows = static_cast<size_t>(t.shape[0]), columns = static_cast<size_t>(t.shape[1]);
  const auto groups = static_cast<size_t>(parameter_shape(scale.grouping, t.shape).back());
  QuantizedTensor out = {.scheme = t.scheme,
                         .shape = t.shape,
                         .codes = unpack_transposed(*how.packing, bits, checkpoint.bytes(t.arrays.at(0)), rows, columns,
                                                    is_symmetric(t.scheme) ? sign_of(bits) : std::byte{0}),
                         .scale = numbers(scale, t.shape,
                                          transposed_bytes(checkpoint.bytes(t.arrays.at(2)), groups, rows,
                                                           size_bytes(*dtype_of(*scale.scheme->element))))};
  if (!is_symmetric(t.scheme)) {
    const std::vector<std::byte> zeros = unpack_zeros(how, bits, checkpoint.bytes(t.arrays.at(1)));
    out.offset = numbers(*t.scheme.offset, t.shape, transposed_bytes(zeros, groups, rows, 1));
  }
  if (scale.grouping.kind == Grouping::Kind::index) {
    const std::span<const std::byte> indices = checkpoint.bytes(t.arrays.at(3));
    out.group_index.resize(columns);
    std::memcpy(out.group_index.data(), indices.data(), indices.size());
  }
  return out;
}

/// What quantize writes where nothing else is asked for: 4 bits, symmetric, groups of 128 and float16 scales, as
/// GPTQModel does; then what agrees with the request.
constexpr auto kChoices = [] {
  std::array<SchemeChoice, 7 * 2 * 2 * 3> choices = {};
  size_t at = 0;
  for (const std::string_view scales : {"float16", "bfloat16", "float32"})
    for (const std::string_view granularity : {"group", "channel"})
      for (const bool symmetric : {true, false})
        for (const int bits : {4, 8, 3, 2, 5, 6, 7})
          choices[at++] = {.bits = bits,
                           .symmetric = symmetric,
                           .granularity = granularity,
                           .group_size = granularity == "group" ? 128 : 0,
                           .scale_dtype = scales};
  return choices;
}();

/// One checkpoint_format for all layers.
Fit fit_model(std::span<const StoredTensor> tensors) {
  bool planar = false, other = false, first = false, three = false;
  for (const StoredTensor& t : tensors) {
    const Layout& layout = layout_of(t);
    planar = planar || &layout == &kPlanar;
    first = first || layout.minus != 0;
    other = other || &layout == &kSecond;
    three = three || (&layout != &kPlanar && t.scheme.element->bits == 3);
  }
  if (first && (other || planar))
    return {Verdict::impossible,
            "a GPTQ model is all symmetric and of 2, 3, 4 and 8 bits, or all with zero points (--symmetric false)"};
  if (planar && three) return {Verdict::impossible, "3 bits are not laid out with 5, 6 or 7 bits in one GPTQ model"};
  return {Verdict::exact};
}

int64_t group_size_of(const StoredTensor& t) {
  const int64_t size = t.scheme.scale->grouping.size;
  return size == 0 ? -1 : size;
}

/// A tensor with the bits and group size that most have; of as many, the first.
const StoredTensor& usual_of(std::span<const StoredTensor> tensors) {
  std::map<std::pair<int, int64_t>, size_t> counts;
  const auto kind = [](const StoredTensor& t) { return std::pair(t.scheme.element->bits, group_size_of(t)); };
  for (const StoredTensor& t : tensors) ++counts[kind(t)];
  return *std::ranges::max_element(tensors, {}, [&](const StoredTensor& t) { return counts[kind(t)]; });
}

/// A regular expression for one module: GPTQModel and vLLM compare from the start of its name on.
std::string pattern_of(std::string_view module) {
  std::string pattern = "^";
  for (const char c : module) {
    if (std::string_view("\\^$.|?*+()[]{}").find(c) != std::string_view::npos) pattern += '\\';
    pattern += c;
  }
  return pattern + "$";
}

bool is_outside_blocks(const std::string& module) {
  return module.ends_with("lm_head") || module.find(".layers.") == std::string::npos;
}

/// What differs from the usual bits and group size, and the modules in blocks that are kept.
OrderedJson exceptions(const WrittenModel& model, const StoredTensor& usual) {
  OrderedJson dynamic = OrderedJson::object();
  for (const std::string& name : model.kept)
    if (!is_outside_blocks(name)) dynamic["-:" + pattern_of(name)] = OrderedJson::object();
  for (const StoredTensor& t : model.tensors) {
    OrderedJson rule = OrderedJson::object();
    if (t.scheme.element->bits != usual.scheme.element->bits) rule["bits"] = t.scheme.element->bits;
    if (group_size_of(t) != group_size_of(usual)) rule["group_size"] = group_size_of(t);
    if (!rule.empty()) dynamic["+:" + pattern_of(layer_of(t.name, kWeight))] = std::move(rule);
  }
  return dynamic;
}

/// GPTQConfig of transformers and QuantizeConfig of GPTQModel: in config.json, and again in the file of its own.
void write_metadata(const WrittenModel& model, const Metadata& out) {
  BW_ASSERT(!model.tensors.empty());
  const StoredTensor& usual = usual_of(model.tensors);
  const auto is_planar = [](const StoredTensor& t) { return &layout_of(t) == &kPlanar; };
  const auto is_indexed = [](const StoredTensor& t) { return t.scheme.scale->grouping.kind == Grouping::Kind::index; };
  const auto is_head = [](const StoredTensor& t) { return layer_of(t.name, kWeight).ends_with("lm_head"); };
  const bool planar = std::ranges::any_of(model.tensors, is_planar);
  OrderedJson config = {{"bits", usual.scheme.element->bits},
                        {"group_size", group_size_of(usual)},
                        {"desc_act", std::ranges::any_of(model.tensors, is_indexed)},
                        {"sym", is_symmetric(usual.scheme)},
                        {"lm_head", std::ranges::any_of(model.tensors, is_head)},
                        {"quant_method", "gptq"},
                        {"checkpoint_format", planar ? kPlanar.format : layout_of(usual).format},
                        {"pack_dtype", "int32"}};
  if (OrderedJson dynamic = exceptions(model, usual); !dynamic.empty()) {
    config["dynamic"] = std::move(dynamic);
    // transformers goes by this list instead: whole names, all in one step.
    OrderedJson quantized = OrderedJson::array();
    for (const StoredTensor& t : model.tensors)
      if (const std::string layer = layer_of(t.name, kWeight); !is_outside_blocks(layer)) quantized.push_back(layer);
    config["modules_in_block_to_quantize"] = OrderedJson::array({std::move(quantized)});
  }
  config["meta"] = {{"quantizer", OrderedJson::array({fmt::format("bitwright:{}", BITWRIGHT_VERSION)})}};
  out.files[std::string(kFiles[0])] = config;
  out.config["quantization_config"] = std::move(config);
}

}  // namespace

extern const Container gptq_container;
const Container gptq_container = {
    .name = "gptq",
    .summary =
        "2, 3, 4, 8 bits (planar: 5, 6, 7), groups or rows, symmetric or with zero points of v1 and v2, desc_act",
    .source = "GPTQModel (f4c327a), nn_modules/qlinear, utils/planar_packing.py; AutoGPTQ (9f7d370), qlinear_cuda.py",
    .only_read =
        "columns in another order (`desc_act`), zero points of v1 (`gptq`) of models that are not symmetric, 3 bits "
        "in planes (`gptq_p`)",
    .rounding =
        "as the quantizer of AutoGPTQ and GPTQModel without a Hessian: the range holds 0, codes are chosen with the "
        "scale in float32, ties to even. Symmetric models are version `gptq`, others `gptq_v2`, since readers of v1 "
        "disagree on a zero point of 0; 5, 6 and 7 bits `gptq_p`",
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
    .encode = encode_gptq,
    .inputs_first = InputsFirst::transposed,
    .files = kFiles};

}  // namespace bitwright
