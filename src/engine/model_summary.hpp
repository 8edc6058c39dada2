#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "base/error.hpp"
#include "base/json.hpp"
#include "checkpoint/checkpoint.hpp"
#include "engine/stored.hpp"

namespace bitwright {

/// What can be said of a model without reading its weights. Its weights may not be there: a directory with nothing but
/// a config.json, or one of the files that say how a model is quantized, is a model to plan for.
struct ModelSummary {
  std::optional<Checkpoint> checkpoint{};  ///< none: no weights are there, or of a kind that is not read (.npz)
  Json config = Json::object();
  DetectedQuantization quantization{};  ///< as the files beside the weights declare it, or the weights themselves
  Json facts = Json::object();          ///< of the architecture and the quantization, as PlanRequest::model has them
  StoredWeights stored{};               ///< what the arrays' names, types and shapes say
  std::optional<Error> unread{};        ///< why they say nothing, though files are there
  uint64_t weight_bytes = 0;            ///< of the files; 0: none are there
};
/// Weights that cannot be opened are `unread` where the files beside them say what the model is: a download that is not
/// complete can be planned for. Throws Error as opening a model does, and Error{"no-model"} for a directory that says
/// nothing of one.
ModelSummary summarize_model(const std::string& path);

/// How it is quantized, as INTERFACES.md lists it for `inspect`.
OrderedJson quantization_json(const ModelSummary& model);

/// The scheme in words, or the name of a type that is not decoded; of a plain tensor its dtype.
std::string type_of(const TensorEntry& entry);

/// One JSON document for a tensor that stays as it is stored.
OrderedJson tensor_json(const TensorEntry& entry);

}  // namespace bitwright
