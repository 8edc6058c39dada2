#include "train/linear.hpp"

#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

namespace bitwright::train {
namespace {

struct Doubled : LinearBehaviour {
  explicit Doubled(torch::Tensor floats) : weight(std::move(floats)) {}
  torch::Tensor forward(const torch::Tensor& input, const torch::Tensor& bias) override {
    ++calls;
    return torch::nn::functional::linear(input, (weight * 2).to(input.dtype()), bias);
  }
  torch::Tensor weight;
  int calls = 0;
};

/// As users write theirs: layers are members of a known type.
struct Net : torch::nn::Module {
  Net() {
    first = register_module("first", torch::nn::Linear(4, 3));
    second = register_module("second", torch::nn::Linear(torch::nn::LinearOptions(3, 2).bias(false)));
  }
  torch::Tensor forward(const torch::Tensor& x) { return second(torch::relu(first(x))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
};

std::shared_ptr<Doubled> attach_doubled(torch::nn::LinearImpl& linear) {
  const torch::Tensor weight = linear.weight;
  auto doubled = std::make_shared<Doubled>(weight);
  attach(linear, doubled, weight);
  return doubled;
}

TEST(LinearBehaviour, ComputesInPlaceOfLibtorch) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{4}, {5, 4}, {2, 5, 4}}) {
    Net net;
    const torch::Tensor x = torch::randn(shape), w1 = net.first->weight, w2 = net.second->weight;
    const torch::Tensor hidden = torch::relu(torch::linear(x, w1 * 2, net.first->bias));
    const torch::Tensor expected = torch::linear(hidden, w2 * 2);
    const auto first = attach_doubled(*net.first), second = attach_doubled(*net.second);
    EXPECT_EQ(behaviour_as<Doubled>(*net.second), second);
    EXPECT_TRUE(parameter_of(*net.second).is_same(w2));
    EXPECT_EQ(net.second->weight.sizes(), w2.sizes());
    EXPECT_TRUE(torch::allclose(net.forward(x), expected));
    {
      const torch::NoGradGuard no_gradients;
      EXPECT_TRUE(torch::allclose(net.forward(x), expected));
    }
    {
      const c10::InferenceMode inference;
      EXPECT_TRUE(torch::allclose(net.forward(x), expected));
    }
    EXPECT_EQ(second->calls, 3);
    net.forward(x).sum().backward();
    EXPECT_TRUE(torch::allclose(w2.grad(), 2 * hidden.reshape({-1, 3}).sum(0).unsqueeze(0).expand({2, 3})));
    detach(*net.first, w1);
    detach(*net.second, w2);
    EXPECT_EQ(behaviour_of(*net.second), nullptr);
    EXPECT_TRUE(torch::allclose(net.forward(x), torch::linear(torch::relu(torch::linear(x, w1, net.first->bias)), w2)));
    EXPECT_EQ(second->calls, 4);
  }
}

TEST(LinearBehaviour, AutocastDoesNotGoAroundIt) {
  Net net;
  const auto first = attach_doubled(*net.first), second = attach_doubled(*net.second);
  at::autocast::set_cpu_enabled(true);
  net.forward(torch::randn({5, 4})).sum().backward();
  net.forward(torch::randn({1, 5, 4}));
  at::autocast::set_cpu_enabled(false);
  at::autocast::clear_cache();
  EXPECT_EQ(first->calls, 2);
  EXPECT_EQ(second->calls, 2);
  EXPECT_TRUE(first->weight.grad().defined());
}

TEST(LinearBehaviour, OptimizersSeeTheParameter) {
  Net net;
  const torch::Tensor codes = torch::zeros({2, 3}, torch::kUInt8);
  const auto second = std::make_shared<Doubled>(net.second->weight);
  attach(*net.second, second, codes);
  EXPECT_EQ(net.parameters().size(), 3u);
  EXPECT_TRUE(net.named_parameters()["second.weight"].is_same(codes));
  EXPECT_NE(net.named_parameters()["first.weight"].data_ptr(), nullptr);
}

TEST(LinearBehaviour, IsGoneWithItsLayer) {
  std::weak_ptr<Doubled> doubled;
  {
    torch::nn::Linear linear(2, 2);
    doubled = attach_doubled(*linear);
    EXPECT_FALSE(doubled.expired());
  }
  EXPECT_TRUE(doubled.expired());
}

TEST(LinearBehaviour, NothingElseCanBeDoneWithTheStandIn) {
  torch::nn::Linear linear(2, 2);
  attach_doubled(*linear);
  EXPECT_THROW(linear->weight.sum(), c10::Error);
  EXPECT_THROW(torch::matmul(linear->weight, torch::ones({2})), c10::Error);
}

TEST(LinearBehaviour, LayersAreFoundInAnyTree) {
  const auto inner = std::make_shared<Net>();
  inner->first->register_module("lora_a", torch::nn::Linear(4, 1));
  const torch::nn::Sequential outer(torch::nn::Linear(1, 1), torch::nn::AnyModule(inner));
  std::vector<std::string> paths;
  for_each_linear(*outer, [&](const std::string& path, torch::nn::LinearImpl&) { paths.push_back(path); });
  EXPECT_EQ(paths, (std::vector<std::string>{"0", "1.first", "1.second"}));
}

}  // namespace
}  // namespace bitwright::train
