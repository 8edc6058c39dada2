#include <gtest/gtest.h>

#include <iostream>

#include "tests/golden_cases.hpp"

namespace bitwright {
namespace {

using namespace test;

/// MLX computes in the dtype of the scales and rounds after the product and after the sum.
std::vector<float> in_scale_dtype(const QuantizedTensor& t) {
  const DType dtype = *dtype_of(*t.scheme.scale->scheme->element);
  const std::vector<float> scale = decode(*t.scale), bias = decode(*t.offset);
  const GroupMap groups(t.scheme.scale->grouping, t.shape);
  std::vector<float> values;
  for (size_t i = 0; i < t.codes.size(); ++i) {
    const auto g = static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)));
    const float product = round_to(dtype, static_cast<float>(std::to_integer<int>(t.codes[i])) * scale[g]);
    values.push_back(round_to(dtype, product + bias[g]));
  }
  return values;
}

// golden/mlx_affine: written by mlx 0.32.2, never by this program.
TEST(Golden, mlx_affine) {
  const auto cases = golden_cases("mlx_affine", "biases");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    const Json config = {{"quantization", {{"bits", c.params["bits"]}, {"group_size", c.params["group_size"]}}}};
    const QuantizedTensor t =
        check_container(*find_container("mlx"), c, {"weight", "scales", "biases"}, "layer.", config);
    check_values(c, in_scale_dtype(t));
    if (t.scheme.scale->scheme->element == &float_element(DType::f32)) check_values(c, decode(t));
  }
  std::cout << "cases: " << cases.size() << '\n';
}

}  // namespace
}  // namespace bitwright
