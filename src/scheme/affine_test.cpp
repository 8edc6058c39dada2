#include "scheme/affine.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <limits>

#include "base/error.hpp"
#include "tests/golden_cases.hpp"

namespace bitwright {
namespace {

using namespace test;

constexpr float kEps = 0x1p-23f, kSmallestNormal = std::numeric_limits<float>::min();
constexpr float kTinygemmLeast = 1e-6f;  // what torchao gives its tinygemm functions

/// Whatever integers or floats an array holds.
std::vector<double> numbers_of(const GoldenCase& c, const std::string& name) {
  const StoredArray& a = c.at(name);
  std::vector<double> out(static_cast<size_t>(element_count(a.shape)));
  for (size_t i = 0; i < out.size(); ++i) {
    const std::byte* const from = a.data.data() + i * size_bytes(a.dtype);
    const auto as = [&](auto value) {
      std::memcpy(&value, from, sizeof value);
      return static_cast<double>(value);
    };
    out[i] = a.dtype == DType::f64   ? as(double{})
             : a.dtype == DType::f32 ? as(float{})
             : a.dtype == DType::i64 ? as(int64_t{})
             : a.dtype == DType::i32 ? as(int32_t{})
             : a.dtype == DType::i8  ? as(int8_t{})
                                     : as(uint8_t{});
  }
  return out;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// ---- fp8_cast ----

TEST(Golden, fp8_cast) {
  const auto cases = golden_cases("fp8_cast");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    const std::vector<float> input = c.floats("input"), e4m3 = c.floats("e4m3fn_decoded"),
                             e5m2 = c.floats("e5m2_decoded");
    const std::span<const std::byte> codes = c.at("all_codes").data;
    for (size_t i = 0; i < codes.size(); ++i) {
      const auto code = std::to_integer<uint8_t>(codes[i]);
      EXPECT_TRUE(same(e4m3_to_f32(code), e4m3[i])) << i;
      EXPECT_TRUE(same(e5m2_to_f32(code), e5m2[i])) << i;
      EXPECT_TRUE(same(float_element(DType::f8_e4m3).decode(float_element(DType::f8_e4m3), code), e4m3[i])) << i;
    }
    for (size_t i = 0; i < input.size(); ++i) {
      EXPECT_EQ(f32_to_e4m3(input[i]), std::to_integer<uint8_t>(c.at("e4m3fn").data[i])) << input[i];
      EXPECT_EQ(f32_to_e5m2(input[i]), std::to_integer<uint8_t>(c.at("e5m2").data[i])) << input[i];
    }
  }
  std::cout << "cases: " << cases.size() << '\n';
}

// ---- torch_native ----

const ElementType& element_of(const std::string& dtype) {
  return integer_element(dtype.ends_with("4x2") ? 4 : 8, dtype.starts_with("qint"));
}

AffineRange range_of(const std::string& dtype) {
  if (dtype == "qint32") return {INT32_MIN, INT32_MAX};
  const ElementType& type = element_of(dtype);
  return {static_cast<int64_t>(type.lowest), static_cast<int64_t>(type.highest)};
}

/// Which of `count` parameters an element has: one a tensor, a row, or (axis 1) a column.
class Channels {
 public:
  Channels(const GoldenCase& c, size_t count)
      : count_(count), each_(c.floats("input").size() / count), by_columns_(c.params.value("axis", 0) != 0) {
    if (by_columns_) {
      EXPECT_EQ(static_cast<size_t>(c.at("input").shape.back()), count);
    }
  }
  size_t of(size_t i) const { return by_columns_ ? i % count_ : i / each_; }

 private:
  size_t count_, each_;
  bool by_columns_;
};

void check_casts(const GoldenCase& c) {
  const std::vector<float> input = c.floats("input");
  for (const auto& [name, dtype] : {std::pair("f16", DType::f16), {"bf16", DType::bf16}}) {
    std::vector<std::byte> bytes(input.size() * 2);
    from_f32(dtype, input, bytes);
    const std::vector<float> expected = c.floats(name);
    for (size_t i = 0; i < input.size(); ++i)  // which NaN is left to the processor
      EXPECT_TRUE(std::isnan(expected[i]) ? std::isnan(round_to(dtype, input[i]))
                                          : std::equal(&bytes[2 * i], &bytes[2 * i] + 2, &c.at(name).data[2 * i]))
          << name << " of " << input[i];
  }
}

void check_fake_quantization(const GoldenCase& c) {
  const std::vector<float> input = c.floats("input"), output = c.floats("output"), grad = c.floats("grad");
  const AffineRange range = {c.params["quant_min"], c.params["quant_max"]};
  const std::vector<double> scales =
      c.find("scales") != nullptr ? numbers_of(c, "scales") : std::vector{c.params["scale"].get<double>()};
  const Channels channels(c, scales.size());
  const AffineRange open = {INT32_MIN, INT32_MAX};
  for (size_t i = 0; i < input.size(); ++i) {
    const AffineParameters p = {static_cast<float>(scales[channels.of(i)]), c.params.value("zero_point", int64_t{0})};
    const int64_t code = quantize_affine(input[i], p, range);
    EXPECT_EQ(static_cast<float>(code - p.zero) * p.scale, output[i]) << i;
    EXPECT_EQ(quantize_affine(input[i], p, open) == code ? 1.0f : 0.0f, grad[i]) << i;
  }
}

/// The range whose squared error, by the histogram, is least: torch's search takes away the end that loses less.
class HistogramRange {
 public:
  explicit HistogramRange(const GoldenCase& c)
      : counts_(numbers_of(c, "histogram")), low_(c.floats("min_val").at(0)), high_(c.floats("max_val").at(0)) {
    for (const double count : counts_) sums_.push_back((sums_.empty() ? 0 : sums_.back()) + count);
  }

  Range find() {
    constexpr double kStep = 1e-5;
    double alpha = 0, beta = 1, least = std::numeric_limits<double>::infinity();
    int64_t begin = 0, last = static_cast<int64_t>(counts_.size()) - 1;
    while (alpha < beta) {
      int64_t left = begin, right = last;
      while (left < last && at(sums_, left) < (alpha + kStep) * sums_.back()) ++left;
      while (right > begin && at(sums_, right) > (beta - kStep) * sums_.back()) --right;
      int64_t next_begin = begin, next_last = last;
      if (left - begin > last - right) {
        next_begin = left;
        alpha += kStep;
      } else {
        next_last = right;
        beta -= kStep;
      }
      if (next_begin == begin && next_last == last) continue;
      const double norm = error(next_begin, next_last);
      if (norm > least) break;
      least = norm;
      begin = next_begin;
      last = next_last;
    }
    const float width = (high_ - low_) / static_cast<float>(counts_.size());
    return {low_ + width * static_cast<float>(begin), low_ + width * static_cast<float>(last + 1)};
  }

 private:
  static double at(const std::vector<double>& values, int64_t i) { return values[static_cast<size_t>(i)]; }
  static double cubes(double begin, double end) { return (end * end * end - begin * begin * begin) / 3; }

  double error(int64_t begin, int64_t last) const {
    constexpr double kCodes = 256;
    const double width = (static_cast<double>(high_) - static_cast<double>(low_)) / static_cast<double>(counts_.size());
    const double step = width * static_cast<double>(last - begin + 1) / kCodes;
    double sum = 0;
    for (size_t i = 0; i < counts_.size() && step != 0; ++i) {
      const double from = static_cast<double>(static_cast<int64_t>(i) - begin) * width, to = from + width;
      const double first = std::clamp(std::floor(from / step), 0.0, kCodes - 1);
      const double end = std::clamp(std::floor(to / step), 0.0, kCodes - 1);
      const double norm = cubes(from - (first + 0.5) * step, step / 2) +
                          (end - first - 1) * cubes(-step / 2, step / 2) +
                          cubes(-step / 2, to - (end * step + step / 2));
      sum += counts_[i] / width * norm;
    }
    return sum;
  }

  std::vector<double> counts_, sums_;
  float low_, high_;
};

Range moving_average(const GoldenCase& c) {
  constexpr float kShare = 0.01f;
  const StoredArray& inputs = c.at("inputs");
  const std::vector<float> values = c.floats("inputs");
  const size_t each = values.size() / static_cast<size_t>(inputs.shape[0]);
  Range range = {0, 0};
  for (size_t begin = 0; begin < values.size(); begin += each) {
    const Range one = min_max_range({}, std::span(values).subspan(begin, each));
    if (begin == 0) range = one;
    range = {range.low + kShare * (one.low - range.low), range.high + kShare * (one.high - range.high)};
  }
  return range;
}

void check_observed(const GoldenCase& c, Range range, const std::string& dtype) {
  const AffineParameters p = choose_affine(range, AffineMapping::asymmetric, range_of(dtype), kEps);
  EXPECT_EQ(p.scale, c.floats("scale").at(0));
  EXPECT_EQ(static_cast<double>(p.zero), numbers_of(c, "zero_point").at(0));
}

/// One scale and zero point a row, a column or a tensor; what an observer chose where the case has it.
void check_quantized(const GoldenCase& c) {
  const bool rows = c.find("scales") != nullptr;
  const std::vector<double> scales = numbers_of(c, rows ? "scales" : "scale");
  const std::vector<double> zeros = numbers_of(c, rows ? "zero_points" : "zero_point");
  const std::vector<float> input = c.floats("input"), dequantized = c.floats("dequantized");
  const std::vector<double> codes = numbers_of(c, "q");
  const auto dtype = c.params["dtype"].get<std::string>();
  const Channels channels(c, scales.size());
  for (size_t i = 0; i < input.size(); ++i) {
    const size_t channel = channels.of(i);
    const AffineParameters p = {static_cast<float>(scales[channel]), static_cast<int64_t>(zeros[channel])};
    const int64_t code = quantize_affine(input[i], p, range_of(dtype));
    EXPECT_EQ(static_cast<double>(code), codes[i]) << i << ": " << input[i];
    const Scheme scheme = {.offset_kind = OffsetKind::zero_point};
    const GroupParameters decoded = {.scale = p.scale, .offset = static_cast<float>(p.zero)};
    EXPECT_EQ(decode_value(scheme, decoded, static_cast<float>(code)), dequantized[i]) << i;
  }
  if (c.find("observer_scales") == nullptr) return;
  const bool symmetric = c.params["qscheme"].get<std::string>().ends_with("symmetric");
  std::vector<std::vector<float>> values(scales.size());
  for (size_t i = 0; i < input.size(); ++i) values[channels.of(i)].push_back(input[i]);
  for (size_t r = 0; r < scales.size(); ++r) {
    const Range range = min_max_range({}, values[r]);
    EXPECT_EQ(range.low, c.floats("min_vals")[r]);
    EXPECT_EQ(range.high, c.floats("max_vals")[r]);
    const AffineMapping mapping = symmetric ? AffineMapping::symmetric : AffineMapping::asymmetric;
    const AffineParameters p = choose_affine(range, mapping, range_of(dtype), kEps);
    EXPECT_EQ(p.scale, c.floats("observer_scales")[r]) << r;
    EXPECT_EQ(static_cast<double>(p.zero), numbers_of(c, "observer_zero_points")[r]) << r;
  }
}

void check_float_zeros(const GoldenCase& c) {
  const std::vector<float> input = c.floats("input"), scales = c.floats("scales"), zeros = c.floats("zero_points");
  const Channels channels(c, scales.size());
  const std::span<const std::byte> packed = c.at("packed_bytes").data;
  for (size_t i = 0; i < input.size(); ++i) {
    const float scale = scales[channels.of(i)], zero = zeros[channels.of(i)];
    const int64_t code = quantize_float_zero(input[i], scale, zero, range_of("quint4x2"));
    EXPECT_EQ(code, std::to_integer<int>(packed[i / 2] >> (i % 2 == 0 ? 0 : 4)) & 15) << i;
    const GroupParameters p = {.scale = scale, .offset = zero};
    EXPECT_EQ(decode_value({.offset_kind = OffsetKind::float_zero}, p, static_cast<float>(code)),
              c.floats("dequantized")[i]);
  }
}

TEST(Golden, torch_native) {
  const auto cases = golden_cases("torch_native");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    if (c.find("histogram") != nullptr)
      check_observed(c, HistogramRange(c).find(), c.params["dtype"]);
    else if (c.find("inputs") != nullptr)
      check_observed(c, moving_average(c), "quint8");
    else if (c.find("grad") != nullptr)
      check_fake_quantization(c);
    else if (c.find("bf16") != nullptr)
      check_casts(c);
    else if (c.find("packed_bytes") != nullptr)
      check_float_zeros(c);
    else
      check_quantized(c);
  }
  // What our arithmetic has words for; integers and halves are refused, or taken, long before it.
  const ElementType& uint8 = integer_element(8, false);
  for (const NegativeCase& n : negative_cases("torch_native")) {
    SCOPED_TRACE(n.name);
    const auto says = [&](std::string_view words) { return n.message.find(words) != std::string::npos; };
    if (says("above upper bound")) {
      check_refused([&] { check_affine(uint8, {0, 255}, 300); });
    } else if (says("quant_min` should be less")) {
      check_refused([&] { check_affine(uint8, {10, 0}, 5); });
    } else if (says("zero_point` must be between")) {
      check_refused([&] { check_affine(uint8, {0, 15}, 16); });
    } else if (says("length of scales")) {
      const Scheme scheme = {.element = &uint8, .scale = parameter(Grouping::channel(), plain(DType::f32))};
      QuantizedTensor t = encode(scheme, {2, 2}, std::vector<float>(4, 1.0f));
      t.scale = std::make_shared<QuantizedTensor>(encode(plain(DType::f32), {3}, std::vector<float>(3, 1.0f)));
      check_refused([&] { check_sizes(t, "test"); });
    } else if (says("axis out of range")) {
      check_refused([&] { parameter_shape(Grouping::along(0, -5), {2, 2}); });
    } else {
      EXPECT_TRUE(!n.raised || says("only works on Float Tensor")) << n.message;
    }
  }
  std::cout << "cases: " << cases.size() << '\n';
}

// ---- torchao ----

void check_torchao(const GoldenCase& c) {
  const bool usual = c.params["quant_min"].is_null();
  const bool is_signed = c.params.value("dtype", "torch.int8") == "torch.int8";
  const AffineRange range = !usual      ? AffineRange{c.params["quant_min"], c.params["quant_max"]}
                            : is_signed ? AffineRange{-128, 127}
                                        : AffineRange{0, 255};
  const auto mapping_name = c.params.value("mapping_type", "");
  const bool tinygemm = c.find("zero_point_float") != nullptr;
  const AffineMapping mapping = mapping_name == "SYMMETRIC"                   ? AffineMapping::symmetric
                                : mapping_name == "SYMMETRIC_NO_CLIPPING_ERR" ? AffineMapping::symmetric_no_clipping
                                                                              : AffineMapping::asymmetric;
  const std::vector<float> input = c.floats("input"), scales = c.floats("scale"), dequantized = c.floats("dequantized");
  const std::vector<double> zeros = numbers_of(c, tinygemm ? "zero_point_float" : "zero_point");
  const std::vector<double> codes = numbers_of(c, "q");
  const size_t each = input.size() / scales.size();
  for (size_t g = 0; g < scales.size(); ++g) {
    const auto group = std::span(input).subspan(g * each, each);
    const Range values = min_max_range({}, group);
    AffineParameters p = choose_affine(values, mapping, range, kSmallestNormal);
    const int64_t middle_code = (range.low + range.high + 1) / 2;
    const auto middle = static_cast<float>(middle_code);
    float zero = static_cast<float>(p.zero);
    if (tinygemm) {  // the range as it is, zero where its middle code lies
      p.scale = std::max((values.high - values.low) / static_cast<float>(range.high - range.low), kTinygemmLeast);
      zero = values.low + p.scale * middle;
    }
    EXPECT_EQ(p.scale, scales[g]) << g;
    EXPECT_EQ(static_cast<double>(zero), zeros[g]) << g;
    for (size_t i = g * each; i < (g + 1) * each; ++i) {
      if (tinygemm) {
        const float least = zero - p.scale * middle;
        const float code = std::clamp(std::nearbyint((input[i] - least) / p.scale), static_cast<float>(range.low),
                                      static_cast<float>(range.high));
        EXPECT_EQ(static_cast<double>(code), codes[i]) << i;
        EXPECT_EQ((code - middle) * p.scale + zero, dequantized[i]) << i;
        continue;
      }
      EXPECT_EQ(static_cast<double>(quantize_affine(input[i], p, range)), codes[i]) << i;
      const GroupParameters decoded = {.scale = p.scale, .offset = zero};
      EXPECT_EQ(decode_value({.offset_kind = OffsetKind::zero_point}, decoded, static_cast<float>(codes[i])),
                dequantized[i])
          << i;
    }
  }
}

TEST(Golden, torchao) {
  const auto cases = golden_cases("torchao");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    check_torchao(c);
  }
  for (const NegativeCase& n : negative_cases("torchao")) {
    SCOPED_TRACE(n.name);
    if (n.message.find("quant_min out of bound") != std::string::npos)
      check_refused([] { check_affine(integer_element(8, true), {-200, 127}, 0); });
    else if (n.message.find("quant_max out of bound") != std::string::npos)
      check_refused([] { check_affine(integer_element(8, true), {-128, 300}, 0); });
    else  // ragged groups are the scheme's; containers whose owners refuse them do
      EXPECT_NE(n.message.find("to be divisible by block_size"), std::string::npos) << n.message;
  }
  std::cout << "cases: " << cases.size() << '\n';
}

}  // namespace
}  // namespace bitwright
