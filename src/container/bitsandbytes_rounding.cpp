#include "container/bitsandbytes_rounding.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/weights.hpp"

namespace bitwright {
namespace {

constexpr size_t kSteps = 15;
constexpr size_t kChunk = size_t{1} << 16;  ///< elements a task works on

/// The comparisons of CUDA's tree in rising order, and the code on each side of them: codes[number of thresholds that
/// are less than the value].
struct Tree {
  std::array<float, kSteps> thresholds;
  std::array<uint8_t, kSteps + 1> codes;
};

constexpr Tree kNf4 = {
    .thresholds = {-0.8480964004993439f, -0.6106329262256622f, -0.4599952697753906f, -0.33967943489551544f,
                   -0.23460740596055984f, -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f,
                   0.1202552504837513f, 0.2035212516784668f, 0.2920137718319893f, 0.3893125355243683f,
                   0.5016634166240692f, 0.6427869200706482f, 0.8614784181118011f},
    .codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};

/// fp4 compares magnitudes and keeps the sign (8), of -0 none: below 0 a value that equals a threshold goes up.
Tree make_fp4() {
  constexpr std::array<float, 7> kMagnitudes = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                                0.4166667f,  0.583333f,  0.8333333f};
  constexpr std::array<uint8_t, 8> kCodes = {0, 1, 6, 7, 4, 5, 2, 3};
  const auto below = [](float value) { return std::nextafter(value, -2.0f); };
  Tree tree = {};
  for (size_t i = 0; i < kMagnitudes.size(); ++i) {
    tree.thresholds.at(6 - i) = below(-kMagnitudes.at(i));
    tree.thresholds.at(8 + i) = kMagnitudes.at(i);
  }
  tree.thresholds[7] = below(0);
  for (size_t i = 0; i < kCodes.size(); ++i) {
    tree.codes.at(7 - i) = static_cast<uint8_t>(kCodes.at(i) + 8);
    tree.codes.at(8 + i) = kCodes.at(i);
  }
  return tree;
}

const Tree& tree_of(const ElementType& type) {
  static const Tree fp4 = make_fp4();
  return type.name == "fp4" ? fp4 : kNf4;
}

/// Written out, so that the compiler makes one vector loop of it.
template <size_t... I>
void count_steps(const float* values, size_t count, float reciprocal, const Tree& tree, int32_t* steps,
                 std::index_sequence<I...> /*all*/) {
  for (size_t i = 0; i < count; ++i) {
    const float value = values[i] * reciprocal;
    steps[i] = ((value > tree.thresholds[I] ? 1 : 0) + ...);
  }
}

/// Where nothing is greater than anything (NaN, of 0 times the reciprocal of 0) the code is 0.
void encode_block(std::span<const float> block, float absmax, const Tree& tree, std::byte* codes) {
  const float reciprocal = 1.0f / absmax;
  constexpr size_t kStride = 64;
  std::array<int32_t, kStride> steps;
  for (size_t begin = 0; begin < block.size(); begin += kStride) {
    const size_t count = std::min(kStride, block.size() - begin);
    count_steps(&block[begin], count, reciprocal, tree, steps.data(), std::make_index_sequence<kSteps>());
    for (size_t i = 0; i < count; ++i)
      codes[begin + i] = static_cast<std::byte>(tree.codes[static_cast<size_t>(steps[i])]);
  }
  if (std::isfinite(reciprocal)) return;
  for (size_t i = 0; i < block.size(); ++i)
    if (std::isnan(block[i] * reciprocal)) codes[i] = std::byte{0};
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
  static const std::array<float, 256> map = [] {
    std::array<float, 256> values = {};
    const ElementType& type = *find_element("dynamic8");
    for (uint32_t code = 0; code < values.size(); ++code) values.at(code) = type.decode(type, code);
    return values;
  }();
  size_t pivot = 127, above = 255, below = 0;
  float low = -1, high = 1;
  for (size_t step = 64; step > 0; step /= 2) {
    const bool greater = value > map.at(pivot);
    (greater ? below : above) = pivot;
    (greater ? low : high) = map.at(pivot);
    pivot = greater ? pivot + step : pivot - step;
  }
  if (above == 255) high = map[255];
  if (below == 0) low = map[0];
  const float middle = map.at(pivot);
  if (value > middle) return static_cast<uint8_t>(value > (high + middle) * 0.5f ? above : pivot);
  return static_cast<uint8_t>(value < (low + middle) * 0.5f ? below : pivot);
}

QuantizedTensor encode_bitsandbytes4(const Scheme& scheme, const Shape& shape, WeightView weight) {
  check_weight_dtype(weight.dtype, "bitsandbytes");
  const auto block = static_cast<size_t>(scheme.scale->grouping.size);
  const size_t count = weight.count(), blocks = (count + block - 1) / block;
  const Tree& tree = tree_of(*scheme.element);
  std::vector<float> absmax(blocks);
  QuantizedTensor t = {.scheme = scheme, .shape = shape, .codes = std::vector<std::byte>(count)};
  parallel_ranges(blocks, std::max<size_t>(kChunk / block, 1), [&](size_t begin, size_t end) {
    const size_t first = begin * block;
    const std::vector<float> values = finite_values(weight, first, std::min(count, end * block));
    for (size_t b = begin; b < end; ++b) {
      const size_t at = b * block - first;
      const auto part = std::span(values).subspan(at, std::min(block, values.size() - at));
      absmax[b] = absmax_of(part);
      encode_block(part, absmax[b], tree, &t.codes[b * block]);
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
