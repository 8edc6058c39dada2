#pragma once

#include <array>
#include <optional>

#include "kernels/encode.hpp"
#include "kernels/kernel_level.hpp"

namespace bitwright {

/// How the kernels decode groups; made once a tensor.
struct GroupDecoding {
  enum class Element : uint8_t { is_signed, is_unsigned, table16, table256 };
  Element element;
  int bits;
  bool subtracts;                   ///< (e - z) * s; else e * s
  float factor;                     ///< multiplied last
  std::array<float, 256> values{};  ///< of each code
};

/// Decodes ranges of a tensor, bit for bit as Decoder does.
class RangeDecoder {
 public:
  /// Keeps references.
  explicit RangeDecoder(const QuantizedTensor& tensor, const KernelLevel& level = active_kernel_level());
  /// out[j] = value of element begin + j.
  void decode(int64_t begin, std::span<float> out) const;

 private:
  const QuantizedTensor& tensor_;
  const KernelLevel& level_;
  Decoder definition_;
  std::optional<GroupRuns> runs_;  ///< nothing: left to the definition
  GroupDecoding decoding_{};
};

/// Sums of (w - decoded)^2 and of w^2, in doubles.
struct SquaredError {
  double difference = 0, norm = 0;
  SquaredError& operator+=(const SquaredError& other);
  /// |w - decoded| / |w|, Euclidean; |decoded| for an all-zero w.
  double relative() const;
};

/// Elements of one sum: those of longer ranges are added in order.
constexpr int64_t kErrorPiece = int64_t{1} << 16;

/// Of elements begin, begin + 1 … of a tensor against what they were; at most kErrorPiece. The order of additions is
/// fixed: element i goes to partial sum i % kPanel, and the partial sums are merged pairwise.
SquaredError squared_error(const RangeDecoder& decoder, int64_t begin, WeightView original,
                           const KernelLevel& level = active_kernel_level());

/// Of a whole tensor, in parallel, summed in a fixed order.
SquaredError squared_error(WeightView original, const QuantizedTensor& tensor,
                           const KernelLevel& level = active_kernel_level());
/// |original - decoded| / |original| of it.
double relative_error(WeightView original, const QuantizedTensor& tensor,
                      const KernelLevel& level = active_kernel_level());

/// The partial sums of squared_error, and the decoding of whole groups: the definitions, of scalar_kernel_level.
void add_squares(DType dtype, const std::byte* original, const float* decoded, size_t count,
                 double (&difference)[kPanel], double (&norm)[kPanel]);
void decode_groups(const GroupDecoding& d, const std::byte* codes, size_t size, size_t groups, const float* scales,
                   const float* zeros, float* out);

}  // namespace bitwright
