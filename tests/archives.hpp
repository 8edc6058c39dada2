#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace bitwright::test {

inline std::string little(uint64_t value, size_t bytes) {
  std::string out;
  for (size_t i = 0; i < bytes; ++i) out += i < sizeof value ? static_cast<char>(value >> (8 * i)) : char{0};
  return out;
}

/// A file as an archive holds it. size, checksum: of the file itself; left out, those of stored data, and 0.
struct ZipMember {
  std::string name, data;
  uint16_t method = 0, flags = 0;
  std::optional<uint64_t> size{};
  uint32_t checksum = 0;
};

/// An archive as the zip specification has it; `in64`: sizes and places only in zip64 fields, as for more than 4 GiB.
inline std::string zip(const std::vector<ZipMember>& entries, bool in64 = false) {
  std::string out, list;
  for (const ZipMember& e : entries) {
    const uint64_t local = out.size(), size = e.data.size(), whole = e.size.value_or(size);
    out += "PK\3\4" + little(45, 2) + little(e.flags, 2) + little(e.method, 2) + little(0, 16) +
           little(e.name.size(), 2) + little(3, 2) + e.name + "pad" + e.data;
    const std::string extra = in64 ? little(9, 2) + little(1, 2) + "x" + little(1, 2) + little(24, 2) +
                                         little(whole, 8) + little(size, 8) + little(local, 8)
                                   : "";
    const auto small = [&](uint64_t value) { return little(in64 ? 0xffffffff : value, 4); };
    list += "PK\1\2" + little(45, 2) + little(45, 2) + little(e.flags, 2) + little(e.method, 2) + little(0, 4) +
            little(e.checksum, 4) + small(size) + small(whole) + little(e.name.size(), 2) + little(extra.size(), 2) +
            little(0, 10) + small(local) + e.name + extra;
  }
  const uint64_t begin = out.size(), end = begin + list.size(), count = entries.size();
  out += list;
  if (in64)
    out += "PK\6\6" + little(44, 8) + little(0, 12) + little(count, 8) + little(count, 8) + little(list.size(), 8) +
           little(begin, 8) + "PK\6\7" + little(0, 4) + little(end, 8) + little(1, 4);
  const auto small = [&](uint64_t value, size_t bytes) {
    return in64 ? std::string(bytes, '\xff') : little(value, bytes);
  };
  return out + "PK\5\6" + little(0, 4) + small(count, 2) + small(count, 2) + small(list.size(), 4) + small(begin, 4) +
         little(0, 2);
}

}  // namespace bitwright::test
