#include "base/mapped_file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const std::string& why) {
  throw Error({.code = "cannot-open",
               .what = "cannot read file",
               .where = path.string(),
               .why = why,
               .fix = "check the path and its permissions"});
}

using Digest = std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)>;

/// OpenSSL's own cleanup at exit would run before our threads end, and what it keeps for each would be lost.
void start_openssl() { OPENSSL_init_crypto(OPENSSL_INIT_NO_ATEXIT, nullptr); }

std::string hexadecimal(std::span<const unsigned char> digest) {
  std::string hex;
  for (const unsigned char byte : digest) hex += fmt::format("{:02x}", byte);
  return hex;
}

extern "C" void on_bus_error(int) {
  constexpr std::string_view kLine =
      "error: cannot read input: a file that is being read shrank, or its disk failed; start again when it is whole\n";
  const ssize_t unused = ::write(STDERR_FILENO, kLine.data(), kLine.size());
  static_cast<void>(unused);
  ::_exit(static_cast<int>(ExitStatus::failed));
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path)
    : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {  // a pipe is refused, not waited for
  if (fd_ < 0) fail(path, std::strerror(errno));
  struct stat status = {};
  const bool known = ::fstat(fd_, &status) == 0;
  const int stat_error = errno;
  const bool regular = known && S_ISREG(status.st_mode);
  size_ = regular ? static_cast<size_t>(status.st_size) : 0;
  void* mapped = size_ == 0 ? nullptr : ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
  const int map_error = errno;
  if (!regular || mapped == MAP_FAILED) {
    ::close(fd_);
    if (!known) fail(path, std::strerror(stat_error));
    if (!regular) fail(path, "not a regular file");
    fail(path, fmt::format("cannot map {} bytes: {}", size_, std::strerror(map_error)));
  }
  data_ = static_cast<const std::byte*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  if (fd_ >= 0) ::close(fd_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::exchange(other.fd_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

void MappedFile::read(std::span<const std::byte> bytes, std::span<std::byte> out) const {
  BW_ASSERT(bytes.size() == out.size());
  if (bytes.empty()) return;
  const auto begin = static_cast<uint64_t>(bytes.data() - data_);
  BW_ASSERT(begin <= size_ && bytes.size() <= size_ - begin);
  for (size_t done = 0; done < out.size();) {
    const ssize_t got = ::pread(fd_, out.data() + done, out.size() - done, static_cast<off_t>(begin + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0)
      throw Error({.code = "cannot-read",
                   .what = "cannot read file",
                   .where = path_.string(),
                   .why = fmt::format("at byte {}: {}", begin + done, std::strerror(errno)),
                   .fix = "check the disk",
                   .resumable = true});
    if (got == 0)
      throw Error({.code = "input-changed",
                   .what = "cannot read file",
                   .where = path_.string(),
                   .why = fmt::format("it ends at byte {} and had {} when it was opened", begin + done, size_),
                   .fix = "it was changed meanwhile: start again when it is whole"});
    done += static_cast<size_t>(got);
  }
}

void MappedFile::prefetch(std::span<const std::byte> bytes) const {
  if (!bytes.empty()) ::posix_fadvise(fd_, bytes.data() - data_, static_cast<off_t>(bytes.size()), POSIX_FADV_WILLNEED);
}

FileIdentity MappedFile::identity() const {
  struct stat status = {};
  if (::fstat(fd_, &status) != 0) fail(path_, std::strerror(errno));
  constexpr int64_t kSecond = 1'000'000'000;
  return {.bytes = static_cast<uint64_t>(status.st_size),
          .modified_ns = int64_t{status.st_mtim.tv_sec} * kSecond + status.st_mtim.tv_nsec};
}

std::string MappedFile::digest() const {
  constexpr size_t kPiece = size_t{1} << 18;  // stays in the second-level cache between the copy and the digest
  std::vector<std::byte> piece(std::min(size_, kPiece));
  start_openssl();
  const Digest state(EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  BW_ASSERT(state && EVP_DigestInit_ex(state.get(), EVP_sha256(), nullptr) == 1);
  for (size_t at = 0; at < size_; at += piece.size()) {
    throw_if_interrupted();
    const std::span<std::byte> part = std::span(piece).first(std::min(piece.size(), size_ - at));
    read(bytes().subspan(at, part.size()), part);
    BW_ASSERT(EVP_DigestUpdate(state.get(), part.data(), part.size()) == 1);
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int size = 0;
  BW_ASSERT(EVP_DigestFinal_ex(state.get(), digest.data(), &size) == 1);
  return hexadecimal(std::span(digest).first(size));
}

void install_bus_error_handler() {
  struct sigaction action = {};
  action.sa_handler = on_bus_error;
  sigaction(SIGBUS, &action, nullptr);
}

std::string read_text_file(const std::filesystem::path& path) { return std::string(MappedFile(path).text()); }

std::string sha256(std::span<const std::byte> bytes) {
  start_openssl();
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int size = 0;
  BW_ASSERT(EVP_Digest(bytes.data(), bytes.size(), digest.data(), &size, EVP_sha256(), nullptr) == 1);
  return hexadecimal(std::span(digest).first(size));
}

std::string sha256(std::string_view text) { return sha256(std::as_bytes(std::span(text))); }

}  // namespace bitwright
