#include "cli/train.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "cli/command.hpp"

namespace bitwright {

std::optional<std::filesystem::path> training_program() {
  std::error_code unknown;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", unknown);
  std::filesystem::path program = self.parent_path() / "bitwright-train";
  if (unknown || ::access(program.c_str(), X_OK) != 0) return std::nullopt;
  return program;
}

namespace {

TrainingRun g_training = nullptr;

/// The other program takes this one's place, with the same words, files and environment.
[[noreturn]] void become_training_program(const Arguments& arguments) {
  const auto program = training_program();
  if (!program)
    throw Error({.code = "no-training",
                 .what = "cannot train",
                 .why = "this build has no bitwright-train beside bitwright",
                 .fix = "build it where libtorch is found (Debian: libtorch-dev)"});
  std::vector<std::string> words = arguments.words;
  words.insert(words.begin(), program->string());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  ::execv(program->c_str(), argv.data());
  throw Error({.code = "no-training", .what = "cannot train", .where = program->string(), .why = std::strerror(errno)});
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  if (arguments.chosen.empty())
    throw Error({.code = "missing-config",
                 .what = "bad command line",
                 .why = "no CONFIG is given",
                 .fix = "see `bitwright train --help`",
                 .status = ExitStatus::usage});
  if (g_training == nullptr) become_training_program(arguments);
  const auto set = arguments.values.find("--set");
  return g_training({.config = arguments.chosen,
                     .set = set == arguments.values.end() ? std::vector<std::string>() : set->second,
                     .resume = arguments.flag("--resume"),
                     .force = arguments.flag("--force")},
                    warnings);
}

/// What adding the adapters to the weights costs.
void print_merge(const OrderedJson& result) {
  const auto merge = result.find("merge");
  if (merge == result.end()) return;
  fmt::print("adapter: {}\nmerged into {} layers", printable(result["adapter"].get<std::string>()),
             (*merge)["layers"].get<int64_t>());
  const double error = (*merge)["relative_error"].get<double>();
  if (error > 0) fmt::print(", which are rounded again: relative error {:.4f}", error);
  if (merge->contains("loss")) {
    const double before = (*merge)["loss_before"].get<double>(), after = (*merge)["loss"].get<double>();
    fmt::print("; loss with adapters {:.4f}, merged in floats {:.4f}, as it is now {:.4f}: {:+.4f}", before,
               (*merge)["loss_floats"].get<double>(), after, after - before);
  }
  fmt::print("\n");
}

void print(const OrderedJson& result) {
  if (result.contains("rank")) return;  // one of several processes, of which rank 0 prints
  const auto loss = [&](const char* key) {
    return result[key].is_null() ? std::string("not measured") : fmt::format("{:.4f}", result[key].get<double>());
  };
  fmt::print("{} steps; loss {}, validation {}\n", result["steps"].get<int64_t>(), loss("loss"), loss("val_loss"));
  print_merge(result);
  fmt::print("model: {}\ncheckpoint: {}\n", printable(result["model"].get<std::string>()),
             printable(result["checkpoint"].get<std::string>()));
}

}  // namespace

void set_training(TrainingRun run) { g_training = run; }

extern const Command train_command;
const Command train_command = {.name = "train",
                               .summary = "train from nothing, through quantization, what is quantized, or adapters",
                               .takes_model = false,
                               .takes_name = "configuration (YAML or JSON): model, data, steps ...",
                               .options = {{.name = "--set",
                                            .type = Option::Type::names,
                                            .value_name = "KEY=VALUE",
                                            .help = "any key of the configuration by its full path; may be repeated"},
                                           {.name = "--resume",
                                            .type = Option::Type::flag,
                                            .value_name = "",
                                            .help = "go on from the newest checkpoint in the output directory"},
                                           {.name = "--force",
                                            .type = Option::Type::flag,
                                            .value_name = "",
                                            .help = "start again where the output directory has a run already"}},
                               .run = run,
                               .print = print};

}  // namespace bitwright
