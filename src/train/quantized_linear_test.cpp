#include "train/quantized_linear.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/encode.hpp"
#include "recipe/recipe.hpp"

namespace bitwright::train {
namespace {

QuantizationSettings method(const std::string& name) { return {.method = name}; }
QuantizationSettings gguf(const std::string& type) { return {.gguf_type = type}; }

/// As the owner of each container would quantize a layer.
struct Owner {
  std::string container;
  QuantizationSettings settings;
};
const std::vector<Owner>& owners() {
  static const std::vector<Owner> all = {{"native", method("int4")},
                                         {"native", method("int3")},
                                         {"native", method("int8")},
                                         {"bitsandbytes", method("nf4")},
                                         {"bitsandbytes",
                                          [] {
                                            QuantizationSettings nested = method("nf4");
                                            nested.nested_scales = true;
                                            return nested;
                                          }()},
                                         {"bitsandbytes", method("int8")},
                                         {"hqq", method("int4")},
                                         {"hqq", method("int3")},
                                         {"hqq", method("int2")},
                                         {"mlx", method("int4")},
                                         {"mlx", method("int3")},
                                         {"quanto", method("int2")},
                                         {"gptq", method("int4")},
                                         {"awq", method("int4")},
                                         {"compressed-tensors", method("fp8")},
                                         {"gguf", gguf("Q4_0")},
                                         {"gguf", gguf("Q2_K")},
                                         {"gguf", gguf("Q3_K_M")},
                                         {"gguf", gguf("Q4_K_M")},
                                         {"gguf", gguf("Q5_K_M")},
                                         {"gguf", gguf("Q6_K")},
                                         {"gguf", gguf("Q8_0")}};
  return all;
}

QuantizedTensor quantized(const Owner& owner, const torch::Tensor& weight) {
  const Shape shape = weight.sizes().vec();
  const TensorFacts facts = {
      .name = "model.layers.0.mlp.up_proj.weight", .shape = shape, .bytes = 4, .dtype = DType::f32};
  QuantizationRequest request;
  request.settings = owner.settings;
  const Recipe recipe = resolve(request, std::span(&facts, 1), find_container(owner.container));
  const TensorPlan& plan = recipe.tensors.at(0);
  const std::span<const float> values(weight.data_ptr<float>(), static_cast<size_t>(weight.numel()));
  return plan.algorithm->quantize(plan.scheme.value(), shape, {DType::f32, std::as_bytes(values)}, plan.options);
}

/// Sums of at most `terms` products in any order, of numbers that were rounded to `epsilon` before: the largest error.
torch::Tensor bound(const torch::Tensor& a, const torch::Tensor& b, double epsilon) {
  const double terms = static_cast<double>(a.size(-1));
  const double relative = terms * std::ldexp(1.0, -23) + 3 * epsilon;
  return relative * at::mm(a.abs(), b.abs()) + 1e-30;
}

void expect_within(const torch::Tensor& value, const torch::Tensor& expected, const torch::Tensor& most) {
  const torch::Tensor excess = (value.to(torch::kDouble) - expected).abs() - most;
  EXPECT_LE(excess.max().item<double>(), 0);
}

TEST(QuantizedLinear, ForwardAndBackwardAreThoseOfTheDecodedWeight) {
  torch::manual_seed(1);
  for (const Owner& owner : owners()) {
    SCOPED_TRACE(owner.container + ' ' + owner.settings.method.value_or("") + owner.settings.gguf_type.value_or(""));
    for (const int64_t rows : {8, 67}) {
      const int64_t columns = 256, align = rows == 67 && owner.container != "native" ? 64 : rows;
      const torch::Tensor weight = torch::randn({align, columns}) * 0.05;
      const auto compact = std::make_shared<const CompactTensor>(quantized(owner, weight));
      const std::vector<float> values = decode(compact->unpacked());
      const torch::Tensor w = torch::tensor(values).reshape(weight.sizes()).to(torch::kDouble);
      for (const auto type : {torch::kFloat32, torch::kBFloat16})
        for (const int64_t tokens : {1, 5, 33}) {
          const torch::Tensor x = torch::randn({tokens, columns}).to(type).requires_grad_(true);
          const torch::Tensor dy = torch::randn({tokens, align}).to(type);
          const torch::Tensor y = multiply_quantized(x, compact);
          EXPECT_EQ(y.scalar_type(), type);
          y.backward(dy);
          // The weight's rounding to bfloat16 and the result's.
          const double epsilon = type == torch::kBFloat16 ? std::ldexp(1.0, -8) : 0;
          const torch::Tensor x64 = x.detach().to(torch::kDouble), dy64 = dy.to(torch::kDouble);
          expect_within(y.detach(), at::mm(x64, w.t()), bound(x64, w.t(), epsilon));
          expect_within(x.grad(), at::mm(dy64, w), bound(dy64, w, epsilon));
        }
    }
  }
}

TEST(QuantizedLinear, AsAHeadItGivesTheLossOfItsDecodedWeight) {
  torch::manual_seed(4);
  const torch::Tensor weight = torch::randn({1500, 64}) * 0.1;  // several parts of the words
  const Owner nf4 = {"bitsandbytes", method("nf4")};
  const QuantizedLinearBehaviour behaviour(quantized(nf4, weight));
  const FrozenHead head = behaviour.as_head().value();
  const torch::Tensor decoded = behaviour.decoded(), hidden = torch::randn({600, 64});  // several parts of the rows
  torch::Tensor targets = torch::randint(1500, {600}, torch::kLong);
  targets[3] = kIgnored;
  for (const Compute compute : {Compute::f32, Compute::bf16})
    for (const double cap : {0.0, 3.0}) {
      SCOPED_TRACE(testing::Message() << static_cast<int>(compute) << ' ' << cap);
      const auto run = [&](const auto& which) {
        const torch::Tensor x = hidden.clone().requires_grad_();
        const torch::Tensor loss = linear_cross_entropy(x, which, targets, cap, compute);
        (loss * 2).backward();
        return std::pair(loss.detach(), x.grad());
      };
      const auto [loss, slope] = run(head);
      const auto [expected, expected_slope] = run(decoded);
      EXPECT_TRUE(torch::equal(loss, expected)) << loss << expected;
      EXPECT_TRUE(torch::equal(slope, expected_slope)) << (slope - expected_slope).abs().max();
      const torch::NoGradGuard no_gradients;
      EXPECT_TRUE(torch::equal(linear_cross_entropy(hidden, head, targets, cap, compute), expected));
    }
  EXPECT_THROW(linear_cross_entropy(hidden, head, torch::full({600}, 1500, torch::kLong)), c10::Error);

  struct Doubled : QuantizedLinearBehaviour {
    using QuantizedLinearBehaviour::QuantizedLinearBehaviour;
    torch::Tensor prepare(const torch::Tensor& input) override { return input * 2; }
  };
  EXPECT_FALSE(Doubled(quantized(nf4, weight)).as_head());
}

TEST(QuantizedLinear, IsALayerOfAnyModule) {
  torch::manual_seed(2);
  torch::nn::Linear linear(256, 24);
  const Owner nf4 = {"bitsandbytes", method("nf4")};
  const auto behaviour = std::make_shared<QuantizedLinearBehaviour>(quantized(nf4, linear->weight.detach()));
  const torch::Tensor bias = linear->bias.detach();
  attach_quantized(*linear, behaviour);

  const torch::Tensor codes = parameter_of(*linear);
  EXPECT_EQ(codes.scalar_type(), torch::kUInt8);
  EXPECT_FALSE(codes.requires_grad());
  EXPECT_EQ(codes.sizes(), torch::IntArrayRef({24, 128}));
  EXPECT_EQ(codes.data_ptr(), static_cast<const void*>(behaviour->weight()->codes().data()));
  EXPECT_EQ(behaviour->bytes(), 24u * 256 / 2 + 24 * 256 / 64 * 4);

  const torch::Tensor x = torch::randn({2, 3, 256}, torch::requires_grad());
  const torch::Tensor y = linear(x), expected = torch::linear(x.detach(), behaviour->decoded(), bias);
  EXPECT_TRUE(torch::allclose(y, expected, 1e-4, 1e-5));
  y.sum().backward();
  EXPECT_TRUE(torch::allclose(x.grad()[1][2], behaviour->decoded().sum(0), 1e-4, 1e-5));
  EXPECT_TRUE(linear->bias.grad().defined());
  EXPECT_FALSE(parameter_of(*linear).grad().defined());
  EXPECT_ANY_THROW(linear(torch::randn({3, 8})));
}

}  // namespace
}  // namespace bitwright::train
