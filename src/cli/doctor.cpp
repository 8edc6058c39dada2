#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>

#include "base/progress.hpp"
#include "base/size.hpp"
#include "base/threads.hpp"
#include "cli/command.hpp"
#include "cli/installed.hpp"
#include "cli/page.hpp"
#include "cli/train.hpp"
#include "engine/facts.hpp"
#include "kernels/kernel_level.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

constexpr std::array<std::string_view, 10> kInstructionSets = {
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "avx512_fp16"};

/// The instruction sets that kernels care about, as the kernel of the system lists them.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;)
      if (std::ranges::find(kInstructionSets, word) != kInstructionSets.end()) found.push_back(word);
    break;
  }
  return found;
}

std::string cpu_name() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);)
    if (line.starts_with("model name")) return line.substr(std::min(line.find(':') + 2, line.size()));
  return "unknown";
}

bool readable(const fs::path& path) { return ::access(path.c_str(), R_OK) == 0; }

/// One thing that may be usable here: where or which, or why not.
OrderedJson finding(std::string_view name, bool usable, const std::string& detail) {
  OrderedJson row = {{"name", name}, {"usable", usable}};
  row[usable ? "detail" : "reason"] = detail;
  return row;
}

OrderedJson kernels() {
  OrderedJson rows = OrderedJson::array();
  for (const KernelLevel& level : kernel_levels()) {
    const bool usable = level.usable();
    rows.push_back({{"name", level.name}, {"usable", usable}, {"active", &level == &active_kernel_level()}});
    if (!usable) rows.back()["reason"] = "the CPU or its operating system lacks the instructions";
  }
  return rows;
}

/// Graphics processors by what their drivers show; none is opened.
OrderedJson gpus(const Installed& installed) {
  OrderedJson gpu = {{"driver", readable("/proc/driver/nvidia/version")}, {"used", false}};
  gpu["reason"] = "this build computes on the CPU";
  OrderedJson& devices = gpu["devices"] = OrderedJson::array();
  std::error_code none;
  for (const auto& entry : fs::directory_iterator("/proc/driver/nvidia/gpus", none)) {
    std::ifstream file(entry.path() / "information");
    for (std::string line; std::getline(file, line);)
      if (line.starts_with("Model:"))
        devices.push_back(line.substr(std::min(line.find_first_not_of(" \t", 6), line.size())));
  }
  OrderedJson& drivers = gpu["drivers"] = OrderedJson::array();
  struct Driver {
    std::string_view name, device, library;
  };
  constexpr std::array<Driver, 2> kDrivers = {
      {{"cuda", "/proc/driver/nvidia/version", "libcuda.so.1"}, {"rocm", "/dev/kfd", "libamdhip64.so"}}};
  for (const Driver& driver : kDrivers) {
    const auto library = installed.library(driver.library);
    const bool device = readable(driver.device);
    drivers.push_back(finding(driver.name, device && library,
                              device && library ? library->string()
                              : !device         ? fmt::format("no driver: {} is not there", driver.device)
                                                : fmt::format("the driver is there, {} is not", driver.library)));
  }
  return gpu;
}

/// The engines of the facts: their programs on the path, their Python packages.
OrderedJson engines(const Installed& installed) {
  OrderedJson rows = OrderedJson::array();
  for (const Json* engine : Facts::standard().all("engines")) {
    const auto name = (*engine)["name"].get<std::string>(), version = (*engine)["version"].get<std::string>();
    if (name == "native") {
      rows.push_back(finding(name, true, "this program"));
      continue;
    }
    std::string found, missing;
    std::set<std::string> programs;
    for (const auto& [entry, pattern] : (*engine)["entries"].items())
      if (const auto text = pattern.get<std::string>(); text.find('(') == std::string::npos)  // no Python call
        programs.insert(text.substr(0, text.find(' ')));
    for (const std::string& program : programs) {
      if (const auto path = installed.program(program))
        found += (found.empty() ? "" : ", ") + path->string();
      else
        missing += (missing.empty() ? "" : ", ") + program;
    }
    OrderedJson row = finding(name, false, "");
    for (const std::string& package : engine->value("packages", std::vector<std::string>())) {
      if (const auto there = installed.python_package(package)) {
        found += (found.empty() ? "" : ", ") + there->path.string();
        if (!there->version.empty()) row["version"] = there->version;
      } else {
        missing += (missing.empty() ? "" : ", ") + fmt::format("Python package {}", package);
      }
    }
    row["usable"] = !found.empty();
    row.erase("reason");
    if (found.empty())
      row["reason"] = "not installed: " + missing;
    else
      row["detail"] = found;
    row["facts_version"] = version;
    rows.push_back(std::move(row));
  }
  return rows;
}

/// Libraries that other tools quantize with or that run what Bitwright writes.
OrderedJson libraries(const Installed& installed) {
  constexpr std::array<std::string_view, 12> kPackages = {
      "torch", "bitsandbytes", "hqq",     "mlx",      "optimum",       "gptqmodel",
      "awq",   "auto_gptq",    "torchao", "modelopt", "llmcompressor", "compressed_tensors"};
  OrderedJson rows = OrderedJson::array();
  for (const std::string_view name : kPackages) {
    const auto package = installed.python_package(std::string(name));
    rows.push_back(finding(name, package.has_value(),
                           package ? package->path.string()
                                   : fmt::format("in none of {} Python folders", installed.python_folders().size())));
    if (package && !package->version.empty()) rows.back()["version"] = package->version;
  }
  return rows;
}

OrderedJson energy_counters(const Installed& installed) {
  OrderedJson rows = OrderedJson::array();
  const fs::path rapl = "/sys/class/powercap/intel-rapl:0/energy_uj";
  std::error_code none;
  rows.push_back(finding("rapl", readable(rapl),
                         readable(rapl) ? rapl.string()
                         : fs::exists(rapl, none)
                             ? fmt::format("only root may read {}", rapl.string())
                             : fmt::format("{} is not there (virtual machine, or no such CPU)", rapl.string())));
  const auto nvml = installed.library("libnvidia-ml.so.1");
  const bool driver = readable("/proc/driver/nvidia/version");
  rows.push_back(finding("nvml", driver && nvml,
                         driver && nvml ? nvml->string()
                         : driver       ? "the NVIDIA driver is there, libnvidia-ml.so.1 is not"
                                        : "no NVIDIA driver"));
  return rows;
}

OrderedJson training() {
  const auto program = training_program();
  return finding("train", program.has_value(),
                 program ? program->string() : "this build has no bitwright-train: libtorch was not found");
}

OrderedJson run(const Arguments&, std::vector<Warning>&) {
  const Installed installed = Installed::here();
  const std::vector<std::string> sets = instruction_sets();
  OrderedJson missing = OrderedJson::array();
  for (const std::string_view name : kInstructionSets)
    if (std::ranges::find(sets, name) == sets.end()) missing.push_back(name);
  return {{"version", BITWRIGHT_VERSION},
          {"cpu", cpu_name()},
          {"threads", thread_count()},
          {"memory_bytes", total_memory()},
          {"instruction_sets", sets},
          {"missing_instruction_sets", missing},
          {"kernels", kernels()},
          {"gpu", gpus(installed)},
          {"libtorch", training_program().has_value()},
          {"training", training()},
          {"engines", engines(installed)},
          {"libraries", libraries(installed)},
          {"energy_counters", energy_counters(installed)}};
}

std::string words(const OrderedJson& names) {
  std::string text;
  for (const OrderedJson& name : names) text += (text.empty() ? "" : " ") + printable(name.get<std::string>());
  return text;
}

/// "yes" or "no" for each, with its version, and where it is or why not.
void print_findings(const char* title, const OrderedJson& rows) {
  std::vector<std::vector<std::string>> lines;
  for (const OrderedJson& row : rows) {
    const bool usable = row["usable"].get<bool>();
    const auto version = printable(row.value("version", ""));
    lines.push_back({row["name"].get<std::string>(), usable ? "yes" : "no",
                     (version.empty() ? "" : version + ", ") +
                         printable(row[usable ? "detail" : "reason"].get<std::string>(), 1000)});
  }
  fmt::print("\n{}\n{}", title, columns(lines, 2));
}

void print(const OrderedJson& result) {
  constexpr size_t kIndent = 17;
  std::string kernel_names;
  for (const OrderedJson& k : result["kernels"])
    kernel_names += fmt::format("{}{} ", k["name"].get<std::string>(),
                                k["active"].get<bool>()   ? " (active)"
                                : k["usable"].get<bool>() ? ""
                                                          : " (" + k["reason"].get<std::string>() + ")");
  fmt::print("bitwright        {}\n", result["version"].get<std::string>());
  fmt::print("cpu              {}, {} threads\n", result["cpu"].get<std::string>(), result["threads"].get<size_t>());
  fmt::print("memory           {}\n", format_bytes(result["memory_bytes"].get<uint64_t>()));
  fmt::print("instruction sets {}\n", wrapped(words(result["instruction_sets"]), kIndent));
  if (const std::string missing = words(result["missing_instruction_sets"]); !missing.empty())
    fmt::print("not in this CPU  {}\n", wrapped(missing, kIndent));
  fmt::print("kernels          {}\n", wrapped(kernel_names, kIndent));
  const std::string devices = words(result["gpu"]["devices"]);
  fmt::print("GPU              {}; {}\n", devices.empty() ? "none that a driver shows" : devices,
             result["gpu"]["reason"].get<std::string>());
  const OrderedJson& training = result["training"];
  const bool trains = training["usable"].get<bool>();
  fmt::print("train            {} ({})\n", trains ? "yes" : "no",
             printable(training[trains ? "detail" : "reason"].get<std::string>()));
  print_findings("GPU drivers", result["gpu"]["drivers"]);
  print_findings("engines", result["engines"]);
  print_findings("Python libraries (looked for, never run)", result["libraries"]);
  print_findings("energy counters", result["energy_counters"]);
}

}  // namespace

extern const Command doctor_command;
const Command doctor_command = {.name = "doctor",
                                .summary = "what this machine and build can do, and why not the rest",
                                .takes_model = false,
                                .run = run,
                                .print = print};

}  // namespace bitwright
