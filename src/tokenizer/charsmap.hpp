#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// SentencePiece's precompiled_charsmap: what prefixes of a text are replaced with. Its layout (normalizer.cc): u32,
/// the bytes of a double-array trie (Darts-clone) of u32 units; the trie, whose values are places in the rest; the
/// rest, texts with a byte 0 after each.
class Charsmap {
 public:
  /// Nothing where `blob` is damaged.
  static std::optional<Charsmap> read(std::string_view blob);

  struct Found {
    size_t length;  ///< bytes replaced; 0: none
    std::string_view replacement;
  };
  Found shortest(std::string_view text) const { return find(text, true); }
  Found longest(std::string_view text) const { return find(text, false); }

 private:
  Found find(std::string_view text, bool stop_at_first) const;

  std::vector<uint32_t> units_;
  std::string replacements_;
};

}  // namespace bitwright
