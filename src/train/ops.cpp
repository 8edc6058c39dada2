#include "train/ops.hpp"

#include <ATen/autocast_mode.h>
#include <malloc.h>

#include <cmath>
#include <limits>

namespace bitwright::train {
namespace {

namespace F = torch::nn::functional;

/// Is it what linear.hpp puts in a weight's place?
bool is_stand_in(const torch::Tensor& weight) { return !weight.has_storage(); }

}  // namespace

Compute compute_type() { return at::autocast::is_cpu_enabled() ? Compute::bf16 : Compute::f32; }

torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double epsilon, double offset) {
  return x * torch::rsqrt(x.square().mean(-1, true) + epsilon) * (weight + offset);
}

torch::Tensor layer_norm(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias,
                         double epsilon) {
  return torch::layer_norm(x, {x.size(-1)}, weight, bias, epsilon);
}

torch::Tensor rotary(const torch::Tensor& x, const torch::Tensor& cosine, const torch::Tensor& sine) {
  const int64_t n = cosine.size(-1);
  const torch::Tensor c = cosine.unsqueeze(1), s = sine.unsqueeze(1);  // [tokens, 1, n]
  const torch::Tensor a = x.narrow(-1, 0, n), b = x.narrow(-1, n, n), rest = x.narrow(-1, 2 * n, x.size(-1) - 2 * n);
  return torch::cat({a * c - b * s, b * c + a * s, rest}, -1);
}

torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const AttentionRule& rule) {
  const int64_t tokens = q.size(1), shared = q.size(2) / k.size(2);
  const torch::Tensor keys = k.repeat_interleave(shared, 2).transpose(1, 2);
  const torch::Tensor values = v.repeat_interleave(shared, 2).transpose(1, 2);
  torch::Tensor scores = torch::matmul(q.transpose(1, 2), keys.transpose(2, 3)) * rule.scale;
  if (rule.cap > 0) scores = torch::tanh(scores / rule.cap) * rule.cap;
  torch::Tensor seen = torch::ones({tokens, tokens}, torch::kBool).tril();
  if (rule.window > 0) seen = seen.triu(1 - static_cast<int64_t>(rule.window));
  scores = scores.masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity());
  return torch::matmul(torch::softmax(scores, -1), values).transpose(1, 2).contiguous();
}

torch::Tensor gated(Activation activation, const torch::Tensor& gate, const torch::Tensor& up) {
  const torch::Tensor y = activation == Activation::silu
                              ? torch::silu(gate)
                              : torch::gelu(gate, activation == Activation::gelu ? "none" : "tanh");
  return up.defined() ? y * up : y;
}

torch::Tensor linear(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias, Compute compute) {
  if (is_stand_in(weight) || compute == Compute::f32) return torch::linear(x, weight, bias);
  const torch::Tensor y = torch::linear(x.to(torch::kBFloat16), weight.to(torch::kBFloat16)).to(torch::kFloat);
  return bias.defined() ? y + bias : y;
}

torch::Tensor linear_cross_entropy(const torch::Tensor& hidden, const torch::Tensor& head, const torch::Tensor& targets,
                                   double cap, Compute compute) {
  torch::Tensor logits = linear(hidden.reshape({-1, hidden.size(-1)}), head, {}, compute);
  if (cap > 0) logits = torch::tanh(logits / cap) * cap;
  const torch::Tensor wanted = targets.reshape({-1});
  const torch::Tensor sum =
      F::cross_entropy(logits, wanted, F::CrossEntropyFuncOptions().ignore_index(kIgnored).reduction(torch::kSum));
  return sum / wanted.ne(kIgnored).sum().clamp_min(1);
}

void keep_pages() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

}  // namespace bitwright::train
