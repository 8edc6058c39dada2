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
#include <vector>

#include "base/error.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

constexpr const char* kMarker = ".bitwright-partial";  ///< in a staging directory: ours, to be cleared after a crash

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

[[noreturn]] void staging_in_use(const fs::path& target, const fs::path& staging, const std::string& why) {
  throw Error({.code = "output-busy",
               .what = "cannot write output",
               .where = target.string(),
               .why = fmt::format("{} {}", staging.string(), why),
               .fix = "wait, remove it, or choose another name"});
}

/// Makes the staging directory, or takes over one that a killed run left, and locks it. Links are not followed.
int open_staging(const fs::path& target, const fs::path& staging) {
  for (;;) {
    if (::mkdir(staging.c_str(), 0777) != 0 && errno != EEXIST) cannot_write(target, errno);
    const int fd = ::open(staging.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT) continue;  // its owner finished meanwhile
    if (fd < 0) staging_in_use(target, staging, "is in the way");
    const bool locked = ::flock(fd, LOCK_EX | LOCK_NB) == 0;
    struct stat opened = {}, named = {};
    const bool same = ::fstat(fd, &opened) == 0 && ::lstat(staging.c_str(), &named) == 0 &&
                      opened.st_ino == named.st_ino && opened.st_dev == named.st_dev;
    if (locked && same && opened.st_uid == ::geteuid()) return fd;
    ::close(fd);
    if (!locked) staging_in_use(target, staging, "is being written by another process");
    if (same) staging_in_use(target, staging, "belongs to another user");
    // else it was removed or renamed between opening and locking: try again
  }
}

/// Removes what a killed run left; what does not bear our mark is somebody's.
void clear_staging(const fs::path& staging) {
  if (fs::is_empty(staging)) return;
  if (!fs::exists(fs::symlink_status(staging / kMarker))) staging_in_use(staging, staging, "holds files of others");
  std::vector<fs::path> stale;
  for (const fs::directory_entry& entry : fs::directory_iterator(staging)) stale.push_back(entry.path());
  for (const fs::path& path : stale) fs::remove_all(path);
}

/// renameat2 is missing on some network file systems; there the second best, which is not atomic on replacement.
void rename_new(const fs::path& from, const fs::path& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return;
  const bool unsupported = errno == EINVAL || errno == ENOSYS;
  if (!unsupported || fs::exists(fs::symlink_status(to)) || ::rename(from.c_str(), to.c_str()) != 0)
    cannot_write(to, unsupported ? EEXIST : errno);
}

/// `to` becomes what `from` was; what `to` was is then at `from`.
void exchange(const fs::path& from, const fs::path& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_EXCHANGE) == 0) return;
  if (errno != EINVAL && errno != ENOSYS) cannot_write(to, errno);
  const fs::path aside = from.string() + ".old";
  if (::rename(to.c_str(), aside.c_str()) != 0 || ::rename(from.c_str(), to.c_str()) != 0 ||
      ::rename(aside.c_str(), from.c_str()) != 0)
    cannot_write(to, errno);
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
  if (target_.empty())
    throw Error({.code = "bad-output",
                 .what = "cannot write output",
                 .why = "its name is empty",
                 .fix = "give a directory",
                 .status = ExitStatus::usage});
  check_target(target_, force);
  staging_ = target_.parent_path() / fmt::format(".{}.partial", target_.filename().string());
  fd_ = open_staging(target_, staging_);
  try {
    clear_staging(staging_);
    write_text_file(staging_ / kMarker, "");
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

OutputDirectory::~OutputDirectory() {
  if (fd_ < 0) return;
  std::error_code ignored;
  fs::remove_all(staging_, ignored);
  ::close(fd_);
}

void OutputDirectory::commit() {
  std::error_code ignored;
  fs::remove(staging_ / kMarker, ignored);
  if (::fsync(fd_) != 0) cannot_write(staging_, errno);
  if (force_ && fs::exists(fs::symlink_status(target_, ignored))) {
    check_target(target_, force_);
    // Swapped, so that the name is never without a complete directory.
    exchange(staging_, target_);
    fs::remove_all(staging_, ignored);
  } else {
    rename_new(staging_, target_);
  }
  ::close(fd_);
  fd_ = -1;
  sync_directory(target_.has_parent_path() ? target_.parent_path() : fs::path("."));
}

}  // namespace bitwright
