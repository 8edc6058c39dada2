#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/json.hpp"
#include "container/container.hpp"
#include "quantize/quantize.hpp"
#include "scheme/quantized_linear.hpp"

namespace bitwright::train {

/// A quantized weight [outputs, inputs] and what is done to its layer's activations.
struct StoredLinear {
  std::shared_ptr<const QuantizedTensor> weight{};
  QuantizedLinear activations{};
};
/// What a LinearBehaviour is too when its weight has a quantized form that is to be stored exactly as it is.
class StoresQuantized {
 public:
  virtual ~StoresQuantized() = default;
  virtual StoredLinear stored() const = 0;
};

/// A tensor on its way into a file: floats, or a quantized matrix.
struct ExportedTensor {
  std::string name;
  torch::Tensor floats{};  ///< undefined: it is quantized
  StoredLinear quantized{};
  DType value_dtype = DType::f32;  ///< of the floats that a quantized one stands for
  bool transposed = false;         ///< the file has it [inputs, outputs], the model here [outputs, inputs]
};
/// All parameters and buffers of a module by their names; of linear layers weight and bias, as a behaviour that
/// StoresQuantized says. Throws Error{"not-exportable"} for a linear layer with another behaviour, whose parameter
/// alone would compute something else (an adapter, fake quantization): merge or convert first.
std::vector<ExportedTensor> exported_tensors(const torch::nn::Module& module);

/// Does any of them need a container? Frozen matrices in bfloat16 do not.
bool has_quantized(const std::vector<ExportedTensor>& tensors);

/// What belongs to a model beside its tensors.
struct ExportSource {
  OrderedJson config;                 ///< config.json; what it says of quantization is replaced
  std::filesystem::path directory{};  ///< whose tokenizer and other side files go along; empty: none
};
ExportSource export_source(const Checkpoint& checkpoint);

struct ExportOptions {
  OutputOptions output{};
  /// What holds the quantized tensors, one with write_metadata. Null: plain floats, what is quantized is decoded.
  const Container* container = nullptr;
  /// Of what is not quantized: f32, f16, bf16. Nothing: each stays of its own type.
  std::optional<DType> floats = DType::f32;
  OrderedJson record{};  ///< "training" of quantization_metadata.json, where the container has it (native)
};

/// Writes a model as all other commands take it: weights, config.json, quantization_metadata.json with the digests of
/// all files, side files; complete or not at all. Nothing is rounded but floats to their type. An output that ends in
/// ".safetensors" is one file, with the JSON files in its header and no side files.
/// Throws Error{"does-not-fit"} where the container cannot hold a scheme, {"not-finite"} where a weight is not, and
/// what OutputDirectory throws.
void export_model(const std::vector<ExportedTensor>& tensors, const ExportSource& source, const ExportOptions& options);

}  // namespace bitwright::train
