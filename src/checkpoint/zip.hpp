#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// A file inside a zip archive.
struct ZipEntry {
  std::string_view name;            ///< points into the archive
  std::span<const std::byte> data;  ///< likewise; compressed where `deflated`
  bool deflated = false;
  uint64_t size = 0;      ///< of the file itself
  uint32_t checksum = 0;  ///< of the file itself (CRC-32), as the archive says
};

enum class Compressed : uint8_t { refuse, allow };

/// The files of an archive in the order of its central directory (PKWARE APPNOTE 6.3.10, sections 4.3 to 4.5; zip64
/// too): stored ones, and deflated ones where they are allowed. Checksums are not compared: data is not read.
/// Throws Error{"bad-zip"} naming `where` where a length or offset leads outside the archive, an entry is compressed
/// in another way, said to be larger than deflating makes anything, encrypted or there twice, or the two headers of an
/// entry disagree.
std::vector<ZipEntry> parse_zip(std::span<const std::byte> archive, const std::string& where,
                                Compressed compressed = Compressed::refuse);

/// The file of a deflated entry (RFC 1951). Throws Error{"bad-zip"} unless it has the size and the checksum that the
/// archive says.
std::vector<std::byte> inflate_entry(const ZipEntry& entry, const std::string& where);

/// The name of the file that an archive begins with, of which these are the first bytes; empty if they begin none, or
/// end before it does.
std::string_view first_zip_name(std::span<const std::byte> start);

}  // namespace bitwright
