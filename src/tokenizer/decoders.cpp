#include "tokenizer/decoders.hpp"

#include <algorithm>
#include <array>

#include "tokenizer/byte_level.hpp"
#include "tokenizer/unicode.hpp"

namespace bitwright {
namespace {

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != text.npos && !from.empty(); at = text.find(from, at + to.size()))
    text.replace(at, from.size(), to);
}

/// The order and the texts are those of transformers' clean_up_tokenization.
void clean_up(std::string& text) {
  static constexpr std::array<std::array<std::string_view, 2>, 11> kChanges = {{{" .", "."},
                                                                                {" ?", "?"},
                                                                                {" !", "!"},
                                                                                {" ,", ","},
                                                                                {" ' ", "'"},
                                                                                {" n't", "n't"},
                                                                                {" 'm", "'m"},
                                                                                {" do not", " don't"},
                                                                                {" 's", "'s"},
                                                                                {" 've", "'ve"},
                                                                                {" 're", "'re"}}};
  for (const auto& [from, to] : kChanges) replace_all(text, from, to);
}

}  // namespace

TokenDecoder from_byte_alphabet() {
  return [](std::vector<std::string>& texts) {
    for (std::string& text : texts)
      if (auto bytes = bytes_of_token(text)) text = std::move(*bytes);
  };
}

TokenDecoder replace_in_tokens(Pattern pattern, std::string content) {
  const auto shared = std::make_shared<const Pattern>(std::move(pattern));
  return [shared, content = std::move(content)](std::vector<std::string>& texts) {
    for (std::string& text : texts) {
      const std::string escaped = escape_stray_bytes(text);
      std::string out;
      size_t at = 0;
      for (const Pattern::Match& match : shared->matches(escaped)) {
        out.append(escaped, at, match.begin - at);
        out += content;
        at = match.end;
      }
      text = unescape_stray_bytes(out.append(escaped, at));
    }
  };
}

TokenDecoder replace_in_tokens(std::string text, std::string content) {
  return [from = std::move(text), to = std::move(content)](std::vector<std::string>& texts) {
    for (std::string& text_of_token : texts) replace_all(text_of_token, from, to);
  };
}

TokenDecoder byte_fallback() {
  return [](std::vector<std::string>& texts) {
    for (std::string& text : texts)
      if (const auto byte = byte_of_token(text)) text.assign(1, static_cast<char>(*byte));
  };
}

TokenDecoder fuse() {
  return [](std::vector<std::string>& texts) {
    std::string all;
    for (const std::string& text : texts) all += text;
    texts = {std::move(all)};
  };
}

TokenDecoder strip_tokens(std::string content, size_t start, size_t stop) {
  return [content = std::move(content), start, stop](std::vector<std::string>& texts) {
    for (std::string& text : texts) {
      std::string_view rest = text;
      for (size_t i = 0; i < start && rest.starts_with(content); ++i) rest.remove_prefix(content.size());
      for (size_t i = 0; i < stop && rest.ends_with(content); ++i) rest.remove_suffix(content.size());
      text = std::string(rest);
    }
  };
}

TokenDecoder word_piece(std::string prefix, bool cleanup) {
  return [prefix = std::move(prefix), cleanup](std::vector<std::string>& texts) {
    for (size_t i = 0; i < texts.size(); ++i) {
      if (i > 0) texts[i] = texts[i].starts_with(prefix) ? texts[i].substr(prefix.size()) : " " + texts[i];
      if (cleanup) clean_up(texts[i]);
    }
  };
}

TokenDecoder end_of_word(std::string suffix) {
  return [suffix = std::move(suffix)](std::vector<std::string>& texts) {
    for (size_t i = 0; i < texts.size(); ++i) replace_all(texts[i], suffix, i + 1 == texts.size() ? "" : " ");
  };
}

TokenDecoder metaspace(std::string replacement, bool prepends) {
  return [replacement = std::move(replacement), prepends](std::vector<std::string>& texts) {
    for (size_t i = 0; i < texts.size(); ++i) {
      std::string_view rest = texts[i];
      if (i == 0 && prepends)
        while (rest.starts_with(replacement)) rest.remove_prefix(replacement.size());
      std::string text(rest);
      replace_all(text, replacement, " ");
      texts[i] = std::move(text);
    }
  };
}

TokenDecoder ctc(std::string pad, std::string delimiter, bool cleanup) {
  return [pad = std::move(pad), delimiter = std::move(delimiter), cleanup](std::vector<std::string>& texts) {
    texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
    for (std::string& text : texts) {
      replace_all(text, pad, "");
      if (!cleanup) continue;
      clean_up(text);
      replace_all(text, delimiter, " ");
    }
    std::erase(texts, "");
  };
}

TokenDecoder join_with_spaces() {
  return [](std::vector<std::string>& texts) {
    for (size_t i = 1; i < texts.size(); ++i) texts[i].insert(0, " ");
  };
}

}  // namespace bitwright
