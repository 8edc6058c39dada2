#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "bitwright/engine/plan.hpp"
#include "bitwright/torch/ptq.hpp"
#include "bitwright/torch/quantization_config.hpp"

namespace bitwright {

/// What belongs to a saved model beside its weights.
struct ModelFiles {
  OrderedJson config = OrderedJson::object();  ///< config.json, which gets what the library expects in it
  std::filesystem::path directory{};           ///< whose tokenizer and other side files go along; empty: none
};

/// One library's way of quantizing, on one backend (SPECIFICATION D2). Ours compute the library's schemes with
/// Bitwright's kernels on the CPU and write the library's files.
class QuantizationAdapter {
 public:
  QuantizationAdapter(std::string backend, QuantizationConfig config)
      : backend_(std::move(backend)), config_(std::move(config)) {}
  QuantizationAdapter(const QuantizationAdapter&) = delete;
  QuantizationAdapter& operator=(const QuantizationAdapter&) = delete;
  virtual ~QuantizationAdapter() = default;

  virtual std::string_view name() const = 0;  ///< "BitsAndBytes"
  const std::string& backend() const { return backend_; }
  const QuantizationConfig& config() const { return config_; }
  /// What speaks against the configuration on the backend, "BACKEND_UNSUPPORTED" among it where the library does not
  /// run there: what the adapter does in its place is then a fallback.
  const std::vector<Diagnostic>& issues() const { return issues_; }

  /// A layer with libtorch's usual random weights, quantized whatever config().skip_modules says.
  virtual torch::nn::Linear create_quantized_linear(int64_t in_features, int64_t out_features, bool bias = true) = 0;
  /// The linear layers of any module, in place. What the config skips and what its scheme cannot hold stays in floats.
  virtual QuantizationInfo quantize_model(torch::nn::Module& model) = 0;
  /// For adapters like LoRA: nothing of the model learns any more, and floats of 16 bits outside the linear layers
  /// (norms) become float32.
  virtual void prepare_model_for_training(torch::nn::Module& model) = 0;
  /// A name that ends in ".safetensors": one file with everything in it; else a directory with config.json.
  virtual void save_quantized_model(const torch::nn::Module& model, const std::filesystem::path& path,
                                    const ModelFiles& files = {}) = 0;
  virtual QuantizationInfo load_quantized_model(torch::nn::Module& model, const std::filesystem::path& path) = 0;

 protected:
  std::vector<Diagnostic> issues_{};

 private:
  std::string backend_;
  QuantizationConfig config_;
};

/// backend: cuda, mps, mlx or cpu. Where the library of config.method does not run on it, the "Fallback", which gives
/// the same model by our own kernels and says so in issues(). Throws Error (exit status 2) for names nobody knows.
std::unique_ptr<QuantizationAdapter> create_quantization_adapter(const std::string& backend,
                                                                 const QuantizationConfig& config);

/// A user's own adapter, which create_quantization_adapter() makes for configs with this method from now on, also one
/// of the nine. A null one takes it back. Safe in several threads.
using AdapterFactory =
    std::function<std::unique_ptr<QuantizationAdapter>(const std::string& backend, const QuantizationConfig& config)>;
void register_quantization_adapter(const std::string& method, AdapterFactory factory);

// Each of these is the adapter's for `backend`.
torch::nn::Linear create_quantized_linear(int64_t in_features, int64_t out_features, bool bias,
                                          const QuantizationConfig& config, const std::string& backend = "cpu");
QuantizationInfo quantize_model(torch::nn::Module& model, const QuantizationConfig& config,
                                const std::string& backend = "cpu");
/// The same; the layers stay the objects that they are, so that no module needs to look for new ones.
QuantizationInfo replace_linear_with_quantized(torch::nn::Module& model, const QuantizationConfig& config,
                                               const std::string& backend = "cpu");
void prepare_model_for_training(torch::nn::Module& model);

/// Writes the quantized layers as `format`, a container, has them, all else in floats as it is. Complete or not at all;
/// what is there is not replaced. Throws Error{"does-not-fit"} where the container cannot hold a layer's scheme,
/// {"output-exists"}.
void save_quantized_model(const torch::nn::Module& model, const std::filesystem::path& path,
                          const std::string& format = "native", const ModelFiles& files = {});
/// Reads any checkpoint into a module whose parameters have the names of its tensors: a directory with config.json, one
/// file with its configuration in it, files of HQQ (.pt, nothing in it is run) and MLX (.npz, .safetensors), GGUF.
/// Layers that are quantized there become so here, exactly. Throws Error{"missing-tensor"}, {"wrong-shape"}; the module
/// is then as it was. Tensors that the module has no place for are named in `warnings`.
QuantizationInfo load_quantized_model(torch::nn::Module& model, const std::filesystem::path& path);

}  // namespace bitwright
