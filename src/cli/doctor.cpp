#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/progress.hpp"
#include "base/threads.hpp"
#include "cli/command.hpp"
#include "kernels/kernel_level.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

/// The instruction sets that kernels care about, as the kernel of the system lists them.
OrderedJson instruction_sets() {
  constexpr std::array<std::string_view, 10> kWanted = {
      "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "avx512_fp16"};
  OrderedJson found = OrderedJson::array();
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;)
      if (std::ranges::find(kWanted, word) != kWanted.end()) found.push_back(word);
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

OrderedJson run(const Arguments&, std::vector<Warning>&) {
  OrderedJson kernels = OrderedJson::array();
  for (const KernelLevel& level : kernel_levels())
    kernels.push_back({{"name", level.name}, {"usable", level.usable()}, {"active", &level == &active_kernel_level()}});
  const auto memory = static_cast<uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  return {{"version", BITWRIGHT_VERSION},
          {"cpu", cpu_name()},
          {"threads", thread_count()},
          {"memory_bytes", memory},
          {"instruction_sets", instruction_sets()},
          {"kernels", kernels},
          {"gpu", {{"driver", readable("/proc/driver/nvidia/version")}, {"used", false}}},
          {"libtorch", false},
          {"energy_counters", readable("/sys/class/powercap/intel-rapl:0/energy_uj")}};
}

void print(const OrderedJson& result) {
  const auto yes = [](const OrderedJson& value) { return value.get<bool>() ? "yes" : "no"; };
  std::string sets, kernels;
  for (const OrderedJson& name : result["instruction_sets"]) sets += name.get<std::string>() + " ";
  for (const OrderedJson& k : result["kernels"])
    kernels += fmt::format("{}{} ", k["name"].get<std::string>(),
                           k["active"].get<bool>()   ? " (active)"
                           : k["usable"].get<bool>() ? ""
                                                     : " (not usable here)");
  fmt::print(
      "bitwright        {}\ncpu              {}, {} threads\nmemory           {}\ninstruction sets {}\nkernels         "
      " {}\n",
      result["version"].get<std::string>(), result["cpu"].get<std::string>(), result["threads"].get<size_t>(),
      format_bytes(result["memory_bytes"].get<uint64_t>()), sets, kernels);
  fmt::print(
      "GPU driver       {} (this build computes on the CPU)\nlibtorch         no (this build has no `train`)\nenergy "
      "counters  {}\n",
      yes(result["gpu"]["driver"]), yes(result["energy_counters"]));
}

}  // namespace

extern const Command doctor_command;
const Command doctor_command = {.name = "doctor",
                                .summary = "what this machine and build can do",
                                .takes_model = false,
                                .run = run,
                                .print = print};

}  // namespace bitwright
