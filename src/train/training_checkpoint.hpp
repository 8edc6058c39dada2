#pragma once

#include <torch/torch.h>

#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/json.hpp"

namespace bitwright::train {

using NamedTensors = std::map<std::string, torch::Tensor>;

/// A safetensors file of any tensors, whatever device and layout they have. Throws Error{"cannot-write"}.
void write_tensors(const std::filesystem::path& path, const NamedTensors& tensors);
/// The tensors of a safetensors file, copied out of it. Throws Error as parse_safetensors() does.
NamedTensors read_tensors(const std::filesystem::path& path);

/// All that a run goes on from, in memory.
struct TrainingState {
  OrderedJson facts;       ///< step, position in the data, configuration …: training.json
  NamedTensors model;      ///< what learns, and buffers: model.safetensors
  NamedTensors optimizer;  ///< moments, random numbers: trainer.safetensors
};

constexpr int64_t kTrainingFormat = 1;  ///< of training.json; a newer one is refused, older ones are migrated

/// A directory with training.json, the two files of tensors and whatever `add_files` writes: whole or not at all, with
/// the digest of each file. Throws Error as OutputDirectory does.
void write_training_state(const std::filesystem::path& directory, const TrainingState& state,
                          const std::function<void(const std::filesystem::path& directory)>& add_files = nullptr);

/// Is this the training.json of a checkpoint that this program reads? path: for messages. Throws as
/// read_training_state(); looks at no other file.
void check_training_facts(const OrderedJson& facts, const std::filesystem::path& path);

/// Throws Error{"no-checkpoint"} for a directory that is none, {"newer-checkpoint"} for a format that is not known yet,
/// {"checkpoint-damaged"} for a file that is missing or not what was written.
TrainingState read_training_state(const std::filesystem::path& directory);

/// Copies `from` into `to`, tensors of the same names, types and sizes. Throws Error{"incompatible-checkpoint"} naming
/// `where` and the first that differs; then nothing was changed.
void copy_tensors(const NamedTensors& from, const NamedTensors& to, const std::filesystem::path& where);

/// The checkpoints of a run below its output directory: checkpoints/step-00001000, oldest first.
std::vector<std::filesystem::path> list_checkpoints(const std::filesystem::path& output);
std::filesystem::path checkpoint_path(const std::filesystem::path& output, int64_t step);
/// Removes the oldest, so that `keep` are left. An interruption leaves none half removed under its name.
void rotate_checkpoints(const std::filesystem::path& output, int64_t keep);

}  // namespace bitwright::train
