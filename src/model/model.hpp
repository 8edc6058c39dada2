#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "model/model_config.hpp"

namespace bitwright {

class LoraAdapter;
struct GgufMapping;

/// One family of models the runtime can run: a row of a table (architectures.def).
struct Architecture {
  std::string_view name;        ///< config.json's `architectures[0]`
  std::string_view model_type;  ///< config.json's `model_type`
  /// What config.json says, and where the tensors lie. Throws Error{"bad-config"} naming the key that is missing, of
  /// the wrong type or out of range, {"unsupported-config"} naming one that would change the result in a way not
  /// computed.
  ModelConfig (*configure)(const Json& config, const std::string& where);
  const GgufMapping* gguf = nullptr;  ///< null: llama.cpp has no model of this architecture, or calls it by another's
};
std::span<const Architecture* const> all_architectures();
/// Null where config.json names none that is known.
const Architecture* find_architecture(const Json& config);
/// Throws Error{"unknown-architecture"} where it is null, and what its `configure` throws.
ModelConfig read_model_config(const Json& config, const std::string& where);

/// Keys and values of one sequence, f32, for up to `capacity` tokens. Where a model's rotary positions depend on the
/// sequence's length, the capacity counts as it. Throws Error{"context-full"} where the model has fewer positions.
class KvCache {
 public:
  KvCache(const ModelConfig& config, int64_t capacity);
  ~KvCache();
  KvCache(KvCache&&) noexcept;
  int64_t length() const;
  int64_t capacity() const;
  uint64_t bytes() const;  ///< of keys and values
  void clear();            ///< length becomes 0
  /// Forgets what comes after the first `length` tokens, so that others may follow them. Needs length <= length().
  void truncate(int64_t length);

 private:
  friend class Model;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A matrix of the model by the tensor of the checkpoint that holds it. Several may be cut from one.
struct MatrixName {
  std::string tensor{};  ///< "model.layers.0.self_attn.q_proj.weight"
  int64_t index = -1;    ///< of a stack of matrices [count, rows, columns]; -1: the tensor is none
  bool operator==(const MatrixName&) const = default;
  bool operator<(const MatrixName& other) const {
    return std::tie(tensor, index) < std::tie(other.tensor, other.index);
  }
};
/// Told what matrices of the layers are about to be multiplied with: `x`, [tokens, columns], in the text's order, the
/// same for all of `matrices`. Experts are told of the tokens that are sent to them.
using InputObserver =
    std::function<void(std::span<const MatrixName* const> matrices, std::span<const float> x, size_t tokens)>;

/// A loaded model. Weights are repacked once into the layout of the kernels, floats in their own dtype. No float copy
/// of the model is made. Immutable after loading.
class Model {
 public:
  /// Keeps a reference to `checkpoint`. Throws Error{"unknown-architecture"}, {"bad-config"}, {"missing-tensor"},
  /// {"wrong-shape"}, {"unsupported-tensor"} naming the tensor.
  /// adapter: of this checkpoint's model; its layers compute with it. Throws Error{"bad-adapter"} if it is none.
  explicit Model(const Checkpoint& checkpoint, const LoraAdapter* adapter = nullptr);
  ~Model();
  Model(Model&&) noexcept;

  const ModelConfig& config() const;
  /// What the weights take in memory. An embedding that is no output matrix too stays in the mapped file, and counts.
  uint64_t weight_bytes() const;

  enum class Logits { all, last };
  /// Appends `tokens` (each in [0, vocabulary)) to the sequence in `cache` and returns the logits of each of them, or
  /// of the last alone: [tokens or 1, vocabulary]. Throws Error{"context-full"} if the cache cannot take them.
  /// Deterministic: the same bits for every thread count and instruction set. observer: null, nobody is told anything.
  std::vector<float> forward(std::span<const int32_t> tokens, KvCache& cache, Logits which = Logits::all,
                             const InputObserver* observer = nullptr) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct Sampling {
  float temperature = 0;  ///< 0: the most likely token (the lowest id on a tie)
  int top_k = 0;          ///< 0: all
  float top_p = 1;
  uint64_t seed = 0;
};

/// Draws token after token; the same seed gives the same tokens on every machine.
class Sampler {
 public:
  explicit Sampler(const Sampling& settings);
  int32_t next(std::span<const float> logits);

 private:
  Sampling settings_;
  uint64_t state_;
};

}  // namespace bitwright
