#include "container/gguf_rounding.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/gguf_blocks.hpp"
#include "container/gguf_types.hpp"

namespace bitwright {
namespace {

constexpr size_t kElementsATask = size_t{1} << 16;

void put_half(float value, uint8_t* to) {
  from_f32(DType::f16, std::span(&value, 1), std::as_writable_bytes(std::span(to, 2)));
}

float largest(const float* x, size_t count) {
  float most = 0;
  for (size_t j = 0; j < count; ++j) most = std::max(most, std::fabs(x[j]));
  return most;
}

/// The value of largest magnitude, with its sign; the first of several.
float extreme(const float* x, size_t count) {
  float most = 0, value = 0;
  for (size_t j = 0; j < count; ++j)
    if (std::fabs(x[j]) > most) {
      most = std::fabs(x[j]);
      value = x[j];
    }
  return value;
}

float inverse(float d) { return d != 0 ? 1.0f / d : 0.0f; }

/// The extreme becomes the lowest code, -kHalf; codes are counted from there.
template <int kHalf>
void symmetric(const float* x, const BlockParts& out) {
  const float d = extreme(x, 32) / static_cast<float>(-kHalf), id = inverse(d);
  put_half(d, out.scale);
  for (size_t j = 0; j < 32; ++j)
    out.codes[j] =
        static_cast<uint8_t>(std::min(2 * kHalf - 1, static_cast<int>(x[j] * id + (static_cast<float>(kHalf) + 0.5f))));
}

/// From the smallest value up.
template <int kLevels>
void from_minimum(const float* x, const BlockParts& out) {
  const auto [low, high] = std::minmax_element(x, x + 32);
  const float least = *low, d = (*high - least) / static_cast<float>(kLevels), id = inverse(d);
  put_half(d, out.scale);
  put_half(least, out.offset);
  for (size_t j = 0; j < 32; ++j)
    out.codes[j] = static_cast<uint8_t>(std::min(kLevels, static_cast<int>((x[j] - least) * id + 0.5f)));
}

void eight_bits(const float* x, const BlockParts& out) {
  const float d = largest(x, 32) / 127.0f, id = inverse(d);
  put_half(d, out.scale);
  for (size_t j = 0; j < 32; ++j) {
    const float v = x[j] * id, whole = std::trunc(v);  // roundf: halves away from zero
    out.codes[j] = static_cast<uint8_t>(static_cast<int>(whole + std::copysign(std::fabs(v - whole) >= 0.5f, v)));
  }
}

/// Doubled values of e2m1, and the first of the nearest.
constexpr std::array<float, 16> kDoubled = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
uint8_t nearest_e2m1(float x, float half_scale) {
  uint8_t best = 0;
  float error = std::fabs(kDoubled[0] * half_scale - x);
  for (uint8_t i = 1; i < 16; ++i) {
    const float other = std::fabs(kDoubled.at(i) * half_scale - x);
    if (other < error) {
      best = i;
      error = other;
    }
  }
  return best;
}

void mxfp4(const float* x, const BlockParts& out) {
  const float most = largest(x, 32);
  // ggml's own float logarithm, which rounds up just below a power of two.
  const int exponent = most > 0 ? static_cast<int>(std::floor(std::log2(most))) - 2 + 127 : 0;
  out.scale[0] = static_cast<uint8_t>(std::clamp(exponent, 0, 254));
  const float half = std::ldexp(1.0f, out.scale[0] - 128);
  for (size_t j = 0; j < 32; ++j) out.codes[j] = nearest_e2m1(x[j], half);
}

/// The code of a float8_e4m3 without a sign: the mantissa's next bit rounds up, whatever follows.
uint8_t to_ue4m3(float x) {
  if (!(x > 0)) return 0;
  const float value = std::min(x, 448.0f);
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 7;
  if (exponent <= 0) return static_cast<uint8_t>(std::clamp(static_cast<int>(value * 512.0f + 0.5f), 0, 7));
  const auto code = static_cast<uint32_t>(exponent) * 8 + (bits >> 20 & 7) + (bits >> 19 & 1);
  return static_cast<uint8_t>(exponent >= 15 || code >= 15 * 8 ? 0x7e : code);
}

void nvfp4(const float* x, const BlockParts& out) {
  static const ElementType& ue4m3 = *find_element("ue4m3");
  for (size_t g = 0; g < 4; ++g) {
    out.scale[g] = to_ue4m3(largest(x + 16 * g, 16) / 6.0f);
    const float half = ue4m3.decode(ue4m3, out.scale[g]) * 0.5f;
    for (size_t j = 16 * g; j < 16 * g + 16; ++j) out.codes[j] = nearest_e2m1(x[j], half);
  }
}

void ternary(const float* x, const BlockParts& out) {
  const float d = largest(x, 256), id = inverse(d);
  put_half(d, out.scale);
  for (size_t j = 0; j < 256; ++j) out.codes[j] = static_cast<uint8_t>(std::lround(x[j] * id) + 1);
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
  const float most = extreme(x, 32);
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
  void (*block)(const float* x, const BlockParts& out);
  void (*weighted)(const float* x, const float* w, const BlockParts& out) = nullptr;
};
constexpr auto kRoundings = std::to_array<Rounding>({{"Q8_0", eight_bits},
                                                     {"Q4_0", symmetric<8>, symmetric_weighted<8>},
                                                     {"Q4_1", from_minimum<15>, from_minimum_weighted<15>},
                                                     {"Q5_0", symmetric<16>, symmetric_weighted<16>},
                                                     {"Q5_1", from_minimum<31>, from_minimum_weighted<31>},
                                                     {"MXFP4", mxfp4},
                                                     {"NVFP4", nvfp4},
                                                     {"TQ1_0", ternary},
                                                     {"TQ2_0", ternary}});

void check_finite_block(std::span<const float> x, size_t first) {
  for (size_t j = 0; j < x.size(); ++j)
    if (!std::isfinite(x[j]))
      throw Error(
          {.code = "not-finite", .what = "cannot quantize", .why = fmt::format("element {} is {}", first + j, x[j])});
}

const Rounding& rounding_of(const Scheme& scheme) {
  const BlockCodec* const codec = find_block_codec(scheme);
  const auto found = codec == nullptr ? kRoundings.end() : std::ranges::find(kRoundings, codec->type, &Rounding::type);
  if (found == kRoundings.end())
    throw Error({.code = "bad-scheme", .what = "cannot quantize", .why = "no rounding of ggml's is known for it"});
  return *found;
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
  // A row at a time where its mean counts, else a block.
  const size_t blocks = t.codes.size() / elements, bytes = size_bytes(weight.dtype);
  const size_t width = weighted ? static_cast<size_t>(shape.back()) : elements;
  const TensorBlocks parts(t, blocks);
  parallel_ranges(t.codes.size() / width, std::max<size_t>(kElementsATask / width, 1), [&](size_t begin, size_t end) {
    std::vector<float> x(width), w(weighted ? width : 0);
    for (size_t i = begin; i < end; ++i) {
      to_f32(weight.dtype, weight.bytes.subspan(i * width * bytes, width * bytes), x);
      check_finite_block(x, i * width);
      if (weighted) weigh(x, importance, w);
      for (size_t at = 0; at < width; at += elements) {
        const BlockParts out = parts.of((i * width + at) / elements);
        if (weighted) {
          rounding.weighted(&x[at], &w[at], out);
        } else {
          rounding.block(&x[at], out);
        }
      }
    }
  });
  return t;
}

}  // namespace bitwright
