#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace bitwright {

/// A codebook of ggml: what a few neighbours are together.
struct GgufGrid {
  GgufGrid(std::span<const uint16_t> grid, int neighbours, int level_bits);

  std::span<const uint16_t> entries;  ///< by index: a level for each neighbour, `level_bits` each, the first lowest
  int neighbours, level_bits;
  std::vector<int16_t> index_of;  ///< by entry; -1: there is no such entry

  uint8_t level(uint16_t entry, int neighbour) const {
    return static_cast<uint8_t>(entry >> neighbour * level_bits & ((1 << level_bits) - 1));
  }
};
/// "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1" (of both types): made when first asked for.
const GgufGrid& gguf_grid(std::string_view name);

}  // namespace bitwright
