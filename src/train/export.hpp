#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <memory>
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
  bool transposed = false;  ///< the file has it [inputs, outputs], the model here [outputs, inputs]
};
/// All parameters and buffers of a module by their names, linear layers whose behaviour StoresQuantized as it says,
/// those with another one as their parameter "weight" has it. Of a CausalLm under the names its checkpoint has.
/// Throws Error{"not-exportable"} for a linear layer whose parameter is not its weight in floats.
std::vector<ExportedTensor> exported_tensors(const torch::nn::Module& module);

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
  DType floats = DType::f32;  ///< of what is not quantized: f32, f16, bf16
  OrderedJson record{};       ///< added to quantization_metadata.json under "training"
};

/// Writes a model as all other commands take it: weights, config.json, quantization_metadata.json with the digests of
/// all files, side files; complete or not at all. Nothing is rounded but floats to their type.
/// Throws Error{"does-not-fit"} where the container cannot hold a scheme, {"not-finite"} where a weight is not, and
/// what OutputDirectory throws.
void export_model(const std::vector<ExportedTensor>& tensors, const ExportSource& source, const ExportOptions& options);

}  // namespace bitwright::train
