#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace bitwright {

/// Texts with numbers, to find those that another text begins with.
class Trie {
 public:
  Trie();
  /// Nothing happens where `text` is there already. value: not negative.
  void add(std::string_view text, int32_t value);
  bool empty() const { return values_.size() == 1; }

  /// Calls found(length, value) for each member that `text` begins with, from the shortest to the longest.
  template <class Found>
  void prefixes(std::string_view text, const Found& found) const {
    uint32_t node = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto byte = static_cast<unsigned char>(text[i]);
      node = i == 0 ? root_[byte] : child(node, byte);
      if (node == 0) return;
      if (values_[node] >= 0) found(i + 1, values_[node]);
    }
  }
  struct Found {
    size_t length;  ///< 0: none
    int32_t value;
  };
  Found longest(std::string_view text) const;

 private:
  struct Slot {
    uint64_t key;    ///< node << 8 | byte
    uint32_t child;  ///< 0: a free slot
  };
  uint32_t child(uint32_t node, unsigned char byte) const { return slots_[slot(uint64_t{node} << 8 | byte)].child; }
  size_t slot(uint64_t key) const;  ///< where `key` stands or would
  void grow();

  std::array<uint32_t, 256> root_ = {};
  std::vector<int32_t> values_;  ///< of each node; -1: none ends here
  std::vector<Slot> slots_;      ///< a hash table with open addressing, at most half full, a power of two
  size_t used_ = 0;
};

}  // namespace bitwright
