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

/// Rows of 32 have a type whatever is asked for; others are kept.
bool takes(std::string_view /*name*/, const Shape& shape) { return shape.back() % 32 == 0; }

/// A file's type for `--method q4_k_m`, or integers by their bits.
constexpr auto kChoices = [] {
  struct Row {
    std::string_view name;
    int bits;
  };
  constexpr auto kRows =
      std::to_array<Row>({{"q8_0", 8},   {"q4_0", 4},   {"q4_1", 4},   {"q5_0", 5},   {"q5_1", 5},   {"nvfp4", 4},
                          {"mxfp4", 4},  {"tq1_0", 2},  {"tq2_0", 2},  {"q2_k", 2},   {"q2_k_s", 2}, {"q3_k_s", 3},
                          {"q3_k_m", 3}, {"q3_k_l", 3}, {"q4_k_s", 4}, {"q4_k_m", 4}, {"q5_k_s", 5}, {"q5_k_m", 5},
                          {"q6_k", 6},   {"iq4_nl", 4}, {"iq4_xs", 4}, {"f32", 32},   {"f16", 16},   {"bf16", 16}});
  std::array<SchemeChoice, kRows.size() + 5> all{};
  size_t n = 0;
  const auto add = [&](std::string_view name, int bits, bool symmetric) {
    all.at(n++) = {
        .quant_type = name, .bits = bits, .symmetric = symmetric, .group_size = 32, .scale_dtype = "float16"};
  };
  add("int", 8, true);
  add("int", 4, true);
  add("int", 4, false);
  add("int", 5, true);
  add("int", 5, false);
  for (const Row& row : kRows) add(row.name, row.bits, true);
  return all;
}();

std::string_view file_type_of(const SchemeChoice& choice) {
  if (choice.quant_type != "int") return choice.quant_type;
  if (choice.bits == 8) return "q8_0";
  if (choice.bits == 5) return choice.symmetric ? "q5_0" : "q5_1";
  return choice.symmetric ? "q4_0" : "q4_1";
}

Scheme scheme_for(const SchemeChoice& choice, const TensorRole& role, const Shape& shape) {
  const std::string_view type = gguf_type_for(*find_gguf_file_type(file_type_of(choice)), role, shape);
  if (const auto dtype = find_gguf_type(type)->dtype) return plain(*dtype);
  return find_block_codec(type)->scheme();
}

std::string note_for(const SchemeChoice& choice, const TensorRole& role, const Shape& shape) {
  const GgufFileType& file = *find_gguf_file_type(file_type_of(choice));
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
                 .fix = "use --method bf16 or f32"});
  return t;
}

/// The usual file type.
std::string_view method_for_bits(int bits) {
  constexpr auto kMethods = std::to_array<std::string_view>({"q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"});
  return bits > 6 ? "q8_0" : kMethods.at(static_cast<size_t>(std::max(bits, 2) - 2));
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
                                  .model_file = "gguf",
                                  .scheme_for = scheme_for,
                                  .note_for = note_for,
                                  .embeddings = true,
                                  .method_for_bits = method_for_bits};

}  // namespace bitwright
