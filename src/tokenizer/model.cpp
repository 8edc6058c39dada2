#include "tokenizer/model.hpp"

#include <algorithm>
#include <cstring>

namespace bitwright {
namespace {

constexpr size_t kSlots = size_t{1} << 16;  // with half of them used it fits the second-level cache

uint64_t hash(std::string_view text) {
  uint64_t h = text.size() * 0x9e3779b97f4a7c15u;
  for (size_t i = 0; i < text.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + i, std::min<size_t>(8, text.size() - i));
    h = (h ^ word) * 0xff51afd7ed558ccdu;  // the multiplier of MurmurHash3's finalizer
    h ^= h >> 32;
  }
  return h;
}

}  // namespace

PieceCache::PieceCache() : slots_(kSlots, Entry{0, 0, 0, 0}) {}

size_t PieceCache::slot(std::string_view piece) const {
  size_t at = hash(piece) & (kSlots - 1);
  while (slots_[at].size != 0 && std::string_view(texts_).substr(slots_[at].text, slots_[at].size) != piece)
    at = (at + 1) & (kSlots - 1);
  return at;
}

void PieceCache::remember(size_t at, std::string_view piece, std::span<const int32_t> ids) {
  if (2 * used_ >= kSlots) return;  // frequent pieces came early
  slots_[at] = {static_cast<uint32_t>(texts_.size()), static_cast<uint32_t>(piece.size()),
                static_cast<uint32_t>(known_.size()), static_cast<uint32_t>(ids.size())};
  texts_ += piece;
  known_.insert(known_.end(), ids.begin(), ids.end());
  ++used_;
}

}  // namespace bitwright
