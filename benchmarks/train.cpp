// Steps of training a Llama of 15.19 M parameters from random weights: tokens a second and processor seconds a step.
// train_bench f32|bf16 [STEPS [THREADS]]; peer_train.py compares it with PyTorch.
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <chrono>
#include <nlohmann/json.hpp>

#include "benchmarks/measure.hpp"
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

void run(const std::string& mode, int steps) {
  keep_pages();
  torch::manual_seed(1);
  CausalLm model(shape(), {.compute = mode == "bf16" ? torch::kBFloat16 : torch::kFloat32});
  AdamW adamw;
  adamw.add_group(model.parameters(), {});
  int64_t parameters = 0;
  for (const torch::Tensor& p : model.parameters()) parameters += p.numel();
  double best = 1e9, best_processor = 1e9, loss_value = 0, forward = 0, backward = 0, update = 0;
  for (int step = 0; step <= steps; ++step) {  // the first warms up
    const torch::Tensor tokens = torch::randint(kWords, {kBatch, kLength + 1}, torch::kLong);
    const double from = now(), processor = processor_seconds();
    const torch::Tensor loss = model.loss(tokens.narrow(1, 0, kLength), tokens.narrow(1, 1, kLength));
    const double at_backward = now();
    loss.backward();
    const double at_update = now();
    adamw.step();
    adamw.zero_grad();
    loss_value = loss.item<double>();
    const double end = now();
    if (step == 0) continue;
    best_processor = std::min(best_processor, processor_seconds() - processor);
    if (end - from >= best) continue;
    best = end - from;
    forward = at_backward - from;
    backward = at_update - at_backward;
    update = end - at_update;
  }
  fmt::print(
      "{} parameters, {}, {} threads: {:.0f} tokens/s, step {:.3f} s (forward {:.3f}, backward {:.3f}, AdamW {:.3f}), "
      "processor {:.3f} s, loss {:.4f}\n",
      parameters, mode, at::get_num_threads(), kBatch * kLength / best, best, forward, backward, update, best_processor,
      loss_value);
}

}  // namespace
}  // namespace bitwright::train

int main(int argc, char** argv) {
  if (argc > 3) at::set_num_threads(std::atoi(argv[3]));
  bitwright::train::run(argc > 1 ? argv[1] : "bf16", argc > 2 ? std::atoi(argv[2]) : 5);
}
