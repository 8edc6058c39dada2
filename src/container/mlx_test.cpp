#include <gtest/gtest.h>

#include <iostream>

#include "tests/golden_cases.hpp"

namespace bitwright {
namespace {

using namespace test;

// golden/mlx_affine: written by mlx 0.32.2, never by this program.
TEST(Golden, mlx_affine) {
  const auto cases = golden_cases("mlx_affine", "biases");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    const Json config = {{"quantization", {{"bits", c.params["bits"]}, {"group_size", c.params["group_size"]}}}};
    const QuantizedTensor t =
        check_container(*find_container("mlx"), c, {"weight", "scales", "biases"}, "layer.", config);
    check_values(c, decode_in_scale_dtype(t));
    if (t.scheme.scale->scheme->element == &float_element(DType::f32)) check_values(c, decode(t));
  }
  const auto models = golden_models("mlx_affine");
  for (const auto& model : models) check_model(model, decode_in_scale_dtype);
  std::cout << "cases: " << cases.size() + models.size() << '\n';
}

}  // namespace
}  // namespace bitwright
