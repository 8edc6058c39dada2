#include "algorithm/rtn.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "algorithm/block_search.hpp"
#include "kernels/encode.hpp"

namespace bitwright {
namespace {

/// For a search: 1 is the most, and what no token reached still counts a little, else it would be thrown away.
std::vector<float> searchable(std::span<const float> importance) {
  constexpr float kLeast = 0x1p-30f;
  const float most = importance.empty() ? 0 : *std::ranges::max_element(importance);
  std::vector<float> out(importance.begin(), importance.end());
  const int exponent = most > 0 ? std::ilogb(most) + 1 : 0;
  for (float& w : out) w = std::max(std::ldexp(w, -exponent), kLeast);  // a power of two: nothing is rounded
  return out;
}

}  // namespace

QuantizedTensor nearest_codes(const Scheme& scheme, const Shape& shape, WeightView weight,
                              const AlgorithmOptions& options) {
  if (options.largest && options.range == RangeRule::minmax)
    return options.fused(scheme, shape, weight, *options.largest);
  if (is_block_scheme(scheme)) return search_blocks(scheme, shape, weight, searchable(options.importance));
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
