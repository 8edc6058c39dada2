#include "kernels/compact_tensor.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include "base/bits.hpp"

namespace bitwright {
namespace {

constexpr size_t kCodes = 4096;  ///< unpacked at a time: they stay in the first-level cache. Whole bytes of any width

std::shared_ptr<const CompactTensor> compact(const std::shared_ptr<const QuantizedTensor>& parameter) {
  return parameter == nullptr ? nullptr : std::make_shared<const CompactTensor>(*parameter);
}
std::shared_ptr<const QuantizedTensor> unpack(const std::shared_ptr<const CompactTensor>& parameter) {
  return parameter == nullptr ? nullptr : std::make_shared<const QuantizedTensor>(parameter->unpacked());
}

std::optional<DType> plain_float(const Scheme& scheme) {
  const auto dtype = dtype_of(*scheme.element);
  if (!scheme.is_plain() || !dtype || scheme.factor != 1) return std::nullopt;
  return dtype;
}

}  // namespace

CompactTensor::CompactTensor(QuantizedTensor tensor)
    : tensor_(std::move(tensor)), scale_(compact(tensor_.scale)), offset_(compact(tensor_.offset)) {
  if (tensor_.scheme.element->bits < 8 && RangeDecoder::takes_codes(tensor_)) {
    bits_packed_ = true;
    packed_ = pack_bits(tensor_.codes, tensor_.scheme.element->bits);
    std::vector<std::byte>().swap(tensor_.codes);  // assigning {} would keep the memory
  }
  tensor_.scale = tensor_.offset = nullptr;
}

uint64_t CompactTensor::bytes() const {
  uint64_t bytes = codes().size() + tensor_.group_index.size() * sizeof(int32_t);
  for (const CompactTensor* parameter : {scale(), offset()})
    if (parameter != nullptr) bytes += parameter->bytes();
  return bytes;
}

QuantizedTensor CompactTensor::parameters() const {
  return {.scheme = scheme(),
          .shape = shape(),
          .scale = unpack(scale_),
          .offset = unpack(offset_),
          .group_index = tensor_.group_index};
}

QuantizedTensor CompactTensor::unpacked() const {
  QuantizedTensor all = parameters();
  const auto count = static_cast<uint64_t>(element_count(shape()));
  all.codes = !bits_packed_ ? tensor_.codes : unpack_bits(packed_, scheme().element->bits, count);
  return all;
}

CompactTensor CompactTensor::with_codes(std::vector<std::byte> codes) const {
  CompactTensor other;
  other.tensor_ = {.scheme = scheme(), .shape = shape(), .group_index = tensor_.group_index};
  other.scale_ = scale_;
  other.offset_ = offset_;
  other.bits_packed_ = bits_packed_;
  (bits_packed_ ? other.packed_ : other.tensor_.codes) = std::move(codes);
  return other;
}

CompactDecoder::CompactDecoder(const CompactTensor& tensor, const KernelLevel& level)
    : tensor_(tensor), plain_(plain_float(tensor.scheme())) {
  if (plain_) return;
  header_ = tensor.parameters();
  // What the kernels do not know is decoded by the definition, which wants the codes: they are few.
  if (!RangeDecoder::takes_codes(header_)) header_.codes = tensor.tensor_.codes;
  ranges_.emplace(header_, level);
}

std::optional<DecodedGroups> CompactDecoder::packed_groups() const {
  if (plain_ || !tensor_.bits_packed_) return std::nullopt;
  return ranges_->groups();
}

void CompactDecoder::decode(int64_t begin, std::span<float> out) const {
  if (out.empty()) return;
  const std::span<const std::byte> codes = tensor_.codes();
  const auto first = static_cast<size_t>(begin);
  if (plain_) {
    const size_t bytes = size_bytes(*plain_);
    return to_f32(*plain_, codes.subspan(first * bytes, out.size() * bytes), out);
  }
  if (!tensor_.bits_packed_)
    return header_.codes.empty() ? ranges_->decode(begin, codes.subspan(first, out.size()), out)
                                 : ranges_->decode(begin, out);
  const auto bits = static_cast<size_t>(tensor_.scheme().element->bits);
  std::array<std::byte, kCodes> unpacked;
  for (size_t i = 0; i < out.size();) {
    // From a byte's first code on; those before `first` are unpacked for nothing.
    const size_t from = (first + i) / 8 * 8, skip = first + i - from;
    const size_t count = std::min(out.size() - i, kCodes - skip);
    unpack_bits(codes.subspan(from * bits / 8), tensor_.scheme().element->bits,
                std::span(unpacked).first(skip + count));
    ranges_->decode(begin + static_cast<int64_t>(i), std::span(unpacked).subspan(skip, count), out.subspan(i, count));
    i += count;
  }
}

}  // namespace bitwright
