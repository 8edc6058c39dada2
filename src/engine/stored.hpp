#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>  // facts of the model
#include <span>
#include <vector>

#include "checkpoint/weight_file.hpp"
#include "engine/detect.hpp"
#include "engine/lint.hpp"

namespace bitwright {

/// What weight files say by themselves: names, types and shapes of their arrays, and the metadata of a GGUF file.
struct StoredWeights {
  DetectedQuantization quantization{};  ///< method empty: nothing is stored as quantized weights are
  std::vector<LinearModule> modules{};  ///< in the order of the arrays; sizes that no array tells are 0
  double parameters = 0;                ///< what the arrays stand for, as far as they tell
  double bytes = 0;                     ///< of all arrays
  Json model = Json::object();          ///< of GGUF: what model_facts gives of a config.json
};

/// `metadata`: of the file beside its arrays (GGUF), or null. Of the arrays' data only small ones are read, those that
/// hold shapes and settings.
StoredWeights read_stored(std::span<const StoredArray> arrays, const Json* metadata = nullptr);
/// The same of a model's files; reads headers only. Throws Error naming the file and what is wrong with it.
StoredWeights read_stored(const std::vector<std::filesystem::path>& files);

/// What the configuration says of all layers and no array shows: zero points that lie in the middle (sym), act-order.
void apply_declared(const DetectedQuantization& declared, std::vector<LinearModule>& modules);

/// Facts for planning from a GGUF file's metadata, named as model_facts names them.
Json gguf_model_facts(const Json& metadata);

}  // namespace bitwright
