// What QLoRA takes and gives.
//   train_qlora_bench memory MODEL [adamw8bit] [MODULE…]
//       one training step after another: batch 1, 256 tokens, layers computed again in the backward pass. A model is
//       kept as it is stored, quantized or in float16. MODULE: ends of paths (default all-linear)
//   train_qlora_bench gain MODEL TEXT [STEPS]
//       LoRA on floats against QLoRA (nf4, nested scales), merged and requantized
//   train_qlora_bench speed TOKENS ROWS COLUMNS
//       the product with an nf4 matrix, forward and backward
#include <fmt/format.h>
#include <malloc.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <random>

#include "base/mapped_file.hpp"
#include "base/threads.hpp"
#include "kernels/dequantize_matmul.hpp"
#include "tokenizer/tokenizer.hpp"
#include "train/keep_frozen.hpp"
#include "train/lora.hpp"
#include "train/optimizer.hpp"
#include "train/quantized_linear.hpp"
#include "train/tensor_memory.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;

// Memory.

/// A line of /proc/self/status, in bytes.
int64_t status(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(key + ":")) return std::stoll(line.substr(key.size() + 1)) * 1024;
  return 0;
}
double mib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

int64_t stored_bytes(const torch::nn::Module& model) {
  int64_t bytes = 0;
  std::map<const void*, int64_t> linear;  // what belongs to codes and is no parameter
  for_each_linear(model, [&](const std::string&, torch::nn::LinearImpl& layer) {
    std::shared_ptr<LinearBehaviour> behaviour = behaviour_of(layer);
    if (const auto lora = std::dynamic_pointer_cast<LoraBehaviour>(behaviour)) behaviour = lora->base();
    if (const auto quantized = std::dynamic_pointer_cast<QuantizedLinearBehaviour>(behaviour))
      linear[parameter_of(layer).data_ptr()] = static_cast<int64_t>(quantized->bytes());
  });
  for (const auto& item : model.named_parameters()) {
    if (item.value().requires_grad()) continue;
    const auto found = linear.find(item.value().data_ptr());
    bytes += found != linear.end() ? found->second : static_cast<int64_t>(item.value().nbytes());
  }
  return bytes;
}

std::vector<Tensor> learning(const torch::nn::Module& model) {
  std::vector<Tensor> found;
  for (const Tensor& p : model.parameters())
    if (p.requires_grad()) found.push_back(p);
  return found;
}

std::unique_ptr<Optimizer> optimizer_of(const torch::nn::Module& model, const std::string& name) {
  std::vector<NamedParameter> parameters;
  for (const auto& item : model.named_parameters())
    if (item.value().requires_grad()) parameters.push_back({.name = item.key(), .tensor = item.value()});
  return make_optimizer(name, std::move(parameters), {.lr = 1e-4});
}

double step_of(CausalLm& model, Optimizer& optimizer, int64_t tokens) {
  const Tensor ids = torch::randint(0, model.config().vocabulary, {1, tokens + 1}, torch::kInt64);
  const Tensor loss = model.loss(ids.narrow(1, 0, tokens), ids.narrow(1, 1, tokens));
  loss.backward();
  optimizer.step(1e-4, 1);
  optimizer.zero_grad();
  return loss.item<double>();
}

/// All of libtorch and oneDNN that a step runs is in memory, and what they keep for themselves.
void warm_up() {
  const Json config = {{"model_type", "llama"},       {"hidden_size", 64},        {"intermediate_size", 128},
                       {"num_hidden_layers", 2},      {"num_attention_heads", 2}, {"num_key_value_heads", 1},
                       {"vocab_size", 256},           {"rms_norm_eps", 1e-5},     {"max_position_embeddings", 64},
                       {"tie_word_embeddings", false}};
  CausalLmOptions options;
  options.compute = torch::kBFloat16;
  options.recompute_layers = true;
  CausalLm model(config, options);
  bitwright::prepare_qlora(model, {.r = 4});
  const auto optimizer = optimizer_of(model, "adamw");
  step_of(model, *optimizer, 32);
}

int measure_memory(const std::string& path, const std::string& optimizer_name, std::vector<std::string> targets) {
  // As bitwright-train has it.
  mallopt(M_MMAP_THRESHOLD, 16 << 20);
  mallopt(M_TRIM_THRESHOLD, 32 << 20);
  use_tensor_memory();
  warm_up();
  const int64_t before = status("VmRSS");

  if (targets.empty()) targets = {"all-linear"};
  const Checkpoint checkpoint(path);
  CausalLmOptions options;
  options.compute = options.matrices = torch::kBFloat16;
  options.recompute_layers = true;
  options.load_linear = keep_frozen;
  int64_t table = 0;
  options.load_embedding = [&](const Checkpoint& from, const TensorEntry& entry) {
    table = static_cast<int64_t>(entry.stored_bytes);
    return keep_table(from, entry);
  };
  CausalLm model(checkpoint, options);
  const int64_t loaded = status("VmHWM") - before;
  add_lora(model, {.r = 16, .target_modules = targets});
  const auto optimizer = optimizer_of(model, optimizer_name);
  int64_t adapters = 0, state = 0;
  for (const Tensor& p : learning(model)) adapters += static_cast<int64_t>(p.nbytes());
  for (const auto& [name, tensor] : optimizer->state()) state += static_cast<int64_t>(tensor.nbytes());

  constexpr int64_t kTokens = 256;
  for (int step = 0; step < 3; ++step) {
    if (step == 1) forget_most_tensor_memory();
    const auto start = std::chrono::steady_clock::now();
    const double loss = step_of(model, *optimizer, kTokens);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    fmt::print("step {}: loss {:.4f}, {:.2f} s, {:.0f} tokens/s\n", step, loss, seconds.count(),
               kTokens / seconds.count());
  }
  const TensorMemoryUse use = tensor_memory_use();
  const int64_t activations = use.most - use.now, base = stored_bytes(model) + table;
  const int64_t needed = base + adapters + state + activations, peak = status("VmHWM") - before;
  struct mallinfo2 heap = mallinfo2();
  const auto line = [](const char* what, int64_t bytes, const char* how) {
    fmt::print("{:22} {:8.1f} MiB  {}\n", what, mib(bytes), how);
  };
  line("libtorch itself", before, "VmRSS after a step of a model of 64 x 64 matrices");
  line("base", base, "codes, scales and norms, embedding and head among them, as they are stored");
  line("adapters", adapters, "A and B, float32");
  line("optimizer", state, optimizer_name.c_str());
  line("activations", activations,
       "tensors of libtorch at most in a step, but for those that stay; gradients among them");
  line("needed", needed, "the sum of the four");
  line("peak", peak, "VmHWM less libtorch itself");
  line("of it while loading", loaded, "");
  line("heap kept free", static_cast<int64_t>(heap.fordblks), "at the end, of glibc");
  fmt::print("peak / needed {:.3f}\n", static_cast<double>(peak) / static_cast<double>(needed));
  return 0;
}

// Gain.

struct Text {
  Tensor train, valid;  ///< token ids
};
Text read_text(const std::string& model, const std::string& file) {
  const Tokenizer tokenizer(model);
  const std::vector<int32_t> ids = tokenizer.encode(MappedFile(file).text());
  const Tensor all = torch::tensor(ids, torch::kInt32).to(torch::kInt64);
  const int64_t cut = all.size(0) * 9 / 10;
  return {all.narrow(0, 0, cut), all.narrow(0, cut, all.size(0) - cut)};
}

constexpr int64_t kContext = 128, kBatch = 8;

double validation_loss(CausalLm& model, const Tensor& ids) {
  const torch::NoGradGuard no_gradients;
  model.eval();
  double sum = 0;
  constexpr int64_t kWindows = 64;
  for (int64_t w = 0; w < kWindows; w += kBatch) {
    std::vector<Tensor> windows;
    for (int64_t i = w; i < w + kBatch; ++i) windows.push_back(ids.narrow(0, i * kContext, kContext + 1));
    const Tensor tokens = torch::stack(windows);
    sum += model.loss(tokens.narrow(1, 0, kContext), tokens.narrow(1, 1, kContext)).item<double>() * kBatch;
  }
  model.train();
  return sum / kWindows;
}

void fine_tune(CausalLm& model, const Tensor& ids, int steps, double rate) {
  torch::optim::AdamW optimizer(learning(model), torch::optim::AdamWOptions(rate).weight_decay(0));
  std::mt19937 random(5);
  std::uniform_int_distribution<int64_t> starts(0, ids.size(0) - kContext - 1);
  for (int step = 0; step < steps; ++step) {
    std::vector<Tensor> windows;
    for (int64_t i = 0; i < kBatch; ++i) windows.push_back(ids.narrow(0, starts(random), kContext + 1));
    const Tensor tokens = torch::stack(windows);
    const double part = static_cast<double>(step) / steps;
    static_cast<torch::optim::AdamWOptions&>(optimizer.param_groups()[0].options()).lr(rate * (1 - part));
    optimizer.zero_grad();
    model.loss(tokens.narrow(1, 0, kContext), tokens.narrow(1, 1, kContext)).backward();
    optimizer.step();
  }
}

int measure_gain(const std::string& path, const std::string& file, int steps) {
  const Checkpoint checkpoint(path);
  const Text text = read_text(path, file);
  CausalLmOptions options;
  options.compute = torch::kBFloat16;
  const LoraConfig config = {.r = 16, .lora_alpha = 32};
  fmt::print("r 16 on all linear layers, {} steps of {} x {} tokens, validation loss in nats a token\n", steps, kBatch,
             kContext);
  CausalLm floats(checkpoint, options);
  const double start = validation_loss(floats, text.valid);
  torch::manual_seed(1);
  add_lora(floats, config);
  fine_tune(floats, text.train, steps, 2e-3);
  const double gained = start - validation_loss(floats, text.valid);
  fmt::print("floats     {:.4f}, LoRA {:.4f}: gains {:.4f}\n", start, start - gained, gained);
  for (const std::string init : {"default", "loftq"}) {
    CausalLm model(checkpoint, options);
    LoraConfig quantized = config;
    quantized.init_lora_weights = init;
    torch::manual_seed(1);
    bitwright::prepare_qlora(model, quantized);
    const double first = validation_loss(model, text.valid);
    fine_tune(model, text.train, steps, 2e-3);
    const auto loss = [&] { return validation_loss(model, text.valid); };
    const LoraMergeReport merged = merge_lora(model, LoraMerge::requantize, loss);
    const auto kept = [&](double value) { return 100 * (start - value) / gained; };
    fmt::print(
        "{:10} {:.4f}, QLoRA {:.4f}: {:.1f} % of the gain; merged in floats {:.4f}; requantized {:.4f}: {:.1f} % "
        "(of its own gain {:.1f} %)\n",
        init, first, *merged.loss_before, kept(*merged.loss_before), *merged.loss_floats, *merged.loss,
        kept(*merged.loss), 100 * (first - *merged.loss) / (first - *merged.loss_before));
  }
  return 0;
}

// Speed.

int measure_speed(int64_t tokens, int64_t rows, int64_t columns) {
  const QuantizationConfig base = qlora_base();
  torch::nn::Linear linear(torch::nn::LinearOptions(columns, rows).bias(false));
  torch::nn::Sequential model(linear);
  bitwright::prepare_qlora(*model, {.r = 1}, base);
  const auto weight =
      std::dynamic_pointer_cast<QuantizedLinearBehaviour>(adapted_layers(*model).at(0).lora->base())->weight();
  const auto seconds = [](const auto& act) {
    act();
    double best = 1e9;
    for (int i = 0; i < 10; ++i) {
      const auto start = std::chrono::steady_clock::now();
      act();
      best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
  };
  const double work = 2.0 * static_cast<double>(tokens * rows * columns);
  fmt::print("{} tokens, nf4 [{}, {}], {} threads; GFLOP/s forward, backward\n", tokens, rows, columns, thread_count());
  for (const DType type : {DType::bf16, DType::f32}) {
    const auto scalar = type == DType::bf16 ? torch::kBFloat16 : torch::kFloat32;
    const Tensor x = torch::randn({tokens, columns}).to(scalar), y = torch::empty({tokens, rows}, scalar);
    const auto product = [&](const Tensor& in, const Tensor& out) -> DequantizedProduct {
      return {.weight = *weight,
              .type = type,
              .tokens = static_cast<size_t>(tokens),
              .in = static_cast<const std::byte*>(in.data_ptr()),
              .out = static_cast<std::byte*>(out.data_ptr())};
    };
    for (const DequantizeMatmul& way : dequantize_matmuls()) {
      if (!way.usable(type) || way.name == "definition") continue;
      const double forward = seconds([&] { way.forward(product(x, y)); });
      const double backward = seconds([&] { way.backward(product(y, x)); });
      fmt::print("{} {:10} {:7.1f} {:7.1f}\n", info(type).name, way.name, work / forward * 1e-9,
                 work / backward * 1e-9);
    }
    const Tensor w = torch::randn({rows, columns}).to(scalar);
    const double forward = seconds([&] { at::mm(x, w.t()); }), backward = seconds([&] { at::mm(y, w); });
    fmt::print("{} {:10} {:7.1f} {:7.1f}  (libtorch, weights in floats)\n", info(type).name, "at::mm",
               work / forward * 1e-9, work / backward * 1e-9);
    std::vector<float> all(static_cast<size_t>(rows * columns));
    const double decoding = seconds([&] {
      const CompactDecoder decoder(*weight);
      parallel_ranges(all.size(), size_t{1} << 16, [&](size_t begin, size_t end) {
        decoder.decode(static_cast<int64_t>(begin), std::span(all).subspan(begin, end - begin));
      });
    });
    fmt::print("decoding alone: {:.2f} G weights/s\n", static_cast<double>(rows * columns) / decoding * 1e-9);
  }
  return 0;
}

int run(std::vector<std::string> arguments) {
  if (const char* threads = std::getenv("OMP_NUM_THREADS")) set_thread_count(std::stoul(threads));
  const std::string what = arguments.empty() ? "" : arguments[0];
  if (what == "memory" && arguments.size() >= 2) {
    const bool eight = arguments.size() > 2 && arguments[2] == "adamw8bit";
    return measure_memory(arguments[1], eight ? "adamw8bit" : "adamw",
                          {arguments.begin() + (eight ? 3 : 2), arguments.end()});
  }
  if (what == "gain" && arguments.size() >= 3)
    return measure_gain(arguments[1], arguments[2], arguments.size() > 3 ? std::stoi(arguments[3]) : 300);
  if (what == "speed" && arguments.size() == 4)
    return measure_speed(std::stoll(arguments[1]), std::stoll(arguments[2]), std::stoll(arguments[3]));
  std::cerr << "memory MODEL [adamw8bit] [MODULE...] | gain MODEL TEXT [STEPS] | speed TOKENS ROWS COLUMNS\n";
  return 2;
}

}  // namespace
}  // namespace bitwright::train

int main(int count, char** arguments) {
  try {
    return bitwright::train::run({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
