#include "bitwright/torch/trainer.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>

#include <chrono>
#include <cmath>
#include <numbers>

#include "base/error.hpp"
#include "base/output.hpp"
#include "base/progress.hpp"
#include "base/threads.hpp"
#include "bitwright/torch/finetuning.hpp"
#include "evaluate/score.hpp"
#include "model/model.hpp"
#include "train/data_parallel.hpp"
#include "train/dataset.hpp"
#include "train/linear.hpp"
#include "train/optimizer.hpp"
#include "train/run_directory.hpp"
#include "train/training_checkpoint.hpp"

namespace bitwright {

using torch::Tensor;
using train::NamedTensors;

namespace {

namespace fs = std::filesystem;

/// Products in bfloat16 for the life of this object, of modules that do not choose their types themselves.
class Autocast {
 public:
  explicit Autocast(bool on) : before_(is_on()) { set(on); }
  ~Autocast() {
    at::autocast::clear_cache();  // of weights that the next step changes
    set(before_);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
#if TORCH_VERSION_MAJOR >= 2 && TORCH_VERSION_MINOR >= 4
  static bool is_on() { return at::autocast::is_autocast_enabled(at::kCPU); }
  static void set(bool on) {
    at::autocast::set_autocast_enabled(at::kCPU, on);
    at::autocast::set_autocast_dtype(at::kCPU, torch::kBFloat16);
  }
#else
  static bool is_on() { return at::autocast::is_cpu_enabled(); }
  static void set(bool on) {
    at::autocast::set_cpu_enabled(on);
    at::autocast::set_autocast_cpu_dtype(torch::kBFloat16);
  }
#endif
  bool before_;
};

/// Shows its inputs and outputs, and computes as the layer did before.
class Observed : public train::LinearBehaviour {
 public:
  using See = std::function<void(const Tensor& input, const Tensor& output)>;
  Observed(std::shared_ptr<LinearBehaviour> inner, Tensor weight, See see)
      : inner_(std::move(inner)), weight_(std::move(weight)), see_(std::move(see)) {}
  Tensor forward(const Tensor& input, const Tensor& bias) override {
    Tensor output = inner_ ? inner_->forward(input, bias) : torch::linear(input, weight_.to(input.scalar_type()), bias);
    see_(input.detach(), output.detach());
    return output;
  }

 private:
  std::shared_ptr<LinearBehaviour> inner_;
  Tensor weight_;  ///< undefined where there is an inner one
  See see_;
};

/// All linear layers of a module are observed while this lives.
class Observation {
 public:
  Observation(const torch::nn::Module& module, const std::vector<Trainer::ActivationObserver>& observers) {
    if (observers.empty()) return;
    train::for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl& layer) {
      const auto inner = train::behaviour_of(layer);
      const Tensor parameter = train::parameter_of(layer), weight = inner ? Tensor() : layer.weight;
      layers_.push_back({&layer, inner, parameter});
      const auto see = [path, &observers](const Tensor& input, const Tensor& output) {
        for (const auto& observer : observers) observer(path, input, output);
      };
      train::attach(layer, std::make_shared<Observed>(inner, weight, see), parameter);
    });
  }
  ~Observation() {
    for (const Layer& layer : layers_)
      if (layer.inner)
        train::attach(*layer.linear, layer.inner, layer.parameter);
      else
        train::detach(*layer.linear, layer.parameter);
  }
  Observation(const Observation&) = delete;
  Observation& operator=(const Observation&) = delete;

 private:
  struct Layer {
    torch::nn::LinearImpl* linear;
    std::shared_ptr<train::LinearBehaviour> inner;
    Tensor parameter;
  };
  std::vector<Layer> layers_;
};

[[noreturn]] void not_finite(int64_t step, const std::string& what, const fs::path& output) {
  const std::vector<fs::path> good = train::list_checkpoints(output);
  throw Error({.code = "not-finite",
               .what = "training stopped",
               .where = fmt::format("step {}", step),
               .why = fmt::format("{} is NaN or infinite; the weights are those of step {}", what, step - 1),
               .fix = good.empty()
                          ? "lower learning_rate or give warmup_steps, and start again"
                          : fmt::format("lower learning_rate and go on from {} with --resume", good.back().string())});
}

void check_tokens(const Tensor& tokens) {
  if (tokens.dim() == 2 && tokens.size(0) > 0 && tokens.size(1) > 1 && tokens.scalar_type() == torch::kInt64) return;
  throw Error(
      {.code = "wrong-shape",
       .what = "cannot train",
       .where = "tokens",
       .why = fmt::format("they are {} {}", torch::toString(tokens.scalar_type()), to_string(tokens.sizes().vec())),
       .fix = "give [sequences, length + 1] of int64, length at least 1"});
}

}  // namespace

struct Trainer::Impl {
  TrainableModel model;
  TrainingConfig config;
  std::shared_ptr<QuantizedFinetuning> finetuning{};
  std::unique_ptr<train::Optimizer> optimizer{};
  std::string run_id = train::new_run_id();
  int64_t step = 0, windows = 0, tokens = 0;         ///< done, read, predicted
  int64_t total_steps = 0;                           ///< of the schedule
  std::string text_digest{};                         ///< of what is trained on
  std::string base_digest{};                         ///< of what does not learn; empty: nobody said
  std::shared_ptr<train::ParallelModel> parallel{};  ///< null: one process alone

  std::vector<ActivationObserver> activation_observers{};
  std::vector<GradientTransform> gradient_transforms{};
  std::vector<std::function<void(const StepResult&)>> step_observers{};
  std::vector<std::function<void(const fs::path&)>> file_writers{};

  Impl(TrainableModel trained, TrainingConfig configuration, std::shared_ptr<QuantizedFinetuning> quantized,
       std::shared_ptr<train::ParallelModel> processes);
  Tensor loss(const Tensor& inputs, const Tensor& targets) const;
  double learning_rate() const;
  double accumulate(const Tensor& batch);
  double update(double lr);
  std::map<std::string, Tensor> gradients() const;
  void average_gradients();
  std::optional<ErrorReport> interruption() const;
  NamedTensors learnt() const;
  NamedTensors whole(const NamedTensors& parts, bool keep) const;
  void load(const NamedTensors& stored, const NamedTensors& parts, const fs::path& where) const;
  std::vector<std::pair<std::string, int64_t*>> optimizer_steps() const;
  void load_optimizer(const NamedTensors& state, const train::RunFacts& facts, const fs::path& where);
  int64_t rank() const { return parallel ? parallel->group().rank() : 0; }
  int64_t size() const { return parallel ? parallel->group().size() : 1; }
  bool split() const { return parallel && parallel->sharding() == train::Sharding::parameters; }
  bool writes() const { return rank() == 0; }
};

Trainer::Impl::Impl(TrainableModel trained, TrainingConfig configuration,
                    std::shared_ptr<QuantizedFinetuning> quantized, std::shared_ptr<train::ParallelModel> processes)
    : model(std::move(trained)),
      config(std::move(configuration)),
      finetuning(std::move(quantized)),
      total_steps(config.max_steps),
      parallel(std::move(processes)) {
  config.check();
  BW_ASSERT(model.module != nullptr && model.logits != nullptr);
  std::vector<train::NamedParameter> parameters;
  if (parallel) {
    for (const train::Trained& t : parallel->trained()) parameters.push_back({t.name, t.tensor, t.decays});
  } else {
    for (const auto& item : model.module->named_parameters()) {
      const Tensor& tensor = item.value();
      if (tensor.requires_grad())
        parameters.push_back({item.key(), tensor, tensor.dim() >= 2 && item.key().ends_with("weight")});
    }
  }
  if (parameters.empty() && !finetuning)
    throw Error({.code = "nothing-to-train",
                 .what = "cannot train",
                 .why = "no parameter of the model learns",
                 .fix = "all are frozen: add adapters (lora.r) or enable_quantized_finetuning"});
  optimizer = train::make_optimizer(config.optimizer, std::move(parameters),
                                    {.lr = config.learning_rate,
                                     .beta1 = config.betas[0],
                                     .beta2 = config.betas[1],
                                     .epsilon = config.epsilon,
                                     .weight_decay = config.weight_decay});
}

Tensor Trainer::Impl::loss(const Tensor& inputs, const Tensor& targets) const {
  if (model.loss) return model.loss(inputs, targets);
  const Tensor logits = model.logits(inputs);
  return torch::nn::functional::cross_entropy(logits.flatten(0, 1).to(torch::kFloat32), targets.flatten());
}

/// Linear warm-up, then half a cosine down to a share of the rate (SGDR, arXiv:1608.03983, one period).
double Trainer::Impl::learning_rate() const {
  if (step < config.warmup_steps)
    return config.learning_rate * static_cast<double>(step + 1) / static_cast<double>(config.warmup_steps);
  if (config.schedule == "constant" || total_steps <= config.warmup_steps) return config.learning_rate;
  const double done =
      static_cast<double>(step - config.warmup_steps) / static_cast<double>(total_steps - config.warmup_steps);
  const double share = 0.5 * (1 + std::cos(std::numbers::pi * std::min(done, 1.0)));
  return config.learning_rate * (config.min_learning_rate + (1 - config.min_learning_rate) * share);
}

/// Gradients of the mean over all sequences, batch_size at a time. Returns that mean.
double Trainer::Impl::accumulate(const Tensor& batch) {
  const int64_t count = batch.size(0), length = batch.size(1) - 1;
  double mean = 0;
  for (int64_t begin = 0; begin < count; begin += config.batch_size) {
    const int64_t size = std::min(config.batch_size, count - begin);
    const Tensor part = batch.narrow(0, begin, size);
    const double share = static_cast<double>(size) / static_cast<double>(count);
    const bool half = config.dtype == "bfloat16";
    if (model.set_compute) model.set_compute(half ? torch::kBFloat16 : torch::kFloat32);
    Tensor value;
    {
      const Autocast autocast(half && !model.set_compute);
      value = loss(part.narrow(1, 0, length).contiguous(), part.narrow(1, 1, length).contiguous());
    }
    mean += share * value.item<double>();
    if (!std::isfinite(mean) && !split()) break;  // where layers are split, all processes must pass through them
    (value * share).backward();
  }
  return parallel ? parallel->group().mean(mean) : mean;
}

/// Over the processes.
void Trainer::Impl::average_gradients() {
  if (!parallel) return;
  parallel->finish_gradients();
  if (!finetuning) return;
  for (Tensor gradient : finetuning->gradients()) {
    parallel->group().all_reduce(gradient);
    gradient.div_(size());
  }
}

/// All processes stop at the same step.
std::optional<ErrorReport> Trainer::Impl::interruption() const {
  const bool own = take_interruption();
  if (parallel ? !parallel->group().any(own) : !own) return std::nullopt;
  return ErrorReport{.code = "interrupted",
                     .what = "interrupted",
                     .why = own ? "" : "another process was",
                     .status = ExitStatus::interrupted,
                     .resumable = true};
}

std::map<std::string, Tensor> Trainer::Impl::gradients() const {
  std::map<std::string, Tensor> found;
  for (const train::NamedParameter& parameter : optimizer->parameters())
    if (parameter.tensor.grad().defined()) found[parameter.name] = parameter.tensor.grad();
  if (!finetuning) return found;
  const std::vector<Tensor> quantized = finetuning->gradients();
  for (size_t i = 0; i < quantized.size(); ++i) found[fmt::format("quantized.{}", i)] = quantized[i];
  return found;
}

/// Clips and steps. Returns the gradients' norm before clipping; where that is not finite nothing has changed.
double Trainer::Impl::update(double lr) {
  average_gradients();
  std::map<std::string, Tensor> all = gradients();
  for (const GradientTransform& transform : gradient_transforms) transform(all);
  std::vector<Tensor> weights;
  for (const train::NamedParameter& parameter : optimizer->parameters()) weights.push_back(parameter.tensor);
  double squares = std::pow(split() ? parallel->gradient_norm() : train::gradient_norm(weights), 2);
  if (finetuning)
    for (const Tensor& gradient : finetuning->gradients())
      squares += std::pow(gradient.to(torch::kFloat32).norm().item<double>(), 2);
  const double norm = std::sqrt(squares);
  if (!std::isfinite(norm)) return norm;
  const double scale = config.max_grad_norm > 0 && norm > config.max_grad_norm ? config.max_grad_norm / norm : 1;
  optimizer->step(lr, scale);
  if (parallel) parallel->after_step();
  if (finetuning) {
    for (const Tensor& gradient : finetuning->gradients())
      if (scale != 1) gradient.mul_(scale);
    finetuning->step();
  }
  return norm;
}

Trainer::Trainer(TrainableModel model, TrainingConfig config, std::shared_ptr<QuantizedFinetuning> finetuning,
                 std::shared_ptr<train::ParallelModel> parallel)
    : impl_(std::make_unique<Impl>(std::move(model), std::move(config), std::move(finetuning), std::move(parallel))) {
  torch::manual_seed(static_cast<uint64_t>(impl_->config.seed + impl_->rank()));
}

Trainer::~Trainer() = default;

StepResult Trainer::training_step(const Tensor& tokens) {
  Impl& t = *impl_;
  check_tokens(tokens);
  const auto start = std::chrono::steady_clock::now();
  const double lr = t.learning_rate();
  t.model.module->train();
  t.optimizer->zero_grad();
  if (t.finetuning) {
    t.finetuning->zero_grad();
    t.finetuning->set_learning_rate(lr);
  }
  StepResult result = {.step = t.step + 1, .lr = lr};
  {
    const Observation observation(*t.model.module, t.activation_observers);
    result.loss = t.accumulate(tokens);
  }
  if (!std::isfinite(result.loss)) not_finite(result.step, "the loss", t.config.output);
  result.grad_norm = t.update(lr);
  if (!std::isfinite(result.grad_norm)) not_finite(result.step, "the gradients' norm", t.config.output);
  t.optimizer->zero_grad();  // their memory is not held until the next step
  result.tokens = tokens.size(0) * (tokens.size(1) - 1) * t.size();
  ++t.step;
  t.windows += tokens.size(0) * t.size();
  t.tokens += result.tokens;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  result.tokens_per_second = static_cast<double>(result.tokens) / std::max(seconds, 1e-9);
  return result;
}

double Trainer::evaluate(std::span<const int32_t> tokens, int64_t length, int64_t most) {
  Impl& t = *impl_;
  const Protocol protocol = {.context = length, .stride = length, .max_windows = most};
  const std::vector<Window> windows = cut(tokens.size(), protocol);
  if (windows.empty())
    throw Error({.code = "text-too-short",
                 .what = "cannot evaluate",
                 .why = fmt::format("{} tokens do not fill a window of {}", tokens.size(), length),
                 .fix = "give a longer text or shorter windows"});
  const torch::NoGradGuard no_gradients;
  t.model.module->eval();
  if (t.model.set_compute) t.model.set_compute(torch::kFloat32);
  double sum = 0;
  for (size_t begin = 0; begin < windows.size(); begin += static_cast<size_t>(t.config.batch_size)) {
    const size_t count = std::min(static_cast<size_t>(t.config.batch_size), windows.size() - begin);
    Tensor batch = torch::empty({static_cast<int64_t>(count), length + 1}, torch::kInt64);
    for (size_t i = 0; i < count; ++i)
      std::copy_n(tokens.begin() + static_cast<std::ptrdiff_t>(windows[begin + i].begin), length + 1,
                  batch.data_ptr<int64_t>() + static_cast<int64_t>(i) * (length + 1));
    const Tensor inputs = batch.narrow(1, 0, length).contiguous(), targets = batch.narrow(1, 1, length).contiguous();
    sum += t.loss(inputs, targets).item<double>() * static_cast<double>(count);
  }
  t.model.module->train();
  return sum / static_cast<double>(windows.size());
}

std::vector<int32_t> Trainer::sample(std::span<const int32_t> prompt, int64_t count, double temperature,
                                     int64_t context) {
  Impl& t = *impl_;
  const torch::NoGradGuard no_gradients;
  t.model.module->eval();
  if (t.model.set_compute) t.model.set_compute(torch::kFloat32);
  Sampler sampler({.temperature = static_cast<float>(temperature), .seed = static_cast<uint64_t>(t.config.seed)});
  std::vector<int64_t> text(prompt.begin(), prompt.end());
  std::vector<int32_t> drawn;
  while (!text.empty() && static_cast<int64_t>(drawn.size()) < count && static_cast<int64_t>(text.size()) < context) {
    const Tensor logits = t.model.logits(torch::tensor(text, torch::kInt64).unsqueeze(0)).to(torch::kFloat32);
    const Tensor last = logits.select(1, logits.size(1) - 1).contiguous();
    drawn.push_back(sampler.next({last.data_ptr<float>(), static_cast<size_t>(last.numel())}));
    text.push_back(drawn.back());
  }
  t.model.module->train();
  return drawn;
}

/// What is frozen belongs to the model that training began with.
NamedTensors Trainer::Impl::learnt() const {
  NamedTensors tensors;
  for (const train::NamedParameter& parameter : optimizer->parameters()) tensors[parameter.name] = parameter.tensor;
  return tensors;
}

/// Where parameters are split: what they are together, for those that keep it.
NamedTensors Trainer::Impl::whole(const NamedTensors& parts, bool keep) const {
  return split() ? parallel->whole(parts, keep) : parts;
}

void Trainer::Impl::load(const NamedTensors& stored, const NamedTensors& parts, const fs::path& where) const {
  const NamedTensors target = whole(parts, true);
  train::copy_tensors(stored, target, where);
  if (split()) parallel->take(target, parts);
}

/// By the names of parameters, whichever of them are counted together.
std::vector<std::pair<std::string, int64_t*>> Trainer::Impl::optimizer_steps() const {
  std::vector<std::pair<std::string, int64_t*>> all;
  const auto counts = optimizer->steps();
  if (!split()) return {counts.begin(), counts.end()};
  for (size_t i = 0; i < parallel->trained().size(); ++i)
    for (const std::string& name : parallel->names(i)) all.emplace_back(name, counts.at(parallel->trained()[i].name));
  return all;
}

constexpr const char* kRandom = "random.cpu";
constexpr std::string_view kFinetuning = "finetuning.";

void Trainer::save_checkpoint(const fs::path& directory) const {
  const Impl& t = *impl_;
  NamedTensors learnt = t.whole(t.learnt(), t.writes()), moments = t.whole(t.optimizer->state(), t.writes());
  if (!t.writes()) return;
  for (const auto& item : t.model.module->named_buffers()) learnt[item.key()] = item.value();
  for (const auto& [name, tensor] : learnt)
    if (tensor.is_floating_point() && !tensor.isfinite().all().item<bool>())
      not_finite(t.step, fmt::format("'{}'", name), t.config.output);
  train::TrainingState state = {
      .facts = train::run_facts(t.config, t.run_id), .model = std::move(learnt), .optimizer = std::move(moments)};
  state.facts["step"] = t.step;
  state.facts["windows"] = t.windows;
  state.facts["tokens"] = t.tokens;
  state.facts["total_steps"] = t.total_steps;
  state.facts["text_sha256"] = t.text_digest;
  if (!t.base_digest.empty()) state.facts["base_sha256"] = t.base_digest;
  OrderedJson& steps = state.facts["optimizer_steps"] = OrderedJson::object();
  for (const auto& [name, count] : t.optimizer_steps()) steps[name] = *count;
  if (t.finetuning)
    for (const auto& [name, tensor] : t.finetuning->state()) state.optimizer[std::string(kFinetuning) + name] = tensor;
  auto generator = at::detail::getDefaultCPUGenerator();
  {
    const std::lock_guard lock(generator.mutex());
    state.optimizer[kRandom] = generator.get_state();
  }
  train::write_training_state(directory, state, [&](const fs::path& staging) {
    for (const auto& write : t.file_writers) write(staging);
  });
}

void Trainer::Impl::load_optimizer(const NamedTensors& state, const train::RunFacts& facts, const fs::path& where) {
  NamedTensors moments;
  std::map<std::string, Tensor> quantized;
  for (const auto& [name, tensor] : state)
    if (name.starts_with(kFinetuning))
      quantized[name.substr(kFinetuning.size())] = tensor;
    else if (name != kRandom)
      moments[name] = tensor;
  load(moments, optimizer->state(), where);
  if (finetuning) finetuning->load_state(quantized);
  for (const auto& [name, count] : optimizer_steps()) {
    const auto made = facts.optimizer_steps.find(name);
    *count = made == facts.optimizer_steps.end() ? facts.step : made->second;
  }
  const auto random = state.find(kRandom);
  if (random == state.end() || !writes()) return;  // the others' are their own, and new
  auto generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard lock(generator.mutex());
  generator.set_state(random->second);
}

void Trainer::load_checkpoint(const fs::path& directory) {
  Impl& t = *impl_;
  const train::TrainingState state = train::read_training_state(directory);
  const train::RunFacts facts = train::read_run_facts(state.facts, directory);
  if (const std::string key = incompatible_key(facts.config, t.config); !key.empty())
    train::fail_incompatible(facts.config, t.config, key, directory);
  if (!facts.base_sha256.empty() && !t.base_digest.empty() && facts.base_sha256 != t.base_digest)
    throw Error({.code = "incompatible-checkpoint",
                 .what = "cannot go on from checkpoint",
                 .where = directory.string(),
                 .why = fmt::format("its frozen base is not what {} holds now", t.config.model),
                 .fix = "give the model that training began with, or start again in another output"});
  NamedTensors learnt = state.model, buffers, stored_buffers;
  for (const auto& item : t.model.module->named_buffers()) {
    buffers[item.key()] = item.value();
    stored_buffers.insert(learnt.extract(item.key()));
  }
  train::copy_tensors(stored_buffers, buffers, directory);
  t.load(learnt, t.learnt(), directory);
  t.load_optimizer(state.optimizer, facts, directory);
  if (t.parallel) t.parallel->after_step();  // of what is split, what every process has whole
  t.run_id = facts.run_id;
  t.step = facts.step;
  t.windows = facts.windows;
  t.tokens = facts.tokens;
  t.text_digest = facts.text_sha256;
}

void Trainer::require_base(const std::string& digest) { impl_->base_digest = digest; }

bool Trainer::resume() {
  const std::vector<fs::path> found = train::list_checkpoints(impl_->config.output);
  if (found.empty()) return false;
  load_checkpoint(found.back());
  return true;
}

namespace {

bool is_due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

}  // namespace

TrainingResult Trainer::train(const Texts& texts) {
  Impl& t = *impl_;
  const TrainingConfig& c = t.config;
  const train::TokenDataset data(texts.training, texts.sequence_length, static_cast<uint64_t>(c.seed),
                                 texts.vocabulary);
  if (!t.text_digest.empty() && t.text_digest != data.digest())
    throw Error({.code = "incompatible-checkpoint",
                 .what = "cannot go on from checkpoint",
                 .where = c.data.text,
                 .why = "its tokens are not those that training began with",
                 .fix = "give the same text, tokenizer and sequence length, or start again in another output"});
  t.text_digest = data.digest();
  const int64_t all_rows = c.batch_size * c.gradient_accumulation_steps;
  const train::Rows rows = t.parallel ? train::rows_of(t.parallel->group(), all_rows) : train::Rows{0, all_rows};
  t.total_steps = c.max_steps > 0 ? c.max_steps : train::steps_of_epochs(c.epochs, data.windows(), all_rows);
  std::optional<train::RunDirectory> directory;
  if (t.writes()) directory.emplace(c, t.run_id, t.step, t.total_steps);

  TrainingResult result = {.steps = t.step};
  int64_t saved = t.step > 0 ? t.step : -1;
  const auto save = [&] {
    result.checkpoint = train::checkpoint_path(c.output, t.step);
    if (saved == t.step || !(t.writes() || t.split())) return;
    save_checkpoint(result.checkpoint);
    if (t.writes()) train::rotate_checkpoints(c.output, c.keep_checkpoints);
    saved = t.step;
  };
  const auto validate = [&]() -> std::optional<double> {
    if (static_cast<int64_t>(texts.validation.size()) <= texts.sequence_length) return std::nullopt;
    return evaluate(texts.validation, texts.sequence_length, c.eval_windows);
  };
  while (t.step < t.total_steps) {
    if (const auto interruption = t.interruption()) {
      save();
      ErrorReport report = *interruption;
      report.where = fmt::format("step {}", t.step);
      report.fix = fmt::format("add --resume to go on from {}", result.checkpoint.string());
      throw Error(report);
    }
    StepResult step = training_step(data.batch(t.windows + rows.first, rows.count));
    if (t.step == t.total_steps || is_due(c.eval_every, t.step)) step.val_loss = validate();
    if (directory) directory->add(step, t.tokens);
    for (const auto& observer : t.step_observers) observer(step);
    if ((directory || t.split()) && texts.encode && is_due(c.sample_every, t.step)) {
      const std::vector<int32_t> prompt = texts.encode(c.sample_prompt);
      const auto drawn = sample(prompt, c.sample_tokens, c.sample_temperature, texts.sequence_length);
      if (directory) directory->add_sample(t.step, c.sample_prompt, texts.decode(drawn));
    }
    if (t.step < t.total_steps && is_due(c.checkpoint_every, t.step)) save();
    result.steps = t.step;
    result.loss = step.loss;
    if (step.val_loss) result.val_loss = step.val_loss;
  }
  save();
  return result;
}

void Trainer::observe_activations(ActivationObserver observer) {
  impl_->activation_observers.push_back(std::move(observer));
}
void Trainer::transform_gradients(GradientTransform transform) {
  impl_->gradient_transforms.push_back(std::move(transform));
}
void Trainer::after_step(std::function<void(const StepResult& result)> observer) {
  impl_->step_observers.push_back(std::move(observer));
}
void Trainer::add_files(std::function<void(const fs::path& directory)> write) {
  impl_->file_writers.push_back(std::move(write));
}

int64_t Trainer::step() const { return impl_->step; }
const TrainingConfig& Trainer::config() const { return impl_->config; }
const std::string& Trainer::run_id() const { return impl_->run_id; }
torch::nn::Module& Trainer::module() { return *impl_->model.module; }

}  // namespace bitwright
