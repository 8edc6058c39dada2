#include "container/bitsandbytes_rounding.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "base/vectorized.hpp"
#include "container/weights.hpp"

namespace bitwright {
namespace {

constexpr size_t kSteps = 15;
constexpr size_t kChunk = size_t{1} << 16;  ///< elements a task works on
constexpr size_t kPiece = size_t{1} << 11;  ///< … at a time, in the first-level cache, or one block

/// The comparisons of CUDA's tree in rising order, and the code on each side of them: codes[number of thresholds that
/// are less than the value].
struct Tree {
  std::array<float, kSteps> thresholds;
  std::array<int32_t, kSteps + 1> codes;
};

constexpr Tree kNf4 = {
    .thresholds = {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f,
                   -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,
                   0.1202552504837513f, 0.2035212516784668f, 0.2920137718319893f, 0.3893125355243683f,
                   0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f},
    .codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};

/// The next float, of 0 and less.
constexpr float below(float value) {
  return std::bit_cast<float>(value == 0 ? 0x80000001 : std::bit_cast<uint32_t>(value) + 1);
}

/// fp4 compares magnitudes and keeps the sign (8), of -0 none: below 0 a value that equals a threshold goes up.
constexpr Tree kFp4 = [] {
  constexpr std::array<float, 7> kMagnitudes = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                                0.4166667f,  0.583333f,  0.8333333f};
  constexpr std::array<int32_t, 8> kCodes = {0, 1, 6, 7, 4, 5, 2, 3};
  Tree tree = {};
  for (size_t i = 0; i < kMagnitudes.size(); ++i) {
    tree.thresholds.at(6 - i) = below(-kMagnitudes.at(i));
    tree.thresholds.at(8 + i) = kMagnitudes.at(i);
  }
  tree.thresholds[7] = below(0);
  for (size_t i = 0; i < kCodes.size(); ++i) {
    tree.codes.at(7 - i) = kCodes.at(i) + 8;
    tree.codes.at(8 + i) = kCodes.at(i);
  }
  return tree;
}();

constexpr size_t kStride = 32;  ///< elements of one call of a loop whose length the compiler knows

/// Written out, with the tree as constants, so that the compiler makes vectors of it: each threshold that is passed
/// adds the step between the codes on its sides.
template <const Tree& tree, size_t... I>
[[gnu::always_inline]] inline void encode_stride(const float* values, float reciprocal, std::byte* codes,
                                                 std::index_sequence<I...> /*all*/) {
  std::array<int32_t, kStride> wide;
  for (size_t i = 0; i < kStride; ++i) {
    const float value = values[i] * reciprocal;
    int32_t code = tree.codes[0];
    ((code = value > tree.thresholds[I] ? code + (tree.codes[I + 1] - tree.codes[I]) : code), ...);
    wide[i] = code;
  }
  for (size_t i = 0; i < kStride; ++i) codes[i] = static_cast<std::byte>(wide[i]);
}

template <const Tree& tree>
[[gnu::always_inline]] inline void encode_values(const float* values, size_t count, float reciprocal,
                                                 std::byte* codes) {
  constexpr auto kAll = std::make_index_sequence<kSteps>();
  size_t i = 0;
  for (; i + kStride <= count; i += kStride) encode_stride<tree>(values + i, reciprocal, codes + i, kAll);
  if (i == count) return;
  std::array<float, kStride> few = {};
  std::array<std::byte, kStride> few_codes;
  std::copy(values + i, values + count, few.begin());
  encode_stride<tree>(few.data(), reciprocal, few_codes.data(), kAll);
  std::copy_n(few_codes.begin(), count - i, codes + i);
}

/// absmax and codes of blocks of `block` values, the last perhaps shorter.
template <const Tree& tree>
[[gnu::always_inline]] inline void encode_blocks(std::span<const float> values, size_t block, float* absmax,
                                                 std::byte* codes) {
  for (size_t begin = 0; begin < values.size(); begin += block, ++absmax) {
    const size_t count = std::min(block, values.size() - begin);
    *absmax = largest_magnitude(&values[begin], count);
    const float reciprocal = 1.0f / *absmax;
    encode_values<tree>(&values[begin], count, reciprocal, codes + begin);
    if (std::isfinite(reciprocal)) continue;
    for (size_t i = begin; i < begin + count; ++i)  // nothing is greater than NaN, of 0 times the reciprocal of 0
      if (std::isnan(values[i] * reciprocal)) codes[i] = std::byte{0};
  }
}

using EncodeBlocks = void (*)(std::span<const float> values, size_t block, float* absmax, std::byte* codes);

BITWRIGHT_VECTORIZED
void encode_nf4(std::span<const float> values, size_t block, float* absmax, std::byte* codes) {
  encode_blocks<kNf4>(values, block, absmax, codes);
}

BITWRIGHT_VECTORIZED
void encode_fp4(std::span<const float> values, size_t block, float* absmax, std::byte* codes) {
  encode_blocks<kFp4>(values, block, absmax, codes);
}

/// CUDA's search ends beside an even entry and keeps it where the value is halfway to a neighbour: above an odd entry
/// it is enough to reach the middle.
std::array<float, 255> dynamic8_thresholds() {
  const ElementType& type = *find_element("dynamic8");
  std::array<float, 255> thresholds = {};
  for (uint32_t code = 0; code < thresholds.size(); ++code) {
    const float middle = (type.decode(type, code) + type.decode(type, code + 1)) * 0.5f;
    thresholds.at(code) = code % 2 == 0 ? middle : std::nextafter(middle, -2.0f);
  }
  return thresholds;
}

/// Double quantization: the mean is taken off, the rest goes through the dynamic map in blocks.
std::shared_ptr<const QuantizedTensor> nest(const Scheme& scheme, const Shape& shape, std::vector<float> absmax) {
  double sum = 0;
  for (const float value : absmax) sum += static_cast<double>(value);
  const float mean = static_cast<float>(absmax.empty() ? 0 : sum / static_cast<double>(absmax.size()));
  for (float& value : absmax) value -= mean;
  const auto block = static_cast<size_t>(scheme.scale->grouping.size);
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(absmax.size())};
  std::vector<float> outer;
  for (size_t begin = 0; begin < absmax.size(); begin += block) {
    const auto values = std::span(absmax).subspan(begin, std::min(block, absmax.size() - begin));
    outer.push_back(absmax_of(values));
    const float reciprocal = 1.0f / outer.back();
    for (size_t i = 0; i < values.size(); ++i)
      t.codes[begin + i] = static_cast<std::byte>(round_to_dynamic8(values[i] * reciprocal));
  }
  t.scale = plain_tensor(outer, parameter_shape(scheme.scale->grouping, shape));
  t.offset = plain_tensor(std::span(&mean, 1), {});
  return std::make_shared<const QuantizedTensor>(std::move(t));
}

}  // namespace

uint8_t round_to_dynamic8(float value) {
  static const std::array<float, 255> thresholds = dynamic8_thresholds();
  size_t passed = 0;
  for (size_t step = 128; step > 0; step /= 2)
    passed += step * static_cast<size_t>(value > thresholds[passed + step - 1]);
  return static_cast<uint8_t>(passed);
}

QuantizedTensor encode_bitsandbytes4(const Scheme& scheme, const Shape& shape, WeightView weight) {
  check_weight_dtype(weight.dtype, "bitsandbytes");
  const auto block = static_cast<size_t>(scheme.scale->grouping.size);
  const size_t count = weight.count(), bytes = size_bytes(weight.dtype),
               piece = std::max(kPiece / block, size_t{1}) * block;
  const EncodeBlocks encode = scheme.element->name == "fp4" ? encode_fp4 : encode_nf4;
  std::vector<float> absmax((count + block - 1) / block);
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(count)};
  parallel_ranges(count, std::max(kChunk / piece, size_t{1}) * piece, [&](size_t begin, size_t end) {
    std::vector<float> values(std::min(piece, end - begin));
    for (size_t i = begin; i < end; i += piece) {
      const auto part = std::span(values).first(std::min(piece, end - i));
      to_f32(weight.dtype, weight.bytes.subspan(i * bytes, part.size() * bytes), part);
      encode(part, block, &absmax[i / block], &t.codes[i]);
      const auto found = std::span(absmax).subspan(i / block, (part.size() + block - 1) / block);
      if (!std::isfinite(absmax_of(found))) check_finite(part, i);
    }
  });
  const Scheme& stored = *scheme.scale->scheme;
  const Shape blocks_shape = parameter_shape(scheme.scale->grouping, shape);
  t.scale = stored.is_plain() ? plain_tensor(absmax, blocks_shape) : nest(stored, blocks_shape, std::move(absmax));
  return t;
}

float round_int8_row(std::span<const float> row, float threshold, std::span<int8_t> codes) {
  const auto is_outlier = [threshold](float value) { return threshold > 0 && std::fabs(value) >= threshold; };
  float absmax = 0;
  for (const float value : row)
    if (!is_outlier(value)) absmax = std::max(absmax, std::fabs(value));
  const float scale = 1.0f / absmax * 127.0f;
  for (size_t i = 0; i < row.size(); ++i)
    codes[i] =
        !std::isfinite(scale) || is_outlier(row[i]) ? int8_t{0} : static_cast<int8_t>(std::nearbyint(row[i] * scale));
  return absmax;
}

QuantizedTensor encode_bitsandbytes8(const Scheme& scheme, const Shape& shape, WeightView weight) {
  check_weight_dtype(weight.dtype, "bitsandbytes");
  const auto columns = static_cast<size_t>(shape.back());
  const size_t rows = columns == 0 ? 0 : weight.count() / columns;
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(weight.count())};
  std::vector<float> absmax(rows);
  parallel_ranges(rows, std::max<size_t>(kChunk / std::max<size_t>(columns, 1), 1), [&](size_t begin, size_t end) {
    std::vector<float> values = finite_values(weight, begin * columns, end * columns);
    for (float& value : values) value = round_to(DType::f16, value);
    check_finite(values, begin * columns);
    for (size_t r = begin; r < end; ++r)
      absmax[r] = round_int8_row(std::span(values).subspan((r - begin) * columns, columns), 0,
                                 {reinterpret_cast<int8_t*>(&t.codes[r * columns]), columns});
  });
  t.scale = plain_tensor(absmax, parameter_shape(scheme.scale->grouping, shape));
  return t;
}

}  // namespace bitwright
