#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/bits.hpp"
#include "base/error.hpp"
#include "container/awq_rounding.hpp"
#include "container/container.hpp"
#include "container/qlinear.hpp"
#include "container/stored_arrays.hpp"
#include "container/words.hpp"

namespace bitwright {
namespace {

// Version "gemm": LAYER.qweight I32 [K, N / 8]: of 8 neighbours along N the codes 0, 2, 4, 6, 1, 3, 5, 7, least
// significant first; LAYER.qzeros I32 [K / G, N / 8] likewise; LAYER.scales F16 [K / G, N].
// Version "gemv": LAYER.qweight I32 [N, K / 8], LAYER.qzeros I32 [N, W], both in order, LAYER.scales F16 [N, 8 W]; W
// words hold K / G zero points, filled up with 0. value = (code - zero) * scale.

using namespace qlinear;

constexpr int kBits = 4;
constexpr int64_t kPack = 8, kRows = 32;
constexpr std::string_view kGemm = "gemm", kGemv = "gemv";  ///< variants of StoredTensor
constexpr std::array<std::string_view, 2> kDocuments = {"quant_config.json", "quantize_config.json"};

bool is_gemv(const StoredTensor& t) { return t.variant == kGemv; }

Scheme make_scheme(const Grouping& grouping) {
  const ElementType* const codes = &integer_element(kBits, false);
  return {.element = codes,
          .scale = parameter(grouping, plain(DType::f16)),
          .offset_kind = OffsetKind::zero_point,
          .offset = parameter(grouping, {.element = codes})};
}

// ---- configuration ----

const Json& config_of(const CheckpointView& checkpoint) { return qlinear::config_of(checkpoint, kDocuments); }

struct Settings {
  std::string_view version;
  std::optional<int64_t> group_size;
};

Settings settings_of(const CheckpointView& checkpoint) {
  const Json& config = config_of(checkpoint);
  const auto bits = number_of(checkpoint, config, {"bits", "w_bit"});
  if (bits && *bits != kBits) bad_setting(checkpoint, fmt::format("AWQ of {} bits, only 4 are known", *bits));
  std::string version = text_of(config, {"version", "format"});
  if (version.empty()) version = kGemm;
  if (version != kGemm && version != kGemv)
    bad_setting(checkpoint, fmt::format("AWQ version '{}' is not known; gemm and gemv are", printable(version)));
  return {version == kGemv ? kGemv : kGemm, number_of(checkpoint, config, {"group_size", "q_group_size"})};
}

// ---- reading ----

bool detect(const CheckpointView& checkpoint) {
  return qlinear::is_method(checkpoint, config_of(checkpoint), "awq", false);
}

/// Words of a row's zero points in version gemv, whose kernels read 1, 2 or 4 at once.
int64_t zero_words(int64_t groups, int64_t group_size) {
  const int64_t at_once = group_size >= 128 ? 1 : group_size == 64 ? 2 : 4;
  const int64_t words = (groups + kPack - 1) / kPack;
  return (words + at_once - 1) / at_once * at_once;
}

/// Elements a group, of a grouping along rows.
int64_t size_of(const Grouping& grouping, int64_t columns) { return grouping.size == 0 ? columns : grouping.size; }

std::vector<ArraySpec> layout(const StoredTensor& t) {
  const std::string layer = layer_of(t.name, kWeight);
  const int64_t rows = t.shape[0], columns = t.shape[1];
  const Grouping& grouping = t.scheme.scale->grouping;
  const int64_t groups = parameter_shape(grouping, t.shape).back();
  const int64_t words = zero_words(groups, size_of(grouping, columns));
  const auto spec = [&](std::string_view suffix, DType dtype, const Shape& gemm, const Shape& gemv) {
    return ArraySpec{.name = array_of(layer, suffix),
                     .dtype = dtype,
                     .shape = is_gemv(t) ? gemv : gemm,
                     .row_axis = is_gemv(t) ? 0 : 1};
  };
  return {spec(kCodes, DType::i32, {columns, rows / kPack}, {rows, columns / kPack}),
          spec(kZeros, DType::i32, {groups, rows / kPack}, {rows, words}),
          spec(kScales, DType::f16, {groups, rows}, {rows, words * kPack})};
}

StoredTensor read_layer(const CheckpointView& checkpoint, const Settings& settings, const std::string& layer,
                        const ArraySpec& codes) {
  const std::string name = array_of(layer, kWeight);
  const ArraySpec& zeros = need_array(checkpoint, name, array_of(layer, kZeros));
  const ArraySpec& scales = need_array(checkpoint, name, array_of(layer, kScales));
  const auto fail = [&](const std::string& why) { bad_container(checkpoint, name, why); };
  check_matrices(checkpoint, name, {&codes, &zeros, &scales});
  const bool gemv = settings.version == kGemv;
  const int64_t columns = gemv ? codes.shape[1] * kPack : codes.shape[0];
  int64_t size = settings.group_size.value_or(gemv ? 0 : columns / scales.shape[0]);
  if (size == -1) size = columns;
  if (size <= 0 || columns % size != 0)
    fail(fmt::format("{} columns are no whole number of groups of {}", columns, size));
  if (gemv && size != 32 && size != 64 && size < 128) fail(fmt::format("version gemv has no groups of {}", size));
  const bool channel = settings.group_size == -1;
  StoredTensor t = {.name = name,
                    .shape = {gemv ? codes.shape[0] : codes.shape[1] * kPack, columns},
                    .scheme = make_scheme(channel ? Grouping::channel() : Grouping::along(size)),
                    .value_dtype = DType::f16,
                    .storage_dtype = DType::i32,
                    .arrays = {codes.name, zeros.name, scales.name},
                    .variant = settings.version};
  for (const ArraySpec& expected : bitwright::layout(t)) check_stored(checkpoint, name, expected);
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

QuantizedModel model(const CheckpointView& checkpoint) {
  return {.skipped = string_list(config_of(checkpoint), "modules_to_not_convert")};
}

/// Scales and zero points of version gemv: rows of `from` elements cut or filled up with 0 to rows of `to`.
std::vector<std::byte> with_row_length(std::span<const std::byte> data, size_t rows, size_t from, size_t to) {
  std::vector<std::byte> out(rows * to);
  for (size_t r = 0; r < rows; ++r) std::memcpy(out.data() + r * to, data.data() + r * from, std::min(from, to));
  return out;
}

QuantizedTensor unpack(const StoredTensor& t, const CheckpointView& checkpoint) {
  const auto rows = static_cast<size_t>(t.shape[0]), columns = static_cast<size_t>(t.shape[1]);
  const Shape parameters = parameter_shape(t.scheme.scale->grouping, t.shape);
  const auto groups = static_cast<size_t>(parameters.back());
  const auto codes = checkpoint.bytes(t.arrays.at(0)), zeros = checkpoint.bytes(t.arrays.at(1)),
             scales = checkpoint.bytes(t.arrays.at(2));
  QuantizedTensor out = {.scheme = t.scheme, .shape = t.shape};
  const auto numbers = [&](const Parameter& p, std::vector<std::byte> data) {
    return std::make_shared<const QuantizedTensor>(
        QuantizedTensor{.scheme = *p.scheme, .shape = parameters, .codes = std::move(data)});
  };
  constexpr size_t kScale = 2;
  if (is_gemv(t)) {
    const size_t padded = scales.size() / kScale / rows;
    out.codes = unpack_bits(codes, kBits, rows * columns);
    out.scale = numbers(*t.scheme.scale, with_row_length(scales, rows, padded * kScale, groups * kScale));
    out.offset =
        numbers(*t.scheme.offset, with_row_length(unpack_bits(zeros, kBits, rows * padded), rows, padded, groups));
  } else {
    out.codes = unpack_interleaved(kAwqOrder, codes, 1, rows, columns);
    out.scale = numbers(*t.scheme.scale, transposed_bytes(scales, groups, rows, kScale));
    out.offset = numbers(*t.scheme.offset, unpack_interleaved(kAwqOrder, zeros, 1, rows, groups));
  }
  return out;
}

// ---- writing ----

Fit fit(const Scheme& scheme, const Shape& shape) {
  const auto no = [](std::string why) { return Fit{Verdict::impossible, std::move(why)}; };
  if (shape.size() != 2) return no("AWQ stores matrices of linear layers only");
  if (!scheme.scale || scheme != make_scheme(scheme.scale->grouping))
    return no("AWQ holds 4 bits with zero points (--symmetric false), under plain float16 scales");
  const Grouping& grouping = scheme.scale->grouping;
  if (grouping.kind != Grouping::Kind::axis || grouping.axis != -1) return no("AWQ groups elements of a row");
  if (shape[0] % kRows != 0) return no(fmt::format("{} out-features are no multiple of {}", shape[0], kRows));
  const int64_t size = size_of(grouping, shape[1]);
  if (size == 0 || shape[1] % size != 0 || shape[1] % kPack != 0)
    return no(fmt::format("{} in-features are no multiple of the group size {}", shape[1], size));
  return {Verdict::exact};
}

std::vector<NamedArray> pack(const StoredTensor& t, const QuantizedTensor& values) {
  const std::vector<ArraySpec> specs = bitwright::layout(t);
  const auto rows = static_cast<size_t>(t.shape[0]), columns = static_cast<size_t>(t.shape[1]);
  const auto groups = static_cast<size_t>(parameter_shape(t.scheme.scale->grouping, t.shape).back());
  constexpr size_t kScale = 2;
  if (is_gemv(t)) {
    const auto padded = static_cast<size_t>(specs[2].shape[1]);
    return moved({{specs[0], pack_bits(values.codes, kBits)},
                  {specs[1], pack_bits(with_row_length(values.offset->codes, rows, groups, padded), kBits)},
                  {specs[2], with_row_length(values.scale->codes, rows, groups * kScale, padded * kScale)}});
  }
  return moved({{specs[0], pack_interleaved(kAwqOrder, values.codes, 1, rows, columns)},
                {specs[1], pack_interleaved(kAwqOrder, values.offset->codes, 1, rows, groups)},
                {specs[2], transposed_bytes(values.scale->codes, rows, groups, kScale)}});
}

/// AutoAWQ and all who read its models have one group size for all layers.
Fit fit_model(std::span<const StoredTensor> tensors) {
  const auto differs = [&](const StoredTensor& t) {
    return t.scheme != tensors.front().scheme || t.variant != tensors.front().variant;
  };
  if (std::ranges::none_of(tensors, differs)) return {Verdict::exact};
  return {Verdict::impossible, "an AWQ model has one group size for all layers"};
}

constexpr std::array<SchemeChoice, 2> kChoices = {
    {{.bits = kBits, .group_size = 128, .scale_dtype = "float16"},
     {.bits = kBits, .granularity = "channel", .scale_dtype = "float16"}}};

/// AwqConfig of transformers. A list of modules, even an empty one, replaces what it would guess.
void write_metadata(const WrittenModel& model, const Metadata& out) {
  BW_ASSERT(!model.tensors.empty());
  const StoredTensor& first = model.tensors.front();
  const int64_t size = first.scheme.scale->grouping.size;
  OrderedJson skipped = OrderedJson::array();
  for (const std::string& name : model.kept) skipped.push_back(name);
  out.config["quantization_config"] = {{"bits", kBits},
                                       {"group_size", size == 0 ? -1 : size},
                                       {"modules_to_not_convert", std::move(skipped)},
                                       {"quant_method", "awq"},
                                       {"version", is_gemv(first) ? kGemv : kGemm},
                                       {"zero_point", true}};
  const auto is_head = [](const StoredTensor& t) { return layer_of(t.name, kWeight).ends_with("lm_head"); };
  if (std::ranges::any_of(model.tensors, is_head)) out.config["quantization_config"]["lm_head"] = true;
}

}  // namespace

extern const Container awq_container;
const Container awq_container = {.name = "awq",
                                 .summary = "4 bits with zero points, groups or rows; versions gemm (written) and gemv",
                                 .source = "AutoAWQ (88e4c76), modules/linear/gemm.py, gemv.py, quantize/quantizer.py",
                                 .only_read = "version gemv",
                                 .rounding =
                                     "as pseudo_quantize_tensor in float16, every step of it, in which AutoAWQ runs "
                                     "models (not in float32); the range need not hold 0. Version gemm, AutoAWQ's "
                                     "default",
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
                                 .encode = encode_awq,
                                 .files = kDocuments};

}  // namespace bitwright
