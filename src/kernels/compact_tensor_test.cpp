#include "kernels/compact_tensor.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

namespace bitwright {
namespace {

std::vector<float> gaussian(size_t count) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

/// Every width of codes, nested scales and zero points, and what only the definition decodes.
std::vector<Scheme> schemes() {
  std::vector<Scheme> all = {plain(DType::f32), plain(DType::bf16), plain(DType::f16)};
  for (const int bits : {1, 2, 3, 4, 5, 6, 7, 8}) {
    all.push_back({.element = &integer_element(bits, false),
                   .scale = parameter(Grouping::along(32), plain(DType::f16)),
                   .offset_kind = OffsetKind::zero_point,
                   .offset = parameter(Grouping::along(32), {.element = &integer_element(bits, false)})});
  }
  Scheme nested = {.element = find_element("int8"), .scale = parameter(Grouping::flat(256), plain(DType::f32))};
  all.push_back({.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), nested)});
  all.push_back({.element = find_element("float8_e4m3"), .scale = parameter(Grouping::tensor(), plain(DType::f32))});
  return all;
}

TEST(KernelsCompactTensor, DecodesAsWhatItWasMadeOf) {
  for (const Shape& shape : {Shape{1, 1}, Shape{9, 7}, Shape{3, 64}, Shape{37, 515}}) {
    const auto count = static_cast<size_t>(element_count(shape));
    const std::vector<float> values = gaussian(count);
    for (const Scheme& scheme : schemes()) {
      const QuantizedTensor t = encode(scheme, shape, values);
      const CompactTensor compact(t);
      EXPECT_TRUE(compact.unpacked() == t) << describe(scheme);
      const std::vector<float> expected = decode(t);
      for (const KernelLevel& level : kernel_levels()) {
        if (!level.usable()) continue;
        const CompactDecoder decoder(compact, level);
        for (size_t begin = 0; begin < count; begin = begin * 2 + 3) {
          std::vector<float> out(std::min(count - begin, begin % 7 * 1500 + 1) + 1, -7.0f);
          decoder.decode(static_cast<int64_t>(begin), std::span(out).first(out.size() - 1));
          ASSERT_EQ(std::memcmp(out.data(), &expected[begin], (out.size() - 1) * sizeof(float)), 0)
              << level.name << ' ' << describe(scheme) << ' ' << to_string(shape) << " from " << begin;
          ASSERT_EQ(out.back(), -7.0f);
        }
      }
    }
  }
}

TEST(KernelsCompactTensor, TakesAsMuchAsAFile) {
  const Shape shape = {64, 1024};
  const std::vector<float> values = gaussian(64 * 1024);
  Scheme nested = {.element = find_element("int8"), .scale = parameter(Grouping::flat(256), plain(DType::f32))};
  const Scheme nf4 = {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), nested)};
  // A byte for two codes, one for the scale of 64, four for that of 64 x 256.
  EXPECT_EQ(CompactTensor(encode(nf4, shape, values)).bytes(), 64u * 1024 / 2 + 1024 + 4 * 4);
  const Scheme int3 = {.element = &integer_element(3, false),
                       .scale = parameter(Grouping::along(32), plain(DType::f16)),
                       .offset_kind = OffsetKind::zero_point,
                       .offset = parameter(Grouping::along(32), {.element = &integer_element(3, false)})};
  EXPECT_EQ(CompactTensor(encode(int3, shape, values)).bytes(), 64u * 1024 * 3 / 8 + 2048 * 2 + 2048 * 3 / 8);
}

}  // namespace
}  // namespace bitwright
