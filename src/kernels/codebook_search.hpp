#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/kernel_level.hpp"

namespace bitwright {

/// A codebook, its entries in two halves. A half is numbered by the levels of its neighbours, in base `levels.size()`,
/// the first lowest.
struct Codebook {
  static constexpr size_t kMostHalves = 81;
  /// How many signs of eight neighbours in a row may be negative.
  enum class Signs : uint8_t { any, even };
  /// Entries that begin with the same half: those of `second` from `begin` to `end`, an even number: one
  /// may be there twice.
  struct Run {
    uint16_t first, begin, end;
  };

  size_t neighbours;  ///< of an entry: 8 or 4
  Signs signs;
  std::span<const float> levels;  ///< above 0; kMostHalves at most to the power of neighbours / 2
  std::span<const Run> runs;
  std::span<const uint8_t> second;  ///< the other half of each entry
};

/// kPanel groups as a GroupPanel has them. Values are magnitudes, but where the number of negative signs has to be even
/// and is not one value of the eight is negative: what its magnitude becomes when its sign is turned over.
struct MagnitudePanel {
  const float *values, *weights;
  size_t size;
};

/// Of vector v of a lane, at [v * kPanel + lane]: the halves of its entry, and 1 if one of its signs is turned over,
/// the one that costs least, 0 if none.
struct ChosenHalves {
  uint8_t *first, *second, *turned;
};

/// Searches of whole codebooks: of each vector of neighbours the entry of least error at a given scale. A row for each
/// KernelLevel, by its name. Every row gives the same bits.
struct CodebookSearch {
  std::string_view name;
  static constexpr size_t kAtOnce = 3;  ///< scales
  /// errors[c * kPanel + lane]: of the group with scale scales[c * kPanel + lane], less the sum of w x^2. The sign that
  /// is turned over is the one the panel says.
  void (*errors)(const MagnitudePanel& panel, const Codebook& book, const float* scales, float* errors);
  /// The sign that is turned over is found with the entries. Halves whose costs differ by less than one part in 2^16
  /// are as good as each other.
  void (*choose)(const MagnitudePanel& panel, const Codebook& book, const float* scales, const ChosenHalves& chosen);
};

/// That of a level.
const CodebookSearch& codebook_search(const KernelLevel& level = active_kernel_level());

}  // namespace bitwright
