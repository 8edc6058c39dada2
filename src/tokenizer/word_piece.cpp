#include "tokenizer/word_piece.hpp"

#include "tokenizer/unicode.hpp"

namespace bitwright {

WordPiece::WordPiece(const Rules& rules) : unknown_(rules.unknown), longest_(rules.longest) {
  for (const auto& [text, id] : rules.first) first_.add(text, id);
  for (const auto& [text, id] : rules.continuing) continuing_.add(text, id);
}

void WordPiece::encode(std::string_view piece, PieceCache& cache, std::vector<int32_t>& ids) const {
  if (piece.size() > PieceCache::kLongest) return encode_new(piece, ids);
  cache.encode(piece, ids, [&] { encode_new(piece, ids); });
}

void WordPiece::encode_new(std::string_view piece, std::vector<int32_t>& ids) const {
  const size_t before = ids.size();
  size_t characters = 0;
  for (size_t at = 0; at < piece.size(); ++characters) at += first_character(piece.substr(at)).length;
  bool written = characters <= longest_;
  for (size_t at = 0; written && at < piece.size();) {
    const Trie::Found found = (at == 0 ? first_ : continuing_).longest(piece.substr(at));
    written = found.length > 0;
    if (written) ids.push_back(found.value);
    at += found.length;
  }
  if (written) return;
  ids.resize(before);
  if (unknown_) ids.push_back(*unknown_);
}

void WordLevel::encode(std::string_view piece, PieceCache&, std::vector<int32_t>& ids) const {
  const auto it = ids_.find(piece);
  if (it != ids_.end()) {
    ids.push_back(it->second);
  } else if (unknown_) {
    ids.push_back(*unknown_);
  }
}

}  // namespace bitwright
