#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/pattern.hpp"

namespace bitwright {

/// Pieces of a text, in order; those that a step changed lie in `owned`.
struct Pieces {
  std::vector<std::string_view> texts;
  std::shared_ptr<std::deque<std::string>> owned = std::make_shared<std::deque<std::string>>();

  void add(std::string_view text) {
    if (!text.empty()) texts.push_back(text);
  }
  std::string_view keep(std::string text) { return owned->emplace_back(std::move(text)); }
};

/// Cuts a piece of escaped text into smaller ones. begins_text: it is the very beginning of what is encoded.
using PreTokenizer = std::function<void(std::string_view piece, bool begins_text, Pieces& out)>;

/// What becomes of the parts of a text that match, as Hugging Face's SplitDelimiterBehavior names it.
enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

/// A part of a text: one that matches, or what lies between two.
struct SplitPart {
  size_t begin, end;
  bool matches;
};

PreTokenizer split_by_pattern(Pattern pattern, SplitBehavior behavior, bool invert);
/// The same where each character that `matches` is a match.
PreTokenizer split_by_character(std::function<bool(char32_t)> matches, SplitBehavior behavior);
/// Puts `prefix` before pieces that do not begin with it: before all, or only the one at the beginning of the text.
PreTokenizer prepend_piece(std::string prefix, bool only_first);
PreTokenizer replace_in_piece(std::string from, std::string to);
/// Each byte as its character in GPT-2's alphabet.
PreTokenizer to_byte_alphabet();

}  // namespace bitwright
