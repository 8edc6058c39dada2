#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace bitwright {

/// What tells whether a file is still the one it was.
struct FileIdentity {
  uint64_t bytes;
  int64_t modified_ns;  ///< since the epoch
  bool operator==(const FileIdentity&) const = default;
};

/// A whole file, read-only, mapped: pages are read when touched and may be dropped by the system at any time.
class MappedFile {
 public:
  /// Throws Error{"cannot-open"} if `path` is missing, not a regular file or not readable. An empty file is empty
  /// bytes.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

  /// Copies `bytes`, which lie in bytes(), to `out` by reading the file: nothing stays mapped in memory, and a file
  /// that shrank or fails is an Error{"input-changed"} or {"cannot-read"} where touching bytes() would end the process.
  void read(std::span<const std::byte> bytes, std::span<std::byte> out) const;
  /// Asks the system to read `bytes` ahead.
  void prefetch(std::span<const std::byte> bytes) const;
  FileIdentity identity() const;  ///< as it is now
  /// SHA-256 of the file, read piece by piece.
  std::string digest() const;

 private:
  std::filesystem::path path_;
  int fd_ = -1;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Touching a mapped page of a file that shrank or whose disk fails raises SIGBUS: with this handler that is one line
/// on stderr and exit status 1.
void install_bus_error_handler();

/// A small file (configuration, text) as a string. Throws like MappedFile.
std::string read_text_file(const std::filesystem::path& path);

/// SHA-256 as 64 hexadecimal digits.
std::string sha256(std::span<const std::byte> bytes);
std::string sha256(std::string_view text);

}  // namespace bitwright
