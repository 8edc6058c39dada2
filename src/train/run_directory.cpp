#include "train/run_directory.hpp"

#include <unistd.h>

#include <cmath>
#include <ctime>
#include <random>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "base/progress.hpp"

namespace bitwright::train {
namespace {

namespace fs = std::filesystem;

void append(std::ofstream& file, const fs::path& path, const OrderedJson& line) {
  file << line.dump(-1, ' ', false, OrderedJson::error_handler_t::replace) << '\n' << std::flush;
  if (!file) throw Error({.code = "cannot-write", .what = "cannot write file", .where = path.string()});
}

/// The lines up to and including `step`.
std::string lines_until(const fs::path& path, int64_t step) {
  if (step == 0 || !fs::exists(path)) return "";
  std::ifstream file(path);
  std::string kept;
  for (std::string line; std::getline(file, line);) {
    const Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) break;  // cut off
    if (json["step"].get<int64_t>() > step) break;
    kept += line + '\n';
  }
  return kept;
}

/// The lines of a file that steps after `step` are dropped from, whole or not at all.
void cut_back(const fs::path& path, int64_t step) {
  const std::string kept = lines_until(path, step);
  WholeFile file(path, /*replace=*/true);
  write_text_file(file.staging(), kept);
  file.commit();
}

}  // namespace

std::string new_run_id() {
  std::random_device random;
  const std::time_t now = std::time(nullptr);
  std::tm utc = {};
  gmtime_r(&now, &utc);
  return fmt::format("{:04}{:02}{:02}-{:02}{:02}{:02}-{:08x}", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday,
                     utc.tm_hour, utc.tm_min, utc.tm_sec, random());
}

OrderedJson run_facts(const TrainingConfig& config, const std::string& run_id) {
  return {{"run_id", run_id},
          {"config_hash", config.hash()},
          {"bitwright", BITWRIGHT_VERSION},
          {"libtorch", TORCH_VERSION},
          {"config", config.to_json()}};
}

RunFacts read_run_facts(const OrderedJson& facts, const fs::path& where) {
  try {
    return {.config = TrainingConfig::from_json(facts.at("config"), (where / "training.json").string()),
            .run_id = facts.at("run_id").get<std::string>(),
            .text_sha256 = facts.at("text_sha256").get<std::string>(),
            .step = facts.at("step").get<int64_t>(),
            .windows = facts.at("windows").get<int64_t>(),
            .tokens = facts.at("tokens").get<int64_t>(),
            .optimizer_steps = facts.at("optimizer_steps").get<std::map<std::string, int64_t>>(),
            .base_sha256 = facts.value("base_sha256", std::string())};
  } catch (const nlohmann::json::exception& error) {
    throw Error({.code = "checkpoint-damaged",
                 .what = "cannot read checkpoint",
                 .where = (where / "training.json").string(),
                 .why = error.what()});
  }
}

void fail_incompatible(const TrainingConfig& before, const TrainingConfig& now, const std::string& key,
                       const fs::path& where) {
  const auto shown = [&](const TrainingConfig& config) {
    const OrderedJson json = config.to_json();
    const OrderedJson* value = &json;
    for (size_t begin = 0; begin <= key.size();) {
      const size_t dot = std::min(key.find('.', begin), key.size());
      const auto found = value->find(key.substr(begin, dot - begin));
      if (found == value->end()) return std::string("nothing");
      value = &*found;
      begin = dot + 1;
    }
    return value->dump();
  };
  throw Error({.code = "incompatible-checkpoint",
               .what = "cannot go on from checkpoint",
               .where = where.string(),
               .why = fmt::format("{} was {}, now it is {}", key, shown(before), shown(now)),
               .fix = "give what it was, or start again in another output"});
}

int64_t steps_of_epochs(double epochs, int64_t windows, int64_t rows) {
  const double all = std::ceil(epochs * static_cast<double>(windows));
  return std::max<int64_t>(1, static_cast<int64_t>(std::ceil(all / static_cast<double>(rows))));
}

RunDirectory::RunDirectory(const TrainingConfig& config, const std::string& run_id, int64_t step, int64_t total_steps)
    : path_(config.output),
      total_steps_(total_steps),
      log_every_(config.log_every),
      shown_(verbosity() != Verbosity::quiet && ::isatty(STDERR_FILENO) != 0) {
  fs::create_directories(path_);
  OrderedJson facts = run_facts(config, run_id);
  facts["total_steps"] = total_steps;
  WholeFile file(path_ / "run.json", /*replace=*/true);
  write_text_file(file.staging(), facts.dump(1) + "\n");
  file.commit();
  cut_back(path_ / "loss.jsonl", step);
  if (fs::exists(path_ / "samples.jsonl")) cut_back(path_ / "samples.jsonl", step);
  loss_.open(path_ / "loss.jsonl", std::ios::app);
}

void RunDirectory::add(const StepResult& step, int64_t tokens) {
  OrderedJson line = {{"step", step.step}, {"loss", step.loss},
                      {"lr", step.lr},     {"grad_norm", step.grad_norm},
                      {"tokens", tokens},  {"tokens_per_second", step.tokens_per_second}};
  if (step.val_loss) line["val_loss"] = *step.val_loss;
  append(loss_, path_ / "loss.jsonl", line);
  if (!shown_ || (!step.val_loss && step.step % log_every_ != 0)) return;
  const std::string validation = step.val_loss ? fmt::format("  validation {:.4f}", *step.val_loss) : "";
  const double left = static_cast<double>((total_steps_ - step.step) * step.tokens) / step.tokens_per_second;
  fmt::print(stderr, "step {}/{}  loss {:.4f}{}  rate {:.2e}  gradient {:.3g}  {:.0f} tokens/s  {} left\n", step.step,
             total_steps_, step.loss, validation, step.lr, step.grad_norm, step.tokens_per_second,
             format_duration(left));
}

void RunDirectory::add_sample(int64_t step, const std::string& prompt, const std::string& text) {
  std::ofstream file(path_ / "samples.jsonl", std::ios::app);
  append(file, path_ / "samples.jsonl", {{"step", step}, {"prompt", prompt}, {"text", text}});
  if (shown_) fmt::print(stderr, "{}{}\n", printable(prompt, 2000), printable(text, 2000));
}

}  // namespace bitwright::train
