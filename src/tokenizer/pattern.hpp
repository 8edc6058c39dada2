#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// A regular expression over escaped text (unicode.hpp). Immutable; may be shared between threads.
class Pattern {
 public:
  struct Match {
    size_t begin, end;
  };

  /// An expression as tokenizers write it, for Oniguruma; run by PCRE2. White space is Unicode's White_Space, a word
  /// character what Oniguruma takes for one, ^ and $ hold at each line. Throws Error{"unsupported-tokenizer"} where
  /// PCRE2 cannot compile it or would read it otherwise.
  explicit Pattern(std::string_view expression);
  /// This very text.
  static Pattern literal(std::string_view text);
  ~Pattern();
  Pattern(Pattern&&) noexcept;

  /// All matches from left to right. Two do not overlap; one may be empty, though not where another ends.
  /// Throws Error{"pattern-too-slow"} where the expression takes exponential time.
  std::vector<Match> matches(std::string_view text) const;

 private:
  struct Impl;
  explicit Pattern(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitwright
