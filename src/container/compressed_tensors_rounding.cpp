#include "container/compressed_tensors_rounding.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/small_floats.hpp"
#include "scheme/range.hpp"

namespace bitwright {
namespace {

constexpr size_t kChunk = size_t{1} << 16;  ///< elements a task works on
constexpr float kRound = 12582912.0f;       ///< 1.5 * 2^23: adding it rounds to an integer, ties to even
constexpr float kLargest = std::numeric_limits<float>::max();

/// What a scale of 0 is replaced by: torch.finfo(dtype).eps.
float epsilon(DType dtype) { return dtype == DType::bf16 ? 0x1p-7f : dtype == DType::f16 ? 0x1p-10f : 0x1p-23f; }

/// The definition of float4_e2m1's nearest, in vectors.
uint8_t to_e2m1(float value) { return static_cast<uint8_t>(to_e2m1_magnitude(std::fabs(value)) | (value < 0 ? 8 : 0)); }

/// Every row is cut into segments whose elements share their parameters.
struct Segments {
  int64_t rows, columns, length, a_row;
  int64_t block_rows;  ///< rows that share parameters; 0: all

  Segments(const Grouping& grouping, const Shape& shape) : rows(shape.at(0)), columns(shape.at(1)), block_rows(1) {
    BW_ASSERT(shape.size() == 2);
    length = columns;
    if (grouping.kind == Grouping::Kind::axis && grouping.size != 0) length = grouping.size;
    if (grouping.kind == Grouping::Kind::tensor) block_rows = 0;
    if (grouping.kind == Grouping::Kind::block) {
      length = grouping.block_columns;
      block_rows = grouping.block_rows;
    }
    length = std::max<int64_t>(std::min(length, columns), 1);
    a_row = (columns + length - 1) / length;
  }
  int64_t groups() const {
    if (block_rows == 0) return 1;
    return (rows + block_rows - 1) / block_rows * a_row;
  }
  int64_t group_of(int64_t row, int64_t segment) const {
    return block_rows == 0 ? 0 : row / block_rows * a_row + segment;
  }
  size_t rows_a_task() const {
    return std::max<size_t>(kChunk / static_cast<size_t>(std::max<int64_t>(columns, 1)), 1);
  }
};

/// Parameters of the groups: as codes are chosen with, and the zero points or the bytes of scales that stand for them.
struct Groups {
  std::vector<float> low, high;  ///< widened to hold 0
  std::vector<float> scale, zero;
  std::vector<std::byte> scale_codes{};
  float global = 1;  ///< NVFP4's
};

template <DType dtype>
class Encoder {
 public:
  /// dtype: the type that is computed in.
  Encoder(const Scheme& scheme, const Shape& shape, WeightView weight, float largest)
      : scheme_(scheme), shape_(shape), weight_(weight), segments_(scheme.scale->grouping, shape), largest_(largest) {
    const auto plain = dtype_of(*scheme.scale->scheme->element);
    if (scheme.scale->scheme->is_plain() && plain && size_bytes(*plain) > 1) scale_dtype_ = *plain;
    const auto count = static_cast<size_t>(segments_.groups());
    groups_.low.assign(count, 0);
    groups_.high.assign(count, 0);
    groups_.scale.resize(count);
  }

  QuantizedTensor run() {
    find_ranges();
    choose_scales();
    QuantizedTensor t = {.scheme = scheme_, .shape = shape_, .codes = std::vector<std::byte>(weight_.count())};
    choose_codes(t.codes);
    t.scale = scale_tensor();
    t.offset = zero_tensor();
    return t;
  }

 private:
  void widen(int64_t row, std::vector<float>& values) const {
    const size_t bytes = static_cast<size_t>(segments_.columns) * size_bytes(weight_.dtype);
    values.resize(static_cast<size_t>(segments_.columns));
    to_f32(weight_.dtype, weight_.bytes.subspan(static_cast<size_t>(row) * bytes, bytes), values);
  }

  template <class Use>
  void for_each_row(Use use) const {
    parallel_ranges(static_cast<size_t>(segments_.rows), segments_.rows_a_task(), [&](size_t begin, size_t end) {
      std::vector<float> values;
      for (size_t row = begin; row < end; ++row) {
        widen(static_cast<int64_t>(row), values);
        use(static_cast<int64_t>(row), std::span<const float>(values));
      }
    });
  }

  /// Segment s of a row.
  std::span<const float> part(std::span<const float> row, int64_t s) const {
    const auto begin = static_cast<size_t>(s * segments_.length);
    return row.subspan(begin, std::min(static_cast<size_t>(segments_.length), row.size() - begin));
  }

  void find_ranges() {
    const auto parts = static_cast<size_t>(segments_.rows * segments_.a_row);
    std::vector<float> low(parts), high(parts);
    std::atomic<int64_t> damaged = segments_.rows;  // the first row
    for_each_row([&](int64_t row, std::span<const float> values) {
      for (int64_t s = 0; s < segments_.a_row; ++s) {
        float least = 0, most = 0;
        bool finite = true;
        for (const float value : part(values, s)) {
          least = std::min(least, value);
          most = std::max(most, value);
          finite = finite & (std::fabs(value) <= kLargest);
        }
        low[static_cast<size_t>(row * segments_.a_row + s)] = least;
        high[static_cast<size_t>(row * segments_.a_row + s)] = most;
        int64_t before = damaged;
        while (!finite && row < before && !damaged.compare_exchange_weak(before, row)) {
        }
      }
    });
    if (damaged < segments_.rows) report_damage(damaged);
    for (int64_t row = 0; row < segments_.rows; ++row)
      for (int64_t s = 0; s < segments_.a_row; ++s) {
        const auto from = static_cast<size_t>(row * segments_.a_row + s);
        const auto g = static_cast<size_t>(segments_.group_of(row, s));
        groups_.low[g] = std::min(groups_.low[g], low[from]);
        groups_.high[g] = std::max(groups_.high[g], high[from]);
      }
  }

  [[noreturn]] void report_damage(int64_t row) const {
    std::vector<float> values;
    widen(row, values);
    const auto bad = std::ranges::find_if(values, [](float value) { return !std::isfinite(value); });
    throw_not_finite(row * segments_.columns + (bad - values.begin()), *bad);
  }

  /// 0, not -0, of a group of zeros.
  float absmax(size_t g) const { return std::max(groups_.high[g], -groups_.low[g]); }

  void choose_scales() {
    const Scheme& stored = *scheme_.scale->scheme;
    if (scheme_.element->kind == ElementKind::integer) {
      for (size_t g = 0; g < groups_.scale.size(); ++g) choose_integer(g);
    } else if (!stored.is_plain()) {
      choose_nvfp4();
    } else if (stored.element == &float_element(DType::f8_e8m0)) {
      for (size_t g = 0; g < groups_.scale.size(); ++g) choose_power(g);
    } else {
      for (size_t g = 0; g < groups_.scale.size(); ++g)
        groups_.scale[g] = not_zero(as_stored(absmax(g) / scheme_.element->full_scale));
    }
  }

  /// The result of an operation as the scheme's plain scales hold it.
  float as_stored(float scale) const {
    const float held = round_to(scale_dtype_, rounded<dtype>(scale));
    if (!std::isfinite(held)) throw_scale_overflow(scale, info(scale_dtype_).name);
    return held;
  }
  float not_zero(float scale) const { return scale == 0 ? epsilon(scale_dtype_) : scale; }

  void choose_integer(size_t g) {
    const auto half = static_cast<float>(1 << (scheme_.element->bits - 1));
    const float steps = 2 * half - 1;
    if (scheme_.offset_kind == OffsetKind::none) {
      groups_.scale[g] = not_zero(as_stored(absmax(g) / (steps / 2)));
      return;
    }
    if (groups_.zero.empty()) groups_.zero.resize(groups_.scale.size());
    const float scale = as_stored(rounded<dtype>(groups_.high[g] - groups_.low[g]) / steps);
    // Of 0/0 the library makes 0.
    const bool undefined = scale == 0 && groups_.low[g] == 0;
    const float zero = undefined ? 0 : rounded<dtype>(-half - rounded<dtype>(groups_.low[g] / scale));
    groups_.zero[g] = std::clamp(zero, -half, half - 1) + kRound - kRound;
    groups_.scale[g] = not_zero(scale);
  }

  /// A power of two: the largest magnitude's, one more where its mantissa reaches 1.75, over that of the element.
  void choose_power(size_t g) {
    constexpr uint32_t kThreeQuarters = 1u << 21, kExponent = 0x7f800000u;
    constexpr float kSmallestHalf = 0x1p-14f;
    float power = std::bit_cast<float>((std::bit_cast<uint32_t>(absmax(g)) + kThreeQuarters) & kExponent);
    if (dtype == DType::f16 && absmax(g) < kSmallestHalf) power = absmax(g) < 0.75f * kSmallestHalf ? 0 : kSmallestHalf;
    if (!std::isfinite(power) || (dtype == DType::f16 && power > 0x1p15f))
      throw_scale_overflow(power, info(dtype).name);
    const int top = std::ilogb(scheme_.element->full_scale);
    int code = power == 0 ? 0 : std::max(127 + std::ilogb(power) - top, 0);
    // Where the weight's type cannot hold the power, it is taken for 0 and so for 1.
    if (dtype == DType::f16 && code < 127 - 24) code = 127;
    groups_.scale_codes.push_back(static_cast<std::byte>(code));
    groups_.scale[g] = std::ldexp(1.0f, code - 127);
  }

  void choose_nvfp4() {
    constexpr float kTop = 448 * 6, kSmallest = 0x1p-126f, kNoScale = 0.125f;
    float most = 0;
    for (size_t g = 0; g < groups_.scale.size(); ++g) most = std::max(most, absmax(g));
    most = std::max(most, largest_);
    groups_.global = 1.0f / std::max(most, kSmallest) * kTop;
    if (!std::isfinite(groups_.global)) groups_.global = 1;
    for (size_t g = 0; g < groups_.scale.size(); ++g) {
      const float local = groups_.global * rounded<dtype>(absmax(g) / scheme_.element->full_scale);
      uint8_t code = to_e4m3(std::min(local, 448.0f));
      if (code == 0) code = to_e4m3(kNoScale);
      groups_.scale_codes.push_back(static_cast<std::byte>(code));
      groups_.scale[g] = e4m3_to_f32(code) / groups_.global;
    }
  }

  void choose_codes(std::vector<std::byte>& codes) const {
    const ElementType& type = *scheme_.element;
    const bool nvfp4 = !scheme_.scale->scheme->is_plain();
    for_each_row([&](int64_t row, std::span<const float> values) {
      for (int64_t s = 0; s < segments_.a_row; ++s) {
        const std::span<const float> from = part(values, s);
        const auto g = static_cast<size_t>(segments_.group_of(row, s));
        std::byte* const to = &codes[static_cast<size_t>(row * segments_.columns + s * segments_.length)];
        if (type.kind == ElementKind::integer)
          encode_integers(from, g, to);
        else if (type.bits == 8)
          encode_floats<dtype>(from, groups_.scale[g], type.highest, to_e4m3, to);
        else if (nvfp4)  // its scale is f32, and so is the quotient
          encode_floats<DType::f32>(from, groups_.scale[g], type.highest, to_e2m1, to);
        else
          encode_floats<dtype>(from, groups_.scale[g], type.highest, to_e2m1, to);
      }
    });
  }

  void encode_integers(std::span<const float> from, size_t g, std::byte* to) const {
    const float scale = groups_.scale[g], zero = groups_.zero.empty() ? 0 : groups_.zero[g];
    const auto half = static_cast<float>(1 << (scheme_.element->bits - 1));
    // Unsigned codes count from the lowest.
    const int shift = groups_.zero.empty() ? 0 : 1 << (scheme_.element->bits - 1);
    const int mask = (1 << scheme_.element->bits) - 1;
    for (size_t i = 0; i < from.size(); ++i) {
      const float shifted = rounded<dtype>(rounded<dtype>(from[i] / scale) + zero);
      const float code = std::min(std::max(shifted, -half), half - 1) + kRound - kRound;
      to[i] = static_cast<std::byte>((static_cast<int>(code) + shift) & mask);
    }
  }

  template <DType quotient, class Round>
  static void encode_floats(std::span<const float> from, float scale, float highest, Round round, std::byte* to) {
    for (size_t i = 0; i < from.size(); ++i) {
      const float value = rounded<quotient>(from[i] / scale) + 0.0f;  // a zero point of 0 makes -0 a 0
      to[i] = static_cast<std::byte>(round(std::min(std::max(value, -highest), highest)));
    }
  }

  std::shared_ptr<const QuantizedTensor> scale_tensor() {
    const Scheme& stored = *scheme_.scale->scheme;
    QuantizedTensor t = {.scheme = stored, .shape = parameter_shape(scheme_.scale->grouping, shape_)};
    t.codes = std::move(groups_.scale_codes);
    if (t.codes.empty()) {
      t.codes.resize(groups_.scale.size() * size_bytes(scale_dtype_));
      from_f32(scale_dtype_, groups_.scale, t.codes);
    }
    if (!stored.is_plain()) {
      const auto bytes = std::as_bytes(std::span(&groups_.global, 1));
      t.scale =
          std::make_shared<QuantizedTensor>(QuantizedTensor{.scheme = *stored.scale->scheme,
                                                            .shape = parameter_shape(stored.scale->grouping, t.shape),
                                                            .codes = {bytes.begin(), bytes.end()}});
    }
    return std::make_shared<const QuantizedTensor>(std::move(t));
  }

  std::shared_ptr<const QuantizedTensor> zero_tensor() const {
    if (groups_.zero.empty()) return nullptr;
    QuantizedTensor t = {.scheme = *scheme_.offset->scheme, .shape = parameter_shape(scheme_.offset->grouping, shape_)};
    const int half = 1 << (scheme_.element->bits - 1);
    for (const float zero : groups_.zero) t.codes.push_back(static_cast<std::byte>(static_cast<int>(zero) + half));
    return std::make_shared<const QuantizedTensor>(std::move(t));
  }

  const Scheme& scheme_;
  const Shape& shape_;
  WeightView weight_;
  Segments segments_;
  float largest_;              ///< of all that is fused with it
  DType scale_dtype_ = dtype;  ///< of plain scales
  Groups groups_;
};

}  // namespace

QuantizedTensor encode_compressed_tensors_fused(const Scheme& scheme, const Shape& shape, WeightView weight,
                                                float largest) {
  switch (weight.dtype) {
    case DType::f32:
    case DType::f16:
    case DType::bf16:
      break;
    default:
      throw Error(
          {.code = "bad-tensor",
           .what = "cannot quantize",
           .why = "compressed-tensors takes weights of 16 and 32 bits, this is " + std::string(info(weight.dtype).name),
           .fix = "convert the model, for example by `bitwright dequantize --dtype float32`"});
  }
  const auto stored = dtype_of(*scheme.scale->scheme->element);
  const bool scales_alike = !stored || size_bytes(*stored) == 1 || *stored == weight.dtype;
  if (scales_alike && weight.dtype == DType::bf16) return Encoder<DType::bf16>(scheme, shape, weight, largest).run();
  if (scales_alike && weight.dtype == DType::f16) return Encoder<DType::f16>(scheme, shape, weight, largest).run();
  return Encoder<DType::f32>(scheme, shape, weight, largest).run();
}

QuantizedTensor encode_compressed_tensors(const Scheme& scheme, const Shape& shape, WeightView weight) {
  return encode_compressed_tensors_fused(scheme, shape, weight, 0);
}

}  // namespace bitwright
