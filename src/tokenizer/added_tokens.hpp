#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "tokenizer/pipeline.hpp"
#include "tokenizer/trie.hpp"

namespace bitwright {

/// A stretch of text: an added token, or what lies between two.
struct Stretch {
  std::string_view text;
  int32_t id;  ///< -1: not an added token
};

/// Finds added tokens in text: from left to right, the longest at each place.
class AddedTokens {
 public:
  /// Those of `tokens` that are `normalized`, or those that are not.
  AddedTokens(std::span<const AddedToken> tokens, bool normalized);

  /// `text` in order; special tokens are left as text unless `special`.
  std::vector<Stretch> split(std::string_view text, bool special) const;

 private:
  /// The token at `at`, or null.
  const AddedToken* find(std::string_view text, size_t at, bool special) const;

  std::vector<AddedToken> tokens_;
  Trie trie_;  ///< of tokens_
};

}  // namespace bitwright
