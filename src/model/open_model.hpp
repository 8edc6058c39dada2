#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "checkpoint/checkpoint.hpp"
#include "model/lora_adapter.hpp"

namespace bitwright {

/// Opens a model whatever its file calls things: a GGUF file of an architecture that is known (Architecture::gguf)
/// appears with Hugging Face's names, rows and config.json; of another one, as it is stored. Throws
/// Error{"is-adapter"} for an adapter, which is no model by itself.
Checkpoint open_model(const std::filesystem::path& path, Checkpoint::Foreign foreign = Checkpoint::Foreign::refuse,
                      Checkpoint::Unfinished unfinished = Checkpoint::Unfinished::refuse);

/// A model to run: a checkpoint, or an adapter with the checkpoint that it belongs to.
struct RunnableModel {
  explicit RunnableModel(const std::filesystem::path& path);
  const LoraAdapter* adapter_or_null() const { return adapter ? &*adapter : nullptr; }

  std::optional<LoraAdapter> adapter{};
  Checkpoint checkpoint;
};

/// What the model calls each tensor of a GGUF file; of a stack of experts, the first.
std::map<std::string, std::string> names_in_model(const std::filesystem::path& path);

}  // namespace bitwright
