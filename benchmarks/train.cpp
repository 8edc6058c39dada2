// Steps of training a Llama of 15.19 M parameters from random weights: tokens a second and processor seconds a step.
// train_bench f32|bf16|qat-f32|qat-bf16 [STEPS [THREADS]]; peer_train.py compares it with PyTorch.
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <chrono>
#include <nlohmann/json.hpp>

#include "base/threads.hpp"
#include "benchmarks/measure.hpp"
#include "bitwright/torch/qat.hpp"
#include "train/adamw.hpp"
#include "train/causal_lm.hpp"
#include "train/ops.hpp"

namespace bitwright::train {
namespace {

constexpr int64_t kBatch = 8, kLength = 256, kWords = 32000;

Json shape() {
  return {{"model_type", "llama"},    {"hidden_size", 288},          {"num_hidden_layers", 6},
          {"num_attention_heads", 6}, {"num_key_value_heads", 6},    {"intermediate_size", 768},
          {"vocab_size", kWords},     {"tie_word_embeddings", true}, {"max_position_embeddings", kLength},
          {"rms_norm_eps", 1e-5},     {"rope_theta", 10000.0},       {"hidden_act", "silu"}};
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// The best of the steps so far.
struct Times {
  double step = 1e9, processor = 1e9, forward = 0, backward = 0, update = 0;
  double loss = 0;  ///< of the last
};

class Learner {
 public:
  explicit Learner(bool bf16) : model(shape(), {.compute = bf16 ? torch::kBFloat16 : torch::kFloat32}) {}

  void step(const torch::Tensor& tokens, bool counts) {
    if (adamw_.parameters().empty()) adamw_.add_group(model.parameters(), {});
    const double from = now(), processor = processor_seconds();
    const torch::Tensor loss = model.loss(tokens.narrow(1, 0, kLength), tokens.narrow(1, 1, kLength));
    const double at_backward = now();
    loss.backward();
    const double at_update = now();
    adamw_.step();
    adamw_.zero_grad();
    times.loss = loss.item<double>();
    const double end = now();
    if (!counts) return;
    times.processor = std::min(times.processor, processor_seconds() - processor);
    if (end - from >= times.step) return;
    times.step = end - from;
    times.forward = at_backward - from;
    times.backward = at_update - at_backward;
    times.update = end - at_update;
  }

  CausalLm model;
  Times times{};

 private:
  AdamW adamw_{};
};

torch::Tensor random_tokens() { return torch::randint(kWords, {kBatch, kLength + 1}, torch::kLong); }

std::string describe(const Times& t) {
  return fmt::format(
      "{:.0f} tokens/s, step {:.3f} s (forward {:.3f}, backward {:.3f}, AdamW {:.3f}), processor {:.3f} s, loss {:.4f}",
      kBatch * kLength / t.step, t.step, t.forward, t.backward, t.update, t.processor, t.loss);
}

void run(const std::string& mode, int steps) {
  Learner learner(mode == "bf16");
  for (int step = 0; step <= steps; ++step) learner.step(random_tokens(), step > 0);  // the first warms up
  int64_t parameters = 0;
  for (const torch::Tensor& p : learner.model.parameters()) parameters += p.numel();
  fmt::print("{} parameters, {}, {} threads: {}\n", parameters, mode, at::get_num_threads(), describe(learner.times));
}

/// What fake quantization adds to a step: floats, weights of 4 bits a channel, and int8 inputs besides, in turn.
void compare(const std::string& mode, int steps) {
  const bool bf16 = mode == "qat-bf16";
  QatConfig config;
  config.quantization = {{"scheme", {{"bits", 4}, {"symmetric", true}, {"granularity", "channel"}}}};
  Learner floats(bf16), weights(bf16), inputs(bf16);
  prepare_model_for_qat(weights.model, config);
  config.activations = "dynamic";
  prepare_model_for_qat(inputs.model, config);
  const std::pair<const char*, Learner*> learners[] = {
      {"floats", &floats}, {"int4 weights", &weights}, {"int4 weights, int8 inputs", &inputs}};
  for (int step = 0; step <= steps; ++step) {
    const torch::Tensor tokens = random_tokens();
    for (const auto& [name, learner] : learners) learner->step(tokens, step > 0);
  }
  for (const auto& [name, learner] : learners)
    fmt::print("{}, {} threads, {}: {}; {:.2f} x the floats' step, {:.2f} x its processor time\n", mode,
               at::get_num_threads(), name, describe(learner->times), learner->times.step / floats.times.step,
               learner->times.processor / floats.times.processor);
}

}  // namespace
}  // namespace bitwright::train

int main(int argc, char** argv) {
  using namespace bitwright;
  const std::string mode = argc > 1 ? argv[1] : "bf16";
  const int steps = argc > 2 ? std::atoi(argv[2]) : 5;
  if (argc > 3) set_thread_count(static_cast<size_t>(std::atoi(argv[3])));
  at::set_num_threads(static_cast<int>(thread_count()));  // as `bitwright train` does
  train::keep_pages();
  torch::manual_seed(1);
  if (mode.starts_with("qat-"))
    train::compare(mode, steps);
  else
    train::run(mode, steps);
}
