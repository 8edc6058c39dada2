#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/gguf_types.hpp"

namespace bitwright {
namespace {

// One array a tensor, rows of whole blocks. Numbers in a block are little-endian.

constexpr size_t kBlocksATask = 4096;
constexpr size_t kMaxRank = 4;

/// How the blocks of one type are taken apart: a row of a table. Types without a row are listed, not decoded.
struct Codec {
  std::string_view type;
  Scheme (*scheme)();
  /// codes: one byte an element of the block, in row order; scale: its bytes.
  void (*unpack)(const std::byte* block, std::byte* codes, std::byte* scale);
  void (*pack)(const std::byte* codes, const std::byte* scale, std::byte* block);
};

// Q8_0: d f16 | 32 codes
// Q4_0: d f16 | 16 bytes, byte j = code j | code j + 16 << 4
constexpr size_t kGroup = 32, kScale = 2;

Scheme q8_0() {
  return {.element = &integer_element(8, true), .scale = parameter(Grouping::along(kGroup), plain(DType::f16))};
}

void unpack_q8_0(const std::byte* block, std::byte* codes, std::byte* scale) {
  std::copy_n(block, kScale, scale);
  std::copy_n(block + kScale, kGroup, codes);
}

void pack_q8_0(const std::byte* codes, const std::byte* scale, std::byte* block) {
  std::copy_n(scale, kScale, block);
  std::copy_n(codes, kGroup, block + kScale);
}

Scheme q4_0() {
  return {.element = &integer_element(4, false),
          .scale = parameter(Grouping::along(kGroup), plain(DType::f16)),
          .offset_kind = OffsetKind::shift,
          .shift = 8};
}

void unpack_q4_0(const std::byte* block, std::byte* codes, std::byte* scale) {
  std::copy_n(block, kScale, scale);
  for (size_t j = 0; j < kGroup / 2; ++j) {
    codes[j] = block[kScale + j] & std::byte{15};
    codes[j + kGroup / 2] = block[kScale + j] >> 4;
  }
}

void pack_q4_0(const std::byte* codes, const std::byte* scale, std::byte* block) {
  std::copy_n(scale, kScale, block);
  for (size_t j = 0; j < kGroup / 2; ++j) block[kScale + j] = codes[j] | codes[j + kGroup / 2] << 4;
}

constexpr auto kCodecs = std::to_array<Codec>({
    {"Q8_0", q8_0, unpack_q8_0, pack_q8_0},
    {"Q4_0", q4_0, unpack_q4_0, pack_q4_0},
});

const BlockType& block_of(const Codec& codec) { return find_gguf_type(codec.type)->block; }

const Codec* codec_of(const BlockType& block) {
  const auto found = std::ranges::find(kCodecs, block.name, &Codec::type);
  return found == kCodecs.end() ? nullptr : &*found;
}

const Codec* codec_of(const Scheme& scheme) {
  const auto found = std::ranges::find_if(kCodecs, [&](const Codec& codec) { return codec.scheme() == scheme; });
  return found == kCodecs.end() ? nullptr : &*found;
}

bool detect(const CheckpointView& checkpoint) {
  return std::ranges::any_of(checkpoint.arrays, [](const auto& item) { return item.second.block != nullptr; });
}

std::vector<StoredTensor> list(const CheckpointView& checkpoint) {
  std::vector<StoredTensor> tensors;
  for (const auto& [name, spec] : checkpoint.arrays)
    if (const Codec* codec = spec.block == nullptr ? nullptr : codec_of(*spec.block))
      tensors.push_back({.name = name, .shape = spec.shape, .scheme = codec->scheme(), .arrays = {name}});
  return tensors;
}

Fit fit(const Scheme& scheme, const Shape& shape) {
  const Codec* const codec = codec_of(scheme);
  if (codec == nullptr) return {Verdict::impossible, "no GGUF type that is written here holds it (Q8_0, Q4_0)"};
  const BlockType& block = block_of(*codec);
  if (shape.empty() || shape.size() > kMaxRank || shape.back() % block.elements != 0)
    return {Verdict::impossible, fmt::format("rows of {} are no multiple of the {} elements of {}", to_string(shape),
                                             block.elements, block.name)};
  return {Verdict::exact};
}

std::vector<ArraySpec> layout(const StoredTensor& tensor) {
  return {{tensor.name, DType::u8, tensor.shape, &block_of(*codec_of(tensor.scheme))}};
}

/// visit(codec, block, its first code, its scale) for every block, in parallel.
template <class Visit>
void for_each_block(const Scheme& scheme, size_t blocks, const Visit& visit) {
  const Codec& codec = *codec_of(scheme);
  const size_t elements = static_cast<size_t>(block_of(codec).elements), bytes = block_of(codec).bytes;
  parallel_ranges(blocks, kBlocksATask, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) visit(codec, i * bytes, i * elements, i * kScale);
  });
}

std::vector<NamedArray> pack(const StoredTensor& tensor, const QuantizedTensor& values) {
  NamedArray array = {.spec = layout(tensor).front(), .data = {}};
  array.data.resize(array.spec.bytes());
  for_each_block(tensor.scheme, array.data.size() / array.spec.block->bytes,
                 [&](const Codec& codec, size_t block, size_t code, size_t scale) {
                   codec.pack(&values.codes[code], &values.scale->codes[scale], &array.data[block]);
                 });
  return {std::move(array)};
}

QuantizedTensor unpack(const StoredTensor& tensor, const CheckpointView& checkpoint) {
  const std::span<const std::byte> data = checkpoint.bytes(tensor.arrays.front());
  const Parameter& p = *tensor.scheme.scale;
  auto scale = std::make_shared<QuantizedTensor>();
  scale->scheme = *p.scheme;
  scale->shape = parameter_shape(p.grouping, tensor.shape);
  scale->codes.resize(static_cast<size_t>(element_count(scale->shape)) * kScale);
  std::vector<std::byte> codes(static_cast<size_t>(element_count(tensor.shape)));
  for_each_block(tensor.scheme, scale->codes.size() / kScale,
                 [&](const Codec& codec, size_t block, size_t code, size_t at) {
                   codec.unpack(&data[block], &codes[code], &scale->codes[at]);
                 });
  return {.scheme = tensor.scheme, .shape = tensor.shape, .codes = std::move(codes), .scale = std::move(scale)};
}

}  // namespace

extern const Container gguf_container;
const Container gguf_container = {.name = "gguf",
                                  .summary = "F32, F16, BF16, Q8_0, Q4_0 decoded; the other types of ggml listed",
                                  .source = "ggml (d99724f), src/ggml-common.h and src/ggml-quants.c",
                                  .detect = detect,
                                  .list = list,
                                  .fit = fit,
                                  .layout = layout,
                                  .pack = pack,
                                  .unpack = unpack,
                                  .write_metadata = nullptr};

}  // namespace bitwright
