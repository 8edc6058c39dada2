#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace bitwright {

/// A file being written, front to back or at given places. Every failure (disk full, quota, lost device) is an
/// Error{"cannot-write"}.
class OutputFile {
 public:
  enum class Contents { replace, keep };
  explicit OutputFile(const std::filesystem::path& path, Contents contents = Contents::replace);
  ~OutputFile();  ///< closes without promising anything; call finish() for that
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// Leaves the place of write() alone. May be called from several threads.
  void write_at(uint64_t offset, std::span<const std::byte> bytes);
  void resize(uint64_t bytes);  ///< what was never written reads as zeros; write() goes on at the end
  void sync_data();             ///< what was written is on stable storage when this returns
  void finish();                ///< likewise, the file's size and name too, and the file is closed

 private:
  std::filesystem::path path_;
  int fd_;
};

void write_text_file(const std::filesystem::path& path, std::string_view text);

/// A file that appears under its name complete or not at all: it is written at staging(), `.NAME.partial` beside it,
/// and renamed by commit(). Without it the destructor removes what was written.
class WholeFile {
 public:
  /// Throws Error{"output-exists"} if something is there and it may not be replaced, or is no file.
  WholeFile(const std::filesystem::path& target, bool replace);
  ~WholeFile();
  WholeFile(const WholeFile&) = delete;
  WholeFile& operator=(const WholeFile&) = delete;
  const std::filesystem::path& staging() const { return staging_; }
  void commit();

 private:
  std::filesystem::path target_, staging_;
  bool replace_;
};

/// Makes the names in a directory last: fsync of a file alone does not promise that it is found after a power cut.
void sync_directory(const std::filesystem::path& path);

/// Is `directory` one that a run is writing or left unfinished? It holds no complete model, whatever is in it.
bool is_unfinished(const std::filesystem::path& directory);

/// What to do about what is there already.
enum class Existing {
  refuse,          ///< a finished output and an unfinished one
  replace,         ///< both
  resume,          ///< an unfinished output is gone on with, a finished one refused
  resume_replace,  ///< gone on with, then put in the place of a finished one
};

/// A directory that appears under its name complete or not at all. Files are written to a staging directory beside it,
/// `.NAME.partial`, which commit() renames into place. In it lies a journal while it is unfinished. Without commit()
/// the destructor removes it, unless keep() was called.
class OutputDirectory {
 public:
  /// Throws Error{"output-exists"} if `target` exists and may not be replaced or is not a model directory;
  /// {"output-unfinished"} if an unfinished run is there and `existing` does not say what to do about it;
  /// {"output-busy"} if another process is writing the same target.
  OutputDirectory(const std::filesystem::path& target, Existing existing);
  ~OutputDirectory();
  OutputDirectory(const OutputDirectory&) = delete;
  OutputDirectory& operator=(const OutputDirectory&) = delete;

  const std::filesystem::path& staging() const { return staging_; }
  std::filesystem::path journal() const;  ///< a file; empty unless something is resumed
  /// A failure from now on leaves the staging directory for a later run to resume; discard() takes it back.
  void keep() { keep_ = true; }
  void discard() { keep_ = false; }
  void commit();

 private:
  std::filesystem::path parent() const;
  std::filesystem::path target_, staging_;
  int fd_ = -1;  ///< of staging_, locked while this process writes there
  bool replace_, keep_ = false;
};

}  // namespace bitwright
