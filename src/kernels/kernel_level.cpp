#include "kernels/kernel_level.hpp"

#include <fmt/format.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "kernels/rows.hpp"

namespace bitwright {

std::span<const KernelLevel> kernel_levels() {
  static const std::vector<KernelLevel> levels = [] {
    const std::span<const KernelLevel> simd = simd_kernel_levels();
    std::vector<KernelLevel> all(simd.begin(), simd.end());
    all.push_back(scalar_kernel_level);
    return all;
  }();
  return levels;
}

const KernelLevel& find_kernel_level(std::string_view name) {
  std::string usable;
  for (const KernelLevel& level : kernel_levels()) {
    if (!level.usable()) continue;
    if (name.empty() || level.name == name) return level;
    usable += (usable.empty() ? "" : ", ") + std::string(level.name);
  }
  throw Error({.code = "unknown-kernel",
               .what = "cannot choose kernels",
               .where = "BITWRIGHT_KERNEL",
               .why = fmt::format("'{}' is not usable here", printable(name)),
               .fix = fmt::format("use one of {}, or leave it unset for the best", usable),
               .status = ExitStatus::usage});
}

const KernelLevel& active_kernel_level() {
  static const KernelLevel& level = [&]() -> const KernelLevel& {
    const char* const wanted = std::getenv("BITWRIGHT_KERNEL");
    return find_kernel_level(wanted != nullptr ? wanted : "");
  }();
  return level;
}

}  // namespace bitwright
