#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// Pieces of one text and the ids they were given, so that each is worked out once.
class PieceCache {
 public:
  PieceCache();
  static constexpr size_t kLongest = 48;  ///< longer pieces seldom come back

  /// The ids of `piece`, not longer than kLongest; if it is new, work() appends them to `ids` first.
  template <class Work>
  void encode(std::string_view piece, std::vector<int32_t>& ids, const Work& work) {
    const size_t at = slot(piece);
    if (slots_[at].size != 0) {
      const Entry e = slots_[at];
      ids.insert(ids.end(), known_.begin() + e.ids, known_.begin() + e.ids + e.count);
      return;
    }
    const size_t begin = ids.size();
    work();
    remember(at, piece, std::span(ids).subspan(begin));
  }

 private:
  struct Entry {
    uint32_t text, size;  ///< of the piece in texts_; size 0: a free slot
    uint32_t ids, count;  ///< in known_
  };
  size_t slot(std::string_view piece) const;
  void remember(size_t at, std::string_view piece, std::span<const int32_t> ids);

  std::string texts_;
  std::vector<int32_t> known_;
  std::vector<Entry> slots_;
  size_t used_ = 0;
};

/// Turns pieces of text into ids. Immutable; may be shared between threads.
class PieceModel {
 public:
  virtual ~PieceModel() = default;
  /// Appends the ids of `piece`, which is not empty and less than 2 GiB. One `cache` serves one model only.
  virtual void encode(std::string_view piece, PieceCache& cache, std::vector<int32_t>& ids) const = 0;
};

}  // namespace bitwright
