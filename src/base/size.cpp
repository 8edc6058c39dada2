#include "base/size.hpp"

#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>
#include <string>

namespace bitwright {
namespace {

struct Unit {
  std::string_view name;  ///< lower case
  double bytes;
};
constexpr double kKibi = 1024, kMebi = kKibi * 1024, kGibi = kMebi * 1024, kTebi = kGibi * 1024;
constexpr std::array<Unit, 14> kUnits = {{{"", 1},
                                          {"b", 1},
                                          {"kb", 1e3},
                                          {"mb", 1e6},
                                          {"gb", 1e9},
                                          {"tb", 1e12},
                                          {"k", kKibi},
                                          {"kib", kKibi},
                                          {"m", kMebi},
                                          {"mib", kMebi},
                                          {"g", kGibi},
                                          {"gib", kGibi},
                                          {"t", kTebi},
                                          {"tib", kTebi}}};

/// The number after `key` at the start of a line of `path`; nothing where there is none ("max").
std::optional<uint64_t> number_in(const char* path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const size_t digit = line.find_first_of("0123456789", key.size());
    if (digit == std::string::npos) return std::nullopt;
    uint64_t value = 0;
    std::from_chars(line.data() + digit, line.data() + line.size(), value);
    return value;
  }
  return std::nullopt;
}

}  // namespace

std::optional<uint64_t> parse_size(std::string_view text) {
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  if (error != std::errc() || !std::isfinite(number) || number < 0) return std::nullopt;
  text.remove_prefix(static_cast<size_t>(end - text.data()));
  while (text.starts_with(' ')) text.remove_prefix(1);
  std::string unit(text);
  std::ranges::transform(unit, unit.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const auto found = std::ranges::find(kUnits, unit, &Unit::name);
  if (found == kUnits.end()) return std::nullopt;
  const double bytes = std::floor(number * found->bytes);
  if (bytes >= static_cast<double>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return static_cast<uint64_t>(bytes);
}

uint64_t total_memory() {
  return static_cast<uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

uint64_t available_memory() {
  constexpr uint64_t kKilobyte = 1024;
  uint64_t most = std::numeric_limits<uint64_t>::max();
  if (const auto available = number_in("/proc/meminfo", "MemAvailable:")) most = *available * kKilobyte;
  const auto limit = number_in("/sys/fs/cgroup/memory.max", ""), used = number_in("/sys/fs/cgroup/memory.current", "");
  if (limit && used) most = std::min(most, *limit - std::min(*limit, *used));
  return most;
}

uint64_t peak_memory() { return number_in("/proc/self/status", "VmHWM:").value_or(0) * 1024; }

std::optional<uint64_t> free_disk(const std::filesystem::path& directory) {
  struct statvfs status = {};
  if (::statvfs(directory.empty() ? "." : directory.c_str(), &status) != 0) return std::nullopt;
  return uint64_t{status.f_bavail} * status.f_frsize;
}

uint64_t allocated_bytes(const std::filesystem::path& directory) {
  constexpr uint64_t kBlock = 512;  // of st_blocks, whatever the file system's
  uint64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    struct stat status = {};
    if (::lstat(entry.path().c_str(), &status) == 0) bytes += static_cast<uint64_t>(status.st_blocks) * kBlock;
  }
  return bytes;
}

}  // namespace bitwright
