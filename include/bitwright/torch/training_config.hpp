#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "bitwright/json.hpp"

namespace bitwright {

/// What is trained, on what, and how. Each member is a key of the YAML file, declared with its default, help and check
/// in one table (training_config.cpp); what a file does not say is as it is here, so that old files load.
struct TrainingConfig {
  // The model: `model` goes on from a checkpoint, `architecture` begins with random weights.
  std::string model{};         ///< directory or file, in any container
  std::string architecture{};  ///< path of a config.json, or its text ("{...}"; a mapping in the YAML file)
  std::string tokenizer{};     ///< empty: the model's own

  struct Data {
    std::string text{};               ///< plain text, or JSON Lines with a "text" a line
    std::string validation{};         ///< another one; empty: the end of `text`
    double validation_fraction = .1;  ///< of the tokens of `text`, where `validation` is empty
    std::string split{};              ///< what separates documents in a plain text
    std::string bos = "auto";         ///< auto (as the tokenizer), document, none
    int64_t sequence_length = 0;      ///< inputs of a window; 0: 512 or the model's context, whichever is less
  } data{};

  // SPECIFICATION C4.
  std::string quantization_mode = "none";    ///< none (null), ptq, qat
  int64_t quantization_bits = 8;             ///< 8, 4; others by the section `quantization`
  std::string quantization_type = "static";  ///< of activations, where they are quantized: static, dynamic
  bool enable_quantized_finetuning = false;
  std::string quantization{};  ///< text of the section `quantization` (JSON) as `bitwright quantize` has it; or empty
  std::string container = "native";      ///< of the exported model where it is quantized
  std::string export_dtype = "float32";  ///< of what is not quantized in it: float32, bfloat16, float16

  /// Of quantization_mode qat: what the section `quantization` does not say. As in QatConfig.
  struct Qat {
    std::string scales = "auto";            ///< of weights: auto, learned (LSQ), computed
    std::string initial_scales = "search";  ///< of learned ones: search, lsq
    double scale_lr = 1;                    ///< learned ones' learning rate, as a share of learning_rate
    bool distill = false;                   ///< the loss is KL(the model in floats || this one), not the text's
    std::string activation_type = "int8";   ///< of inputs that are quantized: int8, int4, e4m3, e5m2
    bool symmetric_activations = true;      ///< false: with zero points
    std::string activation_ranges = "moving_average";  ///< of static ones: minmax, moving_average, percentile, learned
    double averaging = 0.01, percentile = 99.99;
  } qat{};

  struct Lora {
    int64_t r = 0;  ///< 0: no adapters
    double alpha = 16, dropout = 0;
    std::vector<std::string> target_modules = {"all-linear"};
    std::string init = "default";  ///< default, gaussian, loftq
    std::string merge = "none";    ///< at the end: none (an adapter directory), floats, requantize
  } lora{};

  // How long, how much at a time.
  int64_t max_steps = 0;  ///< optimizer steps; 0: as many as `epochs` takes
  double epochs = 1;      ///< passes over the windows of `text`
  int64_t batch_size = 8;
  int64_t gradient_accumulation_steps = 1;

  std::string optimizer = "adamw";  ///< adamw, adamw8bit
  double learning_rate = 3e-4, weight_decay = 0.1;
  std::vector<double> betas = {0.9, 0.95};
  double epsilon = 1e-8;
  int64_t warmup_steps = 0;
  std::string schedule = "cosine";  ///< cosine, constant
  double min_learning_rate = 0.1;   ///< where the cosine ends, as a share of learning_rate
  double max_grad_norm = 1;         ///< 0: gradients are not clipped
  std::string dtype = "float32";    ///< of matrix products: float32, bfloat16 (weights stay float32)
  bool activation_checkpointing = false;
  std::string sharding = "none";  ///< of several processes: none, parameters (and gradients, optimizer state)
  int64_t seed = 0;

  int64_t eval_every = 0;    ///< steps; 0: at the end only
  int64_t eval_windows = 0;  ///< 0: all
  int64_t sample_every = 0;  ///< 0: never
  std::string sample_prompt = "Once upon a time";
  int64_t sample_tokens = 40;
  double sample_temperature = 0;
  int64_t checkpoint_every = 0;  ///< 0: at the end only
  int64_t keep_checkpoints = 2;
  int64_t log_every = 10;  ///< lines on the terminal; loss.jsonl has every step

  std::string output = "training-output";

  /// From a YAML or JSON file, then KEY=VALUE for each of `set` (--set). Throws Error (exit status 2) naming the file
  /// and the key: unknown ones with the nearest that is known, values with those that are valid, and what contradicts.
  static TrainingConfig read(const std::filesystem::path& path, const std::vector<std::string>& set = {});
  static TrainingConfig from_json(const OrderedJson& config, const std::string& where = "configuration");
  /// Every key with its value.
  OrderedJson to_json() const;
  /// 16 hexadecimal digits, the same for the same to_json().
  std::string hash() const;
  /// Does what belongs together agree? Called by read() and from_json(). Throws Error (exit status 2).
  void check(const std::string& where = "configuration") const;
};

/// What of `now` cannot be changed while training goes on from where it was with `before`: the first such key, or
/// empty.
std::string incompatible_key(const TrainingConfig& before, const TrainingConfig& now);

}  // namespace bitwright
