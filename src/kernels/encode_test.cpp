#include "kernels/encode.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

std::vector<std::byte> stored(DType dtype, std::span<const float> values) {
  std::vector<std::byte> bytes(values.size() * size_bytes(dtype));
  from_f32(dtype, values, bytes);
  return bytes;
}

std::vector<float> widened(WeightView weight) {
  std::vector<float> values(weight.count());
  to_f32(weight.dtype, weight.bytes, values);
  return values;
}

/// Gaussian rows, then what goes wrong: constant rows, zeros of both signs, denormals, huge and tiny values, outliers,
/// ties (multiples of half a step).
std::vector<float> awkward(int64_t rows, int64_t columns, DType dtype, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const float v = normal(random), sign = c % 2 == 0 ? 1.0f : -1.0f;
      const bool huge = dtype != DType::f16;
      switch (r % 12) {
        case 0:
          values.push_back(0.25f);
          break;
        case 1:
          values.push_back(sign * 0.0f);
          break;
        case 2:
          values.push_back(v * 1e-6f);
          break;
        case 3:
          values.push_back(v * (huge ? 1e-39f : 1e-5f));
          break;
        case 4:
          values.push_back(v * (huge ? 1e5f : 1e3f));
          break;
        case 5:
          values.push_back(c % 61 == 0 ? 1.0f : v);
          break;
        case 6:
          values.push_back(static_cast<float>(c % 33 - 16) * 0.5f);
          break;
        case 7:
          values.push_back(std::fabs(v));
          break;
        case 8:
          values.push_back(-std::fabs(v));
          break;
        case 9:
          values.push_back(static_cast<float>((c * 7) % 511 - 255) * 0x1p-9f);
          break;
        default:
          values.push_back(v);
      }
    }
  return values;
}

Scheme integer_scheme(int bits, bool is_signed, bool zero_point, const Grouping& grouping, Scheme scale) {
  Scheme scheme = {.element = &integer_element(bits, is_signed), .scale = parameter(grouping, std::move(scale))};
  if (!zero_point) return scheme;
  scheme.offset_kind = OffsetKind::zero_point;
  scheme.offset = parameter(grouping, {.element = scheme.element});
  return scheme;
}

Scheme table_scheme(const char* name, const Grouping& grouping) {
  return {.element = find_element(name), .scale = parameter(grouping, plain(DType::f32))};
}

QuantizedTensor definition(const Scheme& scheme, const Shape& shape, WeightView weight, RangeRule rule) {
  return encode(scheme, shape, widened(weight),
                [rule](const Scheme& s, std::span<const float> v) { return choose_range(rule, s, v); });
}

/// Every usable level gives the definition's bits.
void expect_definition(const Scheme& scheme, const Shape& shape, WeightView weight, RangeRule rule) {
  const QuantizedTensor expected = definition(scheme, shape, weight, rule);
  for (const KernelLevel& level : kernel_levels()) {
    if (!level.usable()) continue;
    const QuantizedTensor t = encode(scheme, shape, weight, rule, level);
    ASSERT_TRUE(*t.scale == *expected.scale) << level.name << " scales of " << describe(scheme);
    ASSERT_EQ(t.offset != nullptr, expected.offset != nullptr);
    ASSERT_TRUE(!t.offset || *t.offset == *expected.offset) << level.name << " zeros of " << describe(scheme);
    for (size_t i = 0; i < t.codes.size(); ++i)
      ASSERT_EQ(t.codes[i], expected.codes[i]) << level.name << ", element " << i << " of " << describe(scheme) << ' '
                                               << to_string(shape) << ' ' << info(weight.dtype).name;
    ASSERT_TRUE(t == expected);
  }
}

std::vector<Grouping> groupings() {
  return {Grouping::tensor(),  Grouping::channel(), Grouping::along(5), Grouping::along(64),
          Grouping::along(32), Grouping::flat(8),   Grouping::flat(64), Grouping::along(0, -2)};
}

class KernelsEncodeTypes : public testing::TestWithParam<DType> {};

TEST(KernelsEncode, FindsTheFirstThatIsNotFinite) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    std::vector<std::byte> bytes(1'000'007 * size_bytes(dtype));
    EXPECT_FALSE(find_non_finite({dtype, bytes}).has_value());
    for (const size_t at : {1'000'006u, 4096u, 5u}) {  // from the last to the first
      const float bad = at == 4096 ? -INFINITY : NAN;
      if (dtype == DType::f64) {
        const double wide = static_cast<double>(bad);
        std::memcpy(bytes.data() + at * sizeof wide, &wide, sizeof wide);
      } else {
        from_f32(dtype, std::span(&bad, 1), std::span(bytes).subspan(at * size_bytes(dtype), size_bytes(dtype)));
      }
      const auto found = find_non_finite({dtype, bytes});
      ASSERT_TRUE(found.has_value());
      EXPECT_EQ(found->position, at);
    }
  }
}

TEST_P(KernelsEncodeTypes, IsTheDefinition) {
  for (const int64_t columns : {1, 7, 63, 64, 65, 515})
    for (const RangeRule rule : {RangeRule::minmax, RangeRule::mse}) {
      const Shape shape = {24, columns};
      const auto bytes = stored(GetParam(), awkward(24, columns, GetParam(), static_cast<uint32_t>(columns)));
      const WeightView weight = {GetParam(), bytes};
      for (const Grouping& grouping : groupings()) {
        for (const int bits : {4, 8})
          for (const bool symmetric : {true, false})
            for (const DType scale : {DType::f16, DType::bf16, DType::f32})
              expect_definition(integer_scheme(bits, symmetric, !symmetric, grouping, plain(scale)), shape, weight,
                                rule);
        for (const char* table : {"nf4", "fp4"}) expect_definition(table_scheme(table, grouping), shape, weight, rule);
      }
    }
}
INSTANTIATE_TEST_SUITE_P(DTypes, KernelsEncodeTypes, testing::Values(DType::bf16, DType::f16, DType::f32),
                         [](const testing::TestParamInfo<DType>& dtype) {
                           return std::string(bitwright::info(dtype.param).name);
                         });

TEST(KernelsEncode, EveryWidthAndSign) {
  const Shape shape = {13, 70};
  const auto bytes = stored(DType::bf16, awkward(13, 70, DType::bf16, 5));
  for (int bits = 1; bits <= 8; ++bits)
    for (const bool is_signed : {true, false})
      for (const bool zero_point : {true, false})
        for (const RangeRule rule : {RangeRule::minmax, RangeRule::mse})
          expect_definition(integer_scheme(bits, is_signed, zero_point, Grouping::along(32), plain(DType::f16)), shape,
                            {DType::bf16, bytes}, rule);
}

TEST(KernelsEncode, NestedScalesExpertsAndOtherTypes) {
  const Scheme e4m3 = {.element = &float_element(DType::f8_e4m3),
                       .scale = parameter(Grouping::tensor(), plain(DType::f32))};
  const Scheme absmax = {.element = find_element("dynamic8"),
                         .scale = parameter(Grouping::flat(256), plain(DType::f32)),
                         .offset_kind = OffsetKind::bias,
                         .offset = parameter(Grouping::tensor(), plain(DType::f32))};
  const Shape shape = {3, 11, 96};
  std::vector<float> values(3 * 11 * 96);
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 1);
  for (float& v : values) v = normal(random);
  for (const DType dtype : {DType::bf16, DType::f32, DType::f64, DType::f8_e5m2}) {
    const auto bytes = stored(dtype, values);
    for (const RangeRule rule : {RangeRule::minmax, RangeRule::mse}) {
      expect_definition(integer_scheme(4, false, true, Grouping::along(32), e4m3), shape, {dtype, bytes}, rule);
      expect_definition(integer_scheme(8, true, false, Grouping::tensor(), plain(DType::f16)), shape, {dtype, bytes},
                        rule);
      Scheme nf4 = table_scheme("nf4", Grouping::flat(64));
      nf4.scale = parameter(Grouping::flat(64), absmax);
      expect_definition(nf4, shape, {dtype, bytes}, rule);
    }
  }
}

// The quotient is built from products: on both sides of every tie it must fall as the division does.
TEST(KernelsEncode, QuotientsNearTies) {
  std::mt19937 random(11);
  std::vector<float> values;
  for (int row = 0; row < 64; ++row) {
    const float top =
        std::ldexp(1 + static_cast<float>(random() % 8388608) * 0x1p-23f, static_cast<int>(row % 40) - 20);
    const float scale = top / 127;
    values.push_back(top);
    for (int i = 1; i < 512; ++i) {
      float v = (static_cast<float>(static_cast<int>(random() % 254) - 127) + 0.5f) * scale;
      for (int step = static_cast<int>(random() % 7) - 3; step != 0; step += step < 0 ? 1 : -1)
        v = std::nextafter(v, step < 0 ? -INFINITY : INFINITY);
      values.push_back(v);
    }
  }
  expect_definition(integer_scheme(8, true, false, Grouping::channel(), plain(DType::f32)), {64, 512},
                    {DType::f32, std::as_bytes(std::span(values))}, RangeRule::minmax);
}

// Groups longer than a task, than the search's pieces and than its buffer.
TEST(KernelsEncode, LongGroups) {
  for (const Shape& shape : {Shape{2, 300'000}, Shape{40, 5000}, Shape{2, 20'000}}) {
    const auto bytes = stored(DType::bf16, awkward(shape[0] + 9, shape[1], DType::bf16, 2));
    const size_t used = static_cast<size_t>(element_count(shape)) * 2;
    const WeightView weight = {DType::bf16, std::span(bytes).last(used)};
    for (const RangeRule rule : {RangeRule::minmax, RangeRule::mse}) {
      expect_definition(integer_scheme(4, false, true, Grouping::channel(), plain(DType::f16)), shape, weight, rule);
      expect_definition(integer_scheme(8, true, false, Grouping::tensor(), plain(DType::f32)), shape, weight, rule);
    }
    expect_definition(table_scheme("nf4", Grouping::flat(1 << 20)), shape, weight, RangeRule::minmax);
  }
}

TEST(KernelsEncode, PiecesGiveTheWhole) {
  const Shape shape = {37, 172};
  const auto bytes = stored(DType::f16, awkward(37, 172, DType::f16, 8));
  const Scheme scheme = integer_scheme(4, false, true, Grouping::along(64), plain(DType::f16));
  ASSERT_TRUE(encodes_in_pieces(scheme, shape, DType::f16));
  const QuantizedTensor whole = encode(scheme, shape, WeightView{DType::f16, bytes}, RangeRule::mse);
  QuantizedTensor t = whole, scale = *whole.scale, zero = *whole.offset;
  for (auto* codes : {&t.codes, &scale.codes, &zero.codes}) std::ranges::fill(*codes, std::byte{0xee});
  const GroupEncoder encoder(scheme, shape, RangeRule::mse);
  for (int64_t begin = 0, end = 0; begin < encoder.runs().groups; begin = end) {
    end = std::min(begin + begin % 13 + 1, encoder.runs().groups);
    const int64_t from = encoder.runs().start(begin), to = encoder.runs().end_of(end - 1);
    encoder.encode(
        begin, end,
        {DType::f16, std::span(bytes).subspan(static_cast<size_t>(from) * 2, static_cast<size_t>(to - from) * 2)},
        {&t.codes[static_cast<size_t>(from)], &scale.codes[static_cast<size_t>(begin) * 2],
         &zero.codes[static_cast<size_t>(begin)]});
  }
  EXPECT_EQ(t.codes, whole.codes);
  EXPECT_EQ(scale.codes, whole.scale->codes);
  EXPECT_EQ(zero.codes, whole.offset->codes);
}

TEST(KernelsEncode, RefusesWhatTheDefinitionRefuses) {
  std::vector<float> values(70 * 1000, 1.0f);
  const auto code_of = [&](const Scheme& scheme, const KernelLevel& level) {
    try {
      encode(scheme, {70, 1000}, WeightView{DType::f32, std::as_bytes(std::span(values))}, RangeRule::mse, level);
    } catch (const Error& error) {
      return std::string(error.code()) + ": " + error.what();
    }
    return std::string("nothing");
  };
  for (const KernelLevel& level : kernel_levels()) {
    if (!level.usable()) continue;
    for (const Grouping& grouping : {Grouping::channel(), Grouping::along(64), Grouping::tensor(), Grouping::flat(8)})
      for (const float bad : {NAN, INFINITY, -INFINITY}) {
        const Scheme scheme = integer_scheme(4, false, true, grouping, plain(DType::f16));
        values[69'999] = values[31'337] = bad;
        EXPECT_NE(code_of(scheme, level).find("element 31337 is"), std::string::npos) << code_of(scheme, level);
        values[69'999] = values[31'337] = 1;
        EXPECT_EQ(code_of(scheme, level), "nothing");
      }
    values[5] = 1e30f;
    EXPECT_TRUE(code_of(integer_scheme(8, true, false, Grouping::channel(), plain(DType::f16)), level)
                    .starts_with("scale-overflow"));
    values[5] = 1;
  }
}

// The search gives up little of what trying every range would find.
TEST(KernelsEncode, SearchIsNearlyExhaustive) {
  std::mt19937 random(9);
  std::normal_distribution<float> normal(0, 0.02f);
  double found = 0, best = 0, minmax = 0;
  for (int g = 0; g < 400; ++g) {
    std::vector<float> group(64);
    for (float& v : group) v = normal(random);
    const Scheme scheme = integer_scheme(4, false, true, Grouping::channel(), plain(DType::f16));
    const auto error = [&](Range range) {
      const std::vector<float> decoded =
          decode(encode(scheme, {1, 64}, group, [range](const Scheme&, std::span<const float>) { return range; }));
      double sum = 0;
      for (size_t i = 0; i < group.size(); ++i) sum += std::pow(double{group[i]} - double{decoded[i]}, 2);
      return sum;
    };
    const Range whole = min_max_range(scheme, group);
    double least = error(whole);
    minmax += least;
    for (int k = 1; k < 48; ++k) {
      const float r = 1 - static_cast<float>(k) / 64;
      least = std::min(least, error({whole.low * r, whole.high * r}));
    }
    best += least;
    found += error(least_squares_range(scheme, group));
  }
  EXPECT_LT(found, best * 1.002);
  EXPECT_GT(minmax, best * 1.05);
}

}  // namespace
}  // namespace bitwright
