// What fine-tuning a quantized model gains of what fine-tuning it in floats does: the bundled model learns another
// text, with the same windows, steps and learning rates. Prints a row of the table for every way and seed.
// finetune_bench MODEL TEXT [STEPS [BATCH [RATE [SEEDS [WAYS]]]]]; WAYS: numbers of rows of kWays, "0125".
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "benchmarks/measure.hpp"
#include "bitwright/torch/finetuning.hpp"
#include "tokenizer/tokenizer.hpp"
#include "train/adamw.hpp"
#include "train/causal_lm.hpp"

namespace bitwright::train {
namespace {

constexpr int64_t kLength = 256, kValidationWindows = 64;

struct Way {
  const char* name;
  bool quantized = true;
  QuantizedFinetuningConfig config{};
};
const std::vector<Way> kWays = {
    {.name = "floats", .quantized = false},
    {.name = "int8 channel, stochastic"},
    {.name = "int8 channel, errors kept", .config = {.requantization = Requantization::error_compensated}},
    {.name = "int8 group 64, stochastic", .config = {.granularity = "group"}},
    {.name = "int8 channel, stochastic, in backward", .config = {.update_in_backward = true}},
    {.name = "int4 group 32, errors kept",
     .config =
         {.bits = 4, .granularity = "group", .group_size = 32, .requantization = Requantization::error_compensated}},
    {.name = "int4 group 32, stochastic", .config = {.bits = 4, .granularity = "group", .group_size = 32}},
};

struct Text {
  torch::Tensor training, validation;  ///< int64
};

Text read_text(const std::string& model, const std::string& path) {
  std::ifstream file(path);
  std::stringstream all;
  all << file.rdbuf();
  const std::vector<int32_t> ids = Tokenizer(model).encode(all.str());
  const torch::Tensor tokens = torch::tensor(ids, torch::kInt64);
  const int64_t cut = tokens.numel() * 9 / 10;
  return {.training = tokens.narrow(0, 0, cut), .validation = tokens.narrow(0, cut, tokens.numel() - cut)};
}

double validate(CausalLm& model, const torch::Tensor& tokens) {
  const torch::NoGradGuard no_gradients;
  const int64_t windows = std::min(kValidationWindows, (tokens.numel() - 1) / kLength),
                stride = tokens.numel() / windows;
  double sum = 0;
  for (int64_t w = 0; w < windows; ++w) {
    const int64_t begin = std::min(w * stride, tokens.numel() - kLength - 1);
    sum += model.loss(tokens.narrow(0, begin, kLength).unsqueeze(0), tokens.narrow(0, begin + 1, kLength).unsqueeze(0))
               .item<double>();
  }
  return sum / static_cast<double>(windows);
}

torch::Tensor batch(const torch::Tensor& tokens, int64_t count, std::mt19937_64& random) {
  std::vector<torch::Tensor> windows;
  for (int64_t i = 0; i < count; ++i) {
    const auto begin = static_cast<int64_t>(random() % static_cast<uint64_t>(tokens.numel() - kLength));
    windows.push_back(tokens.narrow(0, begin, kLength + 1));
  }
  return torch::stack(windows);
}

/// Warm-up over a twentieth of the steps, then a cosine down to a tenth.
double rate_at(double rate, int step, int steps) {
  const double warm_up = std::max(1, steps / 20);
  if (step < warm_up) return rate * (step + 1) / warm_up;
  return rate * (0.1 + 0.45 * (1 + std::cos(M_PI * (step - warm_up) / (steps - warm_up))));
}

struct Result {
  double before, after;
};

Result run(const Checkpoint& checkpoint, const Text& text, const Way& way, int steps, int64_t batch_size, double rate,
           uint64_t seed) {
  const auto owned = std::make_shared<CausalLm>(checkpoint, CausalLmOptions{.compute = torch::kBFloat16});
  CausalLm& model = *owned;
  std::shared_ptr<QuantizedFinetuning> tuning;
  if (way.quantized) {
    QuantizedFinetuningConfig config = way.config;
    config.seed = seed;
    tuning = enable_quantized_finetuning(model, config);
  }
  std::vector<torch::Tensor> floats;
  for (const torch::Tensor& parameter : model.parameters())
    if (parameter.requires_grad()) floats.push_back(parameter);
  AdamW adamw;
  adamw.add_group(floats, {.weight_decay = 0});
  Result result = {.before = validate(model, text.validation), .after = 0};
  std::mt19937_64 random(seed);
  const double from = processor_seconds();
  for (int step = 0; step < steps; ++step) {
    adamw.groups()[0].options.lr = rate_at(rate, step, steps);
    if (tuning) tuning->set_learning_rate(rate_at(rate, step, steps));
    const torch::Tensor tokens = batch(text.training, batch_size, random);
    model.loss(tokens.narrow(1, 0, kLength), tokens.narrow(1, 1, kLength)).backward();
    adamw.step();
    adamw.zero_grad();
    if (tuning) tuning->step();
  }
  const double seconds = (processor_seconds() - from) / steps;
  result.after = validate(model, text.validation);
  fmt::print("| {} | {} | {:.4f} | {:.4f} | {:.4f} |", way.name, seed, result.before, result.after,
             result.before - result.after);
  if (tuning) {
    const auto sizes = tuning->sizes();
    const double size = 4 * static_cast<double>(sizes.elements);
    fmt::print(" {:.4f} | {:.4f} |", static_cast<double>(sizes.quantized_bytes) / size,
               static_cast<double>(sizes.optimizer_bytes + sizes.residual_bytes) / size);
  } else {
    fmt::print(" 1 | 2 |");
  }
  fmt::print(" {:.2f} |", seconds);
  return result;
}

}  // namespace
}  // namespace bitwright::train

int main(int argc, char** argv) {
  using namespace bitwright::train;
  if (argc < 3) return 1;
  at::set_num_threads(1);
  const auto argument = [&](int at, double otherwise) { return argc > at ? std::atof(argv[at]) : otherwise; };
  const auto steps = static_cast<int>(argument(3, 200)), batch = static_cast<int>(argument(4, 8));
  const double rate = argument(5, 5e-4);
  const auto seeds = static_cast<uint64_t>(argument(6, 3));
  const std::string ways = argc > 7 ? argv[7] : "0123";
  const bitwright::Checkpoint checkpoint(argv[1]);
  const Text text = read_text(argv[1], argv[2]);
  fmt::print("{} tokens to train on, {} to validate with; {} steps of {} windows of {}, rate {}\n\n",
             text.training.numel(), text.validation.numel(), steps, batch, kLength, rate);
  fmt::print("| | seed | before | after | gain | size | learning state | processor s a step | of the floats' gain |\n");
  fmt::print("|---|---|---|---|---|---|---|---|---|\n");
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
    double gain = 0;
    for (const char way : ways) {
      const Result r = run(checkpoint, text, kWays.at(static_cast<size_t>(way - '0')), steps, batch, rate, seed);
      if (way == '0') gain = r.before - r.after;
      fmt::print(" {} |\n", gain == 0 ? "" : fmt::format("{:.1f} %", 100 * (r.before - r.after) / gain));
      std::fflush(stdout);
    }
  }
}
