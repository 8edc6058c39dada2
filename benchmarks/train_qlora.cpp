// What QLoRA takes and gives.
//   train_qlora_bench memory MODEL [MODULE…]   one training step after another: batch 1, 256 tokens, layers computed
//                                              again in the backward pass. A plain model is kept in bfloat16, a
//                                              quantized one as it is. MODULE: ends of paths (default all-linear)
//   train_qlora_bench gain MODEL TEXT [STEPS]  LoRA on floats against QLoRA (nf4, nested scales), merged and
//   requantized train_qlora_bench speed TOKENS ROWS COLUMNS  the product with an nf4 matrix, forward and backward
#include <fmt/format.h>
#include <malloc.h>
#include <torch/torch.h>

#include <atomic>
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
#include "train/quantized_linear.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;

// Memory.

std::atomic<int64_t> live_bytes = 0, peak_bytes = 0;

/// What libtorch allocates for tensors, counted.
struct CountingAllocator : at::Allocator {
  static void free_counted(void* data) {
    live_bytes -= static_cast<int64_t>(malloc_usable_size(data));
    std::free(data);
  }
  static at::DataPtr make(size_t bytes) {
    void* data = nullptr;
    if (bytes > 0 && posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
    const int64_t live = live_bytes += static_cast<int64_t>(data == nullptr ? 0 : malloc_usable_size(data));
    for (int64_t peak = peak_bytes; live > peak && !peak_bytes.compare_exchange_weak(peak, live);) {
    }
    return {data, data, &free_counted, at::Device(at::kCPU)};
  }
#if TORCH_VERSION_MAJOR >= 2 && TORCH_VERSION_MINOR >= 3
  at::DataPtr allocate(size_t bytes) override { return make(bytes); }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
#else
  at::DataPtr allocate(size_t bytes) const override { return make(bytes); }
#endif
  at::DeleterFnPtr raw_deleter() const override { return &free_counted; }
};

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

int measure_memory(const std::string& path, std::vector<std::string> targets) {
  static CountingAllocator counting;
  c10::SetAllocator(at::kCPU, &counting, 100);
  // What libtorch itself takes: its products and gradients once.
  const Tensor warm = torch::randn({64, 64}).to(torch::kBFloat16).requires_grad_(true);
  at::mm(warm, warm).to(torch::kFloat32).sum().backward();
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
  const std::vector<Tensor> parameters = learning(model);
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-4));
  int64_t adapters = 0;
  for (const Tensor& p : parameters) adapters += static_cast<int64_t>(p.nbytes());

  const int64_t vocabulary = model.config().vocabulary;
  for (int step = 0; step < 3; ++step) {
    const Tensor tokens = torch::randint(0, vocabulary, {1, 257}, torch::kInt64);
    const auto start = std::chrono::steady_clock::now();
    const Tensor loss = model.loss(tokens.narrow(1, 0, 256), tokens.narrow(1, 1, 256));
    loss.backward();
    optimizer.step();
    for (Tensor p : parameters) p.mutable_grad().reset();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    fmt::print("step {}: loss {:.4f}, {:.2f} s, {:.0f} tokens/s\n", step, loss.item<float>(), seconds.count(),
               256 / seconds.count());
    if (step == 0) peak_bytes = live_bytes.load();
  }
  // Tensors at most during a step beyond those that stay; the gradients are among them.
  const int64_t activations = peak_bytes - live_bytes, base = stored_bytes(model) + table, state = 2 * adapters;
  const int64_t needed = base + adapters + state + activations, peak = status("VmHWM") - before;
  fmt::print(
      "libtorch itself  {:8.1f} MiB\nbase             {:8.1f} MiB\nadapters         {:8.1f} MiB\n"
      "optimizer        {:8.1f} MiB\nactivations      {:8.1f} MiB (with gradients)\nneeded           {:8.1f} MiB\n"
      "peak beyond libtorch {:.1f} MiB = {:.3f} x needed (while loading {:.1f})\n",
      mib(before), mib(base), mib(adapters), mib(state), mib(activations), mib(needed), mib(peak),
      static_cast<double>(peak) / static_cast<double>(needed), mib(loaded));
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
  if (what == "memory" && arguments.size() >= 2)
    return measure_memory(arguments[1], {arguments.begin() + 2, arguments.end()});
  if (what == "gain" && arguments.size() >= 3)
    return measure_gain(arguments[1], arguments[2], arguments.size() > 3 ? std::stoi(arguments[3]) : 300);
  if (what == "speed" && arguments.size() == 4)
    return measure_speed(std::stoll(arguments[1]), std::stoll(arguments[2]), std::stoll(arguments[3]));
  std::cerr << "memory MODEL [MODULE...] | gain MODEL TEXT [STEPS] | speed TOKENS ROWS COLUMNS\n";
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
