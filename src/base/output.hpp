#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace bitwright {

/// A file being written front to back. Every failure (disk full, quota, lost device) is an Error{"cannot-write"}.
class OutputFile {
 public:
  explicit OutputFile(const std::filesystem::path& path);
  ~OutputFile();  ///< closes without promising anything; call finish() for that
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  void finish();  ///< on stable storage when this returns

 private:
  std::filesystem::path path_;
  int fd_;
};

void write_text_file(const std::filesystem::path& path, std::string_view text);

/// A directory that appears under its name complete or not at all. Files are written to a staging directory beside it,
/// which commit() renames into place; without commit() the destructor removes it.
class OutputDirectory {
 public:
  /// Throws Error{"output-exists"} if `target` exists and not `force`, or if `force` would replace something that is
  /// not a model directory; Error{"output-busy"} if another process is writing the same target.
  OutputDirectory(const std::filesystem::path& target, bool force);
  ~OutputDirectory();
  OutputDirectory(const OutputDirectory&) = delete;
  OutputDirectory& operator=(const OutputDirectory&) = delete;

  const std::filesystem::path& staging() const { return staging_; }
  void commit();

 private:
  std::filesystem::path target_, staging_;
  int fd_ = -1;  ///< of staging_, locked while this process writes there
  bool force_;
};

}  // namespace bitwright
