#include "train/adamw.hpp"

#include <ATen/Parallel.h>

#include <cmath>

#include "base/error.hpp"
#include "base/vectorized.hpp"

namespace bitwright::train {
namespace {

struct Factors {
  float scale, beta1, new1, beta2, new2, keep, rate, root, epsilon;
};

BITWRIGHT_VECTORIZED void step_range(const Factors& factors, const float* __restrict g, size_t count,
                                     float* __restrict w, float* __restrict m, float* __restrict v) {
  const Factors f = factors;
  for (size_t i = 0; i < count; ++i) {
    const float gradient = g[i] * f.scale;
    m[i] = m[i] * f.beta1 + gradient * f.new1;
    v[i] = v[i] * f.beta2 + gradient * gradient * f.new2;
    w[i] = w[i] * f.keep - f.rate * m[i] / (std::sqrt(v[i]) * f.root + f.epsilon);
  }
}

/// Sums of every eighth number, so that vectors can run over them.
BITWRIGHT_VECTORIZED double sum_of_squares(const float* x, size_t count) {
  constexpr size_t kSums = 16;
  double sums[kSums] = {};
  size_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (size_t lane = 0; lane < kSums; ++lane) sums[lane] += double{x[i + lane]} * double{x[i + lane]};
  double sum = 0;
  for (; i < count; ++i) sum += double{x[i]} * double{x[i]};
  for (const double s : sums) sum += s;
  return sum;
}

constexpr int64_t kGrain = 1 << 15;

}  // namespace

void adamw_step(const AdamWOptions& o, int64_t step, double gradient_scale, const float* gradient, size_t count,
                float* weight, float* m, float* v) {
  const auto steps = static_cast<double>(step);
  const Factors factors = {.scale = static_cast<float>(gradient_scale),
                           .beta1 = static_cast<float>(o.beta1),
                           .new1 = static_cast<float>(1 - o.beta1),
                           .beta2 = static_cast<float>(o.beta2),
                           .new2 = static_cast<float>(1 - o.beta2),
                           .keep = static_cast<float>(1 - o.lr * o.weight_decay),
                           .rate = static_cast<float>(o.lr / (1 - std::pow(o.beta1, steps))),
                           .root = static_cast<float>(1 / std::sqrt(1 - std::pow(o.beta2, steps))),
                           .epsilon = static_cast<float>(o.epsilon)};
  at::parallel_for(0, static_cast<int64_t>(count), kGrain, [&](int64_t begin, int64_t end) {
    step_range(factors, gradient + begin, static_cast<size_t>(end - begin), weight + begin, m + begin, v + begin);
  });
}

void AdamW::add_group(const std::vector<torch::Tensor>& parameters, const AdamWOptions& options) {
  for (const torch::Tensor& weight : parameters) {
    BW_ASSERT(weight.scalar_type() == torch::kFloat && weight.is_contiguous());
    parameters_.push_back({.weight = weight,
                           .m = torch::zeros_like(weight, torch::requires_grad(false)),
                           .v = torch::zeros_like(weight, torch::requires_grad(false)),
                           .step = 0,
                           .group = groups_.size()});
  }
  groups_.push_back({.options = options});
}

void AdamW::step(double gradient_scale) {
  for (Parameter& p : parameters_) {
    if (!p.weight.grad().defined()) continue;
    const torch::Tensor gradient = p.weight.grad().to(torch::kFloat).contiguous();
    adamw_step(groups_[p.group].options, ++p.step, gradient_scale, gradient.data_ptr<float>(),
               static_cast<size_t>(p.weight.numel()), p.weight.data_ptr<float>(), p.m.data_ptr<float>(),
               p.v.data_ptr<float>());
    p.weight.unsafeGetTensorImpl()->bump_version();  // what was saved for a backward pass is no longer valid
  }
}

void AdamW::zero_grad() {
  for (Parameter& p : parameters_) p.weight.mutable_grad().reset();
}

double gradient_norm(const std::vector<torch::Tensor>& parameters) {
  double sum = 0;
  for (const torch::Tensor& p : parameters) {
    if (!p.grad().defined()) continue;
    const torch::Tensor gradient = p.grad().detach().to(torch::kFloat).contiguous();
    const int64_t count = gradient.numel(), pieces = (count + kGrain - 1) / kGrain;
    const float* const data = gradient.data_ptr<float>();
    std::vector<double> sums(static_cast<size_t>(pieces));
    at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece)
        sums[static_cast<size_t>(piece)] =
            sum_of_squares(data + piece * kGrain, static_cast<size_t>(std::min(kGrain, count - piece * kGrain)));
    });
    for (const double s : sums) sum += s;
  }
  return std::sqrt(sum);
}

}  // namespace bitwright::train
