#include "tokenizer/unicode.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "base/error.hpp"
#include "base/utf8.hpp"

namespace bitwright {
namespace {

constexpr char32_t kStray = 0xdc00;  // + byte

utf8proc_category_t category(char32_t c) { return utf8proc_category(static_cast<utf8proc_int32_t>(c)); }

bool is_ascii(char c) { return static_cast<unsigned char>(c) < 0x80; }

/// text: characters that utf8proc knows.
void append_normal_form(std::string& out, std::string_view text, NormalForm form) {
  const bool composed = form == NormalForm::c || form == NormalForm::kc;
  const bool compatible = form == NormalForm::kc || form == NormalForm::kd;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | (compatible ? UTF8PROC_COMPAT : 0) |
                                                      (composed ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE));
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  std::vector<utf8proc_int32_t> buffer(text.size());  // most characters are not longer decomposed than their bytes
  auto length = utf8proc_decompose(bytes, static_cast<utf8proc_ssize_t>(text.size()), buffer.data(),
                                   static_cast<utf8proc_ssize_t>(buffer.size()), options);
  if (length > static_cast<utf8proc_ssize_t>(buffer.size())) {
    buffer.resize(static_cast<size_t>(length));
    length = utf8proc_decompose(bytes, static_cast<utf8proc_ssize_t>(text.size()), buffer.data(), length, options);
  }
  BW_ASSERT(length >= 0);
  length = utf8proc_normalize_utf32(buffer.data(), length, options);
  BW_ASSERT(length >= 0);
  for (utf8proc_ssize_t i = 0; i < length; ++i)
    append_character(out, static_cast<char32_t>(buffer[static_cast<size_t>(i)]));
}

}  // namespace

std::string escape_stray_bytes(std::string_view bytes) {
  std::string text;
  for (size_t i = 0; i < bytes.size();) {
    const size_t length = utf8_character(bytes.substr(i));
    if (length == 0) {
      append_character(text, kStray + static_cast<unsigned char>(bytes[i++]));
    } else {
      text.append(bytes, i, length);
      i += length;
    }
  }
  return text;
}

std::string unescape_stray_bytes(std::string_view text) {
  std::string bytes;
  for (size_t i = 0; i < text.size();) {
    const Character c = first_character(text.substr(i));
    if (const auto byte = stray_byte(c.code_point)) {
      bytes += static_cast<char>(*byte);
    } else {
      bytes.append(text, i, c.length);
    }
    i += c.length;
  }
  return bytes;
}

std::optional<unsigned char> stray_byte(char32_t code_point) {
  if (code_point < kStray + 0x80 || code_point > kStray + 0xff) return std::nullopt;
  return static_cast<unsigned char>(code_point - kStray);
}

Character first_character(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const auto tail = [&](size_t i) { return static_cast<char32_t>(byte(i) & 0x3f); };
  if (byte(0) < 0x80) return {byte(0), 1};
  switch (utf8_character(text)) {
    case 2:
      return {static_cast<char32_t>((byte(0) & 0x1f) << 6) | tail(1), 2};
    case 3:
      return {static_cast<char32_t>((byte(0) & 0x0f) << 12) | tail(1) << 6 | tail(2), 3};
    case 4:
      return {static_cast<char32_t>((byte(0) & 0x07) << 18) | tail(1) << 12 | tail(2) << 6 | tail(3), 4};
    default:
      break;
  }
  const bool escaped =
      text.size() > 2 && byte(0) == 0xed && (byte(1) == 0xb2 || byte(1) == 0xb3) && (byte(2) & 0xc0) == 0x80;
  if (escaped) return {static_cast<char32_t>(0xd000) | tail(1) << 6 | tail(2), 3};
  return {kStray + byte(0), 1};
}

void append_character(std::string& text, char32_t c) {
  const auto add = [&](char32_t byte) { text += static_cast<char>(byte); };
  if (c < 0x80) {
    add(c);
  } else if (c < 0x800) {
    add(0xc0 | c >> 6), add(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    add(0xe0 | c >> 12), add(0x80 | (c >> 6 & 0x3f)), add(0x80 | (c & 0x3f));
  } else {
    add(0xf0 | c >> 18), add(0x80 | (c >> 12 & 0x3f)), add(0x80 | (c >> 6 & 0x3f)), add(0x80 | (c & 0x3f));
  }
}

bool is_space(char32_t c) {
  return c == ' ' || (c >= '\t' && c <= '\r') || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool is_number(char32_t c) {
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO;
}

bool is_punctuation(char32_t c) {
  if (c < 0x80)
    return (c >= '!' && c <= '/') || (c >= ':' && c <= '@') || (c >= '[' && c <= '`') || (c >= '{' && c <= '~');
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO;
}

bool is_mark(char32_t c) {
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_MN || k == UTF8PROC_CATEGORY_MC || k == UTF8PROC_CATEGORY_ME;
}

bool is_nonspacing_mark(char32_t c) { return category(c) == UTF8PROC_CATEGORY_MN; }

bool is_other(char32_t c) {
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_CN || (k >= UTF8PROC_CATEGORY_CC && k <= UTF8PROC_CATEGORY_CO);
}

void append_lower(std::string& text, char32_t c) {
  if (c == 0x130) {  // the only one whose lower case is two characters (SpecialCasing.txt)
    text += "i\u0307";
  } else {
    append_character(text, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
  }
}

std::string normal_form(std::string_view text, NormalForm form) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    // ASCII is inert, but for the last of a run, which may carry a mark.
    size_t plain = 0;
    while (plain < text.size() && is_ascii(text[plain])) ++plain;
    if (plain > 0 && plain < text.size()) --plain;
    out.append(text, 0, plain);
    text.remove_prefix(plain);
    size_t end = 0;
    while (end < text.size() && (end == 0 || !is_ascii(text[end]))) {
      const size_t length = utf8_character(text.substr(end));
      if (length == 0) break;
      end += length;
    }
    if (end > 0) append_normal_form(out, text.substr(0, end), form);
    text.remove_prefix(end);
    while (!text.empty() && utf8_character(text) == 0) {  // escaped bytes
      const size_t length = first_character(text).length;
      out.append(text, 0, length);
      text.remove_prefix(length);
    }
  }
  return out;
}

size_t first_grapheme(std::string_view text) {
  Character before = first_character(text);
  size_t end = before.length;
  utf8proc_int32_t state = 0;
  while (end < text.size()) {
    const Character next = first_character(text.substr(end));
    if (utf8proc_grapheme_break_stateful(static_cast<utf8proc_int32_t>(before.code_point),
                                         static_cast<utf8proc_int32_t>(next.code_point), &state))
      break;
    before = next;
    end += next.length;
  }
  return end;
}

}  // namespace bitwright
