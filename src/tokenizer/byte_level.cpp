#include "tokenizer/byte_level.hpp"

#include <array>

namespace bitwright {
namespace {

constexpr size_t kAlphabetEnd = 0x144;  // the last of the 68 is U+0143

constexpr bool stands_for_itself(size_t byte) {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || (byte >= 0xae && byte <= 0xff);
}

constexpr std::array<int, kAlphabetEnd> byte_of_code_point() {
  std::array<int, kAlphabetEnd> table = {};
  table.fill(-1);
  size_t next = 0x100;
  for (size_t byte = 0; byte < 256; ++byte) table.at(stands_for_itself(byte) ? byte : next++) = static_cast<int>(byte);
  return table;
}

constexpr std::array<int, kAlphabetEnd> kByteOf = byte_of_code_point();

}  // namespace

std::optional<std::string> bytes_of_token(std::string_view token) {
  std::string bytes;
  for (size_t i = 0, length = 0; i < token.size(); i += length) {
    length = utf8_character(token.substr(i));
    if (length != 1 && length != 2) return std::nullopt;
    const auto first = static_cast<unsigned char>(token[i]);
    const size_t code_point =
        length == 1 ? first : (first & 0x1fu) << 6 | (static_cast<unsigned char>(token[i + 1]) & 0x3fu);
    if (code_point >= kAlphabetEnd || kByteOf[code_point] < 0) return std::nullopt;
    bytes += static_cast<char>(kByteOf[code_point]);
  }
  return bytes;
}

size_t utf8_character(std::string_view text) {
  const auto between = [&](size_t i, unsigned char low, unsigned char high) {
    const auto byte = i < text.size() ? static_cast<unsigned char>(text[i]) : 0;
    return byte >= low && byte <= high;
  };
  if (text.empty()) return 0;
  const auto first = static_cast<unsigned char>(text[0]);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return between(1, 0x80, 0xbf) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {  // no overlong forms, no surrogates
    const bool second = between(1, first == 0xe0 ? 0xa0 : 0x80, first == 0xed ? 0x9f : 0xbf);
    return second && between(2, 0x80, 0xbf) ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {  // no overlong forms, nothing past U+10FFFF
    const bool second = between(1, first == 0xf0 ? 0x90 : 0x80, first == 0xf4 ? 0x8f : 0xbf);
    return second && between(2, 0x80, 0xbf) && between(3, 0x80, 0xbf) ? 4 : 0;
  }
  return 0;
}

}  // namespace bitwright
