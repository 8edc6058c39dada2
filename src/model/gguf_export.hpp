#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "checkpoint/gguf.hpp"

namespace bitwright {

/// A model in llama.cpp's words: what open_model undoes.
struct GgufModel {
  std::string architecture;                  ///< general.architecture
  GgufMetadata metadata;                     ///< of the network: its architecture and the keys that begin with it
  std::vector<ArrayView> arrays;             ///< tensors as llama.cpp calls and orders them, of the model's tensors
  std::map<std::string, std::string> names;  ///< of them in the model's own words; of a stack that of its first matrix
  std::vector<std::string> differences;      ///< in what llama.cpp computes and config.json says
};

/// From names, types and shapes alone. Matrices keep their type; lists, router matrices and positions become f32,
/// which llama.cpp computes with. Throws Error{"no-gguf"} where llama.cpp has no such model or could not compute it as
/// config.json says. Of a GGUF file: everything as it is, `arrays` empty.
GgufModel gguf_model(const Checkpoint& model);

/// The same files under those names. `model` must be plain.
Checkpoint open_as_gguf(const Checkpoint& model, const GgufModel& as);

}  // namespace bitwright
