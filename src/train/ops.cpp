#include "train/ops.hpp"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <malloc.h>

#include <cmath>
#include <limits>

#include "kernels/attention_gradient.hpp"
#include "kernels/row_gradients.hpp"
#include "train/dense.hpp"
#include "train/head_loss.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using Tensors = torch::autograd::variable_list;

/// An undefined tensor is no argument of a torch::autograd::Function.
using MaybeTensor = c10::optional<Tensor>;
MaybeTensor maybe(const Tensor& x) { return x.defined() ? MaybeTensor(x) : MaybeTensor(); }

/// Float32 numbers, one after the other.
Tensor floats(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == torch::kFloat, "these operations are for float32, not ", x.scalar_type());
  return x.contiguous();
}
Tensor like(const Tensor& x) { return torch::empty(x.sizes(), torch::kFloat); }
float* data(const Tensor& x) { return x.data_ptr<float>(); }
std::span<const float> numbers(const Tensor& x) { return {data(x), static_cast<size_t>(x.numel())}; }
int64_t last(const Tensor& x) { return x.size(-1); }
int64_t rows(const Tensor& x) { return last(x) == 0 ? 0 : x.numel() / last(x); }

constexpr int64_t kPiece = 4096;  // numbers that one thread takes at a time

/// use(from, count) for pieces of [0, total).
template <class Use>
void in_pieces(int64_t total, Use use) {
  at::parallel_for(0, (total + kPiece - 1) / kPiece, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) use(i * kPiece, static_cast<size_t>(std::min(kPiece, total - i * kPiece)));
  });
}

// --- norms

struct Norm {
  Tensor weight;  ///< what the rows are multiplied with
  Tensor bias;    ///< undefined: an RMSNorm
  float epsilon;
};

Tensor normalise(const Tensor& x, const Norm& norm) {
  const int64_t n = last(x);
  TORCH_CHECK(norm.weight.numel() == n, "a norm's weight has as many numbers as a row");
  Tensor y = like(x);
  at::parallel_for(0, rows(x), 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const std::span<const float> in(data(x) + row * n, static_cast<size_t>(n));
      if (norm.bias.defined())
        bitwright::layer_norm(in, numbers(norm.weight), numbers(norm.bias), norm.epsilon, data(y) + row * n);
      else
        bitwright::rms_norm(in, numbers(norm.weight), norm.epsilon, data(y) + row * n);
    }
  });
  return y;
}

/// The gradients of x, weight and bias. Those of the parameters are summed in blocks of rows, in order, so that the
/// number of threads does not change them.
Tensors norm_gradient(const Tensor& x, const Norm& norm, const Tensor& dy) {
  constexpr int64_t kRows = 64;
  const int64_t n = last(x), count = rows(x), blocks = (count + kRows - 1) / kRows;
  const bool bias = norm.bias.defined();
  Tensor dx = like(x), sums = torch::zeros({std::max<int64_t>(blocks, 1), bias ? 2 : 1, n});
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kRows; row < std::min(count, end * kRows); ++row) {
      const std::span<const float> in(data(x) + row * n, static_cast<size_t>(n));
      float* const sum = data(sums) + row / kRows * sums.stride(0);
      const float* const slope = data(dy) + row * n;
      if (bias)
        layer_norm_gradient(in, numbers(norm.weight), norm.epsilon, slope, data(dx) + row * n, sum, sum + n);
      else
        rms_norm_gradient(in, numbers(norm.weight), norm.epsilon, slope, data(dx) + row * n, sum);
    }
  });
  for (int64_t block = 1; block < blocks; ++block)
    add({data(sums), static_cast<size_t>(sums.stride(0))}, data(sums) + block * sums.stride(0));
  return {dx, sums[0][0].clone(), bias ? sums[0][1].clone() : Tensor()};
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, double epsilon,
                        double offset) {
    const Tensor in = floats(x), factor = offset != 0 ? floats(weight) + offset : floats(weight);
    context->save_for_backward({in, factor});
    context->saved_data["epsilon"] = epsilon;
    return normalise(in, {.weight = factor, .bias = {}, .epsilon = static_cast<float>(epsilon)});
  }
  static Tensors backward(AutogradContext* context, const Tensors& dy) {
    const Tensors saved = context->get_saved_variables();
    const Norm norm = {
        .weight = saved[1], .bias = {}, .epsilon = static_cast<float>(context->saved_data["epsilon"].toDouble())};
    const Tensors d = norm_gradient(saved[0], norm, floats(dy[0]));
    return {d[0], d[1], {}, {}};
  }
};

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& bias,
                        double epsilon) {
    const Norm norm = {.weight = floats(weight), .bias = floats(bias), .epsilon = static_cast<float>(epsilon)};
    const Tensor in = floats(x);
    context->save_for_backward({in, norm.weight, norm.bias});
    context->saved_data["epsilon"] = epsilon;
    return normalise(in, norm);
  }
  static Tensors backward(AutogradContext* context, const Tensors& dy) {
    const Tensors saved = context->get_saved_variables();
    const Norm norm = {
        .weight = saved[1], .bias = saved[2], .epsilon = static_cast<float>(context->saved_data["epsilon"].toDouble())};
    Tensors d = norm_gradient(saved[0], norm, floats(dy[0]));
    return {d[0], d[1], d[2], {}};
  }
};

// --- rotary positions

Tensor rotate(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  const int64_t tokens = x.size(1), width = x.size(2) * x.size(3), head_size = x.size(3), n = last(cosine);
  Tensor y = like(x);
  at::parallel_for(0, x.size(0) * tokens, 8, [&](int64_t begin, int64_t end) {
    std::copy(data(x) + begin * width, data(x) + end * width, data(y) + begin * width);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = token % tokens;
      for (int64_t at = 0; at < width; at += head_size)
        rotate_halves(data(y) + token * width + at, {data(cosine) + position * n, static_cast<size_t>(n)},
                      data(sine) + position * n);
    }
  });
  return y;
}

struct Rotary : torch::autograd::Function<Rotary> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& cosine, const Tensor& sine) {
    const Tensor c = floats(cosine), s = floats(sine);
    context->save_for_backward({c, s});
    return rotate(floats(x), c, s);
  }
  static Tensors backward(AutogradContext* context, const Tensors& dy) {
    const Tensors saved = context->get_saved_variables();
    return {rotate(floats(dy[0]), saved[0], -saved[1]), {}, {}};
  }
};

// --- attention

/// What task i of batch * kv_heads reads: sequence i / kv_heads, key-value head i % kv_heads.
struct Heads {
  int64_t tokens, kv_heads, shared, head_size;
  Heads(const Tensor& q, const Tensor& k)
      : tokens(q.size(1)), kv_heads(k.size(2)), shared(q.size(2) / k.size(2)), head_size(q.size(3)) {}
  int64_t q_at(int64_t i) const { return (i / kv_heads * tokens * kv_heads + i % kv_heads) * shared * head_size; }
  int64_t kv_at(int64_t i) const { return (i / kv_heads * tokens * kv_heads + i % kv_heads) * head_size; }
  Sequence sequence(const Tensor& q, const Tensor& k, const Tensor& v, int64_t i) const {
    return {.q = data(q) + q_at(i),
            .k = data(k) + kv_at(i),
            .v = data(v) + kv_at(i),
            .q_stride = static_cast<size_t>(kv_heads * shared * head_size),
            .kv_stride = static_cast<size_t>(kv_heads * head_size),
            .tokens = static_cast<size_t>(tokens),
            .heads = static_cast<size_t>(shared),
            .head_size = static_cast<size_t>(head_size)};
  }
  template <class Use>
  void each(const Tensor& q, Use use) const {
    at::parallel_for(0, q.size(0) * kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) use(i);
    });
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                        const AttentionRule& rule) {
    const Tensor q_in = floats(q), k_in = floats(k), v_in = floats(v);
    context->save_for_backward({q_in, k_in, v_in});
    context->saved_data["rule"] = std::vector<double>{rule.scale, rule.cap, static_cast<double>(rule.window)};
    Tensor out = like(q_in);
    const Heads heads(q_in, k_in);
    heads.each(q_in, [&](int64_t i) {
      attend_sequence(heads.sequence(q_in, k_in, v_in, i), rule, data(out) + heads.q_at(i));
    });
    return out;
  }
  static Tensors backward(AutogradContext* context, const Tensors& dy) {
    const Tensors saved = context->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], dout = floats(dy[0]);
    const std::vector<double> numbers = context->saved_data["rule"].toDoubleVector();
    const AttentionRule rule = {.scale = static_cast<float>(numbers[0]),
                                .cap = static_cast<float>(numbers[1]),
                                .window = static_cast<size_t>(numbers[2])};
    Tensor dq = like(q), dk = like(k), dv = like(v);
    const Heads heads(q, k);
    heads.each(q, [&](int64_t i) {
      attend_sequence_gradient(heads.sequence(q, k, v, i), rule, data(dout) + heads.q_at(i), data(dq) + heads.q_at(i),
                               data(dk) + heads.kv_at(i), data(dv) + heads.kv_at(i));
    });
    return {dq, dk, dv, {}};
  }
};

// --- gates

struct Gated : torch::autograd::Function<Gated> {
  static Tensor forward(AutogradContext* context, const Tensor& gate, const MaybeTensor& up, int64_t activation) {
    const Tensor g = floats(gate), u = up ? floats(*up) : Tensor();
    TORCH_CHECK(!u.defined() || u.sizes() == g.sizes(), "a gate has the shape of what it is multiplied with");
    context->save_for_backward({g, u});
    context->saved_data["activation"] = activation;
    Tensor y = like(g);
    in_pieces(g.numel(), [&](int64_t at, size_t count) {
      std::copy_n(data(g) + at, count, data(y) + at);
      active_kernel_level().activate(static_cast<Activation>(activation), data(y) + at,
                                     u.defined() ? data(u) + at : nullptr, count);
    });
    return y;
  }
  static Tensors backward(AutogradContext* context, const Tensors& dys) {
    const Tensors saved = context->get_saved_variables();
    const Tensor &g = saved[0], &u = saved[1], dy = floats(dys[0]);
    const auto activation = static_cast<Activation>(context->saved_data["activation"].toInt());
    Tensor dg = like(g), du = u.defined() ? like(u) : u;
    in_pieces(g.numel(), [&](int64_t at, size_t count) {
      const std::span slope(data(dg) + at, count);
      std::copy_n(data(g) + at, count, slope.data());
      active_kernel_level().activation_slope(activation, slope.data(), count);
      bitwright::multiply(slope, data(dy) + at);
      if (!u.defined()) return;
      bitwright::multiply(slope, data(u) + at);
      std::copy_n(data(g) + at, count, data(du) + at);
      active_kernel_level().activate(activation, data(du) + at, data(dy) + at, count);
    });
    return {dg, du, {}};
  }
};

// --- matrix products

Tensor rounded(const Tensor& x) {
  if (x.scalar_type() == torch::kBFloat16) return x.contiguous();
  const Tensor from = floats(x);
  Tensor to = torch::empty(x.sizes(), torch::kBFloat16);
  auto* const out = static_cast<uint16_t*>(to.data_ptr());
  in_pieces(x.numel(), [&](int64_t at, size_t count) { round_to_bf16(data(from) + at, count, out + at); });
  return to;
}

/// All dimensions but the last are rows.
Matrix matrix(const Tensor& x) {
  return {.data = x.data_ptr(),
          .bf16 = x.scalar_type() == torch::kBFloat16,
          .rows = rows(x),
          .columns = last(x),
          .row_stride = last(x),
          .column_stride = 1};
}

/// In the type that products are computed in.
Tensor operand(const Tensor& x, bool bf16) { return bf16 ? rounded(x) : floats(x); }

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                        bool bf16) {
    const Tensor in = operand(x, bf16), w = operand(weight, bf16), added = bias ? floats(*bias) : Tensor();
    context->saved_data["bias"] = added.defined();
    context->save_for_backward({in, w});
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.back() = weight.size(0);
    Tensor y = torch::empty(sizes, torch::kFloat);
    multiply(matrix(in), matrix(w).transposed(), data(y), weight.size(0), false,
             added.defined() ? data(added) : nullptr);
    return y;
  }
  static Tensors backward(AutogradContext* context, const Tensors& dys) {
    const Tensors saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], dy = floats(dys[0]);
    const Tensor slope = operand(dy, x.scalar_type() == torch::kBFloat16);
    Tensor dx, dweight, dbias;
    if (context->needs_input_grad(0)) {
      dx = like(x);
      multiply(matrix(slope), matrix(weight), data(dx), last(x));
    }
    if (context->needs_input_grad(1)) {
      dweight = like(weight);
      multiply(matrix(slope).transposed(), matrix(x), data(dweight), last(x));
    }
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) dbias = dy.reshape({-1, last(dy)}).sum(0);
    return {dx, dweight, dbias, {}};
  }
};

struct HeadCrossEntropy : torch::autograd::Function<HeadCrossEntropy> {
  static Tensor forward(AutogradContext* context, const Tensor& hidden, const Tensor& head, const Tensor& targets,
                        double cap, bool bf16, bool gradient, bool head_learns) {
    const Tensor x = operand(hidden, bf16), w = operand(head, bf16);
    HeadLoss loss = {
        .hidden = matrix(x), .head = matrix(w), .targets = targets.data_ptr<int64_t>(), .cap = static_cast<float>(cap)};
    if (gradient) {
      const Tensor dhidden = like(x), dhead = head_learns ? like(w) : Tensor();
      if (head_learns && rows(x) == 0) dhead.zero_();
      loss.dhidden = data(dhidden);
      if (head_learns) loss.dhead = data(dhead);
      context->saved_data["hidden"] = dhidden;
      context->saved_data["head"] = dhead;
    }
    return torch::tensor(loss.compute(), torch::kFloat);
  }
  static Tensors backward(AutogradContext* context, const Tensors& dy) {
    TORCH_CHECK(context->saved_data.count("head") != 0, "the gradients of this loss are made once, and were taken");
    Tensor dhidden = context->saved_data["hidden"].toTensor(), dhead = context->saved_data["head"].toTensor();
    context->saved_data.clear();
    if (dy[0].item<float>() != 1) {
      dhidden.mul_(dy[0]);
      if (dhead.defined()) dhead.mul_(dy[0]);
    }
    return {dhidden, dhead, {}, {}, {}, {}, {}};
  }
};

struct FrozenHeadCrossEntropy : torch::autograd::Function<FrozenHeadCrossEntropy> {
  static Tensor forward(AutogradContext* context, const Tensor& hidden, const FrozenHead& head, const Tensor& targets,
                        double cap, bool bf16, bool gradient) {
    const Tensor x = bf16 ? rounded(hidden) : floats(hidden);
    Matrix shape = matrix(x);
    shape.data = nullptr;
    shape.rows = head.words;
    HeadLoss loss = {.hidden = matrix(x),
                     .head = shape,
                     .words = [&](int64_t first, int64_t count, void* out) { head.write(first, count, bf16, out); },
                     .targets = targets.data_ptr<int64_t>(),
                     .cap = static_cast<float>(cap)};
    if (gradient) {
      const Tensor dhidden = like(x);
      loss.dhidden = data(dhidden);
      context->saved_data["hidden"] = dhidden;
    }
    return torch::tensor(loss.compute(), torch::kFloat);
  }
  static Tensors backward(AutogradContext* context, const Tensors& dy) {
    TORCH_CHECK(context->saved_data.count("hidden") != 0, "the gradients of this loss are made once, and were taken");
    const Tensor dhidden = context->saved_data["hidden"].toTensor();
    context->saved_data.clear();
    if (dy[0].item<float>() != 1) dhidden.mul_(dy[0]);
    return {dhidden, {}, {}, {}, {}, {}};
  }
};

/// Targets as the loss reads them, checked.
Tensor checked_targets(const Tensor& targets, int64_t rows, int64_t words) {
  const Tensor wanted = targets.to(torch::kLong).contiguous();
  TORCH_CHECK(wanted.numel() == rows, "one target for each row of `hidden`");
  TORCH_CHECK(wanted.eq(kIgnored).logical_or_(wanted.ge(0).logical_and_(wanted.lt(words))).all().item<bool>(),
              "a target is a word's number or ", kIgnored);
  return wanted;
}

/// Is it what linear.hpp puts in a weight's place?
bool is_stand_in(const Tensor& weight) { return !weight.has_storage(); }

/// Operations of libtorch compute in the type they are given.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKey::AutocastCPU};
};

}  // namespace

Compute compute_type() { return at::autocast::is_cpu_enabled() ? Compute::bf16 : Compute::f32; }

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon, double offset) {
  const NoAutocast guard;
  return RmsNorm::apply(x, weight, epsilon, offset);
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double epsilon) {
  const NoAutocast guard;
  return LayerNorm::apply(x, weight, bias, epsilon);
}

Tensor rotary(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  TORCH_CHECK(x.dim() == 4 && cosine.dim() == 2 && cosine.sizes() == sine.sizes() && cosine.size(0) >= x.size(1) &&
                  2 * cosine.size(1) <= x.size(3),
              "x: [batch, tokens, heads, head size]; cosine and sine: [tokens, half a head or less]");
  const NoAutocast guard;
  return Rotary::apply(x, cosine, sine);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionRule& rule) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
                  q.size(1) == k.size(1) && q.size(3) == k.size(3) && k.size(2) > 0 && q.size(2) % k.size(2) == 0,
              "q: [batch, tokens, heads, head size]; k and v: the same, with heads that divide those of q");
  const NoAutocast guard;
  return Attention::apply(q, k, v, rule);
}

Tensor gated(Activation activation, const Tensor& gate, const Tensor& up) {
  const NoAutocast guard;
  return Gated::apply(gate, maybe(up), static_cast<int64_t>(activation));
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias, Compute compute) {
  if (is_stand_in(weight)) return torch::linear(x, weight, bias);
  const NoAutocast guard;
  const bool bf16 = compute == Compute::bf16;
  if (!bf16 && (x.scalar_type() != torch::kFloat || weight.scalar_type() != torch::kFloat))
    return torch::linear(x, weight, bias);
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == last(x), "x: [..., in]; weight: [out, in]");
  return Linear::apply(x, weight, maybe(bias), bf16);
}

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& head, const Tensor& targets, double cap,
                            Compute compute) {
  TORCH_CHECK(head.dim() == 2 && head.size(1) == last(hidden), "hidden: [..., inputs]; head: [words, inputs]");
  const Tensor wanted = checked_targets(targets, rows(hidden), head.size(0));
  const NoAutocast guard;
  const bool learns = head.requires_grad();
  const bool gradient = torch::GradMode::is_enabled() && (hidden.requires_grad() || learns);
  return HeadCrossEntropy::apply(hidden, head, wanted, cap, compute == Compute::bf16, gradient, learns);
}

Tensor linear_cross_entropy(const Tensor& hidden, const FrozenHead& head, const Tensor& targets, double cap,
                            Compute compute) {
  TORCH_CHECK(head.inputs == last(hidden), "hidden: [..., inputs], as the head has them");
  const Tensor wanted = checked_targets(targets, rows(hidden), head.words);
  const NoAutocast guard;
  const bool gradient = torch::GradMode::is_enabled() && hidden.requires_grad();
  return FrozenHeadCrossEntropy::apply(hidden, head, wanted, cap, compute == Compute::bf16, gradient);
}

void keep_pages() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

}  // namespace bitwright::train
