#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "container/container.hpp"
#include "kernels/elementwise.hpp"

namespace bitwright {

// GGUF names configuration keys and tensors in its own way, and llama.cpp lays some tensors out for its own kernels
// (gguf-py/gguf/constants.py and conversion, llama.cpp b8000). What of that an architecture needs is a field of its
// row.

/// How the rows of a GGUF tensor become the model's.
enum class GgufRows : uint8_t {
  same,
  pairs_of_heads,  ///< the two that turn together lie side by side: row 2 i + j of a head is the model's j * half + i
  pairs_of_kv_heads,  ///< likewise, of keys
  parts_of_heads,     ///< q of all heads, k of all, v of all; the model has q, k and v of each head together
  transposed,         ///< matrices alone; the model has [inputs, outputs]
  experts,            ///< [experts, rows, columns]; the model has a matrix an expert
  minus_one,          ///< GGUF stores 1 + weight
};

/// Names without ".weight" and ".bias"; {0} stands for the layer, {1} for the expert.
struct GgufTensor {
  std::string_view gguf;
  std::string_view model;
  GgufRows rows = GgufRows::same;
};

struct GgufKey {
  std::string_view gguf;  ///< without the architecture before it: "block_count"
  const char* model;      ///< in config.json
};

/// What a GGUF file says of its model.
class GgufFacts {
 public:
  explicit GgufFacts(const CheckpointView& stored) : stored_(stored) {}
  /// By its whole name; null if there is none.
  const Json* find(std::string_view key) const;
  /// By its name after the architecture: "block_count".
  const Json* own(std::string_view key) const;
  std::string architecture() const;
  /// In [low, high]; `missing` if there is no such key. Throws Error{"bad-config"}.
  int64_t integer(std::string_view key, int64_t low, int64_t high, int64_t missing) const;
  double number(std::string_view key, double missing) const;
  bool has_tensor(std::string_view name) const { return stored_.arrays.contains(name); }
  /// The numbers of a plain floating tensor as JSON, null if there is none.
  Json numbers(const std::string& tensor) const;
  [[noreturn]] void fail(const std::string& why) const;
  const CheckpointView& stored() const { return stored_; }

 private:
  const CheckpointView& stored_;
};

struct GgufMapping {
  std::string_view architecture;  ///< general.architecture
  bool routed = false;            ///< has experts: tells Mixtral from Llama, which share a name
  std::span<const GgufKey> keys;
  std::span<const GgufKey> own_keys{};
  std::span<const GgufTensor> tensors;
  std::span<const GgufTensor> shared_tensors{};  ///< looked up after `tensors`
  /// Adds to config.json what does not follow from one key alone. May be null.
  void (*complete)(const GgufFacts& facts, Json& config) = nullptr;
  // What llama.cpp computes, beside what the keys say.
  bool windows = false;                      ///< heeds attention.sliding_window
  bool window_key = false;                   ///< has the key, which is not heeded
  bool rope_factors = false;                 ///< divides frequencies by rope_freqs.weight
  bool biases = false;                       ///< matrices may have biases
  Activation activation = Activation::silu;  ///< of the feed-forward network
};

/// Row r of the model's tensor is row order[r] of GGUF's: of pairs_of_heads (or of keys), and of parts_of_heads.
std::vector<int64_t> order_of_pairs(int64_t rows, int64_t heads);
std::vector<int64_t> order_of_parts(int64_t rows, int64_t heads);

extern const GgufMapping kGgufLlama, kGgufGemma3;  ///< of others too: Mistral; Gemma 3 that sees images

// What most have in common, because they are Llama with differences.
extern const std::span<const GgufKey> kGgufLlamaKeys;
extern const std::span<const GgufTensor> kGgufLlamaTensors;  ///< as Llama but for the order of q's and k's rows
/// rope_scaling from rope.scaling.* (without a type it is linear, as in llama.cpp), partial_rotary_factor from
/// rope.dimension_count; nothing where there is nothing to say.
void set_gguf_rope(const GgufFacts& facts, Json& config);
double gguf_yarn_magnitude(double factor);  ///< what llama.cpp multiplies sines and cosines by, unasked

/// rope_scaling from the tensor rope_freqs.weight, by which each pair's frequency is divided (Llama 3.1).
void set_gguf_rope_factors(const GgufFacts& facts, Json& config);
/// sliding_window, null where there is none.
void set_gguf_window(const GgufFacts& facts, Json& config);

}  // namespace bitwright
