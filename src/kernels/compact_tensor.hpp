#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kernels/decode.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// A quantized tensor in as little memory as a file takes for it: each code has its own bits and no more, those of
/// scales and offsets too, and what is nested stays nested.
class CompactTensor {
 public:
  /// tensor: passes check_sizes.
  explicit CompactTensor(QuantizedTensor tensor);

  const Scheme& scheme() const { return tensor_.scheme; }
  const Shape& shape() const { return tensor_.shape; }
  /// As pack_bits has them; codes of eight bits and more as QuantizedTensor has them, and all of those that the
  /// kernels cannot decode.
  std::span<const std::byte> codes() const { return bits_packed_ ? packed_ : tensor_.codes; }
  const CompactTensor* scale() const { return scale_.get(); }
  const CompactTensor* offset() const { return offset_.get(); }
  uint64_t bytes() const;  ///< of all its arrays
  QuantizedTensor unpacked() const;
  /// The same tensor with other codes, in as many bytes as codes() has; or with none, for as long as they are
  /// elsewhere: then all it can do is this.
  CompactTensor with_codes(std::vector<std::byte> codes) const;

 private:
  CompactTensor() = default;
  friend class CompactDecoder;
  QuantizedTensor parameters() const;  ///< everything but the codes

  QuantizedTensor tensor_;    ///< without scale and offset
  bool bits_packed_ = false;  ///< the codes are packed_; otherwise tensor_'s
  std::vector<std::byte> packed_;
  std::shared_ptr<const CompactTensor> scale_, offset_;
};

/// Decodes ranges of it. Holds the decoded parameters, so it is made for one product and forgotten.
class CompactDecoder {
 public:
  /// Keeps a reference.
  explicit CompactDecoder(const CompactTensor& tensor, const KernelLevel& level = active_kernel_level());
  CompactDecoder(const CompactDecoder&) = delete;
  CompactDecoder& operator=(const CompactDecoder&) = delete;
  /// out[j] = value of element begin + j, bit for bit as RangeDecoder has it. On this thread alone.
  void decode(int64_t begin, std::span<float> out) const;
  /// Where kernels decode codes that are packed.
  std::optional<DecodedGroups> packed_groups() const;

 private:
  const CompactTensor& tensor_;
  std::optional<DType> plain_;  ///< floats without scale
  QuantizedTensor header_;      ///< what ranges_ refers to
  std::optional<RangeDecoder> ranges_;
};

}  // namespace bitwright
