#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/tokenizer_file.hpp"

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
  /// The token at the start of `text`, or null.
  const AddedToken* find(std::string_view text, bool special) const;

  std::unordered_map<std::string, AddedToken> tokens_;
  std::array<std::vector<size_t>, 256> lengths_;  ///< by first byte: the lengths there are, longest first
};

}  // namespace bitwright
