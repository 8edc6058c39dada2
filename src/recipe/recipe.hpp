#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "algorithm/algorithm.hpp"
#include "base/error.hpp"
#include "base/json.hpp"
#include "container/container.hpp"
#include "scheme/scheme.hpp"

namespace bitwright {

/// What the user asked for one tensor: explicit values, else what intent leaves open.
struct QuantizationSettings {
  std::optional<std::string> method{}, gguf_type{}, algorithm{}, range{}, granularity{}, scale_dtype{}, quant_type{};
  std::optional<int64_t> bits{}, group_size{};
  std::optional<bool> symmetric{}, nested_scales{}, weight_only{};
};

/// Settings for the modules that `pattern` matches.
struct LayerRule {
  std::string pattern;
  QuantizationSettings settings;
};

struct QuantizationRequest {
  QuantizationSettings settings;
  std::vector<std::string> skip_modules;
  bool skip_embeddings = true;  ///< unless a layer rule names them, or the container's owner quantizes them too
  bool skips_given = false;     ///< skip_modules are the user's, not the usual ones
  std::vector<LayerRule> rules;
  bool has_statistics = false;  ///< the importance of the weights' columns is known
};

/// Reads the `quantization` section of a configuration that check_config accepted. Order of layer_configs: as in
/// `config` (a mapping of JSON is sorted by name; the more specific rule should not depend on it).
QuantizationRequest read_request(const OrderedJson& config);

/// A tensor of the model, as far as a recipe needs it.
struct TensorFacts {
  std::string name;
  Shape shape;
  bool is_float = true;
  size_t bytes = 2;  ///< of an element
  DType dtype = DType::bf16;
  bool inputs_first = false;  ///< a matrix that is stored [inputs, outputs]
  TensorRole role{};
};

/// The reason why norms and biases are kept, which goes without saying.
inline constexpr std::string_view kNotMatrix = "not a matrix";

/// What happens to one tensor.
struct TensorPlan {
  std::string name;
  std::optional<Scheme> scheme{};  ///< none: kept as it is
  QuantizedLinear linear{};        ///< what is done to the layer's activations
  const Algorithm* algorithm = nullptr;
  AlgorithmOptions options{};
  std::string reason{};  ///< why it is kept
  std::string note{};    ///< why it is not quantized as others are (Container::note_for)
};

struct Recipe {
  std::vector<TensorPlan> tensors;  ///< in the order of the facts
  OrderedJson settings;             ///< the request with every default filled in
  std::vector<Warning> warnings;
};

/// Which scheme and algorithm each tensor gets; the first rule that matches wins. Pure. `container` fills in what the
/// request leaves open, the method too, from its table of choices; null, or one without a table: what is common.
/// Throws Error (exit status 2) if settings contradict each other or nothing would be quantized.
Recipe resolve(const QuantizationRequest& request, std::span<const TensorFacts> tensors,
               const Container* container = nullptr);

/// What a row of the container's table of choices makes of a weight of this type; the container may refuse it.
Scheme scheme_of(const SchemeChoice& choice, const Container& container, DType weight);

/// The row that --gguf-type names, in any case; "q4_k" is llama.cpp's Q4_K_M. Throws Error for what it has not.
const SchemeChoice* named_choice(const std::string& given, const Container& container);

/// Is it a table that is looked up (of tokens, positions …), by the names that models give them?
bool is_embedding(std::string_view tensor);
/// The matrix that gives the logits.
bool is_head(std::string_view tensor);

/// Does `pattern` name this tensor's module? A glob (*, ?) is compared with the whole name, with and without ".weight";
/// other patterns match whole components in a row: "model.layers.0", "down_proj".
bool matches(std::string_view pattern, std::string_view tensor);

}  // namespace bitwright
