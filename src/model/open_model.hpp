#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "checkpoint/checkpoint.hpp"

namespace bitwright {

/// Opens a model whatever its file calls things: a GGUF file of an architecture that is known (Architecture::gguf)
/// appears with Hugging Face's names, rows and config.json; of another one, as it is stored.
Checkpoint open_model(const std::filesystem::path& path, Checkpoint::Foreign foreign = Checkpoint::Foreign::refuse,
                      Checkpoint::Unfinished unfinished = Checkpoint::Unfinished::refuse);

/// What the model calls each tensor of a GGUF file; of a stack of experts, the first.
std::map<std::string, std::string> names_in_model(const std::filesystem::path& path);

}  // namespace bitwright
