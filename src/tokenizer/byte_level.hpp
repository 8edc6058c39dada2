#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace bitwright {

/// The bytes of a token that is written in GPT-2's alphabet (its encoder.py, bytes_to_unicode): each byte is one
/// character; the printable ones of Latin-1 stand for themselves, the other 68 are U+0100, U+0101, ... in their order.
/// Nothing where `token` has another character.
std::optional<std::string> bytes_of_token(std::string_view token);

/// Bytes of the UTF-8 character that `text` begins with; 0 where it begins with none (Unicode 15, table 3-7).
size_t utf8_character(std::string_view text);

}  // namespace bitwright
