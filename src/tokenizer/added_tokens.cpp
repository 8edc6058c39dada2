#include "tokenizer/added_tokens.hpp"

#include <utf8proc.h>

#include "tokenizer/unicode.hpp"

namespace bitwright {
namespace {

bool is_word(char32_t c) {
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  const bool letter = category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
  return letter || is_mark(c) || category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_PC;
}

/// Where the last character of `text`, which is not empty, begins.
size_t last_character(std::string_view text) {
  size_t at = text.size() - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
  return at;
}

bool stands_alone(std::string_view text, size_t begin, size_t end) {
  const bool left =
      begin == 0 || !is_word(first_character(text.substr(last_character(text.substr(0, begin)))).code_point);
  const bool right = end == text.size() || !is_word(first_character(text.substr(end)).code_point);
  return left && right;
}

}  // namespace

AddedTokens::AddedTokens(std::span<const AddedToken> tokens, bool normalized) {
  for (const AddedToken& token : tokens) {
    if (token.normalized != normalized || token.text.empty()) continue;
    trie_.add(token.text, static_cast<int32_t>(tokens_.size()));
    tokens_.push_back(token);
  }
}

const AddedToken* AddedTokens::find(std::string_view text, size_t at, bool special) const {
  const AddedToken* longest = nullptr;
  trie_.prefixes(text.substr(at), [&](size_t length, int32_t number) {
    const AddedToken& token = tokens_[static_cast<size_t>(number)];
    if ((special || !token.special) && (!token.single_word || stands_alone(text, at, at + length))) longest = &token;
  });
  return longest;
}

std::vector<Stretch> AddedTokens::split(std::string_view text, bool special) const {
  if (trie_.empty()) return {{text, -1}};
  std::vector<Stretch> out;
  size_t done = 0;  // up to here the text is in `out`
  for (size_t at = 0; at < text.size();) {
    const AddedToken* token = find(text, at, special);
    if (token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + token->text.size();
    while (token->lstrip && begin > done) {
      const size_t before = last_character(text.substr(0, begin));
      if (before < done || !is_space(first_character(text.substr(before)).code_point)) break;
      begin = before;
    }
    while (token->rstrip && end < text.size() && is_space(first_character(text.substr(end)).code_point))
      end += first_character(text.substr(end)).length;
    if (begin > done) out.push_back({text.substr(done, begin - done), -1});
    out.push_back({text.substr(begin, end - begin), token->id});
    done = at = end;
  }
  if (done < text.size()) out.push_back({text.substr(done), -1});
  return out;
}

}  // namespace bitwright
