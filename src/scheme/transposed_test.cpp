#include "scheme/transposed.hpp"

#include <gtest/gtest.h>

#include <random>

namespace bitwright {
namespace {

TEST(Transposed, ValuesAreTheSame) {
  constexpr int64_t kRows = 6, kColumns = 64;
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(kRows * kColumns);
  for (float& value : values) value = normal(random);
  const Scheme nested = {.element = &float_element(DType::f8_e4m3),
                         .scale = parameter(Grouping::tensor(), plain(DType::f32))};
  for (const Grouping& grouping :
       {Grouping::tensor(), Grouping::channel(), Grouping::along(32), Grouping::along(3, -2)})
    for (const Scheme& scale : {plain(DType::f16), nested}) {
      if (grouping.kind == Grouping::Kind::tensor && !scale.is_plain()) continue;
      const Scheme scheme = {.element = &integer_element(4, true), .scale = parameter(grouping, scale)};
      const QuantizedTensor t = encode(scheme, {kRows, kColumns}, values), other = transposed(t);
      check_sizes(other, "transposed");
      EXPECT_EQ(other.shape, (Shape{kColumns, kRows}));
      EXPECT_TRUE(transposed(other) == t);
      const std::vector<float> before = decode(t), after = decode(other);
      for (size_t r = 0; r < kRows; ++r)
        for (size_t c = 0; c < kColumns; ++c) ASSERT_EQ(after[c * kRows + r], before[r * kColumns + c]);
    }
}

}  // namespace
}  // namespace bitwright
