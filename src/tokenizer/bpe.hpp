#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/model.hpp"

namespace bitwright {

struct Merge {
  int32_t left, right, merged;
  uint32_t rank;  ///< the smallest is made first; equal ones from the left
};

struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
/// Ids by text.
using TokenIds = std::unordered_map<std::string, int32_t, TextHash, std::equal_to<>>;

/// What a file says of a byte-pair encoding.
struct BpeRules {
  bool byte_pieces = false;        ///< a piece is made of bytes, each with its id; else of characters
  std::array<int32_t, 256> bytes;  ///< ids; -1: none. For characters without an id of their own where there is one
  std::unordered_map<char32_t, int32_t> characters{};  ///< ids, not for byte_pieces; may be hidden (below)
  int32_t first_hidden = INT32_MAX;                    ///< ids from here on stand for characters that only occur merged
  std::vector<Merge> merges{};                         ///< each pair once
  /// For each merge the last byte or code point of `left` and the first of `right`. Empty: not known.
  std::vector<std::pair<char32_t, char32_t>> seams{};
  TokenIds whole{};  ///< pieces that are a token whatever the merges would make of them
  std::optional<int32_t> unknown{};
  bool fuse_unknown = false;       ///< neighbours are one unknown token
  std::string prefix{}, suffix{};  ///< of characters not at the beginning, and of the last, when `affixed` is looked up
  TokenIds affixed{};

  BpeRules() { bytes.fill(-1); }
};

/// Byte-pair encoding: of all neighbours that a merge joins, those with the smallest rank are joined, the leftmost
/// first, until none is left.
class Bpe : public PieceModel {
 public:
  explicit Bpe(BpeRules rules);
  void encode(std::string_view piece, PieceCache& cache, std::vector<int32_t>& ids) const override;

 private:
  /// A set of pairs, each with the number it was added with: open addressing, at most half full, a power of two.
  class PairTable {
   public:
    explicit PairTable(size_t most);
    void add(uint64_t pair, uint32_t value);
    uint32_t find(uint64_t pair) const { return slots_[slot(pair)].value; }  ///< kNone: not there
   private:
    struct Slot {
      uint64_t pair;
      uint32_t value;
    };
    size_t slot(uint64_t pair) const;
    std::vector<Slot> slots_;
  };
  struct Symbol {
    int32_t id;  ///< -1: merged into the one before
    uint32_t before, after;
  };

  size_t part_length(std::string_view piece) const;
  void encode_part(std::string_view part, std::vector<int32_t>& ids) const;
  std::vector<int32_t> initial(std::string_view part) const;
  void merge(std::vector<Symbol>& symbols) const;
  void add_unknown(char32_t code_point, std::string_view bytes, std::vector<int32_t>& ids) const;

  BpeRules rules_;
  PairTable pairs_;  ///< of ids: the place in rules_.merges
  PairTable seams_;  ///< of rules_.seams
  std::unordered_map<int32_t, char32_t> hidden_;
};

/// Merges for a vocabulary without a list of them: two neighbours are joined where both together are a token, those
/// with the smallest rank first. Fills rules.merges, rules.seams, rules.characters and first_hidden; `characters` says
/// what tokens are made of. The rules' byte_pieces is to be set.
struct RankedToken {
  std::string_view text;
  int32_t id;
  uint32_t rank;
};
void add_merges_of_ranks(const std::vector<RankedToken>& tokens, int32_t vocabulary_size, BpeRules& rules);

/// The seam between two texts, in bytes or code points.
std::pair<char32_t, char32_t> seam_of(std::string_view left, std::string_view right, bool bytes);

}  // namespace bitwright
