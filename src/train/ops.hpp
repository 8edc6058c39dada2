#pragma once

#include <torch/torch.h>

#include <functional>

#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"

namespace bitwright::train {

// What a transformer computes, each forward and backward pass one operation. Float32 tensors; norms, softmax, loss and
// all gradients are computed in float32 whatever the compute type. What libtorch's autocast would do to the operations
// inside is switched off: the compute type alone decides.

/// The type that matrix products are computed in, with sums in float32.
enum class Compute : uint8_t { f32, bf16 };

/// bf16 where libtorch's autocast of the CPU is on (at::autocast::set_cpu_enabled).
Compute compute_type();

/// x / sqrt(mean(x^2) + epsilon) * (weight + offset), over the last dimension. weight: [last].
torch::Tensor rms_norm(const torch::Tensor& x, const torch::Tensor& weight, double epsilon, double offset = 0);

/// (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, over the last dimension. weight, bias: [last].
torch::Tensor layer_norm(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias,
                         double epsilon);

/// Turns the pairs (i, i + n) of each head; what stands behind them is left alone. x: [batch, tokens, heads,
/// head_size]; cosine, sine: [tokens, n], no gradients. For positions as model/rope.hpp has them.
torch::Tensor rotary(const torch::Tensor& x, const torch::Tensor& cosine, const torch::Tensor& sine);

/// Causal attention within each sequence. q: [batch, tokens, heads, head_size]; k, v: [batch, tokens, kv_heads,
/// head_size]; head h reads key-value head h / (heads / kv_heads). Returns the shape of q.
torch::Tensor attention(const torch::Tensor& q, const torch::Tensor& k, const torch::Tensor& v,
                        const AttentionRule& rule);

/// activation(gate) * up; an undefined `up` stands for ones.
torch::Tensor gated(Activation activation, const torch::Tensor& gate, const torch::Tensor& up);

/// x weightᵀ + bias. x: [..., in]; weight: [out, in]; bias: [out] or undefined. The stand-in of a LinearBehaviour (see
/// linear.hpp) is asked to compute it.
torch::Tensor linear(const torch::Tensor& x, const torch::Tensor& weight, const torch::Tensor& bias = {},
                     Compute compute = compute_type());

/// The target of a row that does not count.
constexpr int64_t kIgnored = -100;

/// The mean over the rows that count of -log softmax(logits)[target], logits = hidden headᵀ, or if cap > 0
/// cap * tanh(hidden headᵀ / cap); 0 where none counts. hidden: [..., inputs]; head: [words, inputs]; targets: one
/// int64 for each row. Never holds all logits. The gradients are made in the forward pass, so backward() can run once.
torch::Tensor linear_cross_entropy(const torch::Tensor& hidden, const torch::Tensor& head, const torch::Tensor& targets,
                                   double cap = 0, Compute compute = compute_type());

/// A head that does not learn and is not kept as it is multiplied with.
struct FrozenHead {
  int64_t words, inputs;
  /// Writes words [first, first + count), [count, inputs], as bfloat16 or float32.
  std::function<void(int64_t first, int64_t count, bool bf16, void* out)> write;
};
/// The same with such a head, of which some words at a time are in memory.
torch::Tensor linear_cross_entropy(const torch::Tensor& hidden, const FrozenHead& head, const torch::Tensor& targets,
                                   double cap = 0, Compute compute = compute_type());

/// Memory that is freed stays with the process, so that each step finds its pages mapped. For programs that train;
/// call it before the first step.
void keep_pages();

}  // namespace bitwright::train
