#include "tokenizer/trie.hpp"

namespace bitwright {

Trie::Trie() : values_{-1}, slots_(1024, Slot{0, 0}) {}

size_t Trie::slot(uint64_t key) const {
  const size_t mask = slots_.size() - 1;
  size_t at = (key * 0x9e3779b97f4a7c15u >> 32) & mask;  // 2^64 / golden ratio; the upper half depends on all bits
  while (slots_[at].child != 0 && slots_[at].key != key) at = (at + 1) & mask;
  return at;
}

void Trie::grow() {
  std::vector<Slot> old(2 * slots_.size(), Slot{0, 0});
  old.swap(slots_);
  for (const Slot& s : old)
    if (s.child != 0) slots_[slot(s.key)] = s;
}

void Trie::add(std::string_view text, int32_t value) {
  uint32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const auto fresh = static_cast<uint32_t>(values_.size());
    if (i == 0) {
      if (root_[byte] == 0) root_[byte] = fresh, values_.push_back(-1);
      node = root_[byte];
      continue;
    }
    if (2 * used_ >= slots_.size()) grow();
    const uint64_t key = uint64_t{node} << 8 | byte;
    Slot& s = slots_[slot(key)];
    if (s.child == 0) {
      s = {key, fresh};
      values_.push_back(-1);
      ++used_;
    }
    node = s.child;
  }
  if (!text.empty() && values_[node] < 0) values_[node] = value;
}

Trie::Found Trie::longest(std::string_view text) const {
  Found best = {0, -1};
  prefixes(text, [&](size_t length, int32_t value) { best = {length, value}; });
  return best;
}

}  // namespace bitwright
