#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.hpp"
#include "base/json.hpp"
#include "checkpoint/checkpoint.hpp"

namespace bitwright {

/// The directory whose config.json and tokenizer belong to `model` (its own, or the one its single file lies in).
std::filesystem::path model_directory(const Checkpoint& model);

/// What Tokenizer reads: a GGUF file that has a vocabulary, else the model's directory.
std::filesystem::path tokenizer_path(const Checkpoint& model);

/// config.json in the order it was written; an empty object where there is none.
OrderedJson read_config(const Checkpoint& model);

/// Copies what belongs to a model beside weights and configuration: tokenizer files, generation settings, templates.
/// No program code and no README.
void copy_side_files(const Checkpoint& model, const std::filesystem::path& to);
/// own: all that is in the directory belongs to the model, not only what is known by name.
void copy_side_files(const std::filesystem::path& directory, bool own, const std::filesystem::path& to);

/// Of a directory made from a GGUF file that has none beside it.
Warning no_tokenizer_written();

/// Size and SHA-256 of each file so far: weights and what belongs to them. Not of what is written afterwards, nor of
/// hidden files, which are ours.
OrderedJson digests_of(const std::filesystem::path& directory);

/// Which engines load a model with these files: [{name, loads, reason}].
OrderedJson engines_json(const std::map<std::string, OrderedJson>& files);

/// Takes out of config.json what says how a model is quantized.
void drop_quantization(OrderedJson& config);

/// An output may be neither the model, nor hold it, nor lie in it. Throws Error.
void check_apart(const Checkpoint& model, const std::filesystem::path& output);

}  // namespace bitwright
