#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace bitwright {

/// Inside the tokenizer text is UTF-8 in which a byte that belongs to no character stands as a lone surrogate,
/// U+DC00 + byte (Python's "surrogateescape"): UTF-8 proper cannot hold one, so nothing collides and nothing is lost.
std::string escape_stray_bytes(std::string_view bytes);
/// The inverse.
std::string unescape_stray_bytes(std::string_view text);
/// The byte that `code_point` stands for, if it is such a surrogate.
std::optional<unsigned char> stray_byte(char32_t code_point);

struct Character {
  char32_t code_point;
  size_t length;  ///< bytes of its UTF-8
};
/// The first character of `text`, which is not empty. Bytes that are none count as the surrogates above.
Character first_character(std::string_view text);
void append_character(std::string& text, char32_t code_point);

bool is_space(char32_t c);            ///< the property White_Space
bool is_number(char32_t c);           ///< a general category N*
bool is_punctuation(char32_t c);      ///< ASCII's, or a general category P*
bool is_mark(char32_t c);             ///< a general category M*
bool is_nonspacing_mark(char32_t c);  ///< the general category Mn
bool is_other(char32_t c);            ///< a general category C*
/// Unicode's full lower case without context (a final sigma is a sigma).
void append_lower(std::string& text, char32_t c);

enum class NormalForm { c, d, kc, kd };
/// Unicode's normal form of `text`, escaped bytes as they are.
std::string normal_form(std::string_view text, NormalForm form);

/// Bytes of the first extended grapheme cluster of `text`, which is not empty.
size_t first_grapheme(std::string_view text);

}  // namespace bitwright
