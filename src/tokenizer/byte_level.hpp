#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace bitwright {

/// The bytes of a token that is written in GPT-2's alphabet (its encoder.py, bytes_to_unicode): each byte is one
/// character; the printable ones of Latin-1 stand for themselves, the other 68 are U+0100, U+0101, ... in their order.
/// Nothing where `token` has another character.
std::optional<std::string> bytes_of_token(std::string_view token);
/// The byte that a character of the alphabet stands for.
std::optional<unsigned char> byte_of_character(char32_t character);
/// The inverse of bytes_of_token.
std::string in_byte_alphabet(std::string_view bytes);

/// The byte that SentencePiece's byte tokens, <0x00> to <0xFF>, stand for.
std::optional<unsigned char> byte_of_token(std::string_view token);
std::string byte_token(unsigned char byte);

}  // namespace bitwright
