#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "base/json.hpp"
#include "bitwright/torch/trainer.hpp"

namespace bitwright::train {

/// A name that no other run has: time and a random number.
std::string new_run_id();

/// What names a run and what made it: run_id, config_hash, versions, configuration.
OrderedJson run_facts(const TrainingConfig& config, const std::string& run_id);

/// What training.json of a checkpoint says of the run.
struct RunFacts {
  TrainingConfig config;
  std::string run_id, text_sha256;
  int64_t step, windows, tokens;
  std::map<std::string, int64_t> optimizer_steps;  ///< of each parameter
  std::string base_sha256;                         ///< of what does not learn; empty: it is not known
};
/// Throws Error{"checkpoint-damaged"}.
RunFacts read_run_facts(const OrderedJson& facts, const std::filesystem::path& where);
/// Throws Error{"incompatible-checkpoint"} with both values of `key`.
[[noreturn]] void fail_incompatible(const TrainingConfig& before, const TrainingConfig& now, const std::string& key,
                                    const std::filesystem::path& where);

/// Steps whose batches hold all windows `epochs` times, the last one filled up with windows of the next epoch.
int64_t steps_of_epochs(double epochs, int64_t windows, int64_t rows);

/// What a run leaves in its output directory while it goes: run.json; loss.jsonl, a line a step; samples.jsonl. And
/// lines on a terminal.
class RunDirectory {
 public:
  /// Lines of steps after `step` are dropped: training goes on from there.
  RunDirectory(const TrainingConfig& config, const std::string& run_id, int64_t step, int64_t total_steps);
  void add(const StepResult& step, int64_t tokens);
  void add_sample(int64_t step, const std::string& prompt, const std::string& text);

 private:
  std::filesystem::path path_;
  int64_t total_steps_, log_every_;
  bool shown_;
  std::ofstream loss_;
};

}  // namespace bitwright::train
