#include "tokenizer/bpe.hpp"

#include <bit>
#include <functional>
#include <limits>
#include <queue>

namespace bitwright {
namespace {

constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

/// Part of a piece, in a list in the order of the text.
struct Symbol {
  int32_t id;  ///< -1: merged into the one before
  uint32_t before, after;
};

uint64_t pair_of(int32_t left, int32_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

Bpe::Bpe(const TokenizerFile& file)
    : byte_ids_(file.byte_ids), merges_(file.merges), slots_(std::bit_ceil(2 * merges_.size() + 1), {0, kNone}) {
  for (uint32_t i = 0; i < merges_.size(); ++i) {
    const uint64_t pair = pair_of(merges_[i].left, merges_[i].right);
    slots_[slot(pair)] = {pair, i};
  }
  for (size_t id = 0; id < file.tokens.size(); ++id)
    if (file.tokens[id].whole_piece) whole_pieces_.emplace(file.tokens[id].bytes, static_cast<int32_t>(id));
}

size_t Bpe::slot(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  const uint64_t hash =
      pair * 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio; its upper half depends on all bits of `pair`
  size_t at = (hash >> 32) & mask;
  while (slots_[at].rank != kNone && slots_[at].pair != pair) at = (at + 1) & mask;
  return at;
}

uint32_t Bpe::rank(int32_t left, int32_t right) const { return slots_[slot(pair_of(left, right))].rank; }

void Bpe::encode_bytes(std::string_view bytes, std::vector<int32_t>& ids) const {
  for (const char c : bytes) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
}

void Bpe::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (!whole_pieces_.empty()) {
    if (const auto it = whole_pieces_.find(std::string(piece)); it != whole_pieces_.end()) {
      ids.push_back(it->second);
      return;
    }
  }
  const auto size = static_cast<uint32_t>(piece.size());
  std::vector<Symbol> symbols(size);
  for (uint32_t i = 0; i < size; ++i)
    symbols[i] = {byte_ids_[static_cast<unsigned char>(piece[i])], i - 1, i + 1 < size ? i + 1 : kNone};

  // Rank and place of the left part in one number: the smallest is the next merge.
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue;
  const auto consider = [&](uint32_t left) {
    const uint32_t right = symbols[left].after;
    if (right == kNone) return;
    const uint32_t found = rank(symbols[left].id, symbols[right].id);
    if (found != kNone) queue.push(uint64_t{found} << 32 | left);
  };
  for (uint32_t i = 0; i < size; ++i) consider(i);
  while (!queue.empty()) {
    const Merge& merge = merges_[queue.top() >> 32];
    const auto left = static_cast<uint32_t>(queue.top());
    queue.pop();
    const uint32_t right = symbols[left].after;
    const bool stands = symbols[left].id == merge.left && right != kNone && symbols[right].id == merge.right;
    if (!stands) continue;  // one of the two has been merged otherwise since
    symbols[left] = {merge.merged, symbols[left].before, symbols[right].after};
    symbols[right].id = -1;
    if (symbols[left].after != kNone) symbols[symbols[left].after].before = left;
    if (symbols[left].before != kNone) consider(symbols[left].before);
    consider(left);
  }
  for (uint32_t i = 0; i < size; i = symbols[i].after) ids.push_back(symbols[i].id);
}

}  // namespace bitwright
