#include "tokenizer/unigram.hpp"

#include <algorithm>

#include "tokenizer/unicode.hpp"

namespace bitwright {
namespace {

constexpr double kUnknownPenalty = 10;
constexpr int32_t kUnknown = -1;

/// The best segmentation of the text up to a place: its last part.
struct Best {
  double score;
  uint32_t begin;
  int32_t piece;  ///< in rules_.pieces, or kUnknown
};
constexpr uint32_t kUnreached = UINT32_MAX;

}  // namespace

Unigram::Unigram(UnigramRules rules) : rules_(std::move(rules)) {
  for (size_t i = 0; i < rules_.pieces.size(); ++i) trie_.add(rules_.pieces[i].text, static_cast<int32_t>(i));
  unknown_score_ = rounded(rules_.worst_score - kUnknownPenalty);
}

void Unigram::encode(std::string_view piece, PieceCache& cache, std::vector<int32_t>& ids) const {
  if (piece.size() > PieceCache::kLongest) return encode_new(piece, ids);
  cache.encode(piece, ids, [&] { encode_new(piece, ids); });
}

void Unigram::add_unknown(std::string_view text, std::vector<int32_t>& ids) const {
  const std::string bytes = unescape_stray_bytes(text);
  const auto id = [&](char byte) { return rules_.bytes[static_cast<unsigned char>(byte)]; };
  if (std::ranges::all_of(bytes, [&](char byte) { return id(byte) >= 0; })) {
    for (const char byte : bytes) ids.push_back(id(byte));
  } else if (rules_.unknown) {
    ids.push_back(*rules_.unknown);
  }
}

void Unigram::encode_new(std::string_view piece, std::vector<int32_t>& ids) const {
  std::vector<Best> best(piece.size() + 1, Best{0, kUnreached, kUnknown});
  const auto offer = [&](size_t begin, size_t end, int32_t number, double score) {
    double sum = best[begin].score + score;
    if (number == kUnknown) sum = rounded(sum);  // SentencePiece compares the others' exact sums with rounded ones
    if (best[end].begin == kUnreached || sum > best[end].score)
      best[end] = {rounded(sum), static_cast<uint32_t>(begin), number};
  };
  for (size_t at = 0; at < piece.size();) {
    const size_t length = first_character(piece.substr(at)).length;
    bool known = false;
    trie_.prefixes(piece.substr(at), [&](size_t prefix, int32_t number) {
      offer(at, at + prefix, number, rules_.pieces[static_cast<size_t>(number)].score);
      known |= prefix == length;
    });
    if (!known) offer(at, at + length, kUnknown, unknown_score_);
    at += length;
  }
  std::vector<std::pair<uint32_t, uint32_t>> parts;  // from the back
  for (size_t end = piece.size(); end > 0; end = best[end].begin)
    parts.emplace_back(best[end].begin, static_cast<uint32_t>(end));
  const auto is_unknown = [&](uint32_t end) {
    const int32_t number = best[end].piece;
    return number == kUnknown || rules_.pieces[static_cast<size_t>(number)].id == rules_.unknown;
  };
  for (size_t i = parts.size(); i-- > 0;) {
    const auto [begin, end] = parts[i];
    if (!is_unknown(end)) {
      ids.push_back(rules_.pieces[static_cast<size_t>(best[end].piece)].id);
      continue;
    }
    while (i > 0 && is_unknown(parts[i - 1].second)) --i;  // neighbours are one
    add_unknown(piece.substr(begin, parts[i].second - begin), ids);
  }
}

}  // namespace bitwright
