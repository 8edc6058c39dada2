#pragma once

#include <optional>

#include "tokenizer/bpe.hpp"
#include "tokenizer/model.hpp"
#include "tokenizer/trie.hpp"

namespace bitwright {

/// From left to right the longest token that fits (Schuster and Nakajima 2012, as Bert uses it); a piece that cannot be
/// written so is unknown as a whole.
class WordPiece : public PieceModel {
 public:
  struct Rules {
    std::vector<std::pair<std::string, int32_t>> first, continuing;  ///< texts, without any prefix
    std::optional<int32_t> unknown;
    size_t longest = SIZE_MAX;  ///< pieces with more characters are unknown
  };
  explicit WordPiece(const Rules& rules);
  void encode(std::string_view piece, PieceCache& cache, std::vector<int32_t>& ids) const override;

 private:
  void encode_new(std::string_view piece, std::vector<int32_t>& ids) const;

  Trie first_, continuing_;
  std::optional<int32_t> unknown_;
  size_t longest_;
};

/// Whole pieces only.
class WordLevel : public PieceModel {
 public:
  WordLevel(TokenIds ids, std::optional<int32_t> unknown) : ids_(std::move(ids)), unknown_(unknown) {}
  void encode(std::string_view piece, PieceCache& cache, std::vector<int32_t>& ids) const override;

 private:
  TokenIds ids_;
  std::optional<int32_t> unknown_;
};

}  // namespace bitwright
