#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "container/container.hpp"

namespace bitwright {

/// The arrays of a QuantizedTensor where one block of them begins. Those that the scheme lacks are null.
struct BlockParts {
  uint8_t* codes;
  uint8_t* scale;        ///< codes of the scales, or the scales themselves
  uint8_t* scale_scale;  ///< what those codes are multiplied by
  uint8_t* offset;       ///< likewise
  uint8_t* offset_scale;
};

/// How the blocks of one type of GGUF are taken apart: a row of a table.
struct BlockCodec {
  std::string_view type;  ///< GgufType's name
  Scheme (*scheme)();     ///< different for each row
  void (*unpack)(const uint8_t* block, const BlockParts& to);
  void (*pack)(const BlockParts& from, uint8_t* block);  ///< does not write to `from`
};
std::span<const BlockCodec> all_block_codecs();
const BlockCodec* find_block_codec(std::string_view type);
const BlockCodec* find_block_codec(const Scheme& scheme);

/// A tensor of a codec's scheme with room for its numbers, all 0.
QuantizedTensor block_tensor(const Scheme& scheme, const Shape& shape);

/// Where the blocks of a tensor have their numbers. Of one that is only read nothing is written to them.
class TensorBlocks {
 public:
  TensorBlocks(const QuantizedTensor& t, size_t blocks);
  BlockParts of(size_t block) const {
    return {all_[0].at(block), all_[1].at(block), all_[2].at(block), all_[3].at(block), all_[4].at(block)};
  }

 private:
  struct Part {
    uint8_t* data = nullptr;
    size_t a_block = 0;  ///< bytes
    uint8_t* at(size_t block) const { return data == nullptr ? nullptr : data + block * a_block; }
  };
  std::array<Part, 5> all_;  ///< as BlockParts has them
};

}  // namespace bitwright
