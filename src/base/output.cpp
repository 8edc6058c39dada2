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
#include <utility>
#include <vector>

#include "base/error.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

// In a staging directory, so that it is known as ours: the journal while it is unfinished; once all is written and
// verified the journal gets the second name, and it is removed when the directory has its own.
constexpr const char* kJournal = ".bitwright-partial";
constexpr const char* kComplete = ".bitwright-complete";

[[noreturn]] void cannot_write(const fs::path& path, int error) {
  const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
  throw Error({.code = "cannot-write",
               .what = "cannot write output",
               .where = path.string(),
               .why = std::strerror(error),
               .fix = full ? "free some space or choose another place" : "check the path and its permissions",
               .resumable = true});
}

/// `--force` replaces models and empty directories, never somebody's home.
/// A file that is a whole model, or the parts of one, lie alone, but for what is said of them.
bool holds_gguf(const fs::path& target) {
  bool only = true, any = false;
  for (const fs::directory_entry& entry : fs::directory_iterator(target)) {
    const bool is_model = entry.path().extension() == ".gguf" && entry.path().filename().string().starts_with("model");
    any = any || is_model;
    only = only && (is_model || entry.path().filename() == "README.md");
  }
  return only && any;
}

bool may_replace(const fs::path& target) {
  if (!fs::is_directory(target)) return false;
  if (fs::is_empty(target) || holds_gguf(target)) return true;
  if (!fs::exists(target / "config.json") && !fs::exists(target / "adapter_config.json")) return false;
  for (const fs::directory_entry& entry : fs::directory_iterator(target))
    if (entry.path().extension() == ".safetensors") return true;
  return false;
}

void check_target(const fs::path& target, bool force, bool resumes) {
  std::error_code ignored;
  if (!fs::exists(fs::symlink_status(target, ignored))) return;
  if (!force)
    throw Error({.code = "output-exists",
                 .what = "cannot write output",
                 .where = target.string(),
                 .why = resumes && may_replace(target) ? "it is there and complete: nothing is left to resume"
                                                       : "it exists already",
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

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(fs::symlink_status(path, ignored));
}

/// Has a killed run left anything of use? What does not bear our mark is somebody's.
bool is_resumable(const fs::path& staging) {
  if (fs::is_empty(staging)) return false;
  if (!is_there(staging / kJournal) && !is_there(staging / kComplete))
    staging_in_use(staging, staging, "holds files of others");
  if (is_there(staging / kComplete)) fs::rename(staging / kComplete, staging / kJournal);  // killed while renaming
  return fs::file_size(staging / kJournal) > 0;
}

/// The journal is emptied first, so that it never speaks of files that are gone, and stays as the mark: killed in
/// between, what is left is still known as ours.
void clear_staging(const fs::path& staging) {
  if (is_there(staging / kJournal)) fs::resize_file(staging / kJournal, 0);
  std::vector<fs::path> stale;
  for (const fs::directory_entry& entry : fs::directory_iterator(staging))
    if (entry.path().filename() != kJournal) stale.push_back(entry.path());
  for (const fs::path& path : stale) fs::remove_all(path);
}

/// A run that was killed between giving the output its name and tidying up: what it replaced is still beside it.
void tidy_up(const fs::path& target, const fs::path& staging) {
  if (!is_there(target / kComplete)) return;
  const int fd = ::open(target.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return;
  if (::flock(fd, LOCK_EX | LOCK_NB) == 0 && !is_there(staging / kJournal) && !is_there(staging / kComplete)) {
    fs::remove_all(staging);
    fs::remove(target / kComplete);
  }
  ::close(fd);
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

void check_file_target(const fs::path& target, bool replace) {
  std::error_code ignored;
  const fs::file_status status = fs::symlink_status(target, ignored);
  if (!fs::exists(status) || (replace && fs::is_regular_file(status))) return;
  throw Error({.code = "output-exists",
               .what = replace ? "cannot replace output" : "cannot write output",
               .where = target.string(),
               .why = replace ? "it is no file" : "it exists already",
               .fix = replace ? "choose another name" : "choose another name or add --force"});
}

}  // namespace

WholeFile::WholeFile(const fs::path& target, bool replace)
    : target_(target),
      staging_(target.parent_path() / ("." + target.filename().string() + ".partial")),
      replace_(replace) {
  check_file_target(target_, replace_);
}

WholeFile::~WholeFile() {
  std::error_code ignored;
  fs::remove(staging_, ignored);
}

void WholeFile::commit() {
  check_file_target(target_, replace_);
  if (!replace_) {
    rename_new(staging_, target_);
  } else if (::rename(staging_.c_str(), target_.c_str()) != 0) {
    cannot_write(target_, errno);
  }
  sync_directory(target_.has_parent_path() ? target_.parent_path() : fs::path("."));
}

OutputFile::OutputFile(const fs::path& path, Contents contents)
    : path_(path),
      fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | (contents == Contents::replace ? O_TRUNC : 0), 0666)) {
  if (fd_ < 0) cannot_write(path_, errno);
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)) {}

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

void OutputFile::write_at(uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) cannot_write(path_, errno);
    bytes = bytes.subspan(static_cast<size_t>(written));
    offset += static_cast<uint64_t>(written);
  }
}

void OutputFile::resize(uint64_t bytes) {
  if (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0 || ::lseek(fd_, 0, SEEK_END) < 0) cannot_write(path_, errno);
}

void OutputFile::sync_data() {
  if (::fdatasync(fd_) != 0 && errno != EINVAL) cannot_write(path_, errno);
}

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

void sync_directory(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;  // a directory we may write to but not list: its entries cannot be synced one by one
  const bool synced = ::fsync(fd) == 0 || errno == EINVAL;  // EINVAL: a file system that has no such thing
  const int error = errno;
  ::close(fd);
  if (!synced) cannot_write(path, error);
}

bool is_unfinished(const fs::path& directory) {
  if (is_there(directory / kJournal)) return true;
  if (!is_there(directory / kComplete)) return false;
  std::error_code ignored;
  const std::string name = fs::canonical(directory, ignored).filename().string();
  return name.starts_with(".") && name.ends_with(".partial");  // whole, but not yet in its place
}

OutputDirectory::OutputDirectory(const fs::path& target, Existing existing)
    : target_(target), replace_(existing == Existing::replace || existing == Existing::resume_replace) {
  if (target_.filename().empty()) target_ = target_.parent_path();  // "out/" means "out"
  if (target_.empty())
    throw Error({.code = "bad-output",
                 .what = "cannot write output",
                 .why = "its name is empty",
                 .fix = "give a directory",
                 .status = ExitStatus::usage});
  staging_ = target_.parent_path() / fmt::format(".{}.partial", target_.filename().string());
  tidy_up(target_, staging_);
  const bool resumes = existing == Existing::resume || existing == Existing::resume_replace;
  check_target(target_, replace_, resumes);
  fd_ = open_staging(target_, staging_);
  try {
    const bool resumable = is_resumable(staging_);
    if (resumable && existing == Existing::refuse)
      throw Error({.code = "output-unfinished",
                   .what = "cannot write output",
                   .where = target.string(),
                   .why = fmt::format("an unfinished run is in {}", staging_.string()),
                   .fix = "add --resume to go on with it or --force to start again"});
    keep_ = resumable && resumes;
    if (!keep_) {
      clear_staging(staging_);
      write_text_file(staging_ / kJournal, "");
      sync_directory(staging_);
      sync_directory(parent());
    }
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

OutputDirectory::~OutputDirectory() {
  if (fd_ < 0) return;
  try {
    if (!keep_) {
      clear_staging(staging_);
      fs::remove_all(staging_);
    }
  } catch (const std::exception&) {  // it still bears our mark: the next run clears it
  }
  ::close(fd_);
}

fs::path OutputDirectory::journal() const { return staging_ / kJournal; }

fs::path OutputDirectory::parent() const { return target_.has_parent_path() ? target_.parent_path() : fs::path("."); }

void OutputDirectory::commit() {
  sync_directory(staging_);  // every file before the name that says they are all there
  fs::rename(staging_ / kJournal, staging_ / kComplete);
  sync_directory(staging_);
  if (replace_ && is_there(target_)) {
    check_target(target_, replace_, false);
    exchange(staging_, target_);  // so that the name is never without a complete directory
    sync_directory(parent());
    std::error_code ignored;
    fs::remove_all(staging_, ignored);
  } else {
    rename_new(staging_, target_);
  }
  sync_directory(parent());
  fs::remove(target_ / kComplete);
  sync_directory(target_);
  ::close(fd_);
  fd_ = -1;
}

}  // namespace bitwright
