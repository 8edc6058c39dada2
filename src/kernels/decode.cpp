#include "kernels/decode.hpp"

#include <algorithm>
#include <cmath>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kBuffer = 4096;  ///< values decoded at a time: they stay in the first-level cache

double merge(double (&lanes)[kPanel]) {
  for (size_t half = kPanel / 2; half > 0; half /= 2)
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

bool has_kernel(const Scheme& scheme) {
  if (!scheme.scale || scheme.scale->divides || scheme.element->bits > 8) return false;
  if (scheme.element->kind == ElementKind::block_code) return false;
  if (scheme.offset_kind == OffsetKind::none) return true;
  return (scheme.offset_kind == OffsetKind::zero_point || scheme.offset_kind == OffsetKind::float_zero) &&
         scheme.offset->grouping == scheme.scale->grouping;
}

GroupDecoding make_decoding(const Scheme& scheme) {
  using Element = GroupDecoding::Element;
  const ElementType& type = *scheme.element;
  GroupDecoding d = {.element = type.bits == 4 ? Element::table16 : Element::table256,
                     .bits = type.bits,
                     .subtracts = scheme.offset_kind != OffsetKind::none,
                     .factor = scheme.factor};
  if (type.kind == ElementKind::integer) d.element = type.lowest < 0 ? Element::is_signed : Element::is_unsigned;
  for (uint32_t code = 0; code < 1u << type.bits; ++code) d.values.at(code) = type.decode(type, code);
  return d;
}

}  // namespace

RangeDecoder::RangeDecoder(const QuantizedTensor& tensor, const KernelLevel& level)
    : tensor_(tensor), level_(level), definition_(tensor) {
  if (!has_kernel(tensor.scheme)) return;
  runs_ = group_runs(tensor.scheme.scale->grouping, tensor.shape);
  decoding_ = make_decoding(tensor.scheme);
}

void RangeDecoder::decode(int64_t begin, std::span<float> out) const {
  if (!runs_) return definition_.decode(begin, out);
  BW_ASSERT(static_cast<uint64_t>(begin) + out.size() <= tensor_.codes.size());
  const int64_t end = begin + static_cast<int64_t>(out.size());
  const float* const scales = definition_.scales().data();
  const float* const zeros = decoding_.subtracts ? definition_.offsets().data() : nullptr;
  int64_t g = begin / runs_->line * runs_->groups_a_line + begin % runs_->line / runs_->size;
  for (int64_t i = begin; i < end;) {
    // Whole groups of one length together, up to the line's short one.
    int64_t size = std::min(runs_->end_of(g), end) - i, groups = 1;
    if (size == runs_->size) {
      const int64_t line_end = runs_->line % size == 0 ? end : i / runs_->line * runs_->line + runs_->line;
      groups = (std::min(end, line_end) - i) / size;
    }
    level_.decode_groups(decoding_, &tensor_.codes[static_cast<size_t>(i)], static_cast<size_t>(size),
                         static_cast<size_t>(groups), scales + g, zeros == nullptr ? nullptr : zeros + g,
                         &out[static_cast<size_t>(i - begin)]);
    i += size * groups;
    g += groups;
  }
}

void decode_groups(const GroupDecoding& d, const std::byte* codes, size_t size, size_t groups, const float* scales,
                   const float* zeros, float* out) {
  for (size_t i = 0; i < size * groups; ++i) {
    const float e = d.values[std::to_integer<size_t>(codes[i])];
    out[i] = (d.subtracts ? e - zeros[i / size] : e) * scales[i / size] * d.factor;
  }
}

void add_squares(DType dtype, const std::byte* original, const float* decoded, size_t count,
                 double (&difference)[kPanel], double (&norm)[kPanel]) {
  const size_t bytes = size_bytes(dtype);
  for (size_t i = 0; i < count; ++i) {
    float value = 0;
    to_f32(dtype, {original + i * bytes, bytes}, std::span(&value, 1));
    const double w = value, d = w - static_cast<double>(decoded[i]);
    difference[i % kPanel] = std::fma(d, d, difference[i % kPanel]);
    norm[i % kPanel] = std::fma(w, w, norm[i % kPanel]);
  }
}

SquaredError& SquaredError::operator+=(const SquaredError& other) {
  difference += other.difference;
  norm += other.norm;
  return *this;
}

double SquaredError::relative() const { return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm); }

SquaredError squared_error(const RangeDecoder& decoder, int64_t begin, WeightView original, const KernelLevel& level) {
  BW_ASSERT(original.count() <= static_cast<size_t>(kErrorPiece));
  const bool native = original.dtype == DType::f16 || original.dtype == DType::bf16 || original.dtype == DType::f32;
  const size_t bytes = size_bytes(original.dtype);
  std::array<float, kBuffer> decoded, wide;
  double difference[kPanel] = {}, norm[kPanel] = {};
  for (size_t first = 0; first < original.count(); first += kBuffer) {
    const size_t count = std::min(kBuffer, original.count() - first);
    decoder.decode(begin + static_cast<int64_t>(first), std::span(decoded).first(count));
    const std::span<const std::byte> values = original.bytes.subspan(first * bytes, count * bytes);
    if (!native) to_f32(original.dtype, values, std::span(wide).first(count));
    const std::byte* const from = native ? values.data() : std::as_bytes(std::span(wide)).data();
    level.add_squares(native ? original.dtype : DType::f32, from, decoded.data(), count, difference, norm);
  }
  return {.difference = merge(difference), .norm = merge(norm)};
}

SquaredError squared_error(WeightView original, const QuantizedTensor& tensor, const KernelLevel& level) {
  BW_ASSERT(static_cast<int64_t>(original.count()) == element_count(tensor.shape));
  const RangeDecoder decoder(tensor, level);
  const size_t grain = static_cast<size_t>(kErrorPiece), bytes = size_bytes(original.dtype);
  std::vector<SquaredError> pieces((original.count() + grain - 1) / grain);
  parallel_ranges(original.count(), grain, [&](size_t begin, size_t end) {
    const WeightView piece = {original.dtype, original.bytes.subspan(begin * bytes, (end - begin) * bytes)};
    pieces[begin / grain] = squared_error(decoder, static_cast<int64_t>(begin), piece, level);
  });
  SquaredError total;
  for (const SquaredError& piece : pieces) total += piece;
  return total;
}

double relative_error(WeightView original, const QuantizedTensor& tensor, const KernelLevel& level) {
  return squared_error(original, tensor, level).relative();
}

}  // namespace bitwright
