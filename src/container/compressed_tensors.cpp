#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "base/bits.hpp"
#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/compressed_tensors_config.hpp"
#include "container/compressed_tensors_rounding.hpp"
#include "container/container.hpp"
#include "container/stored_arrays.hpp"

namespace bitwright {
namespace {

// pack-quantized: LAYER.weight_packed I32 [N, ceil(K b / 32)], each row one stream of q + 2^(b-1), least significant
//   bits first, padded with 0 to a word; weight_scale [N, G], [N, 1] or [1]; weight_zero_point I32 [ceil(N b / 32), G]
//   packed along N, of one scale a tensor I8 [1]; weight_shape I64 [2]; with activation order weight_g_idx I32 [K].
// int-quantized, float-quantized, mxfp8-quantized: LAYER.weight I8 or F8_E4M3 [N, K]; weight_scale likewise, or
//   [N/128, K/128] of blocks, of mxfp8 U8 exponents; weight_zero_point I8 as the scale.
// nvfp4-pack-quantized, mxfp4-pack-quantized: LAYER.weight_packed U8 [N, K/2], the first of two in the low nibble;
//   weight_scale F8_E4M3 [N, K/16] and weight_global_scale F32 [1] that divides it, or U8 exponents [N, K/32].
// All: input_scale, input_zero_point, input_global_scale of activations that are calibrated, and output_ likewise.

constexpr std::string_view kWeight = "weight", kPacked = "weight_packed", kScale = "weight_scale";
constexpr std::string_view kZero = "weight_zero_point", kGlobal = "weight_global_scale", kShape = "weight_shape";
constexpr std::string_view kIndex = "weight_g_idx", kOutputScale = "output_scale";
constexpr std::string_view kActivationScale = "_scale", kActivationZero = "_zero_point",
                           kActivationGlobal = "_global_scale";
constexpr std::array<std::string_view, 6> kCacheSuffixes = {"k_scale",      "v_scale",      "q_scale",
                                                            "k_zero_point", "v_zero_point", "q_zero_point"};
constexpr int kWord = 32;

int64_t words(int64_t codes, int bits) { return (codes * bits + kWord - 1) / kWord; }

/// "model.layers.0.mlp.up_proj." of its weight.
std::string prefix_of(const StoredTensor& t) { return t.name.substr(0, t.name.size() - kWeight.size()); }

bool is_integer(const Scheme& scheme) { return scheme.element->kind == ElementKind::integer; }
bool is_fp4(const Scheme& scheme) { return !is_integer(scheme) && scheme.element->bits == 4; }
bool is_asymmetric(const Scheme& scheme) { return scheme.offset_kind == OffsetKind::zero_point; }
bool is_indexed(const Scheme& scheme) { return scheme.scale->grouping.kind == Grouping::Kind::index; }
bool is_nested(const Scheme& scheme) { return !scheme.scale->scheme->is_plain(); }
bool has_power_scales(const Scheme& scheme) { return scheme.scale->scheme->element == &float_element(DType::f8_e8m0); }

bool stores(const StoredTensor& t, std::string_view suffix) {
  return std::ranges::find(t.arrays, prefix_of(t) + std::string(suffix)) != t.arrays.end();
}

constexpr std::string_view kWords = "pack-quantized", kBytes = "int-quantized";  ///< variants: of integers

/// New integers are packed where activations stay in floats, as the library decides.
bool is_packed(const StoredTensor& t) {
  if (!is_integer(t.scheme)) return false;
  return t.variant.empty() ? !t.linear.input.has_value() : t.variant == kWords;
}

std::string_view format_of(const StoredTensor& t) {
  if (is_fp4(t.scheme)) return is_nested(t.scheme) ? "nvfp4-pack-quantized" : "mxfp4-pack-quantized";
  if (is_integer(t.scheme)) return is_packed(t) ? kWords : kBytes;
  return has_power_scales(t.scheme) ? "mxfp8-quantized" : "float-quantized";
}

// ---- which arrays ----

/// [1] of one group.
Shape stored_shape(const Grouping& grouping, const Shape& shape) {
  const Shape groups = parameter_shape(grouping, shape);
  return groups.empty() ? Shape{1} : groups;
}

void add_activation(std::vector<ArraySpec>& specs, const std::string& name,
                    const std::optional<ActivationScheme>& activation) {
  if (!activation) return;
  const auto add = [&](std::string_view suffix, const QuantizedTensor& t) {
    specs.push_back({.name = name + std::string(suffix),
                     .dtype = *dtype_of(*t.scheme.element),
                     .shape = t.shape,
                     .row_axis = ArraySpec::kNoRows});
  };
  if (activation->scale != nullptr) add(activation->dynamic ? kActivationGlobal : kActivationScale, *activation->scale);
  if (activation->offset != nullptr) add(kActivationZero, *activation->offset);
}

ArraySpec weight_array(const StoredTensor& t, const std::string& prefix) {
  const int64_t rows = t.shape[0], columns = t.shape[1];
  const std::string packed = prefix + std::string(kPacked);
  if (is_fp4(t.scheme)) return {packed, DType::u8, {rows, columns / 2}};
  if (is_packed(t)) return {packed, DType::i32, {rows, words(columns, t.scheme.element->bits)}};
  return {t.name, is_integer(t.scheme) ? DType::i8 : DType::f8_e4m3, t.shape};
}

std::optional<ArraySpec> zero_array(const StoredTensor& t, const std::string& name) {
  const Shape groups = stored_shape(t.scheme.scale->grouping, t.shape);
  if (is_asymmetric(t.scheme)) {
    if (!is_packed(t) || groups.size() < 2) return ArraySpec{name, DType::i8, groups};
    return ArraySpec{name, DType::i32, {words(groups[0], t.scheme.element->bits), groups[1]}};
  }
  // Older versions of the library stored the zeros of symmetric weights as well.
  if (!stores(t, kZero)) return std::nullopt;
  return ArraySpec{name, is_integer(t.scheme) ? DType::i8 : DType::f8_e4m3, groups};
}

std::vector<ArraySpec> layout(const StoredTensor& t) {
  BW_ASSERT(t.name.ends_with(kWeight) && t.shape.size() == 2);
  const std::string prefix = prefix_of(t);
  const auto name = [&](std::string_view suffix) { return prefix + std::string(suffix); };
  const auto fixed = [&](std::string_view suffix, DType dtype, const Shape& shape) {
    return ArraySpec{.name = name(suffix), .dtype = dtype, .shape = shape, .row_axis = ArraySpec::kNoRows};
  };
  const Scheme& scales = *t.scheme.scale->scheme;
  const DType scale_dtype = has_power_scales(t.scheme) ? DType::u8 : *dtype_of(*scales.element);
  std::vector<ArraySpec> specs = {weight_array(t, prefix),
                                  {name(kScale), scale_dtype, stored_shape(t.scheme.scale->grouping, t.shape)}};
  if (const auto zero = zero_array(t, name(kZero))) specs.push_back(*zero);
  if (is_nested(t.scheme)) specs.push_back(fixed(kGlobal, DType::f32, {1}));
  if (is_packed(t)) specs.push_back(fixed(kShape, DType::i64, {2}));
  if (is_indexed(t.scheme) || stores(t, kIndex)) specs.push_back(fixed(kIndex, DType::i32, {t.shape[1]}));
  add_activation(specs, name("input"), t.linear.input);
  add_activation(specs, name("output"), t.linear.output);
  return specs;
}

// ---- bytes ----

/// Signed codes are stored as their distance from the lowest: with the sign bit turned. Done to packed bytes, of which
/// there are fewer: `count` codes of `bits` bits.
void flip_signs(std::span<std::byte> packed, size_t count, int bits) {
  constexpr size_t kPeriod = 64;  // codes: whole words of any width
  const auto width = static_cast<size_t>(bits);
  std::array<std::byte, kPeriod> signs = {}, pattern = {};
  signs.fill(static_cast<std::byte>(1u << (bits - 1)));
  const size_t period = packed_bytes(kPeriod, bits), whole = count * width / 8;
  pack_bits(signs, bits, std::span(pattern).first(period));
  size_t at = 0;
  for (; whole - at >= period; at += period)
    for (size_t i = 0; i < period; i += sizeof(uint64_t)) {
      uint64_t word = 0, turned = 0;
      std::memcpy(&word, &packed[at + i], sizeof word);
      std::memcpy(&turned, &pattern[i], sizeof turned);
      word ^= turned;
      std::memcpy(&packed[at + i], &word, sizeof word);
    }
  for (size_t i = 0; at + i < whole; ++i) packed[at + i] ^= pattern.at(i);
  if (const size_t rest = count * width % 8; rest != 0)
    packed[whole] ^= pattern.at(whole - at) & static_cast<std::byte>((1u << rest) - 1);
}
bool flips(const Scheme& scheme) { return is_integer(scheme) && !is_asymmetric(scheme); }

/// Rows of codes, each padded to a multiple of `pad` bytes.
struct RowStreams {
  int64_t rows, columns;
  int bits;
  size_t pad;

  size_t row_bytes() const {
    const uint64_t bytes = packed_bytes(static_cast<uint64_t>(columns), bits);
    return (bytes + pad - 1) / pad * pad;
  }
  bool dense() const { return static_cast<uint64_t>(columns) * static_cast<uint64_t>(bits) == 8 * row_bytes(); }
  size_t bytes() const { return static_cast<size_t>(rows) * row_bytes(); }
};

/// `bytes` for each row, written by body(first row, end, first byte of all): rows that make whole words where rows are
/// one stream, about as many as fit a cache.
template <class Body>
std::vector<std::byte> row_stretches(const RowStreams& s, size_t bytes, const Body& body) {
  constexpr int64_t kElements = int64_t{1} << 15;
  if (s.rows == 0 || bytes == 0) return {};
  const auto grain =
      static_cast<size_t>(std::max<int64_t>(kElements / std::max<int64_t>(s.columns, 1) / kWord, 1) * kWord);
  return parallel_bytes(static_cast<size_t>(s.rows) * bytes, grain * bytes,
                        [&](size_t begin, size_t end, std::byte* all) { body(begin / bytes, end / bytes, all); });
}

/// signs: are they turned?
std::vector<std::byte> pack_rows(std::span<const std::byte> codes, const RowStreams& s, bool signs) {
  const auto columns = static_cast<size_t>(s.columns);
  return row_stretches(s, s.row_bytes(), [&](size_t begin, size_t end, std::byte* all) {
    const auto from = codes.subspan(begin * columns, (end - begin) * columns);
    const std::span to(all + begin * s.row_bytes(), (end - begin) * s.row_bytes());
    const size_t line = s.dense() ? from.size() : columns, bytes = s.dense() ? to.size() : s.row_bytes();
    for (size_t done = 0, at = 0; done < from.size(); done += line, at += bytes) {
      pack_bits(from.subspan(done, line), s.bits, to.subspan(at, packed_bytes(line, s.bits)));
      if (signs) flip_signs(to.subspan(at, bytes), line, s.bits);
    }
  });
}

std::vector<std::byte> unpack_rows(std::span<const std::byte> packed, const RowStreams& s, bool signs) {
  const auto columns = static_cast<size_t>(s.columns);
  return row_stretches(s, columns, [&](size_t begin, size_t end, std::byte* all) {
    const std::span to(all + begin * columns, (end - begin) * columns);
    const auto from = packed.subspan(begin * s.row_bytes(), (end - begin) * s.row_bytes());
    const size_t line = s.dense() ? to.size() : columns, bytes = s.dense() ? from.size() : s.row_bytes();
    std::vector<std::byte> turned;
    for (size_t done = 0, at = 0; done < to.size(); done += line, at += bytes) {
      std::span<const std::byte> stored = from.subspan(at, bytes);
      if (signs) {
        turned.assign(stored.begin(), stored.end());
        flip_signs(turned, line, s.bits);
        stored = turned;
      }
      unpack_bits(stored, s.bits, to.subspan(done, line));
    }
  });
}

RowStreams streams_of(const StoredTensor& t) {
  const bool fp4 = is_fp4(t.scheme);
  return {.rows = t.shape[0],
          .columns = t.shape[1],
          .bits = t.scheme.element->bits,
          .pad = fp4 ? size_t{1} : size_t{kWord / 8}};
}

/// [rows, columns] of small elements to [columns, rows].
template <class T>
std::vector<T> transposed(std::span<const T> from, int64_t rows, int64_t columns) {
  std::vector<T> out(from.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      out[static_cast<size_t>(c * rows + r)] = from[static_cast<size_t>(r * columns + c)];
  return out;
}

/// Zero points [N, G], packed along N to words [ceil(N b / 32), G].
std::vector<std::byte> pack_zeros(std::span<const std::byte> zeros, int64_t rows, int64_t groups, int bits) {
  const RowStreams s = {.rows = groups, .columns = rows, .bits = bits, .pad = kWord / 8};
  const std::vector<std::byte> lines = pack_rows(transposed(zeros, rows, groups), s, false);
  std::vector<uint32_t> words_of(lines.size() / sizeof(uint32_t));
  std::memcpy(words_of.data(), lines.data(), lines.size());
  const auto turned = transposed<uint32_t>(words_of, groups, words(rows, bits));
  const auto bytes = std::as_bytes(std::span(turned));
  return {bytes.begin(), bytes.end()};
}

std::vector<std::byte> unpack_zeros(std::span<const std::byte> packed, int64_t rows, int64_t groups, int bits) {
  std::vector<uint32_t> words_of(packed.size() / sizeof(uint32_t));
  std::memcpy(words_of.data(), packed.data(), packed.size());
  const auto lines = transposed<uint32_t>(words_of, words(rows, bits), groups);
  const RowStreams s = {.rows = groups, .columns = rows, .bits = bits, .pad = kWord / 8};
  return transposed<std::byte>(unpack_rows(std::as_bytes(std::span(lines)), s, false), groups, rows);
}

/// Codes in the low bits of a byte as I8: signed ones with their sign above, unsigned ones less half their range.
std::vector<std::byte> to_i8(std::span<const std::byte> codes, const ElementType& type) {
  std::vector<std::byte> out(codes.begin(), codes.end());
  const unsigned half = 1u << (type.bits - 1);
  const auto turned = static_cast<uint8_t>(type.lowest < 0 ? half : 0), less = static_cast<uint8_t>(half);
  if (type.bits == 8 && type.lowest < 0) return out;  // they are the same
  for (std::byte& code : out) code = static_cast<std::byte>((std::to_integer<uint8_t>(code) ^ turned) - less);
  return out;
}
std::vector<std::byte> from_i8(std::span<const std::byte> stored, const ElementType& type) {
  std::vector<std::byte> out(stored.begin(), stored.end());
  const unsigned half = 1u << (type.bits - 1);
  const auto more = static_cast<uint8_t>(type.lowest < 0 ? 0 : half), mask = static_cast<uint8_t>(2 * half - 1);
  if (type.bits == 8 && type.lowest < 0) return out;
  for (std::byte& code : out) code = static_cast<std::byte>((std::to_integer<uint8_t>(code) + more) & mask);
  return out;
}

std::vector<std::byte> pack_weight(const StoredTensor& t, const QuantizedTensor& values) {
  if (is_fp4(t.scheme) || is_packed(t)) return pack_rows(values.codes, streams_of(t), flips(t.scheme));
  return is_integer(t.scheme) ? to_i8(values.codes, *t.scheme.element) : values.codes;
}

std::vector<std::byte> pack_zero(const StoredTensor& t, const ArraySpec& spec, const QuantizedTensor& values) {
  if (!is_asymmetric(t.scheme)) return std::vector<std::byte>(spec.bytes());
  if (spec.dtype == DType::i8) return to_i8(values.offset->codes, *t.scheme.element);
  return pack_zeros(values.offset->codes, t.shape[0], spec.shape[1], t.scheme.element->bits);
}

template <class T>
std::vector<std::byte> bytes_of(const std::vector<T>& numbers) {
  const auto bytes = std::as_bytes(std::span(numbers));
  return {bytes.begin(), bytes.end()};
}

std::vector<NamedArray> pack(const StoredTensor& t, const QuantizedTensor& values) {
  std::vector<NamedArray> arrays;
  const std::string prefix = prefix_of(t);
  for (ArraySpec& spec : layout(t)) {
    const std::string_view suffix = std::string_view(spec.name).substr(prefix.size());
    const auto& activation = suffix.starts_with("input") ? t.linear.input : t.linear.output;
    std::vector<std::byte> data;
    if (suffix == kWeight || suffix == kPacked)
      data = pack_weight(t, values);
    else if (suffix == kScale)
      data = values.scale->codes;
    else if (suffix == kZero)
      data = pack_zero(t, spec, values);
    else if (suffix == kGlobal)
      data = values.scale->scale->codes;
    else if (suffix == kShape)
      data = bytes_of(t.whole_shape());
    else if (suffix == kIndex)
      data = bytes_of(is_indexed(t.scheme) ? values.group_index
                                           : std::vector<int32_t>(static_cast<size_t>(t.shape[1]), -1));
    else
      data = suffix.ends_with(kActivationZero) ? activation->offset->codes : activation->scale->codes;
    BW_ASSERT(data.size() == spec.bytes());
    arrays.push_back({std::move(spec), std::move(data)});
  }
  return arrays;
}

QuantizedTensor unpack(const StoredTensor& t, const CheckpointView& checkpoint) {
  const std::string prefix = prefix_of(t);
  const auto bytes = [&](std::string_view suffix) { return checkpoint.bytes(prefix + std::string(suffix)); };
  QuantizedTensor values = {.scheme = t.scheme, .shape = t.shape};
  if (is_fp4(t.scheme) || is_packed(t)) {
    values.codes = unpack_rows(bytes(kPacked), streams_of(t), flips(t.scheme));
  } else {
    const std::span<const std::byte> stored = bytes(kWeight);
    values.codes = is_integer(t.scheme) ? from_i8(stored, *t.scheme.element)
                                        : std::vector<std::byte>(stored.begin(), stored.end());
  }
  const Shape groups = parameter_shape(t.scheme.scale->grouping, t.shape);
  const auto scale = numbers(*t.scheme.scale->scheme, groups, bytes(kScale));
  if (is_nested(t.scheme)) {
    const Parameter& global = *scale->scheme.scale;
    scale->scale = numbers(*global.scheme, parameter_shape(global.grouping, groups), bytes(kGlobal));
  }
  values.scale = scale;
  if (is_asymmetric(t.scheme)) {
    const auto zero = numbers(*t.scheme.offset->scheme, groups, {});
    const std::span<const std::byte> stored = bytes(kZero);
    const int bits = t.scheme.element->bits;
    zero->codes = is_packed(t) && groups.size() == 2 ? unpack_zeros(stored, groups[0], groups[1], bits)
                                                     : from_i8(stored, *t.scheme.element);
    values.offset = zero;
  }
  if (is_indexed(t.scheme)) {
    const std::span<const std::byte> stored = bytes(kIndex);
    values.group_index.resize(static_cast<size_t>(t.shape[1]));
    std::memcpy(values.group_index.data(), stored.data(), stored.size());
  }
  return values;
}

// ---- reading ----

bool detect(const CheckpointView& checkpoint) { return find_compressed_config(checkpoint.config) != nullptr; }

/// visit(prefix) of each module that has a scale or a packed weight.
template <class Visit>
void for_each_module(const CheckpointView& checkpoint, const Visit& visit) {
  std::set<std::string> done;
  for (const auto& [array, spec] : checkpoint.arrays)
    for (const std::string_view suffix : {kPacked, kScale}) {
      if (!array.ends_with(suffix)) continue;
      std::string prefix = array.substr(0, array.size() - suffix.size());
      if ((prefix.empty() || prefix.back() == '.') && done.insert(prefix).second) visit(prefix);
    }
}

Fit fit(const Scheme& scheme, const Shape& shape);

class ModuleReader {
 public:
  ModuleReader(const CheckpointView& checkpoint, const CompressedConfig& config, const std::string& prefix)
      : checkpoint_(checkpoint), config_(config), prefix_(prefix) {
    tensor_.name = prefix + std::string(kWeight);
  }

  StoredTensor read() {
    const std::string module = prefix_.empty() ? prefix_ : prefix_.substr(0, prefix_.size() - 1);
    const CompressedGroup* const group = config_.find(checkpoint_, module);
    if (group == nullptr || !group->weights) fail("no group of config_groups is about it");
    read_scheme(*group->weights);
    read_shape();
    read_activation("input", group->input, tensor_.linear.input);
    // Older files: the KV cache's scales are those of k_proj's and v_proj's outputs.
    const bool cached = !group->output && config_.kv_cache && has(kOutputScale);
    read_activation("output", cached ? config_.kv_cache : group->output, tensor_.linear.output);
    check_format(group->format);
    if (has(kZero) && !is_asymmetric(tensor_.scheme)) check_all(kZero, std::byte{0}, "a zero point that is not 0");
    if (has(kIndex) && !is_indexed(tensor_.scheme)) check_all(kIndex, std::byte{255}, "an index of groups");
    check_arrays();
    if (is_indexed(tensor_.scheme)) check_index();
    tensor_.value_dtype = value_dtype();
    return std::move(tensor_);
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { bad_container(checkpoint_, tensor_.name, why); }
  std::string name(std::string_view suffix) const { return prefix_ + std::string(suffix); }
  bool has(std::string_view suffix) const { return checkpoint_.arrays.contains(name(suffix)); }
  const ArraySpec& need(std::string_view suffix) const { return need_array(checkpoint_, tensor_.name, name(suffix)); }

  void read_scheme(CompressedArguments arguments) {
    const DType scales = need(kScale).dtype;
    arguments.power_scales = scales == DType::u8;
    const bool nested = has(kGlobal);
    if (nested && arguments.strategy == "group") arguments.strategy = "tensor_group";
    if (nested != (arguments.strategy == "tensor_group")) fail("its scales have no global scale");
    if (nested && !(arguments.is_float && arguments.bits == 4)) fail("only 4-bit floats have global scales");
    if (arguments.power_scales && !arguments.is_float) fail("weight_scale is uint8, of integers");
    const bool plain_float = is_plain_float(scales);
    if (!nested && !arguments.power_scales && !plain_float) fail(fmt::format("weight_scale is {}", info(scales).name));
    if (arguments.is_float && arguments.bits == 4 && plain_float) fail("scales of 4-bit floats have 8 bits");
    if (arguments.indexed && (!has(kIndex) || is_unused(kIndex))) arguments.indexed = false;
    if (arguments.indexed && !arguments.is_float && arguments.group_size <= 0) fail("indexed groups have no size");
    tensor_.scheme = arguments.scheme(scales);
  }

  /// Whole -1: the library takes the columns as they come.
  bool is_unused(std::string_view suffix) const {
    return std::ranges::all_of(checkpoint_.bytes(name(suffix)), [](std::byte b) { return b == std::byte{255}; });
  }

  void read_shape() {
    const bool packed = has(kPacked);
    const ArraySpec& weight = packed ? need(kPacked) : need(kWeight);
    tensor_.variant = packed ? kWords : kBytes;
    if (has(kZero)) tensor_.arrays.push_back(name(kZero));
    if (has(kIndex)) tensor_.arrays.push_back(name(kIndex));
    if (weight.shape.size() != 2) fail(fmt::format("it is no matrix, its array has shape {}", to_string(weight.shape)));
    if (weight.shape[0] <= 0 || weight.shape[1] <= 0) fail("it is empty");
    tensor_.shape = weight.shape;
    if (is_fp4(tensor_.scheme)) {
      tensor_.shape[1] *= 2;
    } else if (packed) {
      read_packed_shape(weight);
    }
  }

  void read_packed_shape(const ArraySpec& weight) {
    if (!is_integer(tensor_.scheme)) fail("8-bit floats are not packed");
    const ArraySpec& spec = need(kShape);
    if (spec.dtype != DType::i64 || spec.shape != Shape{2}) fail("weight_shape is not two int64");
    std::array<int64_t, 2> shape = {};
    std::memcpy(shape.data(), checkpoint_.bytes(spec.name).data(), sizeof shape);
    const int bits = tensor_.scheme.element->bits;
    const bool fits = shape[0] == weight.shape[0] && shape[1] > 0 && shape[1] <= weight.shape[1] * kWord / bits &&
                      words(shape[1], bits) == weight.shape[1];
    if (!fits)
      fail(fmt::format("weight_shape is [{}, {}], weight_packed has room for [{}, {}] of {} bits", shape[0], shape[1],
                       weight.shape[0], weight.shape[1] * kWord / bits, bits));
    tensor_.shape = {shape[0], shape[1]};
  }

  void read_activation(const std::string& side, const std::optional<CompressedArguments>& arguments,
                       std::optional<ActivationScheme>& to) {
    using Dynamic = CompressedArguments::Dynamic;
    const std::string scale = side + std::string(kActivationScale), zero = side + std::string(kActivationZero),
                      global = side + std::string(kActivationGlobal);
    if (!arguments) {
      for (const std::string& array : {scale, zero, global})
        if (has(array)) fail(fmt::format("'{}' is stored, and its activations are not quantized", array));
      return;
    }
    if (arguments->dynamic == Dynamic::no && arguments->strategy == "tensor_group")
      fail("static scales of groups of activations are not known");
    ActivationScheme activation = {.scheme = arguments->scheme(DType::f32),
                                   .dynamic = arguments->dynamic != Dynamic::no};
    if (activation.dynamic && has(scale)) fail(fmt::format("'{}' is stored, and they are dynamic", scale));
    if (arguments->dynamic == Dynamic::local) activation.scale = small(global);
    if (!activation.dynamic) activation.scale = small(scale);
    if (!activation.dynamic && !arguments->symmetric) activation.offset = small(zero);
    to = std::move(activation);
  }

  /// Scales and zero points of activations.
  std::shared_ptr<const QuantizedTensor> small(const std::string& suffix) const {
    const ArraySpec& spec = need(suffix);
    const bool is_zero = suffix.ends_with(kActivationZero);
    if (is_zero ? spec.dtype != DType::i8 : !is_plain_float(spec.dtype))
      fail(fmt::format("array '{}' is {}", printable(spec.name), info(spec.dtype).name));
    if (element_count(spec.shape) != 1)
      fail(fmt::format("array '{}' has shape {}, one number is known", printable(spec.name), to_string(spec.shape)));
    return numbers(is_zero ? Scheme{.element = &integer_element(8, true)} : plain(spec.dtype), spec.shape,
                   checkpoint_.bytes(spec.name));
  }

  void check_format(const std::string& format) const {
    const std::string_view stored = format_of(tensor_);
    const bool naive = format == "naive-quantized" && (stored == "int-quantized" || stored == "float-quantized");
    if (format != stored && !naive)
      fail(fmt::format("it is stored as {}, its format is '{}'", stored, printable(format)));
  }

  void check_all(std::string_view suffix, std::byte value, const std::string& what) const {
    if (!std::ranges::all_of(checkpoint_.bytes(name(suffix)), [&](std::byte b) { return b == value; }))
      fail(fmt::format("it has {}, against its scheme", what));
  }

  void check_arrays() {
    if (const Fit fits = fit(tensor_.scheme, tensor_.shape); fits.verdict == Verdict::impossible) fail(fits.reason);
    std::vector<std::string> names;
    for (const ArraySpec& spec : layout(tensor_)) {
      check_stored(checkpoint_, tensor_.name, spec);
      names.push_back(spec.name);
    }
    tensor_.arrays = std::move(names);
  }

  void check_index() const {
    std::vector<int32_t> index(static_cast<size_t>(tensor_.shape[1]));
    std::memcpy(index.data(), checkpoint_.bytes(name(kIndex)).data(), index.size() * sizeof(int32_t));
    const int64_t groups = parameter_shape(tensor_.scheme.scale->grouping, tensor_.shape).at(1);
    for (const int32_t group : index)
      if (group < 0 || group >= groups) fail(fmt::format("weight_g_idx has group {} of {}", group, groups));
  }

  /// The model's type; where it says none, that of the scales.
  DType value_dtype() const {
    const Scheme& scales = *tensor_.scheme.scale->scheme;
    return model_dtype(checkpoint_.config, is_plain_float(scales) ? *dtype_of(*scales.element) : DType::bf16);
  }

  const CheckpointView& checkpoint_;
  const CompressedConfig& config_;
  std::string prefix_;
  StoredTensor tensor_;
};

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  const CompressedConfig config = read_compressed_config(checkpoint);
  std::vector<StoredTensor> out;
  for_each_module(checkpoint,
                  [&](const std::string& prefix) { out.push_back(ModuleReader(checkpoint, config, prefix).read()); });
  return out;
}

QuantizedModel model(const CheckpointView& checkpoint) {
  const CompressedConfig config = read_compressed_config(checkpoint);
  QuantizedModel found = {.skipped = config.ignore};
  if (!config.kv_cache) return found;
  found.kv_cache = ActivationScheme{.scheme = config.kv_cache->scheme(DType::f32),
                                    .dynamic = config.kv_cache->dynamic != CompressedArguments::Dynamic::no};
  for (const auto& [array, spec] : checkpoint.arrays) {
    const std::string_view last = std::string_view(array).substr(array.rfind('.') + 1);
    const bool cached = std::ranges::find(kCacheSuffixes, last) != kCacheSuffixes.end();
    // Of a projection that is not quantized itself.
    const bool of_output =
        last == kOutputScale &&
        !checkpoint.arrays.contains(array.substr(0, array.size() - last.size()) + std::string(kScale));
    if (cached || of_output) found.arrays.push_back(array);
  }
  return found;
}

// ---- what it holds ----

Fit impossible(const std::string& why) { return {Verdict::impossible, why}; }

/// The library's own grounds for refusing a shape.
Fit fit_shape(const Scheme& scheme, const Shape& shape) {
  const Grouping& grouping = scheme.scale->grouping;
  if (grouping.size > 0 && shape[1] % grouping.size != 0)
    return impossible(fmt::format("compressed-tensors wants rows of whole groups, {} columns are no multiple of {}",
                                  shape[1], grouping.size));
  if (is_fp4(scheme) && shape[1] % 2 != 0) return impossible("4-bit floats are packed in pairs along a row");
  return {Verdict::exact};
}

Fit fit_integer(const Scheme& scheme) {
  const Grouping& grouping = scheme.scale->grouping;
  using Kind = Grouping::Kind;
  const bool grouped = (grouping.kind == Kind::axis && grouping.axis == -1) || grouping.kind == Kind::tensor ||
                       grouping.kind == Kind::index;
  if (!grouped) return impossible("compressed-tensors holds integers with a scale a tensor, row or group of a row");
  const bool asymmetric = is_asymmetric(scheme);
  if (!asymmetric && scheme.offset_kind != OffsetKind::none)
    return impossible("compressed-tensors has integer zero points alone");
  if (scheme.element != &integer_element(scheme.element->bits, !asymmetric) ||
      (asymmetric &&
       (scheme.offset->grouping != grouping || *scheme.offset->scheme != Scheme{.element = scheme.element})))
    return impossible("codes with zero points are kept unsigned, zero points as the codes, others signed");
  return {Verdict::exact};
}

Fit fit_float(const Scheme& scheme) {
  const Grouping& grouping = scheme.scale->grouping;
  const Scheme& scales = *scheme.scale->scheme;
  using Kind = Grouping::Kind;
  constexpr int64_t kNvidia = 16, kMicroscaling = 32;
  if (scheme.offset_kind != OffsetKind::none) return impossible("compressed-tensors has no zero points of floats");
  const bool row = grouping.kind == Kind::axis && grouping.axis == -1;
  if (has_power_scales(scheme))
    return row && grouping.size == kMicroscaling ? Fit{Verdict::exact}
                                                 : impossible("scales that are powers of two are of 32 in a row");
  if (is_fp4(scheme)) {
    const bool global = scales.element == &float_element(DType::f8_e4m3) && scales.scale && scales.scale->divides &&
                        scales.scale->grouping == Grouping::tensor() && *scales.scale->scheme == plain(DType::f32) &&
                        scales.offset_kind == OffsetKind::none && scales.factor == 1;
    if (row && grouping.size == kNvidia && global) return {Verdict::exact};
    return impossible("4-bit floats are NVFP4 (16 in a row, e4m3 scales, a global scale that divides) or MXFP4");
  }
  if (scheme.element != &float_element(DType::f8_e4m3)) return impossible("compressed-tensors' 8-bit float is e4m3");
  if (row || grouping.kind == Kind::tensor || grouping.kind == Kind::block) return {Verdict::exact};
  return impossible("compressed-tensors holds e4m3 with a scale a tensor, row, group of a row or block");
}

Fit fit(const Scheme& scheme, const Shape& shape) {
  if (shape.size() != 2) return impossible("compressed-tensors holds the matrices of linear layers");
  const bool known = is_integer(scheme) || scheme.element == &float_element(DType::f8_e4m3) ||
                     scheme.element == find_element("float4_e2m1");
  if (!known || !scheme.scale || scheme.scale->divides || scheme.factor != 1)
    return impossible("compressed-tensors holds integers, e4m3, NVFP4, MXFP4 and MXFP8");
  Fit kind = is_integer(scheme) ? fit_integer(scheme) : fit_float(scheme);
  if (kind.verdict == Verdict::impossible) return kind;
  if (!is_plain_float(*scheme.scale->scheme) && !has_power_scales(scheme) && !(is_fp4(scheme) && is_nested(scheme)))
    return impossible("compressed-tensors stores scales as float32, float16 or bfloat16");
  if (has_power_scales(scheme) && is_integer(scheme)) return impossible("integers have no power-of-two scales");
  return fit_shape(scheme, shape);
}

// ---- what quantize writes ----

constexpr SchemeChoice integers(int bits, bool symmetric) {
  return {.bits = bits, .symmetric = symmetric, .group_size = 128};
}
constexpr SchemeChoice floats(std::string_view granularity, bool weight_only) {
  return {.quant_type = "e4m3",
          .bits = 8,
          .symmetric = true,
          .granularity = granularity,
          .group_size = 128,
          .weight_only = weight_only};
}
constexpr SchemeChoice groups(std::string_view type, int bits, int64_t size, bool weight_only) {
  return {.quant_type = type, .bits = bits, .symmetric = true, .group_size = size, .weight_only = weight_only};
}
// The library's presets: W4A16, W4A16_ASYM, W8A16, W8A8, W4A8 … FP8_DYNAMIC, FP8_BLOCK, NVFP4A16, MXFP4A16 …
constexpr std::array kChoices = {
    integers(4, true),
    integers(4, false),
    integers(8, true),
    integers(8, false),
    SchemeChoice{.bits = 8, .symmetric = true, .granularity = "channel", .weight_only = false},
    SchemeChoice{.bits = 4, .symmetric = true, .group_size = 128, .weight_only = false},
    integers(3, true),
    integers(3, false),
    integers(2, true),
    integers(2, false),
    integers(5, true),
    integers(5, false),
    integers(6, true),
    integers(6, false),
    integers(7, true),
    integers(7, false),
    integers(1, true),
    integers(1, false),
    floats("channel", false),
    floats("tensor", false),
    floats("block", false),
    floats("channel", true),
    floats("tensor", true),
    floats("block", true),
    floats("group", true),
    groups("nvfp4", 4, 16, true),
    groups("nvfp4", 4, 16, false),
    groups("mxfp4", 4, 32, true),
    groups("mxfp4", 4, 32, false),
    groups("mxfp8", 8, 32, true),
    groups("mxfp8", 8, 32, false),
};

/// As the presets have it: each token by itself, of blocks and groups of floats as many of a token as in a group.
QuantizedLinear linear_of(const SchemeChoice& choice) {
  if (choice.quant_type == "nvfp4")
    throw Error({.code = "needs-calibration",
                 .what = "cannot quantize",
                 .why = "activations in NVFP4 have a global scale that comes from data",
                 .fix = "leave 'weight_only' out",
                 .status = ExitStatus::usage});
  const bool integer = choice.quant_type == "int", micro = choice.quant_type.starts_with("mx");
  const bool grouped = micro || choice.granularity == "block";
  const CompressedArguments a = {.bits = choice.quant_type == "mxfp4" ? 4 : 8,
                                 .is_float = !integer,
                                 .strategy = grouped ? "group" : "token",
                                 .group_size = grouped ? choice.group_size : 0,
                                 .power_scales = micro};
  return {.input = ActivationScheme{.scheme = a.scheme(DType::f32), .dynamic = true}};
}

Scheme scheme_of(const SchemeChoice& choice, DType weight) {
  const bool integer = choice.quant_type == "int", four = choice.quant_type.ends_with("fp4");
  const bool micro = choice.quant_type.starts_with("mx"), nvidia = choice.quant_type == "nvfp4";
  CompressedArguments a = {.bits = choice.bits,
                           .is_float = !integer,
                           .symmetric = choice.symmetric,
                           .strategy = std::string(choice.granularity),
                           .group_size = choice.group_size,
                           .block_rows = choice.group_size,
                           .block_columns = choice.group_size,
                           .power_scales = micro};
  if (nvidia && a.strategy == "group") a.strategy = "tensor_group";
  if (four) a.bits = 4;
  Scheme scheme = a.scheme(scale_dtype_of(choice, weight));
  // Which `fit` refuses.
  if (choice.quant_type == "e5m2") scheme.element = &float_element(DType::f8_e5m2);
  if (choice.granularity == "flat") scheme.scale->grouping = Grouping::flat(choice.group_size);
  if (choice.nested_scales && !nvidia)
    scheme.scale = parameter(scheme.scale->grouping, {.element = &float_element(DType::f8_e4m3),
                                                      .scale = parameter(Grouping::tensor(), plain(DType::f32))});
  return scheme;
}

void write_metadata(const WrittenModel& model, const Metadata& out) {
  out.config["quantization_config"] = write_compressed_config(model.tensors, model.kept, format_of);
}

}  // namespace

extern const Container compressed_tensors_container;
const Container compressed_tensors_container = {
    .name = "compressed-tensors",
    .summary =
        "integers of 1 to 8 bits packed or as int8, fp8 per tensor, row, group or block, NVFP4, MXFP4, MXFP8; "
        "activations, KV cache",
    .source = "compressed-tensors ac8e2ba, compressors/, quantization/",
    .only_read =
        "columns in another order (`weight_g_idx`), calibrated activations, activations in NVFP4, quantized outputs, "
        "scales of "
        "the KV cache",
    .rounding =
        "as calculate_qparams of a group's extremes and quantize, every step in the weight's own type (float32 where "
        "scales are asked for in another)",
    .detect = detect,
    .list = list,
    .model = model,
    .fit = fit,
    .layout = layout,
    .pack = pack,
    .unpack = unpack,
    .write_metadata = write_metadata,
    .by_rows = true,
    .choices = kChoices,
    .make_scheme = scheme_of,
    .make_linear = linear_of,
    .encode = encode_compressed_tensors,
    .encode_fused = encode_compressed_tensors_fused};

}  // namespace bitwright
