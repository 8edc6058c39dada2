#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// The split of GPT-2 (its encoder.py): English contractions, words, numbers and other signs, each with the space
/// before it, and white space. White space is spelled out because PCRE2's \s holds U+180E, which Unicode took out
/// in 6.3.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\t-\r\x85\p{Z}\p{L}\p{N}]+|)"
    R"([\t-\r\x85\p{Z}]+(?![^\t-\r\x85\p{Z}])|[\t-\r\x85\p{Z}]+)";

/// A regular expression (PCRE2, Unicode) that cuts a text into pieces. Immutable; may be shared between threads.
class SplitPattern {
 public:
  explicit SplitPattern(std::string_view pattern);
  ~SplitPattern();
  SplitPattern(SplitPattern&&) noexcept;

  /// Each match and each gap between matches, in order: together the whole of `text`, which must be UTF-8.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitwright
