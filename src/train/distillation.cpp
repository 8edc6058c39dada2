#include "train/distillation.hpp"

namespace bitwright::train {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

/// By hand, because of what autograd would keep and write: several arrays of tokens times words.
struct Divergence : Function<Divergence> {
  static Tensor forward(AutogradContext* context, const Tensor& student, const Tensor& teacher) {
    const double tokens = static_cast<double>(student.numel()) / static_cast<double>(student.size(-1));
    const Tensor log_student = student.log_softmax(-1), log_teacher = teacher.log_softmax(-1);
    const Tensor share = log_teacher.exp();
    const Tensor divergence = (log_teacher - log_student).mul_(share).sum(torch::kDouble) / tokens;
    context->save_for_backward({log_student.exp_().sub_(share).div_(tokens)});
    return divergence.to(torch::kFloat);
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    return {context->get_saved_variables()[0] * gradients[0], Tensor()};
  }
};

}  // namespace

Tensor distillation_loss(const Tensor& student, const Tensor& teacher) {
  TORCH_CHECK(student.sizes() == teacher.sizes() && student.numel() > 0, "logits of the same tokens and words");
  return Divergence::apply(student.to(torch::kFloat), teacher.detach().to(torch::kFloat));
}

}  // namespace bitwright::train
