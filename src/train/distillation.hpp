#pragma once

#include <torch/torch.h>

namespace bitwright::train {

/// KL(teacher || student) of the next token, in nats, the mean over all tokens (Hinton, Vinyals, Dean 2015, at
/// temperature 1). Both: [..., vocabulary] of the same shape; the gradient is the student's.
torch::Tensor distillation_loss(const torch::Tensor& student, const torch::Tensor& teacher);

}  // namespace bitwright::train
