#include "tokenizer/byte_level.hpp"

#include <fmt/format.h>

#include <array>
#include <charconv>

#include "tokenizer/unicode.hpp"

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

constexpr std::array<char32_t, 256> code_point_of_byte() {
  const std::array<int, kAlphabetEnd> bytes = byte_of_code_point();
  std::array<char32_t, 256> table = {};
  for (size_t c = 0; c < kAlphabetEnd; ++c)
    if (bytes[c] >= 0) table.at(static_cast<size_t>(bytes[c])) = static_cast<char32_t>(c);
  return table;
}

constexpr std::array<int, kAlphabetEnd> kByteOf = byte_of_code_point();

}  // namespace

std::optional<unsigned char> byte_of_character(char32_t character) {
  if (character >= kAlphabetEnd || kByteOf[character] < 0) return std::nullopt;
  return static_cast<unsigned char>(kByteOf[character]);
}

std::optional<std::string> bytes_of_token(std::string_view token) {
  std::string bytes;
  for (size_t i = 0; i < token.size();) {
    const Character c = first_character(token.substr(i));
    const auto byte = byte_of_character(c.code_point);
    if (!byte) return std::nullopt;
    bytes += static_cast<char>(*byte);
    i += c.length;
  }
  return bytes;
}

std::string in_byte_alphabet(std::string_view bytes) {
  static constexpr std::array<char32_t, 256> kCodePointOf = code_point_of_byte();
  std::string text;
  for (const char c : bytes) append_character(text, kCodePointOf[static_cast<unsigned char>(c)]);
  return text;
}

std::optional<unsigned char> byte_of_token(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  unsigned value = 0;
  const auto [end, error] = std::from_chars(token.data() + 3, token.data() + 5, value, 16);
  if (error != std::errc{} || end != token.data() + 5) return std::nullopt;
  return static_cast<unsigned char>(value);
}

std::string byte_token(unsigned char byte) { return fmt::format("<0x{:02X}>", byte); }

}  // namespace bitwright
