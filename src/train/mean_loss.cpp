#include "train/mean_loss.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "evaluate/score.hpp"

namespace bitwright::train {

using torch::Tensor;

Tensor loss_of(const TrainableModel& model, const Tensor& inputs, const Tensor& targets) {
  if (model.loss) return model.loss(inputs, targets);
  const Tensor logits = model.logits(inputs);
  return torch::nn::functional::cross_entropy(logits.flatten(0, 1).to(torch::kFloat32), targets.flatten());
}

double mean_loss(const TrainableModel& model, std::span<const int32_t> tokens, const LossWindows& windows) {
  const int64_t length = windows.length;
  const Protocol protocol = {.context = length, .stride = length, .max_windows = windows.most};
  const std::vector<Window> all = cut(tokens.size(), protocol);
  if (all.empty())
    throw Error({.code = "text-too-short",
                 .what = "cannot evaluate",
                 .why = fmt::format("{} tokens do not fill a window of {}", tokens.size(), length),
                 .fix = "give a longer text or shorter windows"});
  const torch::NoGradGuard no_gradients;
  model.module->eval();
  if (model.set_compute) model.set_compute(torch::kFloat32);
  double sum = 0;
  for (size_t begin = 0; begin < all.size(); begin += static_cast<size_t>(windows.batch)) {
    const size_t count = std::min(static_cast<size_t>(windows.batch), all.size() - begin);
    const Tensor batch = torch::empty({static_cast<int64_t>(count), length + 1}, torch::kInt64);
    for (size_t i = 0; i < count; ++i)
      std::copy_n(tokens.begin() + static_cast<std::ptrdiff_t>(all[begin + i].begin), length + 1,
                  batch.data_ptr<int64_t>() + static_cast<int64_t>(i) * (length + 1));
    const Tensor inputs = batch.narrow(1, 0, length).contiguous(), targets = batch.narrow(1, 1, length).contiguous();
    sum += loss_of(model, inputs, targets).item<double>() * static_cast<double>(count);
  }
  model.module->train();
  return sum / static_cast<double>(all.size());
}

}  // namespace bitwright::train
