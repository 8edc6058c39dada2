// What quantization-aware training wins back: validation loss of the bundled model in floats, rounded, and after QAT.
// train_qat_bench TRAINING_TEXT VALIDATION_TEXT [KEY=VALUE]… or train_qat_bench speed weights; lines of JSON.
#include <fmt/format.h>
#include <torch/torch.h>

#include <chrono>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <sstream>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "benchmarks/measure.hpp"
#include "bitwright/torch/qat.hpp"
#include "evaluate/evaluate.hpp"
#include "tokenizer/tokenizer.hpp"
#include "train/adamw.hpp"
#include "train/causal_lm.hpp"
#include "train/distillation.hpp"
#include "train/fake_quantize.hpp"

namespace bitwright {
namespace {

using train::CausalLm;

constexpr int64_t kLength = 256;
const char* const kModel = "examples/tinystories-4m";

std::map<std::string, std::string> options = {{"scheme", R"({"bits":4,"symmetric":true,"granularity":"channel"})"},
                                              {"steps", "100"},
                                              {"batch", "8"},
                                              {"lr", "5e-4"},
                                              {"seeds", "1"},
                                              {"first_seed", "0"},
                                              {"scales", "auto"},
                                              {"start", "search"},
                                              {"decay", "0.1"},
                                              {"scale_lr", "1"},
                                              {"distill", "0"},
                                              {"windows", "100"},
                                              {"dtype", "bfloat16"},
                                              {"threads", "1"}};
double number(const char* key) { return std::stod(options.at(key)); }

torch::Tensor windows_of(const Tokenizer& tokenizer, const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  const std::vector<int32_t> ids =
      token_stream(tokenizer, text.str(), {.bos = Protocol::Bos::document, .split = "<|endoftext|>"});
  return torch::tensor(ids, torch::kLong);
}

/// Window i of kLength inputs and their targets.
std::pair<torch::Tensor, torch::Tensor> batch_at(const torch::Tensor& tokens, const std::vector<int64_t>& starts) {
  std::vector<torch::Tensor> in, out;
  for (const int64_t at : starts) {
    in.push_back(tokens.slice(0, at, at + kLength));
    out.push_back(tokens.slice(0, at + 1, at + 1 + kLength));
  }
  return {torch::stack(in), torch::stack(out)};
}

double validation_loss(CausalLm& model, const torch::Tensor& tokens) {
  const torch::NoGradGuard no_gradient;
  const auto compute = std::exchange(model.options().compute, torch::kFloat);
  model.eval();
  const int64_t count = std::min<int64_t>((tokens.size(0) - 1) / kLength, static_cast<int64_t>(number("windows")));
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto [in, out] = batch_at(tokens, {i * kLength});
    sum += model.loss(in, out).item<double>();
  }
  model.train();
  model.options().compute = compute;
  return sum / static_cast<double>(count);
}

QatConfig config_of(const std::string& scales, const std::string& range) {
  QatConfig config;
  config.quantization = {{"scheme", OrderedJson::parse(options["scheme"])}, {"range", range}};
  config.scales = scales;
  config.initial_scales = options["start"];
  return config;
}

double rounded_loss(const Checkpoint& checkpoint, const torch::Tensor& tokens, const char* range) {
  CausalLm model(checkpoint);
  prepare_model_for_qat(model, config_of("computed", range));
  return validation_loss(model, tokens);
}

void learn(CausalLm& model, CausalLm& floats, const torch::Tensor& tokens, uint64_t seed) {
  torch::manual_seed(seed);
  train::AdamW optimizer;
  std::vector<torch::Tensor> matrices, others, scales;
  for (const auto& item : model.named_parameters()) {
    const bool is_scale = item.key().find("fake_quantize.") != std::string::npos;
    (is_scale ? scales : item.value().dim() >= 2 ? matrices : others).push_back(item.value());
  }
  const double lr = number("lr"), scale_lr = number("scale_lr");
  optimizer.add_group(matrices, {.lr = lr, .weight_decay = number("decay")});
  optimizer.add_group(others, {.lr = lr, .weight_decay = 0});
  optimizer.add_group(scales, {.lr = lr, .weight_decay = 0});
  const auto steps = static_cast<int64_t>(number("steps")), warmup = std::max<int64_t>(steps / 20, 1);
  std::vector<torch::Tensor> all = model.parameters();
  for (int64_t step = 0; step < steps; ++step) {
    const double along = static_cast<double>(step - warmup) / static_cast<double>(std::max<int64_t>(steps - warmup, 1));
    const double rate = step < warmup ? static_cast<double>(step + 1) / static_cast<double>(warmup)
                                      : 0.1 + 0.9 * (1 + std::cos(std::numbers::pi * along)) / 2;
    optimizer.groups()[0].options.lr = lr * rate;
    optimizer.groups()[1].options.lr = lr * rate;
    optimizer.groups()[2].options.lr = lr * rate * scale_lr;
    const auto count = static_cast<int64_t>(number("batch"));
    const torch::Tensor starts = torch::randint(tokens.size(0) - kLength - 1, {count}, torch::kLong);
    const auto [in, out] = batch_at(tokens, {starts.data_ptr<int64_t>(), starts.data_ptr<int64_t>() + count});
    optimizer.zero_grad();
    if (number("distill") != 0) {
      torch::Tensor target;
      {
        const torch::NoGradGuard no_gradient;
        target = floats.forward(in);
      }
      train::distillation_loss(model.forward(in), target).backward();
    } else {
      model.loss(in, out).backward();
    }
    const double norm = train::gradient_norm(all);
    optimizer.step(norm > 1 ? 1 / norm : 1);
  }
}

void run(const std::string& training_text, const std::string& validation_text) {
  const Tokenizer tokenizer{std::filesystem::path(kModel)};
  const torch::Tensor training = windows_of(tokenizer, training_text);
  const torch::Tensor validation = windows_of(tokenizer, validation_text);
  const Checkpoint checkpoint{std::filesystem::path(kModel)};
  CausalLm floats(checkpoint);
  const double reference = validation_loss(floats, validation);
  const double nearest = rounded_loss(checkpoint, validation, "minmax");
  const double searched = rounded_loss(checkpoint, validation, "mse");
  OrderedJson line = {{"options", options}, {"float", reference}, {"rtn", nearest}, {"mse", searched}};
  const auto first = static_cast<uint64_t>(number("first_seed"));
  for (uint64_t seed = first; seed < first + static_cast<uint64_t>(number("seeds")); ++seed) {
    CausalLm model(checkpoint);
    if (options["dtype"] == "bfloat16") model.options().compute = torch::kBFloat16;
    prepare_model_for_qat(model, config_of(options["scales"], "auto"));
    line["before"] = validation_loss(model, validation);
    const double from = static_cast<double>(std::clock());
    floats.options().compute = model.options().compute;
    learn(model, floats, training, seed);
    line["processor_seconds"] = (static_cast<double>(std::clock()) - from) / CLOCKS_PER_SEC;
    const double loss = validation_loss(model, validation);
    line["seed"] = seed;
    line["qat"] = loss;
    line["of_rtn_gap_recovered"] = (nearest - loss) / (nearest - reference);
    line["of_mse_gap_recovered"] = (searched - loss) / (searched - reference);
    fmt::print("{}\n", line.dump());
    std::fflush(stdout);
  }
}

/// What the weights of a step cost: fake quantization and its gradients of 15 million, in processor seconds.
void time_weights() {
  const Scheme scheme = {.element = &integer_element(4, true),
                         .scale = parameter(Grouping::channel(), plain(DType::f16))};
  const train::IntegerGrid grid = *train::integer_grid(scheme);
  const torch::Tensor w = torch::randn({30000, 500}).requires_grad_(), slope = torch::randn_like(w);
  const torch::Tensor scale = torch::full({30000}, 0.3f).requires_grad_();
  const auto forward = [&](torch::ScalarType type) { return train::fake_quantize(w, scale, {}, grid, 1, type); };
  OrderedJson line;
  for (const auto& [name, type] : {std::pair("float32", torch::kFloat), std::pair("bfloat16", torch::kBFloat16)}) {
    line[name]["forward"] = best_seconds([&] { forward(type); });
    const torch::Tensor y = forward(type), g = slope.to(type);
    line[name]["backward"] = best_seconds([&] { torch::autograd::grad({y}, {w, scale}, {g}, /*retain_graph=*/true); });
  }
  const torch::NoGradGuard no_gradient;
  line["computed"]["forward"] = best_seconds([&] { train::fake_quantize(w, train::quantizer(scheme)); });
  fmt::print("{}\n", line.dump());
}

}  // namespace
}  // namespace bitwright

int main(int argc, char** argv) {
  for (int i = 3; i < argc; ++i) {
    const std::string given = argv[i];
    const size_t equals = given.find('=');
    if (equals == std::string::npos || !bitwright::options.contains(given.substr(0, equals))) {
      fmt::print(stderr, "what is {}?\n", given);
      return 2;
    }
    bitwright::options[given.substr(0, equals)] = given.substr(equals + 1);
  }
  if (argc < 3) return 2;
  const int threads = std::stoi(bitwright::options["threads"]);
  at::set_num_threads(threads);
  bitwright::set_thread_count(static_cast<size_t>(threads));
  try {
    if (std::string_view(argv[1]) == "speed")
      bitwright::time_weights();
    else
      bitwright::run(argv[1], argv[2]);
  } catch (const bitwright::Error& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
  return 0;
}
