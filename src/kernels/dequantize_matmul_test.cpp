#include "kernels/dequantize_matmul.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

namespace bitwright {
namespace {

std::vector<float> gaussian(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 0.5f);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

std::vector<Scheme> schemes() {
  Scheme nested = {.element = find_element("int8"), .scale = parameter(Grouping::flat(256), plain(DType::f32))};
  const Scheme zero_point = {.element = &integer_element(4, false),
                             .scale = parameter(Grouping::along(32), plain(DType::f16)),
                             .offset_kind = OffsetKind::zero_point,
                             .offset = parameter(Grouping::along(32), {.element = &integer_element(4, false)})};
  const Scheme int3 = {.element = &integer_element(3, true),
                       .scale = parameter(Grouping::channel(), plain(DType::f16))};
  return {plain(DType::bf16),
          zero_point,
          int3,
          {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), nested)}};
}

std::vector<std::byte> stored(std::span<const float> values, DType type) {
  std::vector<std::byte> bytes;
  for (const float value : values) {
    const uint16_t half = f32_to_bf16(value);
    const auto* const from =
        type == DType::f32 ? reinterpret_cast<const std::byte*>(&value) : reinterpret_cast<const std::byte*>(&half);
    bytes.insert(bytes.end(), from, from + size_bytes(type));
  }
  return bytes;
}
std::vector<float> floats(std::span<const std::byte> bytes, DType type) {
  std::vector<float> values(bytes.size() / size_bytes(type));
  to_f32(type, bytes, values);
  return values;
}

/// out[m, o] = sum over i of in[m, i] * w(o, i), with how far from it a sum in f32 in any order may be: K products,
/// each of a weight that is rounded to bf16 where the inputs are, then the result's own rounding.
struct Expected {
  double value, most;
};
template <class Weight>
Expected expected(std::span<const float> in, size_t m, size_t inner, DType type, const Weight& weight) {
  double sum = 0, magnitude = 0;
  for (size_t i = 0; i < inner; ++i) {
    const double term = static_cast<double>(in[m * inner + i]) * static_cast<double>(weight(i));
    sum += term;
    magnitude += std::abs(term);
  }
  const double rounded = type == DType::bf16 ? 0x1p-8 : 0;
  const double sums = (static_cast<double>(inner) * 0x1p-24 * 1.01 + rounded) * magnitude;
  return {sum, sums + (type == DType::bf16 ? 0x1p-8 : 0x1p-24) * (std::abs(sum) + sums) + 1e-30};
}

TEST(KernelsDequantizeMatmul, EveryWayIsWithinRoundingOfTheExactProduct) {
  constexpr size_t kGuard = 64;
  for (const Shape& shape : {Shape{1, 1}, Shape{5, 33}, Shape{33, 7}, Shape{64, 96}, Shape{70, 515}, Shape{515, 40}}) {
    const auto rows = static_cast<size_t>(shape[0]), columns = static_cast<size_t>(shape[1]);
    for (const Scheme& scheme : schemes()) {
      const QuantizedTensor t = encode(scheme, shape, gaussian(rows * columns, 1));
      const CompactTensor compact(t);
      const std::vector<float> w = decode(t);
      for (const size_t tokens : {1, 16, 35})
        for (const DType type : {DType::f32, DType::bf16})
          for (const DequantizeMatmul& way : dequantize_matmuls()) {
            if (!way.usable(type)) continue;
            for (const bool forward : {true, false}) {
              const size_t inner = forward ? columns : rows, outer = forward ? rows : columns;
              const std::vector<std::byte> in = stored(gaussian(tokens * inner, 2), type);
              std::vector<std::byte> out(tokens * outer * size_bytes(type) + 2 * kGuard, std::byte{0xa5});
              (forward ? way.forward : way.backward)(
                  {.weight = compact, .type = type, .tokens = tokens, .in = in.data(), .out = out.data() + kGuard});
              const std::vector<float> x = floats(in, type);
              const std::vector<float> y = floats(std::span(out).subspan(kGuard, out.size() - 2 * kGuard), type);
              for (size_t m = 0; m < tokens; ++m)
                for (size_t o = 0; o < outer; ++o) {
                  const Expected e = expected(
                      x, m, inner, type, [&](size_t i) { return forward ? w[o * columns + i] : w[i * columns + o]; });
                  ASSERT_NEAR(static_cast<double>(y[m * outer + o]), e.value, e.most)
                      << way.name << (forward ? " forward " : " backward ") << describe(scheme) << ' '
                      << to_string(shape) << " tokens " << tokens << " at " << m << ',' << o;
                }
              for (size_t g = 0; g < kGuard; ++g) {
                ASSERT_EQ(out[g], std::byte{0xa5});
                ASSERT_EQ(out[out.size() - 1 - g], std::byte{0xa5});
              }
            }
          }
    }
  }
}

TEST(KernelsDequantizeMatmul, TheBestUsableWayIsTaken) {
  EXPECT_EQ(dequantize_matmuls().back().name, "definition");
  for (const DType type : {DType::f32, DType::bf16}) EXPECT_TRUE(dequantize_matmul_for(type).usable(type));
  EXPECT_NE(dequantize_matmul_for(DType::f32).name, "definition");
}

}  // namespace
}  // namespace bitwright
