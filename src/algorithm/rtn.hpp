#pragma once

#include "algorithm/algorithm.hpp"

namespace bitwright {

/// The codes of least error in a weight taken by itself: by search where the scheme's scales are searched for, else as
/// its owner rounds. Heeds options.importance. Throws what `encode` throws.
QuantizedTensor nearest_codes(const Scheme& scheme, const Shape& shape, WeightView weight,
                              const AlgorithmOptions& options);

}  // namespace bitwright
