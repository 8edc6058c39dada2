#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace bitwright {

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

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// A small file (configuration, text) as a string. Throws like MappedFile.
std::string read_text_file(const std::filesystem::path& path);

/// SHA-256 as 64 hexadecimal digits.
std::string sha256(std::span<const std::byte> bytes);
std::string sha256(std::string_view text);

}  // namespace bitwright
