#include "tokenizer/normalizers.hpp"

#include "tokenizer/byte_level.hpp"
#include "tokenizer/trie.hpp"

namespace bitwright {
namespace {

/// Calls each(c, its bytes) for the characters of `text`.
template <class Each>
void for_characters(std::string_view text, const Each& each) {
  while (!text.empty()) {
    const Character c = first_character(text);
    each(c.code_point, text.substr(0, c.length));
    text.remove_prefix(c.length);
  }
}

/// What Bert takes for a Chinese character (tokenization.py; its fifth block begins where Hugging Face has it).
bool is_chinese(char32_t c) {
  return (c >= 0x4e00 && c <= 0x9fff) || (c >= 0x3400 && c <= 0x4dbf) || (c >= 0x20000 && c <= 0x2a6df) ||
         (c >= 0x2a700 && c <= 0x2b73f) || (c >= 0x2b740 && c <= 0x2b81f) || (c >= 0x2b920 && c <= 0x2ceaf) ||
         (c >= 0xf900 && c <= 0xfaff) || (c >= 0x2f800 && c <= 0x2fa1f);
}

std::string cleaned_for_bert(std::string_view text, bool chinese_apart, bool clean) {
  std::string out;
  for_characters(text, [&](char32_t c, std::string_view bytes) {
    const bool plain_space = c == '\t' || c == '\n' || c == '\r';
    const bool dropped = c == 0 || c == 0xfffd || (is_other(c) && !plain_space && !stray_byte(c));
    if (clean && dropped) return;
    if (clean && (plain_space || is_space(c))) bytes = " ";
    const bool apart = chinese_apart && is_chinese(c);
    if (apart) out += ' ';
    out += bytes;
    if (apart) out += ' ';
  });
  return out;
}

bool nmt_drops(char32_t c) {
  return (c >= 1 && c <= 8) || c == 0x0b || (c >= 0x0e && c <= 0x1f) || c == 0x7f || c == 0x8f || c == 0x9f;
}

bool nmt_makes_space(char32_t c) {
  return c == '\t' || c == '\n' || c == 0x0c || c == '\r' || c == 0x1680 || (c >= 0x200b && c <= 0x200f) ||
         c == 0x2028 || c == 0x2029 || c == 0x2581 || c == 0xfeff || c == 0xfffd;
}

}  // namespace

TextNormalizer to_normal_form(NormalForm form) {
  return [form](std::string_view text) { return normal_form(text, form); };
}

TextNormalizer to_lower_case() {
  return [](std::string_view text) {
    std::string out;
    for_characters(text, [&](char32_t c, std::string_view) { append_lower(out, c); });
    return out;
  };
}

TextNormalizer strip_space(bool left, bool right) {
  return [left, right](std::string_view text) {
    size_t begin = text.size(), end = 0, at = 0;
    for_characters(text, [&](char32_t c, std::string_view bytes) {
      if (!is_space(c)) begin = std::min(begin, at), end = at + bytes.size();
      at += bytes.size();
    });
    if (!left && begin < text.size()) begin = 0;
    if (!right) end = text.size();
    if (begin == text.size() && !(left && right)) return std::string(left || right ? "" : text);
    return std::string(begin < end ? text.substr(begin, end - begin) : "");
  };
}

TextNormalizer strip_accents() {
  return [](std::string_view text) {
    std::string out;
    for_characters(text, [&](char32_t c, std::string_view bytes) {
      if (!is_mark(c)) out += bytes;
    });
    return out;
  };
}

TextNormalizer replace_text(Pattern pattern, std::string content) {
  const auto shared = std::make_shared<const Pattern>(std::move(pattern));
  return [shared, content = std::move(content)](std::string_view text) {
    std::string out;
    size_t at = 0;
    for (const Pattern::Match& match : shared->matches(text)) {
      out.append(text, at, match.begin - at);
      out += content;
      at = match.end;
    }
    return out.append(text, at);
  };
}

TextNormalizer prepend_text(std::string prefix) {
  return [prefix = std::move(prefix)](std::string_view text) {
    return text.empty() ? std::string() : prefix + std::string(text);
  };
}

TextNormalizer text_to_byte_alphabet() {
  return [](std::string_view text) { return in_byte_alphabet(unescape_stray_bytes(text)); };
}

TextNormalizer nmt() {
  return [](std::string_view text) {
    std::string out;
    for_characters(text, [&](char32_t c, std::string_view bytes) {
      if (!nmt_drops(c)) out += nmt_makes_space(c) ? " " : bytes;
    });
    return out;
  };
}

TextNormalizer bert(const BertNormalization& options) {
  return [options](std::string_view text) {
    std::string out = cleaned_for_bert(text, options.handle_chinese_chars, options.clean_text);
    if (options.strip_accents) {
      std::string bare;
      for_characters(normal_form(out, NormalForm::d), [&](char32_t c, std::string_view bytes) {
        if (!is_nonspacing_mark(c)) bare += bytes;
      });
      out = std::move(bare);
    }
    return options.lowercase ? to_lower_case()(out) : out;
  };
}

TextNormalizer precompiled(Charsmap map) {
  const auto shared = std::make_shared<const Charsmap>(std::move(map));
  return [shared](std::string_view text) {
    constexpr size_t kLongestGrapheme = 5;
    std::string out;
    while (!text.empty()) {
      const std::string_view grapheme = text.substr(0, first_grapheme(text));
      text.remove_prefix(grapheme.size());
      const Charsmap::Found whole = shared->shortest(grapheme);
      if (grapheme.size() <= kLongestGrapheme && whole.length > 0) {
        out += whole.replacement;
        continue;
      }
      for_characters(grapheme, [&](char32_t, std::string_view bytes) {
        const Charsmap::Found found = shared->shortest(bytes);
        out += found.length > 0 ? found.replacement : bytes;
      });
    }
    return out;
  };
}

TextNormalizer sentencepiece(SentencePieceNormalization options) {
  Trie user_defined;
  for (const std::string& text : options.user_defined) user_defined.add(text, 0);
  const auto shared =
      std::make_shared<const std::pair<SentencePieceNormalization, Trie>>(std::move(options), std::move(user_defined));
  return [shared](std::string_view text) {
    const auto& [o, kept] = *shared;
    std::string plain;
    while (!text.empty()) {
      size_t length = kept.longest(text).length;
      std::string_view replacement = text.substr(0, length);
      if (length == 0 && o.charsmap) {
        const Charsmap::Found found = o.charsmap->longest(text);
        length = found.length;
        replacement = found.replacement;
      }
      if (length == 0) {
        length = first_character(text).length;
        replacement = text.substr(0, length);
      }
      text.remove_prefix(length);
      for (const char c : replacement) {
        const bool extra = c == ' ' && o.remove_extra_whitespaces && (plain.empty() || plain.back() == ' ');
        if (!extra) plain += c;
      }
    }
    if (o.remove_extra_whitespaces && plain.ends_with(' ')) plain.pop_back();
    if (plain.empty()) return plain;
    const std::string_view space = o.escape_whitespaces ? kMetaspace : " ";
    std::string out;
    const auto add = [&](char c) { c == ' ' ? out.append(space) : out.append(1, c); };
    if (o.add_dummy_prefix && !o.treat_whitespace_as_suffix) add(' ');
    for (const char c : plain) add(c);
    if (o.add_dummy_prefix && o.treat_whitespace_as_suffix) add(' ');
    return out;
  };
}

}  // namespace bitwright
