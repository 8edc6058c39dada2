#include "train/quantized_finetuning.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright::train {
namespace {

struct NetImpl : torch::nn::Module {
  explicit NetImpl(uint64_t seed = 1) {
    torch::manual_seed(seed);
    embedding = register_module("embedding", torch::nn::Embedding(8, 64));
    up = register_module("up", torch::nn::Linear(64, 96));
    down = register_module("down", torch::nn::Linear(torch::nn::LinearOptions(96, 64).bias(false)));
    head = register_module("head", torch::nn::Linear(torch::nn::LinearOptions(64, 8).bias(false)));
    detach(*head, embedding->weight);
  }
  torch::Tensor forward(const torch::Tensor& x) { return down(torch::relu(up(x))); }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear up{nullptr}, down{nullptr}, head{nullptr};
};
TORCH_MODULE(Net);

using Config = QuantizedFinetuningConfig;
constexpr Requantization kBoth[] = {Requantization::stochastic, Requantization::error_compensated};

/// What the float teacher gives for random inputs: its weights are `move` away from those of Net(1).
struct Task {
  torch::Tensor x, y;
  explicit Task(double move) {
    Net teacher(1);
    const torch::NoGradGuard no_gradients;
    torch::manual_seed(2);
    for (auto* linear : {&teacher->up, &teacher->down})
      (*linear)->weight.add_(torch::randn((*linear)->weight.sizes()), move);
    x = torch::randn({256, 64});
    y = teacher->forward(x);
  }
  torch::Tensor loss(Net& net) const { return (net->forward(x) - y).square().mean(); }
};

void learn(Net& net, QuantizedFinetuning& tuning, const Task& task, int steps, double rate = 1e-3) {
  for (int i = 0; i < steps; ++i) {
    tuning.set_learning_rate(rate);
    task.loss(net).backward();
    tuning.step();
  }
}

void expect_equal(const std::map<std::string, torch::Tensor>& a, const std::map<std::string, torch::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, tensor] : a) EXPECT_TRUE(tensor.equal(b.at(name))) << name;
}

std::string code_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.code();
  }
  return "no error";
}

TEST(LearningLinear, HasTheGradientsOfItsDecodedWeight) {
  Net net(1);
  const auto tuning = enable_quantized_finetuning(*net, {.gradient_type = torch::kFloat32});
  const auto up = behaviour_as<LearningLinear>(*net->up);
  ASSERT_NE(up, nullptr);
  const torch::Tensor x = torch::randn({3, 5, 64}, torch::requires_grad()), dy = torch::randn({3, 5, 96});
  net->up(x).mul_(1).backward(dy);  // in place, as ReLUs are
  const torch::Tensor got_x = x.grad().clone(), got_w = up->gradient().clone(), got_b = net->up->bias.grad().clone();
  x.mutable_grad() = torch::Tensor();
  net->up->bias.mutable_grad() = torch::Tensor();
  const torch::Tensor w = up->decoded().requires_grad_();
  torch::linear(x, w, net->up->bias).backward(dy);
  EXPECT_TRUE(torch::allclose(got_x, x.grad(), 1e-4, 1e-5));
  EXPECT_TRUE(torch::allclose(got_w, w.grad(), 1e-4, 1e-5));
  EXPECT_TRUE(torch::allclose(got_b, net->up->bias.grad(), 1e-4, 1e-5));
}

TEST(LearningLinear, LearnsWhereItsInputDoesNot) {
  Net net(1);
  const auto tuning = enable_quantized_finetuning(*net);
  net->up(torch::randn({5, 64})).sum().backward();
  net->up(torch::randn({5, 64})).sum().backward();
  ASSERT_EQ(tuning->gradients().size(), 1u);
  EXPECT_EQ(tuning->gradients()[0].scalar_type(), torch::kBFloat16);
  EXPECT_EQ(tuning->sizes().gradient_bytes, 96 * 64 * 2);
  tuning->step();
  EXPECT_EQ(tuning->gradients().size(), 0u);
  const torch::NoGradGuard no_gradients;
  net->up(torch::randn({5, 64}));
  EXPECT_EQ(tuning->gradients().size(), 0u);
}

// SPECIFICATION C3, one scenario a test.

TEST(SpecificationC, C3_WeightsAreQuantizedAfterEveryStep) {
  const Task task(0.03);
  for (const Requantization rounding : kBoth) {
    Net net(1);
    const auto tuning = enable_quantized_finetuning(*net, {.requantization = rounding});
    const auto up = behaviour_as<LearningLinear>(*net->up);
    for (int step = 0; step < 5; ++step) {
      const QuantizedTensor before = up->weight()->unpacked();
      learn(net, *tuning, task, 1);
      const QuantizedTensor weight = up->weight()->unpacked();
      EXPECT_NO_THROW(check_sizes(weight, "up"));
      EXPECT_TRUE(weight.scheme == before.scheme);
      EXPECT_NE(weight.codes, before.codes);
      // The parameter is the codes, and what is computed is what they decode to.
      EXPECT_EQ(parameter_of(*net->up).scalar_type(), torch::kUInt8);
      EXPECT_EQ(std::memcmp(parameter_of(*net->up).data_ptr(), weight.codes.data(), weight.codes.size()), 0);
      const torch::NoGradGuard no_gradients;
      EXPECT_TRUE(torch::allclose(net->up(task.x), torch::linear(task.x, up->decoded(), net->up->bias), 1e-4, 1e-5));
    }
  }
}

TEST(SpecificationC, C3_GradientsAreOfHigherPrecisionAndLearningGoesAsFarAsInFloats) {
  const Task task(0.03);
  Net floats(1);
  const double before = task.loss(floats).item<double>();
  AdamW adamw;
  adamw.add_group({floats->up->weight, floats->down->weight}, {.lr = 1e-3, .weight_decay = 0});
  for (int i = 0; i < 60; ++i) {
    task.loss(floats).backward();
    adamw.step();
    adamw.zero_grad();
  }
  const double gain = before - task.loss(floats).item<double>();
  ASSERT_GT(gain, 0.5 * before);
  for (const int bits : {8, 4})
    for (const Requantization rounding : kBoth) {
      Net net(1);
      const auto tuning = enable_quantized_finetuning(
          *net,
          {.bits = bits, .granularity = bits == 4 ? "group" : "channel", .group_size = 32, .requantization = rounding});
      const double start = task.loss(net).item<double>();
      learn(net, *tuning, task, 60);
      const double own = start - task.loss(net).item<double>();
      EXPECT_GT(own, (bits == 8 ? 0.95 : 0.5) * gain) << bits;
    }
}

/// Steps of which rounding to nearest would lose every one: a hundredth of a code.
TEST(SpecificationC, C3_SmallUpdatesAreNotLost) {
  const Task task(0.03);
  for (const Requantization rounding : kBoth) {
    Net net(1);
    const auto tuning = enable_quantized_finetuning(*net, {.requantization = rounding});
    const float step = decode(*behaviour_as<LearningLinear>(*net->up)->weight()->unpacked().scale).at(0);
    const double before = task.loss(net).item<double>();
    learn(net, *tuning, task, 150, static_cast<double>(step) / 100);
    EXPECT_LT(task.loss(net).item<double>(), 0.97 * before);
  }
}

TEST(SpecificationC, C3_ParametersAreUpdated) {
  const Task task(0.3);
  Net net(1);
  const auto tuning = enable_quantized_finetuning(*net);
  const auto before = tuning->state();
  learn(net, *tuning, task, 20, 1e-2);
  const auto after = tuning->state();
  for (const char* name : {"up.codes", "up.scales", "down.codes", "down.scales"})
    EXPECT_FALSE(before.at(name).equal(after.at(name))) << name;
}

TEST(SpecificationC, C3_SizeStaysReduced) {
  const Task task(0.03);
  struct Case {
    int bits;
    const char* granularity;
    double most;  ///< of the floats' size
  };
  for (const Case& c : {Case{8, "tensor", 0.251}, Case{8, "channel", 0.27}, Case{8, "group", 0.27},
                        Case{4, "group", 0.145}, Case{4, "channel", 0.14}}) {
    Net net(1);
    const auto tuning = enable_quantized_finetuning(*net, {.bits = c.bits, .granularity = c.granularity});
    learn(net, *tuning, task, 3);
    const auto sizes = tuning->sizes();
    EXPECT_EQ(sizes.elements, 2 * 64 * 96);
    EXPECT_LE(static_cast<double>(sizes.quantized_bytes), c.most * 4 * static_cast<double>(sizes.elements))
        << c.bits << ' ' << c.granularity;
    EXPECT_EQ(sizes.gradient_bytes, 0);
    EXPECT_EQ(sizes.residual_bytes, 0);
    EXPECT_LE(static_cast<double>(sizes.optimizer_bytes), 2.04 * static_cast<double>(sizes.elements));
    size_t parameters = 0;  // codes, a bias in floats, and the embedding, twice because it is the head's too
    for (const auto& parameter : net->parameters()) parameters += parameter.nbytes();
    EXPECT_LE(parameters, static_cast<size_t>(sizes.quantized_bytes) + (2 * 8 * 64 + 96) * 4);
  }
}

TEST(SpecificationC, C3_SavesAndResumesBitForBit) {
  const Task task(0.03);
  for (const Requantization rounding : kBoth)
    for (const bool eight_bit : {true, false}) {
      const Config config = {
          .requantization = rounding, .weight_decay = 0.1, .eight_bit_optimizer = eight_bit, .seed = 5};
      Net net(1), resumed(77);
      const auto tuning = enable_quantized_finetuning(*net, config);
      learn(net, *tuning, task, 4);
      const auto saved = tuning->state();
      learn(net, *tuning, task, 4);
      const auto other = enable_quantized_finetuning(*resumed, config);
      {
        const torch::NoGradGuard no_gradients;
        resumed->up->bias.copy_(net->up->bias);
      }
      other->load_state(saved);
      expect_equal(other->state(), saved);
      learn(resumed, *other, task, 4);
      expect_equal(other->state(), tuning->state());
    }
}

// Beside the specification.

TEST(QuantizedFinetuning, UpdatesInBackwardAreTheSame) {
  const Task task(0.03);
  Net one(1), two(1);
  const auto in_step = enable_quantized_finetuning(*one, {.gradient_type = torch::kFloat32});
  const auto in_backward =
      enable_quantized_finetuning(*two, {.update_in_backward = true, .gradient_type = torch::kFloat32});
  for (int step = 0; step < 4; ++step) {
    task.loss(one).backward();
    in_step->step();
    task.loss(two).backward();
    EXPECT_EQ(in_backward->sizes().gradient_bytes, 0);
    in_backward->step();
  }
  expect_equal(in_backward->state(), in_step->state());
  // A layer that a graph uses twice learns once, from both.
  const auto twice = [&](Net& net) {
    (net->down(net->up(net->down(net->up(task.x)))) - task.y).square().mean().backward();
  };
  twice(one);
  in_step->step();
  twice(two);
  in_backward->step();
  expect_equal(in_backward->state(), in_step->state());
  // A graph that was never gone back through is forgotten.
  two->forward(task.x);
  learn(one, *in_step, task, 1, 1e-4);
  learn(two, *in_backward, task, 1, 1e-4);
  expect_equal(in_backward->state(), in_step->state());
  task.loss(two).backward();
  EXPECT_EQ(code_of([&] { task.loss(two).backward(); }), "bad-config");
}

TEST(QuantizedFinetuning, GradientsThatAreNoNumbersAreRefusedBeforeAnythingIsTouched) {
  const Task task(0.03);
  for (const bool in_backward : {false, true})
    for (const float bad : {std::nanf(""), INFINITY}) {
      Net net(1);
      const auto tuning = enable_quantized_finetuning(*net, {.update_in_backward = in_backward});
      learn(net, *tuning, task, 2);
      const auto before = tuning->state();
      EXPECT_EQ(code_of([&] {
                  (task.loss(net) * bad).backward();
                  tuning->step();
                }),
                "gradient-not-finite");
      expect_equal(tuning->state(), before);
      tuning->zero_grad();
      learn(net, *tuning, task, 1);
    }
}

TEST(QuantizedFinetuning, DependsOnTheSeedAndNotOnThreads) {
  const Task task(0.03);
  const size_t threads = thread_count();
  std::vector<std::map<std::string, torch::Tensor>> states;
  for (const auto& [count, seed] : {std::pair<size_t, uint64_t>{1, 3}, {3, 3}, {1, 4}}) {
    set_thread_count(count);
    Net net(1);
    const auto tuning = enable_quantized_finetuning(*net, {.granularity = "tensor", .seed = seed});
    learn(net, *tuning, task, 4);
    states.push_back(tuning->state());
  }
  set_thread_count(threads);
  expect_equal(states[0], states[1]);
  EXPECT_FALSE(states[0].at("up.codes").equal(states[2].at("up.codes")));
}

TEST(QuantizedFinetuning, WhatIsQuantizedKeepsItsCodes) {
  Net net(1);
  const Scheme int4 = {.element = &integer_element(4, true),
                       .scale = parameter(Grouping::along(32), plain(DType::f16))};
  const torch::Tensor floats = parameter_of(*net->up).detach().contiguous();
  const QuantizedTensor weight =
      encode(int4, {96, 64}, {DType::f32, {static_cast<const std::byte*>(floats.data_ptr()), floats.nbytes()}},
             RangeRule::minmax);
  attach_quantized(*net->up, std::make_shared<QuantizedLinearBehaviour>(weight));
  const auto tuning = enable_quantized_finetuning(*net);
  EXPECT_EQ(tuning->layers(), (std::vector<std::string>{"up", "down"}));  // the head shares the embedding's matrix
  EXPECT_EQ(behaviour_as<LearningLinear>(*net->up)->weight()->unpacked(), weight);
  EXPECT_EQ(behaviour_as<LearningLinear>(*net->down)->scheme().element->bits, 8);
}

TEST(QuantizedFinetuning, SaysWhatItCannotDo) {
  Net net(1);
  const auto code = [&](const Config& config) { return code_of([&] { enable_quantized_finetuning(*net, config); }); };
  EXPECT_EQ(code({.bits = 5}), "bad-config");
  EXPECT_EQ(code({.granularity = "row"}), "bad-config");
  EXPECT_EQ(code({.granularity = "group", .group_size = 0}), "bad-config");
  EXPECT_EQ(code({.beta2 = 1}), "bad-config");
  EXPECT_EQ(code({.gradient_type = torch::kHalf}), "bad-config");
  EXPECT_EQ(code({.skip_modules = {"up", "down", "head"}}), "nothing-to-quantize");
  const Scheme nf4 = {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))};
  const std::vector<float> zeros(96 * 64);
  attach_quantized(*net->up, std::make_shared<QuantizedLinearBehaviour>(encode(nf4, {96, 64}, zeros)));
  EXPECT_EQ(code({}), "not-trainable");
  EXPECT_EQ(behaviour_of(*net->down), nullptr);  // nothing is begun
  EXPECT_EQ(enable_quantized_finetuning(*net, {.skip_modules = {"up"}})->layers(), std::vector<std::string>{"down"});
}

TEST(QuantizedFinetuning, RefusesAnotherModelsState) {
  Net net(1);
  const auto tuning = enable_quantized_finetuning(*net);
  const auto before = tuning->state();
  auto state = before;
  state.erase("up.codes");
  EXPECT_EQ(code_of([&] { tuning->load_state(state); }), "incompatible-state");
  state = before;
  state["more"] = torch::zeros({1});
  EXPECT_EQ(code_of([&] { tuning->load_state(state); }), "incompatible-state");
  for (const Config& config :
       {Config{.bits = 4}, Config{.granularity = "tensor"}, Config{.symmetric = false},
        Config{.requantization = Requantization::error_compensated}, Config{.eight_bit_optimizer = false}}) {
    Net third(1);
    const auto theirs = enable_quantized_finetuning(*third, config)->state();
    EXPECT_EQ(code_of([&] { tuning->load_state(theirs); }), "incompatible-state");
  }
  expect_equal(tuning->state(), before);
}

TEST(AdamW8, FollowsAdamWInAQuarterOfItsMemory) {
  const Task task(0.03);
  Net one(1), two(1);
  AdamW floats;
  AdamW8 bytes;
  const AdamWOptions decayed = {.lr = 1e-3, .weight_decay = 0.1}, plain = {.lr = 1e-3, .weight_decay = 0};
  floats.add_group({one->up->weight, one->down->weight}, decayed);
  floats.add_group({one->up->bias}, plain);
  bytes.add_group({two->up->weight, two->down->weight}, decayed);
  bytes.add_group({two->up->bias}, plain);
  const double before = task.loss(one).item<double>();
  for (int i = 0; i < 60; ++i) {
    task.loss(one).backward();
    floats.step(0.5);
    floats.zero_grad();
    task.loss(two).backward();
    bytes.step(0.5);
    bytes.zero_grad();
  }
  const double gain = before - task.loss(one).item<double>(), gain8 = before - task.loss(two).item<double>();
  EXPECT_GT(gain, 0.5 * before);
  EXPECT_NEAR(gain8, gain, 0.02 * gain);
  EXPECT_FALSE(one->up->weight.equal(two->up->weight));
  const AdamW8::Parameter& up = bytes.parameters()[0];
  EXPECT_EQ(up.moments.bytes(), 2 * (64 * 96 + 64 * 96 / 256 * 4));
  EXPECT_EQ(bytes.parameters()[2].moments.bytes(), 2 * 96 * 4);  // a bias: floats
  EXPECT_EQ(up.step, 60);
}

}  // namespace
}  // namespace bitwright::train
