#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bitwright/torch/training_config.hpp"

namespace bitwright {

class QuantizedFinetuning;
namespace train {
class ParallelModel;
}

/// What a Trainer needs of a model: any module, and how it is called.
struct TrainableModel {
  std::shared_ptr<torch::nn::Module> module{};
  /// Token ids [batch, length] int64 → logits [batch, length, vocabulary].
  std::function<torch::Tensor(const torch::Tensor& inputs)> logits{};
  /// Mean cross-entropy of the tokens that follow, in nats; null: from the logits.
  std::function<torch::Tensor(const torch::Tensor& inputs, const torch::Tensor& targets)> loss{};
  /// Type of its products, before each forward pass; null: bfloat16 is autocast's work.
  std::function<void(torch::ScalarType type)> set_compute{};
};

/// What one optimizer step did.
struct StepResult {
  int64_t step = 0;      ///< how many are done
  double loss = 0;       ///< mean over the step's tokens, before the update
  double lr = 0;         ///< of this step
  double grad_norm = 0;  ///< before clipping
  int64_t tokens = 0;    ///< that were predicted in this step
  double tokens_per_second = 0;
  std::optional<double> val_loss{};
};

/// What a run ends with: INTERFACES.md "train".
struct TrainingResult {
  int64_t steps = 0;
  std::optional<double> loss{};  ///< of the last step; none where no step was left
  std::optional<double> val_loss{};
  std::filesystem::path checkpoint{};  ///< the newest
};

/// Next-token training of a model: AdamW, warm-up and cosine, clipping, accumulation, bfloat16 products.
/// Deterministic: the same configuration, data and threads give the same numbers, and so does a run that was
/// interrupted and resumed from a checkpoint. Not for several threads.
class Trainer {
 public:
  /// A module of any kind. What of the configuration names files is not looked at.
  /// Its parameters that require gradients learn; they are float32. finetuning: the quantized matrices that learn too.
  /// Seeds libtorch's random numbers.
  /// Throws Error{"nothing-to-train"}, and as TrainingConfig::check().
  /// parallel: one of several processes that train the module. The sequences of a step are divided among them, so that
  /// the same configuration trains the same for every number of processes; process 0 writes the files.
  Trainer(TrainableModel model, TrainingConfig config, std::shared_ptr<QuantizedFinetuning> finetuning = nullptr,
          std::shared_ptr<train::ParallelModel> parallel = nullptr);
  ~Trainer();
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// One optimizer step on tokens [sequences, length + 1] int64: forward and backward for batch_size sequences at a
  /// time, whose gradients are averaged.
  /// Throws Error{"wrong-shape"}, {"not-finite"} for a loss or gradient that is NaN or infinite; then no weight has
  /// changed.
  StepResult training_step(const torch::Tensor& tokens);
  /// Mean cross-entropy in nats over windows of `length` inputs, not overlapping, in float32: what `bitwright eval`
  /// gives for these tokens with --context length. most: windows; 0: all.
  double evaluate(std::span<const int32_t> tokens, int64_t length, int64_t most = 0);
  /// `count` tokens that follow `prompt`; temperature 0: the likeliest.
  std::vector<int32_t> sample(std::span<const int32_t> prompt, int64_t count, double temperature, int64_t context);

  /// All steps that are left of the configuration's, on windows of `text` in an order drawn by the seed; evaluates,
  /// samples and writes loss.jsonl and checkpoints into config().output as it says. Ctrl-C writes a checkpoint and
  /// throws Error{"interrupted"} (exit status 130).
  struct Texts {
    std::vector<int32_t> training{}, validation{};  ///< token ids; validation may be empty
    int64_t sequence_length = 0;
    int64_t vocabulary = 0;                                                 ///< tokens are below it; 0: not checked
    std::function<std::vector<int32_t>(const std::string& text)> encode{};  ///< for samples; null: none
    std::function<std::string(std::span<const int32_t> tokens)> decode{};
  };
  TrainingResult train(const Texts& texts);

  /// Model, optimizer, step, random numbers and place in the data, whole or not at all.
  void save_checkpoint(const std::filesystem::path& directory) const;
  /// Goes on bit for bit from where that was. Throws Error{"incompatible-checkpoint"}, {"checkpoint-damaged"}.
  void load_checkpoint(const std::filesystem::path& directory);
  /// What does not learn is in no checkpoint. From now on `digest`, of the model it came from, is: load_checkpoint()
  /// refuses one that was made with another. Called before.
  void require_base(const std::string& digest);
  /// The newest checkpoint below config().output is loaded; false: there is none.
  bool resume();

  // Hooks. They are called in the order they were added.
  /// Sees what goes into and comes out of each linear layer in training steps (with activation_checkpointing twice).
  using ActivationObserver =
      std::function<void(const std::string& path, const torch::Tensor& input, const torch::Tensor& output)>;
  void observe_activations(ActivationObserver observer);
  /// May change gradients in place, after accumulation and before clipping: name → gradient.
  using GradientTransform = std::function<void(std::map<std::string, torch::Tensor>& gradients)>;
  void transform_gradients(GradientTransform transform);
  /// After each optimizer step of train(), evaluation included.
  void after_step(std::function<void(const StepResult& result)> observer);
  /// What is written into each checkpoint besides: tokenizer, config.json, quantization_metadata.json.
  void add_files(std::function<void(const std::filesystem::path& directory)> write);

  int64_t step() const;
  const TrainingConfig& config() const;
  const std::string& run_id() const;
  torch::nn::Module& module();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitwright
