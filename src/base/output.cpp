#include "base/output.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>

#include "base/error.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void cannot_write(const fs::path& path, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw Error({.code = "cannot-write",
               .what = "cannot write output",
               .where = path.string(),
               .why = std::strerror(error),
               .fix = full ? "free some space or choose another place" : "check the path and its permissions"});
}

void sync_directory(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;  // a directory we may write to but not list: its entries cannot be synced one by one
  ::fsync(fd);
  ::close(fd);
}

/// `--force` replaces models and empty directories, never somebody's home.
bool may_replace(const fs::path& target) {
  if (!fs::is_directory(target)) return false;
  if (fs::is_empty(target)) return true;
  if (!fs::exists(target / "config.json")) return false;
  for (const fs::directory_entry& entry : fs::directory_iterator(target))
    if (entry.path().extension() == ".safetensors") return true;
  return false;
}

void check_target(const fs::path& target, bool force) {
  std::error_code ignored;
  if (!fs::exists(fs::symlink_status(target, ignored))) return;
  if (!force)
    throw Error({.code = "output-exists",
                 .what = "cannot write output",
                 .where = target.string(),
                 .why = "it exists already",
                 .fix = "choose another name or add --force"});
  if (!may_replace(target))
    throw Error({.code = "output-exists",
                 .what = "cannot replace output",
                 .where = target.string(),
                 .why = "it is not a model directory",
                 .fix = "remove it yourself or choose another name"});
}

}  // namespace

OutputFile::OutputFile(const fs::path& path)
    : path_(path), fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
  if (fd_ < 0) cannot_write(path_, errno);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void OutputFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) cannot_write(path_, errno);
    bytes = bytes.subspan(static_cast<size_t>(written));
  }
}

void OutputFile::write(std::string_view text) { write(std::as_bytes(std::span(text))); }

void OutputFile::finish() {
  // Special files (a pipe) cannot be synced: EINVAL is not a loss.
  const bool synced = ::fsync(fd_) == 0 || errno == EINVAL;
  const int sync_error = errno;
  const bool closed = ::close(fd_) == 0;
  fd_ = -1;
  if (!synced || !closed) cannot_write(path_, synced ? errno : sync_error);
}

void write_text_file(const fs::path& path, std::string_view text) {
  OutputFile file(path);
  file.write(text);
  file.finish();
}

OutputDirectory::OutputDirectory(const fs::path& target, bool force) : target_(target), force_(force) {
  if (target_.filename().empty()) target_ = target_.parent_path();  // "out/" means "out"
  check_target(target_, force);
  staging_ = target_.parent_path() / fmt::format(".{}.partial", target_.filename().string());
  if (::mkdir(staging_.c_str(), 0777) != 0 && errno != EEXIST) cannot_write(target_, errno);
  fd_ = ::open(staging_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd_ < 0) cannot_write(staging_, errno);
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
    ::close(fd_);
    throw Error({.code = "output-busy",
                 .what = "cannot write output",
                 .where = target_.string(),
                 .why = "another process is writing it",
                 .fix = "wait for it or choose another name"});
  }
  for (const fs::directory_entry& stale : fs::directory_iterator(staging_)) fs::remove_all(stale);
}

OutputDirectory::~OutputDirectory() {
  if (fd_ < 0) return;
  std::error_code ignored;
  fs::remove_all(staging_, ignored);
  ::close(fd_);
}

void OutputDirectory::commit() {
  ::fsync(fd_);
  if (::renameat2(AT_FDCWD, staging_.c_str(), AT_FDCWD, target_.c_str(), RENAME_NOREPLACE) != 0) {
    if (errno != EEXIST || !force_) cannot_write(target_, errno);
    check_target(target_, force_);
    // Swap, so that the name is never without a complete directory; what was there is then at staging_ and goes.
    if (::renameat2(AT_FDCWD, staging_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) != 0)
      cannot_write(target_, errno);
    std::error_code ignored;
    fs::remove_all(staging_, ignored);
  }
  ::close(fd_);
  fd_ = -1;
  sync_directory(target_.has_parent_path() ? target_.parent_path() : fs::path("."));
}

}  // namespace bitwright
