#pragma once

#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/json.hpp"
#include "checkpoint/checkpoint.hpp"
#include "model/model_config.hpp"

namespace bitwright::train {

/// Asked for each linear layer of a checkpoint before its weight is read, e.g. to attach a behaviour that keeps it
/// quantized: true, the weight has been taken care of; false, it is decoded to floats. The layer's weight has sizes and
/// type, and no numbers. `entry` is the transpose of it where `transposed`. Biases are none of its business.
using LinearLoader = std::function<bool(const std::string& path, torch::nn::LinearImpl& layer,
                                        const Checkpoint& checkpoint, const TensorEntry& entry, bool transposed)>;

/// Called around each use of a layer; they are counted from 0.
struct LayerHooks {
  std::function<void(size_t layer)> before{}, after{};
  std::function<void(size_t layer)> after_backward{};  ///< in after()'s place, once its parameters have their gradients
};

struct CausalLmOptions {
  torch::ScalarType compute = torch::kFloat32;   ///< of matrix products: float32 or bfloat16; all else is float32
  torch::ScalarType matrices = torch::kFloat32;  ///< what matrices are kept in; bfloat16 asks for compute in bfloat16
  /// Activations within a layer are not kept for backward(), but computed again there (with the same random numbers).
  /// What is inside gets its gradients from backward(); torch::autograd::grad() cannot ask for them.
  bool recompute_layers = false;
  LayerHooks hooks{};          ///< all or none; with them layers are computed again in backward() in any case
  uint64_t seed = 0;           ///< of random weights
  LinearLoader load_linear{};  ///< null: all become floats
};

/// A decoder-only transformer as the runtime's description of its architecture (ModelConfig) has it, to be trained.
/// Modules and parameters have the names of the checkpoint's tensors ("model.layers.0.self_attn.q_proj.weight"). Each
/// matrix but the embeddings is the weight of a torch::nn::Linear, [outputs, inputs] however it is stored. A head that
/// is tied to the embedding is no module: its weight is the embedding's.
class CausalLm : public torch::nn::Module {
 public:
  /// Random weights: normal with deviation 0.02, those that write to the residual stream (attention's and the
  /// feed-forward network's output) by 1 / sqrt(2 layers) less; biases 0, norms 1. `config`: config.json.
  /// Throws Error{"unknown-architecture"}, {"bad-config"}, {"unsupported-config"} (experts among them).
  explicit CausalLm(const Json& config, const CausalLmOptions& options = {});
  /// Quantized or not, in any container; GGUF as open_model() shows it. Throws as Model does.
  explicit CausalLm(const Checkpoint& checkpoint, const CausalLmOptions& options = {});
  ~CausalLm() override;

  /// tokens: [batch, length] int64, each in [0, vocabulary), all sequences from their beginning.
  /// Returns logits, [batch, length, vocabulary] float32.
  /// Throws Error{"context-full"} where the model has fewer positions.
  torch::Tensor forward(const torch::Tensor& tokens);
  /// What the head reads: [batch, length, hidden] float32, after the last norm.
  torch::Tensor hidden(const torch::Tensor& tokens);
  /// Logits of hidden().
  torch::Tensor logits(const torch::Tensor& hidden);
  /// Mean cross-entropy in nats; targets: [batch, length] int64, the tokens that follow; negative ones do not count.
  torch::Tensor loss(const torch::Tensor& tokens, const torch::Tensor& targets);

  const ModelConfig& config() const;
  const Json& config_json() const;  ///< config.json
  torch::nn::LinearImpl& head();    ///< its weight may be the embedding's
  bool tied_head() const;
  CausalLmOptions& options();  ///< compute, recompute_layers and hooks may be changed at any time
  std::vector<std::string> layer_paths() const;  ///< "model.layers.0", …
  /// Does a file have this parameter [inputs, outputs], transposed to what it is here (GPT-2)?
  bool stored_transposed(const std::string& parameter) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitwright::train
