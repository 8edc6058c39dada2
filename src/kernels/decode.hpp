#pragma once

#include <array>
#include <optional>
#include <vector>

#include "kernels/encode.hpp"
#include "kernels/kernel_level.hpp"

namespace bitwright {

/// How the kernels decode groups; made once a tensor.
struct GroupDecoding {
  enum class Element : uint8_t { is_signed, is_unsigned, table16, table256 };
  /// What becomes of an element e with its group's scale s and offset z: OffsetKind's rows.
  enum class Form : uint8_t { scale, divide, subtract_scale, scale_add, scale_subtract };
  Element element;
  int bits;
  Form form;
  float offset = 0;                 ///< z of all groups, where none is stored
  float factor;                     ///< multiplied after the scale
  std::array<float, 256> values{};  ///< of each code
};

/// Scales and offsets of groups that follow each other.
struct GroupNumbers {
  const float* scales;
  const float* offsets;  ///< null where none is stored
  const int32_t* index;  ///< where groups are single elements, perhaps which number each has; else null
};

/// Where a tensor's parameters are: for each of its lines of consecutive elements the first one, then one every `size`
/// elements, the last perhaps of fewer.
struct ParameterLines {
  int64_t line;           ///< elements
  int64_t size;           ///< elements that share a parameter; 1: each has its own
  int64_t parameters;     ///< a line
  int64_t in_matrix = 1;  ///< lines a matrix
  int64_t sharing = 1;    ///< lines one below the other that have the same parameters; never of two matrices

  int64_t first(int64_t line_number) const {
    const int64_t different = (in_matrix - 1) / sharing + 1;
    return (line_number / in_matrix * different + line_number % in_matrix / sharing) * parameters;
  }
};
/// Nothing for tensors without elements. Of Kind::index a column's parameter is parameters' group_index[column].
std::optional<ParameterLines> parameter_lines(const Grouping& grouping, const Shape& shape);

/// Decodes ranges of a tensor, bit for bit as Decoder does.
class RangeDecoder {
 public:
  /// Keeps references. Decodes the parameters, in parallel.
  explicit RangeDecoder(const QuantizedTensor& tensor, const KernelLevel& level = active_kernel_level());
  /// Can `tensor.codes` be empty, because decode() is given them?
  static bool takes_codes(const QuantizedTensor& tensor);
  /// out[j] = value of element begin + j.
  void decode(int64_t begin, std::span<float> out) const;
  /// The same where takes_codes; codes: those of these elements alone.
  void decode(int64_t begin, std::span<const std::byte> codes, std::span<float> out) const;

 private:
  /// Within one line, the first element of which is number `in_line` of it; `first` is the line's first parameter.
  void decode_line(const std::byte* codes, int64_t in_line, int64_t first, std::span<float> out) const;
  GroupNumbers numbers(size_t group, const int32_t* index) const {
    return {.scales = &scales_[group], .offsets = offsets_.empty() ? nullptr : &offsets_[group], .index = index};
  }

  const QuantizedTensor& tensor_;
  const KernelLevel& level_;
  std::optional<Decoder> definition_;  ///< for what has no kernel
  ParameterLines lines_{};
  std::vector<float> scales_, offsets_;
  GroupDecoding decoding_{};
};

/// All values, in parallel, as decode() of scheme/ gives them. out: element_count(tensor.shape).
void decode(const QuantizedTensor& tensor, std::span<float> out, const KernelLevel& level = active_kernel_level());

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
void decode_groups(const GroupDecoding& d, const GroupNumbers& numbers, const std::byte* codes, size_t size,
                   size_t groups, float* out);

}  // namespace bitwright
