#include "tokenizer/added_tokens.hpp"

#include <algorithm>
#include <functional>

namespace bitwright {

AddedTokens::AddedTokens(std::span<const AddedToken> tokens, bool normalized) {
  for (const AddedToken& token : tokens) {
    if (token.normalized != normalized) continue;
    tokens_.emplace(token.text, token);
    std::vector<size_t>& lengths = lengths_[static_cast<unsigned char>(token.text[0])];
    if (std::find(lengths.begin(), lengths.end(), token.text.size()) == lengths.end())
      lengths.push_back(token.text.size());
  }
  for (std::vector<size_t>& lengths : lengths_) std::sort(lengths.begin(), lengths.end(), std::greater<>());
}

const AddedToken* AddedTokens::find(std::string_view text, bool special) const {
  for (const size_t length : lengths_[static_cast<unsigned char>(text[0])]) {
    if (length > text.size()) continue;
    const auto it = tokens_.find(std::string(text.substr(0, length)));
    if (it != tokens_.end() && (special || !it->second.special)) return &it->second;
  }
  return nullptr;
}

std::vector<Stretch> AddedTokens::split(std::string_view text, bool special) const {
  std::vector<Stretch> out;
  size_t begin = 0;  // of the text after the last token
  for (size_t at = 0; at < text.size();) {
    const AddedToken* token = find(text.substr(at), special);
    if (token == nullptr) {
      ++at;
      continue;
    }
    if (at > begin) out.push_back({text.substr(begin, at - begin), -1});
    out.push_back({text.substr(at, token->text.size()), token->id});
    begin = at += token->text.size();
  }
  if (begin < text.size()) out.push_back({text.substr(begin), -1});
  return out;
}

}  // namespace bitwright
