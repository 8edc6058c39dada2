#include "train/distillation.hpp"

#include <gtest/gtest.h>

namespace bitwright::train {
namespace {

using torch::Tensor;

TEST(Distillation, IsPyTorchsDivergenceAndItsGradient) {
  torch::manual_seed(4);
  const Tensor teacher = torch::randn({2, 3, 50}) * 3;
  Tensor one = (teacher + torch::randn_like(teacher)).requires_grad_(), other = one.detach().clone().requires_grad_();
  const Tensor loss = distillation_loss(one, teacher);
  const Tensor expected =
      torch::kl_div(other.to(torch::kDouble).log_softmax(-1), teacher.to(torch::kDouble).log_softmax(-1),
                    at::Reduction::Sum, /*log_target=*/true) /
      6;
  EXPECT_NEAR(loss.item<double>(), expected.item<double>(), 1e-6);
  EXPECT_GT(loss.item<double>(), 0.05);
  (loss * 0.5).backward();
  (expected * 0.5).backward();
  EXPECT_LE((one.grad() - other.grad()).abs().max().item<double>(), 1e-7);
}

TEST(Distillation, NothingIsLearnedFromItself) {
  Tensor logits = torch::randn({4, 30}).requires_grad_();
  const Tensor loss = distillation_loss(logits, logits);
  loss.backward();
  EXPECT_NEAR(loss.item<double>(), 0, 1e-7);
  EXPECT_LE(logits.grad().abs().max().item<double>(), 1e-7);
}

}  // namespace
}  // namespace bitwright::train
