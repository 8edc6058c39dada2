#include "train/adamw.hpp"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

namespace bitwright::train {
namespace {

TEST(TrainAdamW, IsLibtorchs) {
  torch::manual_seed(3);
  const torch::Tensor start = torch::randn({300, 7}), ours = start.clone().requires_grad_(),
                      theirs = start.to(torch::kDouble).requires_grad_();
  const AdamWOptions options = {.lr = 0.02, .beta1 = 0.8, .beta2 = 0.9, .epsilon = 1e-6, .weight_decay = 0.3};
  AdamW adamw;
  adamw.add_group({ours}, options);
  torch::optim::AdamW peer({theirs}, torch::optim::AdamWOptions(0.02).betas({0.8, 0.9}).eps(1e-6).weight_decay(0.3));
  for (int step = 0; step < 20; ++step) {
    const torch::Tensor gradient = torch::randn({300, 7}) * (step + 1);
    ours.mutable_grad() = gradient * 4;
    theirs.mutable_grad() = gradient.to(torch::kDouble);
    const auto version = ours._version();
    adamw.step(0.25);
    peer.step();
    EXPECT_GT(ours._version(), version);
  }
  EXPECT_LE((ours.to(torch::kDouble) - theirs).abs().max().item<double>(), 20 * 8 * 0x1p-24 * 3);
  EXPECT_EQ(adamw.parameters()[0].step, 20);
  adamw.zero_grad();
  EXPECT_FALSE(ours.grad().defined());
}

TEST(TrainAdamW, GroupsAndWhatHasNoGradient) {
  const torch::Tensor a = torch::ones({3}), b = torch::ones({3}), c = torch::ones({3});
  AdamW adamw;
  adamw.add_group({a}, {.lr = 0.5, .weight_decay = 0});
  adamw.add_group({b, c}, {.lr = 0.5, .weight_decay = 1});
  a.mutable_grad() = torch::zeros({3});
  b.mutable_grad() = torch::zeros({3});
  adamw.step();
  EXPECT_TRUE(a.equal(torch::ones({3})));
  EXPECT_TRUE(b.equal(torch::full({3}, 0.5f)));
  EXPECT_TRUE(c.equal(torch::ones({3})));
  EXPECT_EQ(adamw.parameters()[2].step, 0);
  adamw.groups()[1].options.lr = 0;
  adamw.step();
  EXPECT_TRUE(b.equal(torch::full({3}, 0.5f)));
}

TEST(TrainAdamW, NormOfGradients) {
  torch::manual_seed(4);
  const torch::Tensor a = torch::zeros({200, 501}), b = torch::zeros({5}), none = torch::zeros({2});
  a.mutable_grad() = torch::randn({200, 501});
  b.mutable_grad() = torch::full({5}, 1e30f);  // whose squares no float holds
  EXPECT_NEAR(gradient_norm({b, none}), 1e30 * std::sqrt(5.0), 1e24);
  const double norm = gradient_norm({a, none});
  EXPECT_NEAR(norm, a.grad().to(torch::kDouble).norm().item<double>(), 1e-9 * norm);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  EXPECT_EQ(gradient_norm({a}), norm);
  at::set_num_threads(threads);
}

}  // namespace
}  // namespace bitwright::train
