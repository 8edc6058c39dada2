#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/tokenizer_file.hpp"

namespace bitwright {

/// Byte-pair encoding from single bytes: of all neighbours that a merge joins, those whose merge comes first in the
/// list are joined, the leftmost first, until none is left. Immutable; may be shared between threads.
class Bpe {
 public:
  explicit Bpe(const TokenizerFile& file);

  /// Appends the ids of `piece` (less than 2 GiB). O(n log n).
  void encode(std::string_view piece, std::vector<int32_t>& ids) const;
  /// Appends an id for each byte, nothing merged.
  void encode_bytes(std::string_view bytes, std::vector<int32_t>& ids) const;

 private:
  struct Slot {
    uint64_t pair;
    uint32_t rank;  ///< place in merges_, or kNone: a free slot
  };

  uint32_t rank(int32_t left, int32_t right) const;  ///< kNone: no merge joins them
  size_t slot(uint64_t pair) const;                  ///< where `pair` stands or would

  std::array<int32_t, 256> byte_ids_;
  std::vector<Merge> merges_;
  std::vector<Slot> slots_;  ///< a hash table with open addressing, at most half full, a power of two
  std::unordered_map<std::string, int32_t> whole_pieces_;
};

}  // namespace bitwright
