#pragma once

#include <filesystem>
#include <functional>
#include <span>

#include "checkpoint/checkpoint.hpp"
#include "checkpoint/safetensors.hpp"
#include "quantize/quantize.hpp"
#include "quantize/stream.hpp"

namespace bitwright {

/// What a command does around its job.
struct OutputSteps {
  std::function<void()> begin{};  ///< before the first piece; may be null
  /// When all weights are written, in the directory that gets the output's name after it.
  std::function<void(const std::filesystem::path& staging, std::span<const SquaredError> errors)> finish;
  bool side_files = true;  ///< tokenizer files and the like go along
};

/// Writes a model, complete or not at all: an unfinished directory, a journal in it, the side files (one that cannot be
/// read does not cost the work on the weights), the weights piece by piece, and what `finish` adds. The job's identity
/// gets what all outputs depend on. Throws what OutputDirectory, Journal, stream and check_unchanged throw; after an
/// interruption or a failure of the disk a run with Existing::resume goes on.
void write_output(const Checkpoint& source, Job& job, const ShardPlan& shards, const Estimate& estimate,
                  const OutputOptions& options, const OutputSteps& steps);

}  // namespace bitwright
