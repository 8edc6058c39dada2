#include "train/ops.hpp"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "train/dense.hpp"
#include "train/linear.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;
using Tensors = std::vector<Tensor>;
using Operation = std::function<Tensor(const Tensors&)>;
namespace F = torch::nn::functional;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// --- the definitions, of libtorch's own operations

Tensor plain_rms_norm(const Tensor& x, const Tensor& weight, double epsilon, double offset) {
  return x * torch::rsqrt(x.square().mean(-1, true) + epsilon) * (weight + offset);
}

Tensor plain_rotary(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  const int64_t n = cosine.size(-1);
  const Tensor c = cosine.narrow(0, 0, x.size(1)).unsqueeze(1), s = sine.narrow(0, 0, x.size(1)).unsqueeze(1);
  const Tensor a = x.narrow(-1, 0, n), b = x.narrow(-1, n, n), rest = x.narrow(-1, 2 * n, x.size(-1) - 2 * n);
  return torch::cat({a * c - b * s, b * c + a * s, rest}, -1);
}

Tensor plain_attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionRule& rule) {
  const int64_t tokens = q.size(1), shared = q.size(2) / k.size(2);
  const Tensor keys = k.repeat_interleave(shared, 2).transpose(1, 2);
  const Tensor values = v.repeat_interleave(shared, 2).transpose(1, 2);
  Tensor scores = torch::matmul(q.transpose(1, 2), keys.transpose(2, 3)) * double{rule.scale};
  if (rule.cap > 0) scores = torch::tanh(scores / double{rule.cap}) * double{rule.cap};
  Tensor seen = torch::ones({tokens, tokens}, torch::kBool).tril();
  if (rule.window > 0) seen = seen.triu(1 - static_cast<int64_t>(rule.window));
  scores = scores.masked_fill(seen.logical_not(), -kInfinity);
  return torch::matmul(torch::softmax(scores, -1), values).transpose(1, 2);
}

Tensor plain_gated(Activation activation, const Tensor& gate, const Tensor& up) {
  const Tensor y = activation == Activation::silu ? torch::silu(gate)
                                                  : torch::gelu(gate, activation == Activation::gelu ? "none" : "tanh");
  return up.defined() ? y * up : y;
}

Tensor plain_loss(const Tensor& hidden, const Tensor& head, const Tensor& targets, double cap) {
  Tensor logits = torch::matmul(hidden, head.t());
  if (cap > 0) logits = torch::tanh(logits / cap) * cap;
  const auto options = F::CrossEntropyFuncOptions().ignore_index(kIgnored).reduction(torch::kSum);
  const Tensor sum = F::cross_entropy(logits.reshape({-1, head.size(0)}), targets.reshape({-1}), options);
  return sum / targets.ne(kIgnored).sum().clamp_min(1);
}

// --- how they are compared

/// The result and the gradient of each input, the result being weighed with numbers that are no ones.
Tensors results(const Operation& operation, const Tensors& inputs, torch::ScalarType type, bool magnitudes = false) {
  Tensors leaves;
  for (const Tensor& x : inputs)
    leaves.push_back((magnitudes ? x.abs() : x).to(type).detach().clone().requires_grad_());
  const Tensor y = operation(leaves);
  const Tensor weights = torch::cos(torch::arange(y.numel(), torch::kDouble)).reshape(y.sizes()).to(type);
  y.backward(magnitudes ? weights.abs() : weights);
  Tensors all = {y.detach()};
  for (const Tensor& leaf : leaves) all.push_back(leaf.grad());
  return all;
}

/// The largest difference of any number from that in double, against the largest number of its tensor.
double error_of(const Tensor& found, const Tensor& exact) {
  if (exact.numel() == 0) return 0;
  const double difference = (found.to(torch::kDouble) - exact).abs().max().item<double>();
  return difference / std::max(exact.abs().max().item<double>(), 1e-30);
}

void expect_close(const Operation& operation, const Operation& plain, const Tensors& inputs, double tolerance) {
  const Tensors found = results(operation, inputs, torch::kFloat), exact = results(plain, inputs, torch::kDouble);
  for (size_t i = 0; i < exact.size(); ++i) {
    ASSERT_EQ(found[i].sizes(), exact[i].sizes()) << i;
    EXPECT_EQ(found[i].scalar_type(), torch::kFloat);
    EXPECT_LE(error_of(found[i], exact[i]), tolerance) << (i == 0 ? "result" : "gradient of input ") << i;
  }
}

/// Sums of n products in float32 in any order: n * 2^-24 of the sum of magnitudes, which is within sqrt(n) of the
/// largest result here (independent signs); a few roundings besides.
double sums_of(int64_t n) { return (std::sqrt(static_cast<double>(n)) + 8) * 4 * 0x1p-24; }
/// The most that rounding to bfloat16's 8 bits changes a number, as a part of it.
constexpr double kBf16 = 0x1p-8;

/// Of a sum of n products of what `roundings` roundings to bfloat16 have changed, as a part of the sum of its terms'
/// magnitudes: all may err to the same side, and float32's sums besides.
double bf16_error(int roundings, int64_t n) {
  return std::pow(1 + kBf16, roundings) * (1 + static_cast<double>(n + 8) * 0x1p-24) - 1;
}

/// Each number within its own bound.
void expect_within(const Tensor& found, const Tensor& exact, const Tensor& bound, const std::string& what) {
  ASSERT_EQ(found.sizes(), exact.sizes()) << what;
  const Tensor excess = (found.to(torch::kDouble) - exact).abs() - bound;
  EXPECT_TRUE(excess.le(0).all().item<bool>()) << what << ", by " << excess.max().item<double>();
}

class TrainOps : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(7); }
};

TEST_F(TrainOps, Norms) {
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{{1, 5}, {3, 7}, {2, 33, 65}, {130, 48}}) {
    const int64_t n = shape.back();
    const Tensor x = torch::randn(shape) * 3 + 1, weight = torch::randn({n}), bias = torch::randn({n});
    for (const double offset : {0.0, 1.0})
      expect_close([&](const Tensors& in) { return train::rms_norm(in[0], in[1], 1e-5, offset); },
                   [&](const Tensors& in) { return plain_rms_norm(in[0], in[1], 1e-5, offset); }, {x, weight},
                   sums_of(130 * n));
    expect_close([](const Tensors& in) { return layer_norm(in[0], in[1], in[2], 1e-5); },
                 [&](const Tensors& in) { return torch::layer_norm(in[0], {n}, in[1], in[2], 1e-5); },
                 {x, weight, bias}, sums_of(130 * n));
  }
  const Tensor zeros = torch::zeros({2, 5}).requires_grad_();
  train::rms_norm(zeros, torch::ones(5), 1e-6).sum().backward();
  EXPECT_LE(error_of(zeros.grad(), torch::full({2, 5}, 1e3, torch::kDouble)), 1e-5);
}

TEST_F(TrainOps, Rotary) {
  for (const int64_t n : {1, 4, 5}) {
    const Tensor angle = torch::rand({9, n}) * 6, cosine = angle.cos(), sine = angle.sin();
    expect_close(
        [&](const Tensors& in) { return rotary(in[0], cosine, sine); },
        [&](const Tensors& in) { return plain_rotary(in[0], cosine.to(torch::kDouble), sine.to(torch::kDouble)); },
        {torch::randn({3, 7, 2, 11})}, 4 * 0x1p-24);
  }
}

TEST_F(TrainOps, Attention) {
  struct Case {
    int64_t batch, tokens, heads, kv_heads, head_size;
    AttentionRule rule;
  };
  for (const Case& c : std::vector<Case>{{1, 1, 1, 1, 4, {.scale = 1}},
                                         {2, 7, 2, 1, 5, {.scale = 0.5f}},
                                         {1, 100, 6, 2, 48, {.scale = 0.14f}},
                                         {1, 97, 4, 4, 17, {.scale = 0.3f, .window = 33}},
                                         {2, 49, 2, 2, 16, {.scale = 0.25f, .window = 1}},
                                         {1, 130, 2, 1, 20, {.scale = 0.3f, .cap = 2, .window = 50}},
                                         {1, 60, 2, 2, 8, {.scale = 1, .cap = 5}},
                                         {1, 64, 1, 1, 8, {.scale = 40}}}) {  // nearly one-hot
    const auto random = [&](int64_t heads) { return torch::randn({c.batch, c.tokens, heads, c.head_size}); };
    SCOPED_TRACE(testing::Message() << c.tokens << " tokens, head size " << c.head_size << ", scale " << c.rule.scale);
    // A score's error is that of its sum times the scale, and changes each probability by as much.
    const double scores = 1 + double{c.rule.scale} * static_cast<double>(c.head_size);
    expect_close([&](const Tensors& in) { return attention(in[0], in[1], in[2], c.rule); },
                 [&](const Tensors& in) { return plain_attention(in[0], in[1], in[2], c.rule); },
                 {random(c.heads), random(c.kv_heads), random(c.kv_heads)}, sums_of(c.tokens) * scores);
  }
}

TEST_F(TrainOps, Gates) {
  for (const Activation activation : {Activation::silu, Activation::gelu, Activation::gelu_tanh})
    for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{{9}, {3, 5}, {2, 70, 131}}) {
      const Tensor gate = torch::randn(shape) * 6, up = torch::randn(shape);
      expect_close([&](const Tensors& in) { return gated(activation, in[0], in[1]); },
                   [&](const Tensors& in) { return plain_gated(activation, in[0], in[1]); }, {gate, up}, 2e-6);
      expect_close([&](const Tensors& in) { return gated(activation, in[0], {}); },
                   [&](const Tensors& in) { return plain_gated(activation, in[0], {}); }, {gate}, 2e-6);
    }
}

/// In bfloat16 each number is a sum of products of two operands, each rounded once (of the result x and weight, of the
/// gradients what comes in and the other of the two); only the bias and its gradient are not.
TEST_F(TrainOps, Linear) {
  for (const auto& [rows, in_size, out_size] :
       std::vector<std::array<int64_t, 3>>{{1, 4, 5}, {5, 7, 3}, {33, 70, 129}, {1100, 9, 20}}) {
    const Tensor x = torch::randn({rows, in_size}), w = torch::randn({out_size, in_size}), b = torch::randn({out_size});
    const Operation plain = [](const Tensors& in) {
      return torch::linear(in[0], in[1], in.size() > 2 ? in[2] : Tensor());
    };
    for (const Tensors& inputs : {Tensors{x, w, b}, Tensors{x.unsqueeze(0), w}}) {
      const auto ours = [](Compute compute) {
        return [compute](const Tensors& in) {
          return train::linear(in[0], in[1], in.size() > 2 ? in[2] : Tensor(), compute);
        };
      };
      expect_close(ours(Compute::f32), plain, inputs, sums_of(1100));
      const Tensors found = results(ours(Compute::bf16), inputs, torch::kFloat),
                    exact = results(plain, inputs, torch::kDouble),
                    magnitudes = results(plain, inputs, torch::kDouble, /*magnitudes=*/true);
      for (size_t i = 0; i < found.size(); ++i)
        expect_within(found[i], exact[i], magnitudes[i] * bf16_error(2, 1100), std::to_string(i));
    }
  }
}

/// Against the product of what bfloat16 holds of the operands, only float32's sums are left to differ.
TEST_F(TrainOps, LinearInBf16SumsInFloat) {
  const Tensor x = torch::randn({40, 500}).to(torch::kBFloat16), w = torch::randn({30, 500}).to(torch::kBFloat16);
  const Tensor y = train::linear(x.to(torch::kFloat), w.to(torch::kFloat), {}, Compute::bf16);
  EXPECT_LE(error_of(y, torch::linear(x.to(torch::kDouble), w.to(torch::kDouble))), sums_of(500));
}

TEST_F(TrainOps, AutocastIsTheComputeType) {
  const Tensor x = torch::randn({4, 8}), w = torch::randn({4, 8});
  at::autocast::set_cpu_enabled(true);
  EXPECT_EQ(compute_type(), Compute::bf16);
  EXPECT_TRUE(train::linear(x, w).equal(train::linear(x, w, {}, Compute::bf16)));
  EXPECT_EQ(train::linear(x, w, {}, Compute::f32).scalar_type(), torch::kFloat);
  at::autocast::set_cpu_enabled(false);
  at::autocast::clear_cache();
  EXPECT_TRUE(train::linear(x, w).equal(train::linear(x, w, {}, Compute::f32)));
}

TEST_F(TrainOps, LinearAsksTheBehaviour) {
  struct Thrice : LinearBehaviour {
    Tensor forward(const Tensor& input, const Tensor&) override { return input * 3; }
  };
  torch::nn::Linear layer(torch::nn::LinearOptions(4, 4).bias(false));
  attach(*layer, std::make_shared<Thrice>(), layer->weight);
  const Tensor x = torch::randn({2, 4});
  for (const Compute compute : {Compute::f32, Compute::bf16})
    EXPECT_TRUE(train::linear(x, layer->weight, {}, compute).equal(x * 3));
}

/// The largest errors of the loss in bfloat16, and of both gradients. A logit errs by d: its operands, each rounded
/// once unless bfloat16 holds them already, and sums. The loss is the difference of a logit and of a mean of logits: 2
/// d. A probability p is a quotient of what errs by e^d; a gradient is a sum over p, less 1 at the target, times the
/// other operand: three roundings (the exponential, the operand, and that times a row's factor), a fourth where a row's
/// reference moves.
Tensors loss_errors(const Tensor& hidden, const Tensor& head, const Tensor& targets, double cap, bool held) {
  const Tensor h = hidden.to(torch::kDouble), w = head.to(torch::kDouble);
  const int64_t words = w.size(0);
  const double d = torch::matmul(h.abs(), w.abs().t()).max().item<double>() * bf16_error(held ? 0 : 2, h.size(1));
  const Tensor counts = targets.ne(kIgnored);
  Tensor logits = torch::matmul(h, w.t());
  if (cap > 0) logits = torch::tanh(logits / cap) * cap;
  Tensor slopes = torch::softmax(logits, -1) + torch::one_hot(targets.clamp_min(0), words).to(torch::kDouble);
  slopes = slopes * counts.unsqueeze(1) / counts.sum().clamp_min(1);
  const double part = (1 + bf16_error(4, words + h.size(0))) * std::exp(2 * d) - 1;
  const Tensor loss = torch::tensor(2 * d + 1e-6 * std::log(static_cast<double>(words) + 2));  // exponentials, rounding
  constexpr double kDenormal = 1e-35;  // what the processor may take for 0, some of it
  return {loss, torch::matmul(slopes, w.abs()) * part + kDenormal,
          torch::matmul(slopes.t(), h.abs()) * part + kDenormal};
}

void check_loss(const Tensor& hidden, const Tensor& head, const Tensor& targets, double cap, double tolerance) {
  const auto ours = [&](Compute compute) {
    return [&, compute](const Tensors& in) { return linear_cross_entropy(in[0], in[1], targets, cap, compute); };
  };
  const Operation plain = [&](const Tensors& in) { return plain_loss(in[0], in[1], targets, cap); };
  expect_close(ours(Compute::f32), plain, {hidden, head}, tolerance);
  const auto held = [](const Tensor& x) { return x.to(torch::kBFloat16).to(torch::kFloat); };
  const Tensor held_hidden = held(hidden), held_head = held(head);
  const auto check_bf16 = [&](const Tensor& h, const Tensor& w, bool exact_operands) {
    const Tensors found = results(ours(Compute::bf16), {h, w}, torch::kFloat),
                  exact = results(plain, {h, w}, torch::kDouble),
                  errors = loss_errors(h, w, targets, cap, exact_operands);
    for (size_t i = 0; i < found.size(); ++i)
      expect_within(found[i], exact[i], errors[i], fmt::format("{} ({})", i, exact_operands ? "held" : "rounded"));
  };
  check_bf16(held_hidden, held_head, true);
  if (cap == 0) check_bf16(hidden, head, false);  // a cap's slope errs too
}

TEST_F(TrainOps, CrossEntropy) {
  struct Case {
    int64_t rows, inputs, words;
    double size, cap;
  };
  for (const Case& c : std::vector<Case>{{1, 1, 1, 1, 0},
                                         {5, 7, 11, 1, 0},
                                         {9, 16, 1500, 0.3, 0},  // several parts of the words
                                         {600, 6, 40, 1, 0},     // several parts of the rows
                                         {12, 8, 33, 1, 3},
                                         {7, 8, 1100, 1, 3},
                                         {12, 8, 33, 64, 0}}) {  // logits in the hundreds
    SCOPED_TRACE(testing::Message() << c.rows << " rows, " << c.words << " words");
    Tensor targets = torch::randint(c.words, {c.rows}, torch::kLong);
    if (c.rows > 2) targets[1] = kIgnored;
    check_loss(torch::randn({c.rows, c.inputs}) * c.size, torch::randn({c.words, c.inputs}), targets, c.cap,
               sums_of(c.words) * (1 + c.size));
  }
}

/// Of each row the first part of the words is what exponentials are taken relative to, unless others are far above.
TEST_F(TrainOps, CrossEntropyOfLogitsThatGrow) {
  const Tensor hidden = torch::tensor({{1.0f}, {4.0f}, {-1.0f}}), targets = torch::tensor({1499, 600, 3}, torch::kLong);
  const Tensor steps = torch::cat({torch::zeros({512}), torch::full({512}, 29), torch::full({476}, 31)});
  check_loss(hidden, steps.unsqueeze(1), targets, 0, sums_of(1500) * 32);
}

TEST_F(TrainOps, CrossEntropyAtItsEnds) {
  const Tensor hidden = torch::randn({3, 4}).requires_grad_(), head = torch::randn({5, 4}).requires_grad_();
  const Tensor none = torch::full({3}, kIgnored, torch::kLong);
  const Tensor loss = linear_cross_entropy(hidden, head, none);
  EXPECT_EQ(loss.item<float>(), 0);
  loss.backward();
  EXPECT_EQ(hidden.grad().abs().sum().item<float>(), 0);
  EXPECT_EQ(head.grad().abs().sum().item<float>(), 0);
  EXPECT_THROW(loss.backward(), c10::Error);
  {
    const torch::NoGradGuard no_gradients;
    EXPECT_FALSE(linear_cross_entropy(hidden, head, none).requires_grad());
  }
  EXPECT_THROW(linear_cross_entropy(hidden, head, torch::full({3}, 5, torch::kLong)), c10::Error);
  EXPECT_THROW(linear_cross_entropy(hidden, head, torch::zeros({2}, torch::kLong)), c10::Error);
  // A word whose probability is 0 in float32: the loss is the distance of its logit.
  const Tensor far =
      linear_cross_entropy(torch::tensor({{1e6f}}), torch::tensor({{1.0f}, {0.0f}}), torch::ones(1, torch::kLong));
  EXPECT_EQ(far.item<float>(), 1e6f);
  const Tensor bad = torch::full({3, 4}, std::numeric_limits<float>::quiet_NaN());
  EXPECT_TRUE(std::isnan(linear_cross_entropy(bad, head.detach(), torch::zeros(3, torch::kLong)).item<float>()));
}

/// A gradient that comes in counts as a factor.
TEST_F(TrainOps, CrossEntropyCountsAsAPart) {
  const Tensor hidden = torch::randn({3, 4}).requires_grad_(), head = torch::randn({5, 4});
  const Tensor targets = torch::zeros(3, torch::kLong);
  linear_cross_entropy(hidden, head, targets).backward();
  const Tensor once = hidden.grad().clone();
  (linear_cross_entropy(hidden, head, targets) * 3).backward();
  EXPECT_TRUE(torch::allclose(hidden.grad(), once * 4));
}

TEST_F(TrainOps, SlopesAreDifferences) {
  const Tensor q = torch::randn({1, 20, 2, 6}), k = torch::randn({1, 20, 1, 6}), weight = torch::randn({12});
  const auto network = [&](const Tensor& x) {  // each operation once
    const Tensor cosine = torch::full({20, 3}, 0.6f), sine = torch::full({20, 3}, 0.8f);
    const Tensor a = attention(rotary(x, cosine, sine), k, k, {.scale = 0.4f}).reshape({1, 20, 12});
    const Tensor n = layer_norm(train::rms_norm(a, weight, 1e-5, 1), weight, weight, 1e-5);
    return linear_cross_entropy(gated(Activation::silu, n, a), weight.outer(weight), torch::zeros({20}, torch::kLong));
  };
  const Tensor leaf = q.clone().requires_grad_();
  network(leaf).backward();
  const Tensor direction = leaf.grad() / leaf.grad().norm();
  constexpr double kStep = 0.02;
  const double difference =
      (network(q + direction * kStep) - network(q - direction * kStep)).item<double>() / (2 * kStep);
  EXPECT_NEAR(difference, leaf.grad().norm().item<double>(), 0.02 * difference);
}

/// One layer of a Llama with its head: in float32 the loss and every gradient are those of libtorch's operations.
TEST_F(TrainOps, AStepInFloatIsThePlainOne) {
  constexpr int64_t kBatch = 2, kTokens = 50, kHeads = 4, kKvHeads = 2, kSize = 12, kWidth = kHeads * kSize,
                    kWords = 90;
  const Tensor angle = torch::arange(kTokens).unsqueeze(1) * torch::tensor({1.0f, 0.3f, 0.1f, 0.03f, 0.01f, 0.003f});
  const Tensor targets = torch::randint(kWords, {kBatch, kTokens}, torch::kLong);
  const AttentionRule rule = {.scale = 0.29f};
  const auto heads = [&](const Tensor& x, int64_t count) { return x.reshape({kBatch, kTokens, count, kSize}); };
  const auto step = [&](const Tensors& w, auto norm, auto rope, auto attend, auto product, auto gate, auto loss) {
    const Tensor cosine = angle.cos().to(w[0].scalar_type()), sine = angle.sin().to(w[0].scalar_type());
    const Tensor x = w[0], y = norm(x, w[1]);
    const Tensor q = rope(heads(product(y, w[2]), kHeads), cosine, sine);
    const Tensor k = rope(heads(product(y, w[3]), kKvHeads), cosine, sine);
    const Tensor mixed = attend(q, k, heads(product(y, w[4]), kKvHeads)).reshape({kBatch, kTokens, kWidth});
    const Tensor after = x + product(mixed, w[5]), z = norm(after, w[1]);
    return loss(after + product(gate(product(z, w[6]), product(z, w[7])), w[8]), w[9]);
  };
  const Operation ours = [&](const Tensors& w) {
    return step(
        w, [](const Tensor& x, const Tensor& weight) { return train::rms_norm(x, weight, 1e-5); },
        [](const Tensor& x, const Tensor& c, const Tensor& s) { return rotary(x, c, s); },
        [&](const Tensor& q, const Tensor& k, const Tensor& v) { return attention(q, k, v, rule); },
        [](const Tensor& x, const Tensor& weight) { return train::linear(x, weight); },
        [](const Tensor& gate, const Tensor& up) { return gated(Activation::silu, gate, up); },
        [&](const Tensor& hidden, const Tensor& head) { return linear_cross_entropy(hidden, head, targets); });
  };
  const Operation plain = [&](const Tensors& w) {
    return step(
        w, [](const Tensor& x, const Tensor& weight) { return plain_rms_norm(x, weight, 1e-5, 0); }, plain_rotary,
        [&](const Tensor& q, const Tensor& k, const Tensor& v) { return plain_attention(q, k, v, rule); },
        [](const Tensor& x, const Tensor& weight) { return torch::linear(x, weight); },
        [](const Tensor& gate, const Tensor& up) { return plain_gated(Activation::silu, gate, up); },
        [&](const Tensor& hidden, const Tensor& head) { return plain_loss(hidden, head, targets, 0); });
  };
  const auto random = [](int64_t out, int64_t in) { return torch::randn({out, in}) * 0.2; };
  expect_close(ours, plain,
               {torch::randn({kBatch, kTokens, kWidth}), torch::rand({kWidth}) + 0.5, random(kWidth, kWidth),
                random(kWidth / 2, kWidth), random(kWidth / 2, kWidth), random(kWidth, kWidth), random(128, kWidth),
                random(128, kWidth), random(kWidth, 128), random(kWords, kWidth)},
               1e-5);
}

TEST_F(TrainOps, SameBitsOnEveryNumberOfThreads) {
  const Tensor q = torch::randn({2, 60, 4, 12}), weight = torch::randn({48}),
               targets = torch::randint(90, {120}, torch::kLong);
  const Operation network = [&](const Tensors& in) {
    const Tensor a = attention(in[0], in[0], in[0], {.scale = 0.3f}).reshape({120, 48});
    return linear_cross_entropy(gated(Activation::gelu, train::rms_norm(a, in[1], 1e-5), a), in[2], targets, 0,
                                Compute::bf16);
  };
  const int threads = at::get_num_threads();
  Tensors first;
  for (const int count : {1, 2, 3}) {
    at::set_num_threads(count);
    const Tensors found =
        results(network, {q, weight, torch::randn({90, 48}, torch::kFloat).fill_(0.1)}, torch::kFloat);
    if (first.empty()) first = found;
    for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(found[i].equal(first[i])) << i << ", threads: " << count;
  }
  at::set_num_threads(threads);
}

TEST_F(TrainOps, ProductsAddAndHaveStrides) {
  const Tensor a = torch::randn({5, 9}), b = torch::randn({9, 4}), bias = torch::randn({4});
  const Matrix left = Matrix::of(a.data_ptr<float>(), 5, 9), right = Matrix::of(b.data_ptr<float>(), 9, 4);
  const Tensor y = torch::ones({5, 6}), both = torch::empty({5, 4}), turned = torch::empty({4, 5});
  multiply(left, right, y.data_ptr<float>(), 6, true);
  EXPECT_TRUE(torch::allclose(y.narrow(1, 0, 4), torch::matmul(a, b) + 1, 1e-5, 1e-5));
  EXPECT_EQ(y.narrow(1, 4, 2).sum().item<float>(), 10);
  multiply(left, right, both.data_ptr<float>(), 4, false, bias.data_ptr<float>());
  EXPECT_TRUE(torch::allclose(both, torch::matmul(a, b) + bias, 1e-5, 1e-5));
  multiply(right.transposed(), left.transposed(), turned.data_ptr<float>(), 5);
  EXPECT_TRUE(torch::allclose(turned, torch::matmul(a, b).t(), 1e-5, 1e-5));
}

}  // namespace
}  // namespace bitwright::train
