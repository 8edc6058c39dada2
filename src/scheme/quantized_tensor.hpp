#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "scheme/grouping.hpp"
#include "scheme/scheme.hpp"

namespace bitwright {

/// A tensor as it is stored, nothing widened: what passes between schemes, algorithms, containers and the runtime.
struct QuantizedTensor {
  Scheme scheme{};
  Shape shape{};
  /// One code an element, row-major, element->code_bytes() each, little-endian; up to 8 bits the low `bits` bits of a
  /// byte, the others 0. Block codes: the raw blocks, row by row.
  std::vector<std::byte> codes{};
  std::shared_ptr<const QuantizedTensor> scale{}, offset{};  ///< shape: parameter_shape(); null where there is none
  std::vector<int32_t> group_index{};                        ///< for Grouping::Kind::index, one a column
};

/// Numbers as a file holds them, row-major: what is to be quantized. Not owned.
struct WeightView {
  DType dtype;
  std::span<const std::byte> bytes;
  size_t count() const { return bytes.size() / size_bytes(dtype); }
};

/// Equal bytes in every array.
bool operator==(const QuantizedTensor& a, const QuantizedTensor& b);

/// Throws Error{"bad-tensor"} naming `where` unless codes and parameters have the sizes that scheme and shape ask for.
void check_sizes(const QuantizedTensor& t, const std::string& where);

/// Decodes pieces of a tensor by the definition. Keeps the decoded parameters (one f32 a group), never the whole
/// tensor in floats.
class Decoder {
 public:
  explicit Decoder(const QuantizedTensor& tensor);  ///< keeps a reference
  /// out[j] = value of element begin + j.
  void decode(int64_t begin, std::span<float> out) const;
  // Decoded, one a group; empty where the scheme has none.
  std::span<const float> scales() const { return scale_; }
  std::span<const float> offsets() const { return offset_; }

 private:
  const QuantizedTensor& tensor_;
  std::vector<float> elements_;  ///< value of each code, for up to 8 bits
  std::vector<float> scale_, offset_;
  std::unique_ptr<GroupMap> scale_groups_, offset_groups_;
};

/// All values, in parallel.
std::vector<float> decode(const QuantizedTensor& tensor);

/// A group's smallest and largest value that codes must reach.
struct Range {
  float low, high;
};
/// Chooses it from the group's values (never empty, all finite). Called from several threads at once.
using ChooseRange = std::function<Range(const Scheme& scheme, std::span<const float> values)>;
Range min_max_range(const Scheme& scheme, std::span<const float> values);

/// Scale and offset of one group as decoded.
struct GroupParameters {
  float scale = 1, offset = 0;
};
/// The scale for a range, before it is stored. With a zero point the range is widened to hold 0.
float ideal_scale(const Scheme& scheme, Range range);
/// The integer zero point for a range that is widened to hold 0, given the decoded scale.
float zero_point(const Scheme& scheme, float scale, Range range);
/// The code nearest to one value, and the value of a decoded element: the definition of both.
/// short_block: the last block of a flat grouping, where bitsandbytes divides instead of multiplying by a reciprocal.
uint32_t encode_value(const Scheme& scheme, const GroupParameters& parameters, float value, bool short_block = false);
float decode_value(const Scheme& scheme, const GroupParameters& parameters, float element);

/// Reference encoder: ranges, then scales (quantized again where nested), then codes, each code to nearest.
/// Holds for plain and nested scales with no offset, a zero point, or (for nested scales) a mean as bias.
/// values: element_count(shape), row-major. Throws Error{"not-finite"} (with the position) on NaN or infinity,
/// Error{"scale-overflow"} if a scale does not fit its type, Error{"bad-scheme"} if the scheme has no encoder.
QuantizedTensor encode(const Scheme& scheme, const Shape& shape, std::span<const float> values,
                       const ChooseRange& choose = min_max_range);

}  // namespace bitwright
