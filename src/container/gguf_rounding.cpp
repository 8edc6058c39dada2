#include "container/gguf_rounding.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/threads.hpp"
#include "base/vectorized.hpp"
#include "container/gguf_blocks.hpp"
#include "container/gguf_types.hpp"

namespace bitwright {
namespace {

constexpr size_t kElementsATask = size_t{1} << 16;
constexpr size_t kBuffer = 4096;  ///< values at a time: they stay in the first-level cache, and are whole blocks

void put_half(float value, uint8_t* to) {
  const uint16_t half = f32_to_f16(value);
  std::memcpy(to, &half, sizeof half);
}

// Loops over the values of a block become vectors: they hold no branches, and what is compared is whole numbers, since
// the compiler keeps the order of floating-point minimums.

[[gnu::always_inline]] inline uint32_t magnitude_bits(float x) { return std::bit_cast<uint32_t>(x) & 0x7fffffff; }

/// Bits of the largest magnitude.
template <size_t kCount>
[[gnu::always_inline]] inline uint32_t largest_bits(const float* x) {
  uint32_t most = 0;
  for (size_t j = 0; j < kCount; ++j) most = std::max(most, magnitude_bits(x[j]));
  return most;
}
template <size_t kCount>
[[gnu::always_inline]] inline float largest(const float* x) {
  return std::bit_cast<float>(largest_bits<kCount>(x));
}

/// In the order of whole numbers, and back.
[[gnu::always_inline]] inline int32_t key_of(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
[[gnu::always_inline]] inline float value_of(int32_t key) {
  return std::bit_cast<float>(key ^ (key >> 31 & 0x7fffffff));
}

/// The smallest and the largest value; of zeros with different signs the first.
template <size_t kCount>
[[gnu::always_inline]] inline std::pair<float, float> extremes(const float* x) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (size_t j = 0; j < kCount; ++j) {
    low = std::min(low, key_of(x[j]));
    high = std::max(high, key_of(x[j]));
  }
  float least = value_of(low);
  if (least == 0) least = *std::find(x, x + kCount, 0.0f);
  return {least, value_of(high)};
}

/// The value of largest magnitude, with its sign; the first of several.
template <size_t kCount>
[[gnu::always_inline]] inline float extreme(const float* x) {
  const auto [low, high] = extremes<kCount>(x);
  if (high == 0 && low == 0) return 0;
  if (high != -low) return high > -low ? high : low;
  return *std::find_if(x, x + kCount, [most = high](float v) { return std::fabs(v) == most; });
}

[[gnu::always_inline]] inline float inverse(float d) { return d != 0 ? 1.0f / d : 0.0f; }

/// roundf of less than 2^22: halves away from zero. What is added is the largest below 1/2.
[[gnu::always_inline]] inline int rounded_away(float v) {
  return static_cast<int>(v + std::copysign(0x1.fffffep-2f, v));
}

// Blocks that lie one after the other; `out` are the parts of the first.

/// The extreme becomes the lowest code, -kHalf; codes are counted from there.
template <int kHalf>
[[gnu::always_inline]] inline void symmetric(const float* x, size_t blocks, BlockParts out) {
  for (; blocks > 0; --blocks, x += 32, out.codes += 32, out.scale += 2) {
    const float d = extreme<32>(x) / static_cast<float>(-kHalf), id = inverse(d);
    put_half(d, out.scale);
    for (size_t j = 0; j < 32; ++j)
      out.codes[j] = static_cast<uint8_t>(
          std::min(2 * kHalf - 1, static_cast<int>(x[j] * id + (static_cast<float>(kHalf) + 0.5f))));
  }
}
BITWRIGHT_VECTORIZED void q4_0(const float* x, size_t blocks, const BlockParts& out) { symmetric<8>(x, blocks, out); }
BITWRIGHT_VECTORIZED void q5_0(const float* x, size_t blocks, const BlockParts& out) { symmetric<16>(x, blocks, out); }

/// From the smallest value up.
template <int kLevels>
[[gnu::always_inline]] inline void from_minimum(const float* x, size_t blocks, BlockParts out) {
  for (; blocks > 0; --blocks, x += 32, out.codes += 32, out.scale += 2, out.offset += 2) {
    const auto [least, most] = extremes<32>(x);
    const float low = least, d = (most - low) / static_cast<float>(kLevels), id = inverse(d);
    put_half(d, out.scale);
    put_half(low, out.offset);
    for (size_t j = 0; j < 32; ++j) {
      const float up = (x[j] - low) * id + 0.5f;
      out.codes[j] = static_cast<uint8_t>(std::min(kLevels, static_cast<int>(up)));
    }
  }
}
BITWRIGHT_VECTORIZED void q4_1(const float* x, size_t blocks, const BlockParts& out) {
  from_minimum<15>(x, blocks, out);
}
BITWRIGHT_VECTORIZED void q5_1(const float* x, size_t blocks, const BlockParts& out) {
  from_minimum<31>(x, blocks, out);
}

BITWRIGHT_VECTORIZED void q8_0(const float* x, size_t blocks, const BlockParts& first) {
  for (BlockParts out = first; blocks > 0; --blocks, x += 32, out.codes += 32, out.scale += 2) {
    const float d = largest<32>(x) / 127.0f, id = inverse(d);
    put_half(d, out.scale);
    for (size_t j = 0; j < 32; ++j) out.codes[j] = static_cast<uint8_t>(rounded_away(x[j] * id));
  }
}

/// Doubled values of e2m1.
constexpr std::array<float, 16> kDoubled = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/// The first of the nearest, with half the scale of each value.
template <size_t kCount>
[[gnu::always_inline]] inline void to_e2m1(const float* x, const float* half_scales, uint8_t* codes) {
  std::array<uint32_t, kCount> best{};
  std::array<float, kCount> error;
  for (size_t j = 0; j < kCount; ++j) error[j] = std::fabs(kDoubled[0] * half_scales[j] - x[j]);
  for (uint32_t code = 1; code < 16; ++code)
    for (size_t j = 0; j < kCount; ++j) {
      const float other = std::fabs(kDoubled[code] * half_scales[j] - x[j]);
      const uint32_t better = 0u - static_cast<uint32_t>(other < error[j]);
      best[j] = (code & better) | (best[j] & ~better);
      error[j] = other < error[j] ? other : error[j];
    }
  for (size_t j = 0; j < kCount; ++j) codes[j] = static_cast<uint8_t>(best[j]);
}

BITWRIGHT_VECTORIZED void mxfp4(const float* x, size_t blocks, const BlockParts& first) {
  for (BlockParts out = first; blocks > 0; --blocks, x += 32, out.codes += 32, out.scale += 1) {
    const float most = largest<32>(x);
    // ggml's own float logarithm, which rounds up just below a power of two.
    const int exponent = most > 0 ? static_cast<int>(std::floor(std::log2(most))) - 2 + 127 : 0;
    out.scale[0] = static_cast<uint8_t>(std::clamp(exponent, 0, 254));
    std::array<float, 32> half_scales;
    half_scales.fill(std::ldexp(1.0f, out.scale[0] - 128));
    to_e2m1<32>(x, half_scales.data(), out.codes);
  }
}

/// The code of a float8_e4m3 without a sign: the mantissa's next bit rounds up, whatever follows.
uint8_t to_ue4m3(float x) {
  if (!(x > 0)) return 0;
  const float value = std::min(x, 448.0f);
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 7;
  const float up = value * 512.0f + 0.5f;
  if (exponent <= 0) return static_cast<uint8_t>(std::clamp(static_cast<int>(up), 0, 7));
  const auto code = static_cast<uint32_t>(exponent) * 8 + (bits >> 20 & 7) + (bits >> 19 & 1);
  return static_cast<uint8_t>(exponent >= 15 || code >= 15 * 8 ? 0x7e : code);
}

BITWRIGHT_VECTORIZED void nvfp4(const float* x, size_t blocks, const BlockParts& first) {
  const ElementType& ue4m3 = *find_element("ue4m3");
  for (BlockParts out = first; blocks > 0; --blocks, x += 64, out.codes += 64, out.scale += 4) {
    std::array<float, 64> half_scales;
    for (size_t g = 0; g < 4; ++g) {
      out.scale[g] = to_ue4m3(largest<16>(x + 16 * g) / 6.0f);
      std::fill_n(&half_scales[16 * g], 16, ue4m3.decode(ue4m3, out.scale[g]) * 0.5f);
    }
    to_e2m1<64>(x, half_scales.data(), out.codes);
  }
}

BITWRIGHT_VECTORIZED void ternary(const float* x, size_t blocks, const BlockParts& first) {
  for (BlockParts out = first; blocks > 0; --blocks, x += 256, out.codes += 256, out.scale += 2) {
    const float d = largest<256>(x), id = inverse(d);
    put_half(d, out.scale);
    for (size_t j = 0; j < 256; ++j) out.codes[j] = static_cast<uint8_t>(rounded_away(x[j] * id) + 1);
  }
}

// ---- with weights. Sums are made in ggml's order, a value at a time: the bits depend on it.

float whole(float v) {
  constexpr float kRounder = 12582912;  // 1.5 * 2^23: adding it rounds
  return v + kRounder - kRounder;
}

/// The best of 19 scales around the one that takes the extreme to the lowest code, each by least squares.
template <int kHalf>
void symmetric_weighted(const float* x, const float* w, const BlockParts& out) {
  constexpr float kNothing = 1e-15f, kLowest = -kHalf, kHighest = kHalf - 1;
  const float most = extreme<32>(x);
  put_half(0, out.scale);
  std::fill_n(out.codes, 32, uint8_t{0});
  if (std::fabs(most) < kNothing) return;
  float scale = 0, best = 0, best_inverse = 0;
  for (int k = 0; k <= 19; ++k) {
    const int step = k == 0 ? 0 : k - 10;  // the middle first
    if (k != 0 && step == 0) continue;
    const float inv = -(static_cast<float>(kHalf) + 0.1f * static_cast<float>(step)) / most;
    float sum_xl = 0, sum_ll = 0;
    for (size_t j = 0; j < 32; ++j) {
      const float l = std::clamp(whole(inv * x[j]), kLowest, kHighest);
      sum_xl += w[j] * x[j] * l;
      sum_ll += w[j] * l * l;
    }
    if (k != 0 && !(sum_ll > 0 && sum_xl * sum_xl > best * sum_ll)) continue;
    scale = sum_ll != 0 ? sum_xl / sum_ll : 0;
    best = scale * sum_xl;
    best_inverse = inv;
  }
  put_half(scale, out.scale);
  for (size_t j = 0; j < 32; ++j)
    out.codes[j] =
        static_cast<uint8_t>(kHalf + static_cast<int>(std::clamp(whole(best_inverse * x[j]), kLowest, kHighest)));
}

/// The best of 37 ranges from the smallest value (or 0) up, scale and minimum by least squares.
template <int kLevels>
void from_minimum_weighted(const float* x, const float* w, const BlockParts& out) {
  constexpr float kTop = kLevels;
  const auto [low, high] = std::minmax_element(x, x + 32);
  const float least = std::min(*low, 0.0f), span = *high - least;
  float scale = 0, minimum = least, sum_w = 0, sum_x = 0;
  std::array<float, 32> codes{};
  if (span > 0) {
    for (size_t j = 0; j < 32; ++j) {
      sum_w += w[j];
      sum_x += w[j] * x[j];
    }
    const auto code = [&](size_t j, float inv) { return std::clamp(whole(inv * (x[j] - minimum)), 0.0f, kTop); };
    const auto error = [&](const std::array<float, 32>& l, float a, float b) {
      float sum = 0;
      for (size_t j = 0; j < 32; ++j) {
        const float off = a * l[j] + b - x[j];
        sum += w[j] * (off * off);
      }
      return sum;
    };
    scale = 1 / (kTop / span);
    for (size_t j = 0; j < 32; ++j) codes[j] = code(j, kTop / span);
    float best = error(codes, scale, least);
    for (int k = 0; k <= 36; ++k) {
      // From the best minimum so far, as ggml does it.
      const float inv = (-0.9f + 0.05f * static_cast<float>(k) + kTop) / (*high - minimum);
      float sum_l = 0, sum_ll = 0, sum_xl = 0;
      std::array<float, 32> l{};
      for (size_t j = 0; j < 32; ++j) {
        l[j] = code(j, inv);
        sum_l += w[j] * l[j];
        sum_ll += w[j] * l[j] * l[j];
        sum_xl += w[j] * l[j] * x[j];
      }
      const float d = sum_w * sum_ll - sum_l * sum_l;
      if (!(d > 0)) continue;
      float a = (sum_w * sum_xl - sum_x * sum_l) / d, b = (sum_ll * sum_x - sum_l * sum_xl) / d;
      if (b > 0) {
        b = 0;
        a = sum_xl / sum_ll;
      }
      const float e = error(l, a, b);
      if (!(e < best)) continue;
      best = e;
      scale = a;
      minimum = b;
      codes = l;
    }
  }
  put_half(scale, out.scale);
  put_half(minimum, out.offset);
  for (size_t j = 0; j < 32; ++j) out.codes[j] = static_cast<uint8_t>(codes[j]);
}

struct Rounding {
  std::string_view type;
  void (*blocks)(const float* x, size_t blocks, const BlockParts& first);
  void (*weighted)(const float* x, const float* w, const BlockParts& out) = nullptr;
};
constexpr auto kRoundings = std::to_array<Rounding>({{"Q8_0", q8_0},
                                                     {"Q4_0", q4_0, symmetric_weighted<8>},
                                                     {"Q4_1", q4_1, from_minimum_weighted<15>},
                                                     {"Q5_0", q5_0, symmetric_weighted<16>},
                                                     {"Q5_1", q5_1, from_minimum_weighted<31>},
                                                     {"MXFP4", mxfp4},
                                                     {"NVFP4", nvfp4},
                                                     {"TQ1_0", ternary},
                                                     {"TQ2_0", ternary}});

BITWRIGHT_VECTORIZED bool all_finite(std::span<const float> x) {
  uint32_t most = 0;
  for (const float v : x) most = std::max(most, magnitude_bits(v));
  return most < 0x7f800000;
}

void check_finite_values(std::span<const float> x, size_t first) {
  if (all_finite(x)) return;
  const auto bad = std::ranges::find_if(x, [](float v) { return !std::isfinite(v); });
  throw Error({.code = "not-finite",
               .what = "cannot quantize",
               .why = fmt::format("element {} is {}", first + static_cast<size_t>(bad - x.begin()), *bad)});
}

const Rounding& rounding_of(const Scheme& scheme) {
  const BlockCodec* const codec = find_block_codec(scheme);
  const auto found = codec == nullptr ? kRoundings.end() : std::ranges::find(kRoundings, codec->type, &Rounding::type);
  if (found == kRoundings.end())
    throw Error({.code = "bad-scheme", .what = "cannot quantize", .why = "no rounding of ggml's is known for it"});
  return *found;
}

/// A scale or minimum beyond float16, which ggml would store as infinite.
void check_halves(const QuantizedTensor* parameter) {
  if (parameter == nullptr || !parameter->scheme.is_plain() || parameter->scheme.element->bits != 16) return;
  for (size_t i = 0; i + 1 < parameter->codes.size(); i += 2)
    if ((static_cast<unsigned>(parameter->codes[i + 1]) & 0x7c) == 0x7c)
      throw Error({.code = "scale-overflow",
                   .what = "cannot quantize",
                   .why = "a scale is too large for float16",
                   .fix = "keep the layer in full precision (--skip-modules)"});
}

/// Weights of a row's errors: importance * sqrt(mean of squares + square).
void weigh(std::span<const float> x, std::span<const float> importance, std::span<float> out) {
  float squares = 0;
  for (const float v : x) squares += v * v;
  const float mean = squares / static_cast<float>(x.size());
  for (size_t j = 0; j < x.size(); ++j) out[j] = importance[j] * std::sqrt(mean + x[j] * x[j]);
}

}  // namespace

QuantizedTensor round_to_gguf(const Scheme& scheme, const Shape& shape, WeightView weight) {
  return round_to_gguf(scheme, shape, weight, {});
}

QuantizedTensor round_to_gguf(const Scheme& scheme, const Shape& shape, WeightView weight,
                              std::span<const float> importance) {
  const Rounding& rounding = rounding_of(scheme);
  const bool weighted = !importance.empty() && rounding.weighted != nullptr;
  const auto elements = static_cast<size_t>(find_gguf_type(rounding.type)->block.elements);
  QuantizedTensor t = block_tensor(scheme, shape);
  if (t.codes.empty()) return t;
  // A row at a time where its mean counts.
  const size_t count = t.codes.size(), bytes = size_bytes(weight.dtype);
  const size_t width = weighted ? static_cast<size_t>(shape.back()) : kBuffer;
  const TensorBlocks parts(t, count / elements);
  parallel_ranges(count, std::max<size_t>(kElementsATask / width, 1) * width, [&](size_t begin, size_t end) {
    std::vector<float> values(width), weights(weighted ? width : 0);
    for (size_t first = begin; first < end; first += width) {
      const std::span<float> x = std::span(values).first(std::min(width, end - first));
      to_f32(weight.dtype, weight.bytes.subspan(first * bytes, x.size() * bytes), x);
      check_finite_values(x, first);
      if (!weighted) {
        rounding.blocks(x.data(), x.size() / elements, parts.of(first / elements));
        continue;
      }
      weigh(x, importance, weights);
      for (size_t at = 0; at < width; at += elements)
        rounding.weighted(&x[at], &weights[at], parts.of((first + at) / elements));
    }
  });
  check_halves(t.scale.get());
  check_halves(t.offset.get());
  return t;
}

}  // namespace bitwright
