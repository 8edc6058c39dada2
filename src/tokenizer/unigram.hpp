#pragma once

#include <array>
#include <optional>
#include <string>

#include "tokenizer/model.hpp"
#include "tokenizer/trie.hpp"

namespace bitwright {

struct UnigramRules {
  struct Piece {
    std::string text;
    double score;
    int32_t id;
  };
  std::vector<Piece> pieces;
  double worst_score = 0;         ///< that an unknown character is measured by
  bool single_precision = false;  ///< sums are rounded to floats, which decides between segmentations of equal scores
  std::optional<int32_t> unknown;
  std::array<int32_t, 256> bytes;  ///< ids for the bytes of unknown characters; -1 in all: none
};

/// The segmentation with the greatest sum of scores (Kudo 2018, by Viterbi's algorithm); a character that is no piece
/// costs 10 more than the worst score. Sums are doubles, as in Hugging Face tokenizers and llama.cpp, or floats, as in
/// SentencePiece.
class Unigram : public PieceModel {
 public:
  explicit Unigram(UnigramRules rules);
  void encode(std::string_view piece, PieceCache& cache, std::vector<int32_t>& ids) const override;

 private:
  double rounded(double sum) const {
    return rules_.single_precision ? static_cast<double>(static_cast<float>(sum)) : sum;
  }
  void encode_new(std::string_view piece, std::vector<int32_t>& ids) const;
  void add_unknown(std::string_view text, std::vector<int32_t>& ids) const;

  UnigramRules rules_;
  Trie trie_;  ///< of rules_.pieces
  double unknown_score_;
};

}  // namespace bitwright
