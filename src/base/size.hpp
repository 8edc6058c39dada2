#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>

namespace bitwright {

/// "8GiB", "500 MB", "1.5g", "4096": bytes. kB, MB, GB, TB count by 1000; KiB … TiB and bare K, M, G, T by 1024, as
/// `dd` and `docker` have the latter. Nothing if it is no size or does not fit 64 bits.
std::optional<uint64_t> parse_size(std::string_view text);

/// The machine's memory.
uint64_t total_memory();
/// What this process could still take without the system reclaiming from others: the least of the machine's available
/// memory and what its control group leaves.
uint64_t available_memory();
/// The most memory this process has held so far (VmHWM).
uint64_t peak_memory();
/// What an ordinary user may still write on the file system that holds `directory`; nothing where it is unknown.
std::optional<uint64_t> free_disk(const std::filesystem::path& directory);

/// Blocks that the files of `directory` (not below it) have taken.
uint64_t allocated_bytes(const std::filesystem::path& directory);

}  // namespace bitwright
