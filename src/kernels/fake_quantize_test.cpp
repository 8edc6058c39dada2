#include "kernels/fake_quantize.hpp"

#include <gtest/gtest.h>

#include <random>

namespace bitwright {
namespace {

constexpr std::byte kGuard{0xa5};

struct Case {
  Shape shape;
  Grouping grouping;
};

std::vector<std::byte> numbers(DType dtype, size_t count, float spread, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  std::vector<std::byte> bytes(count * size_bytes(dtype));
  from_f32(dtype, values, bytes);
  return bytes;
}

/// Every level, shape and pair of types gives the bits of the definition, and touches nothing beside its output.
TEST(FakeQuantizeKernels, EveryLevelGivesTheDefinitionsBits) {
  const Case cases[] = {{{3, 40}, Grouping::channel()},   {{5, 37}, Grouping::along(16)},
                        {{4, 96}, Grouping::along(32)},   {{3, 33}, Grouping::flat(25)},
                        {{7, 1}, Grouping::channel()},    {{1, 70000}, Grouping::tensor()},
                        {{2, 70001}, Grouping::channel()}};
  for (const Case& c : cases)
    for (const DType type : {DType::f32, DType::bf16, DType::f16})
      for (const DType slope_type : {DType::f32, DType::bf16})
        for (const bool has_zeros : {false, true}) {
          const auto count = static_cast<size_t>(element_count(c.shape));
          const GroupRuns runs = *group_runs(c.grouping, c.shape);
          const auto values = numbers(type, count, 0.1f, 1), slopes = numbers(slope_type, count, 1, 2);
          std::vector<float> scales(static_cast<size_t>(runs.groups)), zeros(has_zeros ? scales.size() : 0);
          for (size_t g = 0; g < scales.size(); ++g) scales[g] = 0.02f + 0.001f * static_cast<float>(g % 7);
          for (size_t g = 0; g < zeros.size(); ++g) zeros[g] = static_cast<float>(g % 5) - 2;
          scales.front() = scales.size() > 1 ? 0 : scales.front();
          const FakeTensor t = {
              .values = {type, values}, .runs = runs, .scales = scales, .zeros = zeros, .lowest = -4, .highest = 3};
          const size_t bytes = count * size_bytes(type), out_bytes = count * size_bytes(slope_type);
          std::vector<std::byte> expected(out_bytes), expected_slopes(bytes);
          fake_quantize(t, slope_type, expected.data(), kernel_levels().back());
          const auto sums =
              fake_quantize_backward(t, {slope_type, slopes}, expected_slopes.data(), kernel_levels().back());
          for (const KernelLevel& level : kernel_levels()) {
            if (!level.usable()) continue;
            SCOPED_TRACE(level.name);
            std::vector<std::byte> out(out_bytes + 64, kGuard), out_slopes(bytes + 64, kGuard);
            fake_quantize(t, slope_type, out.data(), level);
            const auto found = fake_quantize_backward(t, {slope_type, slopes}, out_slopes.data(), level);
            EXPECT_TRUE(std::ranges::equal(std::span(out).first(out_bytes), expected));
            EXPECT_TRUE(std::ranges::equal(std::span(out_slopes).first(bytes), expected_slopes));
            EXPECT_EQ(found.scale, sums.scale);
            EXPECT_EQ(found.zero, sums.zero);
            for (size_t i = 0; i < 64; ++i) EXPECT_EQ(out[out_bytes + i], kGuard);
            for (size_t i = 0; i < 64; ++i) EXPECT_EQ(out_slopes[bytes + i], kGuard);
          }
        }
}

}  // namespace
}  // namespace bitwright
