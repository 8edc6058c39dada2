#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/gguf_blocks.hpp"
#include "container/gguf_file_types.hpp"
#include "container/gguf_rounding.hpp"
#include "container/gguf_types.hpp"

namespace bitwright {
namespace {

// One array a tensor, rows of whole blocks.

constexpr size_t kElementsATask = size_t{1} << 17;
constexpr size_t kMaxRank = 4;

const BlockType& block_of(const BlockCodec& codec) { return find_gguf_type(codec.type)->block; }

bool detect(const CheckpointView& checkpoint) {
  return std::ranges::any_of(checkpoint.arrays, [](const auto& item) { return item.second.block != nullptr; });
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> tensors;
  for (const auto& [name, spec] : checkpoint.arrays)
    if (const BlockCodec* codec = spec.block == nullptr ? nullptr : find_block_codec(spec.block->name))
      tensors.push_back({.name = name, .shape = spec.shape, .scheme = codec->scheme(), .arrays = {name}});
  return tensors;
}

/// Of plain numbers.
std::optional<DType> float_of(const Scheme& scheme) {
  const auto dtype = scheme.is_plain() ? dtype_of(*scheme.element) : std::nullopt;
  const bool known = dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16;
  return known ? dtype : std::nullopt;
}

Fit fit(const Scheme& scheme, const Shape& shape) {
  if (float_of(scheme)) return {Verdict::exact};
  const BlockCodec* const codec = find_block_codec(scheme);
  if (codec == nullptr) return {Verdict::impossible, "no type of GGUF holds it"};
  const BlockType& block = block_of(*codec);
  if (shape.empty() || shape.size() > kMaxRank || shape.back() % block.elements != 0)
    return {Verdict::impossible, fmt::format("rows of {} are no multiple of the {} elements of {}", to_string(shape),
                                             block.elements, block.name)};
  return {Verdict::exact};
}

std::vector<ArraySpec> layout(const StoredTensor& tensor) {
  if (const auto dtype = float_of(tensor.scheme)) return {{tensor.name, *dtype, tensor.shape}};
  return {{tensor.name, DType::u8, tensor.shape, &block_of(*find_block_codec(tensor.scheme))}};
}

template <class Visit>
void for_each_block(const BlockType& type, size_t blocks, const Visit& visit) {
  const size_t grain = std::max<size_t>(kElementsATask / static_cast<size_t>(type.elements), 1);
  parallel_ranges(blocks, grain, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) visit(i);
  });
}

std::vector<NamedArray> pack(const StoredTensor& tensor, const QuantizedTensor& values) {
  NamedArray array = {.spec = layout(tensor).front(), .data = {}};
  if (float_of(tensor.scheme)) {
    array.data = values.codes;
    return {std::move(array)};
  }
  array.data.resize(array.spec.bytes());
  const BlockCodec& codec = *find_block_codec(tensor.scheme);
  const BlockType& type = block_of(codec);
  const size_t blocks = array.data.size() / type.bytes;
  const TensorBlocks parts(values, blocks);
  uint8_t* const to = reinterpret_cast<uint8_t*>(array.data.data());
  for_each_block(type, blocks, [&](size_t i) { codec.pack(parts.of(i), to + i * type.bytes); });
  return {std::move(array)};
}

QuantizedTensor unpack(const StoredTensor& tensor, const CheckpointView& checkpoint) {
  const std::span<const std::byte> data = checkpoint.bytes(tensor.arrays.front());
  const BlockCodec& codec = *find_block_codec(tensor.scheme);
  const BlockType& type = block_of(codec);
  QuantizedTensor t = block_tensor(tensor.scheme, tensor.shape);
  const size_t blocks = data.size() / type.bytes;
  const TensorBlocks parts(t, blocks);
  const uint8_t* const from = reinterpret_cast<const uint8_t*>(data.data());
  for_each_block(type, blocks, [&](size_t i) { codec.unpack(from + i * type.bytes, parts.of(i)); });
  return t;
}

/// Rows of 32 have a quantized type whatever is asked for. scheme_for knows more; a conversion asks this.
bool takes(std::string_view /*name*/, const Shape& shape) { return shape.back() % 32 == 0; }

/// The types of files. Of integers the first of its bits is what a method means.
constexpr auto kChoices = [] {
  struct Row {
    std::string_view name, quant_type;
    int bits;
    bool symmetric;
    int64_t group_size;
    bool nested_scales;
  };
  constexpr auto kRows = std::to_array<Row>({
      {"q4_k_m", "int", 4, false, 32, true},     {"q8_0", "int", 8, true, 32, false},
      {"q6_k", "int", 6, true, 16, true},        {"q5_k_m", "int", 5, false, 32, true},
      {"q3_k_m", "int", 3, true, 16, true},      {"q2_k", "int", 2, false, 16, true},
      {"q4_0", "int", 4, true, 32, false},       {"q4_1", "int", 4, false, 32, false},
      {"q5_0", "int", 5, true, 32, false},       {"q5_1", "int", 5, false, 32, false},
      {"q2_k_s", "int", 2, false, 16, true},     {"q3_k_s", "int", 3, true, 16, true},
      {"q3_k_l", "int", 3, true, 16, true},      {"q4_k_s", "int", 4, false, 32, true},
      {"q5_k_s", "int", 5, false, 32, true},     {"iq4_nl", "iq4_nl", 4, true, 32, false},
      {"iq2_xxs", "iq2_xxs", 2, true, 32, true}, {"iq2_xs", "iq2_xs", 2, true, 32, true},
      {"iq2_s", "iq2_s", 2, true, 32, true},     {"iq2_m", "iq2_m", 2, true, 32, true},
      {"iq3_xxs", "iq3_xxs", 3, true, 32, true}, {"iq3_xs", "iq3_xs", 3, true, 32, true},
      {"iq3_s", "iq3_s", 3, true, 32, true},     {"iq3_m", "iq3_m", 3, true, 32, true},
      {"iq4_xs", "iq4_xs", 4, true, 32, true},   {"nvfp4", "nvfp4", 4, true, 16, false},
      {"mxfp4", "mxfp4", 4, true, 32, false},    {"tq1_0", "tq1_0", 2, true, 256, false},
      {"tq2_0", "tq2_0", 2, true, 256, false},   {"f32", "f32", 32, true, 32, false},
      {"f16", "f16", 16, true, 32, false},       {"bf16", "bf16", 16, true, 32, false},
  });
  std::array<SchemeChoice, kRows.size()> all{};
  for (size_t i = 0; i < kRows.size(); ++i) {
    const Row& row = kRows.at(i);
    all.at(i) = {.name = row.name,
                 .quant_type = row.quant_type,
                 .bits = row.bits,
                 .symmetric = row.symmetric,
                 .group_size = row.group_size,
                 .scale_dtype = "float16",
                 .nested_scales = row.nested_scales};
  }
  return all;
}();

/// Throws Error where the choice was given what its type has not.
Scheme scheme_for(const SchemeChoice& choice, const TensorRole& role, const Shape& shape) {
  const auto row = std::ranges::find(kChoices, choice.name, &SchemeChoice::name);
  const bool as_it_is = row != kChoices.end() && choice.bits == row->bits && choice.symmetric == row->symmetric &&
                        choice.granularity == row->granularity && choice.group_size == row->group_size &&
                        choice.scale_dtype == row->scale_dtype && choice.nested_scales == row->nested_scales;
  if (!as_it_is)
    throw Error({.code = "does-not-fit",
                 .what = "cannot quantize",
                 .where = "quantization",
                 .why = fmt::format("no type of GGUF is {}{} {}{} by {}", choice.quant_type, choice.bits,
                                    choice.symmetric ? "symmetric" : "asymmetric",
                                    choice.nested_scales ? " with nested scales" : "",
                                    choice.granularity == "group" ? fmt::format("groups of {}", choice.group_size)
                                                                  : std::string(choice.granularity)),
                 .fix = "give --gguf-type, or less",
                 .status = ExitStatus::usage});
  const std::string_view type = gguf_type_for(*find_gguf_file_type(row->name), role, shape);
  if (const auto dtype = find_gguf_type(type)->dtype) return plain(*dtype);
  return find_block_codec(type)->scheme();
}

std::string note_for(const SchemeChoice& choice, const TensorRole& role, const Shape& shape) {
  const GgufFileType& file = *find_gguf_file_type(choice.name);
  const std::string_view type = gguf_type_for(file, role, shape), wanted = gguf_type_wanted(file, role, shape);
  if (type == wanted) return {};
  return fmt::format("{} in place of {}: rows of {} are no multiple of {}", type, wanted, shape.back(),
                     find_gguf_type(wanted)->block.elements);
}

QuantizedTensor round(const Scheme& scheme, const Shape& shape, WeightView weight) {
  const auto dtype = float_of(scheme);
  if (!dtype) return round_to_gguf(scheme, shape, weight);
  QuantizedTensor t = {.scheme = scheme, .shape = shape};
  t.codes.resize(static_cast<size_t>(element_count(shape)) * size_bytes(*dtype));
  std::vector<float> values(static_cast<size_t>(element_count(shape)));
  to_f32(weight.dtype, weight.bytes, values);
  from_f32(*dtype, values, t.codes);
  to_f32(*dtype, t.codes, values);
  if (!std::ranges::all_of(values, [](float value) { return std::isfinite(value); }))
    throw Error({.code = "out-of-range",
                 .what = "cannot quantize",
                 .why = fmt::format("a value is too large for {}", info(*dtype).name),
                 .fix = "use --gguf-type bf16 or f32"});
  return t;
}

QuantizedTensor round_weighted(const Scheme& scheme, const Shape& shape, WeightView weight,
                               std::span<const float> importance) {
  return float_of(scheme) ? round(scheme, shape, weight) : round_to_gguf(scheme, shape, weight, importance);
}

/// The file says all; engines are asked about a configuration that names it.
void write_metadata(const WrittenModel& /*model*/, const Metadata& out) {
  out.config["quantization_config"] = {{"quant_method", "gguf"}};
}

}  // namespace

extern const Container gguf_container;
const Container gguf_container = {.name = "gguf",
                                  .summary = "every block type of ggml decoded",
                                  .source = "ggml (d99724f), src/ggml-common.h and src/ggml-quants.c",
                                  .rounding =
                                      "as ggml's reference: Q4_0 to Q8_0, TQ1_0, TQ2_0, MXFP4, NVFP4; codes of the "
                                      "other types are searched, with no more error than ggml's",
                                  .detect = detect,
                                  .list = list,
                                  .takes = takes,
                                  .fit = fit,
                                  .layout = layout,
                                  .pack = pack,
                                  .unpack = unpack,
                                  .write_metadata = write_metadata,
                                  .by_rows = true,
                                  .choices = kChoices,
                                  .encode = round,
                                  .encode_weighted = round_weighted,
                                  .model_file = "gguf",
                                  .scheme_for = scheme_for,
                                  .embeddings = true,
                                  .note_for = note_for};

}  // namespace bitwright
