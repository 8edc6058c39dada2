#include "checkpoint/zip.hpp"

#include <fmt/format.h>
#include <zlib.h>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <new>
#include <unordered_set>

#include "base/error.hpp"

namespace bitwright {
namespace {

constexpr uint32_t kLocal = 0x04034b50, kCentral = 0x02014b50, kEnd = 0x06054b50;
constexpr uint32_t kEnd64 = 0x06064b50, kLocator64 = 0x07064b50;
constexpr size_t kLocalBytes = 30, kCentralBytes = 46, kEndBytes = 22, kEnd64Bytes = 56, kLocator64Bytes = 20;
constexpr size_t kMaxComment = 0xffff;
constexpr uint16_t kEncrypted = 1, kZip64Field = 1, kStored = 0, kDeflated = 8;
constexpr uint64_t kMostDeflated = 1032;  // times: two bits that stand for 258 bytes
constexpr uint32_t kIn64 = 0xffffffff;    // a 32-bit field whose value stands in a zip64 one

[[noreturn]] void bad_zip(const std::string& where, const std::string& why) {
  throw Error({.code = "bad-zip",
               .what = "cannot read archive",
               .where = where,
               .why = why,
               .fix = "the download is incomplete or damaged, fetch it again"});
}
[[noreturn]] void bad_zip(const std::string& where, std::string_view name, const std::string& why) {
  bad_zip(where, fmt::format("entry '{}' {}", printable(name), why));
}

/// Where the list of entries lies.
struct Directory {
  uint64_t begin, bytes, entries;
};

class ZipReader {
 public:
  ZipReader(std::span<const std::byte> archive, const std::string& where, Compressed compressed)
      : archive_(archive), where_(where), compressed_(compressed) {}

  std::vector<ZipEntry> read() {
    const Directory directory = find_directory();
    std::vector<ZipEntry> entries;
    std::unordered_set<std::string_view> names;
    uint64_t at = directory.begin;
    const uint64_t end = directory.begin + directory.bytes;
    for (uint64_t i = 0; i < directory.entries; ++i) {
      if (end - at < kCentralBytes) fail("its list of entries ends early");
      const uint64_t tail = uint64_t{get<uint16_t>(at + 28)} + get<uint16_t>(at + 30) + get<uint16_t>(at + 32);
      if (get<uint32_t>(at) != kCentral || tail > end - at - kCentralBytes) fail("its list of entries is damaged");
      entries.push_back(entry(at));
      if (!names.insert(entries.back().name).second) fail(entries.back().name, "is there twice");
      at += kCentralBytes + tail;
    }
    if (at != end) fail(fmt::format("{} bytes follow its list of entries", end - at));
    return entries;
  }

 private:
  [[noreturn]] void fail(const std::string& why) const { bad_zip(where_, why); }
  [[noreturn]] void fail(std::string_view name, const std::string& why) const { bad_zip(where_, name, why); }

  /// A little-endian number, inside the archive.
  template <std::unsigned_integral T>
  T get(uint64_t at) const {
    if (at > archive_.size() || archive_.size() - at < sizeof(T)) fail("it ends early");
    T value;
    std::memcpy(&value, archive_.data() + at, sizeof value);
    return value;
  }
  std::string_view text(uint64_t at, uint64_t length) const {
    if (at > archive_.size() || length > archive_.size() - at) fail("it ends early");
    return {reinterpret_cast<const char*>(archive_.data()) + at, static_cast<size_t>(length)};
  }

  /// The end record: its comment reaches to the end of the file.
  uint64_t find_end() const {
    if (archive_.size() < kEndBytes) fail(fmt::format("{} bytes are too few for a zip archive", archive_.size()));
    const uint64_t last = archive_.size() - kEndBytes;
    for (uint64_t comment = 0; comment <= std::min<uint64_t>(kMaxComment, last); ++comment)
      if (get<uint32_t>(last - comment) == kEnd && get<uint16_t>(last - comment + 20) == comment) return last - comment;
    fail("it has no end record, its last part is missing");
  }

  Directory find_directory() const {
    const uint64_t end = find_end();
    Directory d = {
        .begin = get<uint32_t>(end + 16), .bytes = get<uint32_t>(end + 12), .entries = get<uint16_t>(end + 10)};
    uint64_t limit = end;
    if (end >= kLocator64Bytes && get<uint32_t>(end - kLocator64Bytes) == kLocator64) {
      limit = get<uint64_t>(end - kLocator64Bytes + 8);
      const Directory large = directory64(limit);
      const auto agree = [](uint64_t small, uint64_t all, uint64_t ones) { return small == all || small == ones; };
      if (!agree(d.begin, large.begin, kIn64) || !agree(d.bytes, large.bytes, kIn64) ||
          !agree(d.entries, large.entries, 0xffff))
        fail("its two end records disagree");
      d = large;
    } else if (get<uint16_t>(end + 4) != 0 || get<uint16_t>(end + 8) != d.entries) {
      fail("it is one part of several");
    }
    if (d.begin > limit || d.bytes > limit - d.begin || d.entries > d.bytes / kCentralBytes)
      fail(fmt::format("its list of {} entries is said to lie at byte {}, {} bytes long, the file has {}", d.entries,
                       d.begin, d.bytes, archive_.size()));
    return d;
  }

  Directory directory64(uint64_t at) const {
    if (at > archive_.size() || archive_.size() - at < kEnd64Bytes || get<uint32_t>(at) != kEnd64)
      fail("its zip64 end record is missing");
    if (get<uint64_t>(at + 24) != get<uint64_t>(at + 32)) fail("it is one part of several");
    return {.begin = get<uint64_t>(at + 48), .bytes = get<uint64_t>(at + 40), .entries = get<uint64_t>(at + 32)};
  }

  /// Of the entry listed at `at`. Its place and sizes count as listed: writers leave them out of the local header.
  ZipEntry entry(uint64_t at) const {
    const std::string_view name = text(at + kCentralBytes, get<uint16_t>(at + 28));
    if ((get<uint16_t>(at + 8) & kEncrypted) != 0) fail(name, "is encrypted");
    const uint16_t method = get<uint16_t>(at + 10);
    if (method != kStored && compressed_ == Compressed::refuse)
      fail(name, "is compressed, those of torch.save are not");
    if (method != kStored && method != kDeflated) fail(name, "is compressed in another way than by deflating");
    uint64_t packed = get<uint32_t>(at + 20), size = get<uint32_t>(at + 24), local = get<uint32_t>(at + 42);
    read_zip64_field(at, name, {&size, &packed, &local});
    if (method == kStored ? packed != size : size / kMostDeflated > packed)
      fail(name, fmt::format("has {} bytes, stored as {}", size, packed));
    return {.name = name,
            .data = data(name, local, packed),
            .deflated = method == kDeflated,
            .size = size,
            .checksum = get<uint32_t>(at + 16)};
  }

  /// The values that did not fit 32 bits, in the field's order.
  void read_zip64_field(uint64_t at, std::string_view name, std::initializer_list<uint64_t*> values) const {
    if (std::ranges::none_of(values, [](const uint64_t* value) { return *value == kIn64; })) return;
    uint64_t field = at + kCentralBytes + name.size();
    const uint64_t end = field + get<uint16_t>(at + 30);
    while (end - field >= 4 && get<uint16_t>(field) != kZip64Field) {
      const uint64_t length = get<uint16_t>(field + 2);
      if (length > end - field - 4) break;
      field += 4 + length;
    }
    if (end - field < 4 || get<uint16_t>(field) != kZip64Field || get<uint16_t>(field + 2) > end - field - 4)
      fail(name, "lacks its zip64 sizes");
    const uint64_t stop = field + 4 + get<uint16_t>(field + 2);
    field += 4;
    for (uint64_t* value : values) {
      if (*value != kIn64) continue;
      if (stop - field < sizeof(uint64_t)) fail(name, "lacks its zip64 sizes");
      *value = get<uint64_t>(field);
      field += sizeof(uint64_t);
    }
  }

  std::span<const std::byte> data(std::string_view name, uint64_t local, uint64_t size) const {
    if (local > archive_.size() || archive_.size() - local < kLocalBytes || get<uint32_t>(local) != kLocal)
      fail(name, fmt::format("is said to begin at byte {}, where no entry begins", local));
    const uint64_t name_bytes = get<uint16_t>(local + 26);
    if (text(local + kLocalBytes, name_bytes) != name) fail(name, "has another name where its data is");
    const uint64_t begin = local + kLocalBytes + name_bytes + get<uint16_t>(local + 28);
    if (begin > archive_.size() || size > archive_.size() - begin)
      fail(name, fmt::format("of {} bytes begins at byte {}, the file has {}", size, begin, archive_.size()));
    return archive_.subspan(static_cast<size_t>(begin), static_cast<size_t>(size));
  }

  std::span<const std::byte> archive_;
  const std::string& where_;
  Compressed compressed_;
};

/// zlib counts in 32 bits: the next part of `left` bytes.
uInt next_part(size_t left) { return static_cast<uInt>(std::min<size_t>(left, size_t{1} << 30)); }

/// Fills `out`; false unless the stream is sound and makes just as many bytes.
bool inflate_into(std::span<const std::byte> packed, std::span<std::byte> out) {
  z_stream stream = {};
  constexpr int kRaw = -MAX_WBITS;
  if (inflateInit2(&stream, kRaw) != Z_OK) throw std::bad_alloc();
  std::byte beyond{};  // somewhere to point to where `out` is full or empty
  size_t taken = 0, made = 0;
  int state = Z_OK;
  while (state == Z_OK) {
    stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(packed.data() + taken));  // which it only reads
    stream.avail_in = next_part(packed.size() - taken);
    const bool full = made == out.size();
    stream.next_out = reinterpret_cast<Bytef*>(full ? &beyond : out.data() + made);
    stream.avail_out = full ? 1 : next_part(out.size() - made);
    const uInt in = stream.avail_in, room = stream.avail_out;
    state = inflate(&stream, Z_NO_FLUSH);
    taken += in - stream.avail_in;
    made += full ? 0 : room - stream.avail_out;
    if (full && stream.avail_out == 0) state = Z_DATA_ERROR;  // it makes more
  }
  inflateEnd(&stream);
  return state == Z_STREAM_END && taken == packed.size() && made == out.size();
}

uint32_t checksum_of(std::span<const std::byte> data) {
  uLong sum = crc32(0, nullptr, 0);
  while (!data.empty()) {
    const uInt part = next_part(data.size());
    sum = crc32(sum, reinterpret_cast<const Bytef*>(data.data()), part);
    data = data.subspan(part);
  }
  return static_cast<uint32_t>(sum);
}

}  // namespace

std::vector<ZipEntry> parse_zip(std::span<const std::byte> archive, const std::string& where, Compressed compressed) {
  return ZipReader(archive, where, compressed).read();
}

std::vector<std::byte> inflate_entry(const ZipEntry& entry, const std::string& where) {
  std::vector<std::byte> out(entry.size);
  if (!inflate_into(entry.data, out)) bad_zip(where, entry.name, "does not inflate to the size that is said");
  if (checksum_of(out) != entry.checksum) bad_zip(where, entry.name, "has another checksum than is said");
  return out;
}

std::string_view first_zip_name(std::span<const std::byte> start) {
  uint32_t magic = 0;
  uint16_t length = 0;
  if (start.size() < kLocalBytes) return {};
  std::memcpy(&magic, start.data(), sizeof magic);
  std::memcpy(&length, start.data() + 26, sizeof length);
  if (magic != kLocal || length > start.size() - kLocalBytes) return {};
  return {reinterpret_cast<const char*>(start.data()) + kLocalBytes, length};
}

}  // namespace bitwright
