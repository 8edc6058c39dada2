#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// A file inside a zip archive.
struct ZipEntry {
  std::string_view name;            ///< points into the archive
  std::span<const std::byte> data;  ///< likewise
};

/// The files of an archive whose entries are stored, not compressed, in the order of its central directory (PKWARE
/// APPNOTE 6.3.10, sections 4.3 to 4.5; zip64 too). Checksums are not compared: data is not read.
/// Throws Error{"bad-zip"} naming `where` where a length or offset leads outside the archive, an entry is compressed,
/// encrypted or there twice, or the two headers of an entry disagree.
std::vector<ZipEntry> parse_zip(std::span<const std::byte> archive, const std::string& where);

}  // namespace bitwright
