#include "algorithm/rtn.hpp"

#include "algorithm/block_search.hpp"
#include "kernels/encode.hpp"

namespace bitwright {

QuantizedTensor nearest_codes(const Scheme& scheme, const Shape& shape, WeightView weight,
                              const AlgorithmOptions& options) {
  if (options.largest && options.range == RangeRule::minmax)
    return options.fused(scheme, shape, weight, *options.largest);
  if (is_block_scheme(scheme)) return search_blocks(scheme, shape, weight, options.importance);
  if (!options.importance.empty()) return options.weighted_owner(scheme, shape, weight, options.importance);
  if (options.owner != nullptr && options.range == RangeRule::minmax) return options.owner(scheme, shape, weight);
  return encode(scheme, shape, weight, options.range);
}

extern const Algorithm rtn_algorithm;
const Algorithm rtn_algorithm = {
    .name = "rtn",
    .summary = "round to nearest; ranges by minimum and maximum or by least squared error; needs no data",
    .source = "scheme/encode.cpp is the definition",
    .quantize = nearest_codes};

}  // namespace bitwright
