#include "kernels/matmul.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <thread>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

using Random = std::mt19937;

/// Small numbers, and now and then one that overflows, cancels or underflows.
float draw(Random& random, bool hostile) {
  constexpr float kHostile[] = {1e38f, -1e38f, 1e-38f, -1e-44f, 0.0f, -0.0f, 16777217.0f, -3e20f};
  if (hostile && random() % 4 == 0) return kHostile[random() % std::size(kHostile)];
  return std::ldexp(static_cast<float>(static_cast<int>(random() % 2001) - 1000), -9);
}

std::vector<float> draw_all(Random& random, size_t count, bool hostile) {
  std::vector<float> values(count);
  for (float& v : values) v = draw(random, hostile);
  return values;
}

/// Any codes; scales and offsets of any size the type has.
QuantizedTensor draw_tensor(Random& random, const Scheme& scheme, const Shape& shape, bool hostile) {
  QuantizedTensor t{.scheme = scheme, .shape = shape};
  const ElementType& element = *scheme.element;
  const auto count = static_cast<size_t>(element_count(shape));
  if (const auto dtype = dtype_of(element); dtype && info(*dtype).is_float && element.bits > 8) {
    t.codes.resize(count * size_bytes(*dtype));
    from_f32(*dtype, draw_all(random, count, hostile), t.codes);
  } else {
    t.codes.resize(count);
    for (std::byte& code : t.codes) code = static_cast<std::byte>(random() % (1u << element.bits));
  }
  const auto parameter = [&](const std::optional<Parameter>& p) -> std::shared_ptr<const QuantizedTensor> {
    if (!p) return nullptr;
    return std::make_shared<QuantizedTensor>(
        draw_tensor(random, *p->scheme, parameter_shape(p->grouping, shape), hostile));
  };
  t.scale = parameter(scheme.scale);
  t.offset = parameter(scheme.offset);
  if (scheme.scale && scheme.scale->grouping.kind == Grouping::Kind::index) {
    const int64_t groups = parameter_shape(scheme.scale->grouping, shape).back();
    for (int64_t k = 0; k < shape[1]; ++k)
      t.group_index.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(groups)));
  }
  check_sizes(t, "test");
  return t;
}

/// The definition.
std::vector<float> multiply_plainly(const std::vector<float>& x, size_t m, const std::vector<float>& w, size_t n,
                                    size_t k) {
  std::vector<float> y(m * n);
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < n; ++j)
      for (size_t l = 0; l < k; ++l) y[i * n + j] = std::fma(x[i * k + l], w[j * k + l], y[i * n + j]);
  return y;
}

/// The first place where the bits differ (any NaN equals any other), or the size.
size_t first_difference(std::span<const float> a, std::span<const float> b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (std::bit_cast<uint32_t>(a[i]) != std::bit_cast<uint32_t>(b[i]) && !(std::isnan(a[i]) && std::isnan(b[i])))
      return i;
  return a.size();
}

/// multiply() between guard words that must stay as they are.
std::vector<float> multiply_guarded(const std::vector<float>& x, size_t m, const PackedMatrix& w,
                                    const KernelLevel& level) {
  constexpr size_t kGuard = 40;
  constexpr float kMark = -123.25f;
  std::vector<float> y(m * w.rows + 2 * kGuard, kMark);
  multiply(x.data(), m, w, y.data() + kGuard, level);
  for (size_t i = 0; i < kGuard; ++i) {
    EXPECT_EQ(y[i], kMark) << "before the result";
    EXPECT_EQ(y[y.size() - 1 - i], kMark) << "after the result";
  }
  return {y.begin() + kGuard, y.end() - kGuard};
}

void check(const PackedMatrix& packed, const std::vector<float>& weights, std::initializer_list<size_t> ms,
           Random& random, bool hostile, const KernelLevel& level) {
  const size_t n = packed.rows, k = packed.columns;
  for (const size_t m : ms) {
    if (m * n * k > 1'000'000) continue;
    SCOPED_TRACE(testing::Message() << "M " << m << " N " << n << " K " << k);
    const std::vector<float> x = draw_all(random, m * k, hostile);
    const std::vector<float> expected = multiply_plainly(x, m, weights, n, k);
    const std::vector<float> y = multiply_guarded(x, m, packed, level);
    const size_t at = first_difference(expected, y);
    ASSERT_EQ(at, y.size()) << y[at] << " where the definition has " << expected[at];
  }
  std::vector<float> row(k);
  for (const size_t i : {size_t{0}, n / 2, n - 1}) {
    expand_row(packed, i, row, level);
    ASSERT_EQ(first_difference(row, std::span(weights).subspan(i * k, k)), k) << "row " << i;
  }
}

std::vector<std::pair<size_t, size_t>> shapes() {
  std::vector<std::pair<size_t, size_t>> all = {{64, 172}, {172, 64}, {352, 128}, {96, 768}, {33, 515}, {768, 40}};
  for (const size_t n : {1, 3, 15, 16, 17, 31, 64})
    for (const size_t k : {1, 3, 15, 16, 17, 31, 64}) all.emplace_back(n, k);
  return all;
}

constexpr std::initializer_list<size_t> kManyRows = {1, 2, 5, 7, 33};

class KernelsMatmul : public testing::TestWithParam<std::string_view> {
 protected:
  const KernelLevel& level() const { return find_kernel_level(GetParam()); }
};

TEST_P(KernelsMatmul, PlainFloats) {
  Random random(1);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const bool hostile : {false, true})
      for (const auto& [n, k] : shapes()) {
        SCOPED_TRACE(info(dtype).name);
        std::vector<std::byte> bytes(n * k * size_bytes(dtype));
        from_f32(dtype, draw_all(random, n * k, hostile), bytes);
        std::vector<float> weights(n * k);
        to_f32(dtype, bytes, weights);
        check(pack_matrix(dtype, bytes, n, k), weights, kManyRows, random, hostile, level());
        if (HasFatalFailure()) return;
      }
}

struct SchemeCase {
  Scheme scheme;
  bool fast;  ///< has a layout of its own
};

Parameter plain_parameter(const Grouping& grouping, DType dtype) { return parameter(grouping, plain(dtype)); }

/// Every way of reading codes x every affine form x every grouping that runs along rows, and some that do not.
std::vector<SchemeCase> schemes() {
  std::vector<SchemeCase> all;
  std::vector<const ElementType*> elements;
  for (const ElementType* e : all_elements())
    if (e->bits <= 8 && e->kind != ElementKind::block_code) elements.push_back(e);
  for (const ElementType* e : elements) {
    all.push_back({{.element = e}, true});
    all.push_back({{.element = e, .scale = plain_parameter(Grouping::along(32), DType::f16)}, true});
  }
  for (const ElementType* e : {&integer_element(4, false), &integer_element(3, true), &integer_element(8, true),
                               &integer_element(7, false), find_element("nf4"), find_element("dynamic8")})
    for (const Grouping& grouping : {Grouping::tensor(), Grouping::channel(), Grouping::along(1), Grouping::along(12),
                                     Grouping::along(64), Grouping::along(1000)}) {
      const Parameter scale = plain_parameter(grouping, DType::f32), offset = plain_parameter(grouping, DType::bf16);
      const Parameter zero = parameter(grouping, {.element = &integer_element(4, false)});
      all.push_back({{.element = e, .scale = scale}, true});
      all.push_back({{.element = e, .scale = scale, .offset_kind = OffsetKind::zero_point, .offset = zero}, true});
      for (const OffsetKind kind : {OffsetKind::float_zero, OffsetKind::bias, OffsetKind::minimum})
        all.push_back({{.element = e, .scale = scale, .offset_kind = kind, .offset = offset}, true});
      all.push_back({{.element = e, .scale = scale, .offset_kind = OffsetKind::shift, .shift = 8}, true});
    }
  const ElementType* const int4 = &integer_element(4, false);
  const Parameter by_64 = plain_parameter(Grouping::along(64), DType::f16);
  all.push_back({{.element = int4,
                  .scale = by_64,
                  .offset_kind = OffsetKind::bias,
                  .offset = plain_parameter(Grouping::along(16), DType::f16)},
                 true});
  all.push_back({{.element = int4,
                  .scale = by_64,
                  .offset_kind = OffsetKind::bias,
                  .offset = plain_parameter(Grouping::tensor(), DType::f16)},
                 true});
  // Quantized scales, as nf4 with nested absmax has them.
  const Scheme nested = {.element = &integer_element(8, true),
                         .scale = plain_parameter(Grouping::flat(256), DType::f32)};
  all.push_back({{.element = int4, .scale = parameter(Grouping::along(8), nested)}, true});
  all.push_back({{.element = int4, .scale = by_64, .factor = 1.0f / 127}, false});
  all.push_back({{.element = int4,
                  .scale = by_64,
                  .offset_kind = OffsetKind::bias,
                  .offset = plain_parameter(Grouping::along(24), DType::f16)},
                 false});
  all.push_back({{.element = int4, .scale = plain_parameter(Grouping::along(8, -2), DType::f32)}, false});
  Parameter divisor = by_64;
  divisor.divides = true;
  all.push_back({{.element = int4, .scale = divisor}, false});
  all.push_back({{.element = &float_element(DType::f16), .scale = by_64}, false});
  return all;
}

void check_quantized(const SchemeCase& s, size_t n, size_t k, std::initializer_list<size_t> ms, Random& random,
                     bool hostile, const KernelLevel& level) {
  SCOPED_TRACE(describe(s.scheme));
  auto tensor = std::make_shared<QuantizedTensor>(
      draw_tensor(random, s.scheme, {static_cast<int64_t>(n), static_cast<int64_t>(k)}, hostile));
  const std::vector<float> weights = decode(*tensor);
  const PackedMatrix packed = pack_matrix(tensor);
  ASSERT_EQ(packed.kind != CodeKind::reference, s.fast);
  check(packed, weights, ms, random, hostile, level);
}

TEST_P(KernelsMatmul, Quantized) {
  Random random(2);
  for (const SchemeCase& s : schemes())
    for (const bool hostile : {false, true})
      for (const auto& [n, k] : {std::pair<size_t, size_t>{17, 131}, {40, 172}}) {
        check_quantized(s, n, k, {1, 7}, random, hostile, level());
        if (HasFatalFailure()) return;
      }
}

TEST_P(KernelsMatmul, QuantizedShapes) {
  Random random(3);
  const Parameter scale = plain_parameter(Grouping::along(32), DType::f16);
  const Parameter zero = parameter(Grouping::along(32), {.element = &integer_element(8, false)});
  for (const int bits : {4, 8})
    for (const auto& [n, k] : shapes()) {
      check_quantized({{.element = &integer_element(bits, bits == 8),
                        .scale = scale,
                        .offset_kind = OffsetKind::zero_point,
                        .offset = zero},
                       true},
                      n, k, kManyRows, random, false, level());
      if (HasFatalFailure()) return;
    }
}

/// Flat groups are fast where they are groups along the rows, too.
TEST_P(KernelsMatmul, FlatGroups) {
  Random random(4);
  const ElementType* const nf4 = find_element("nf4");
  const auto flat = [&](int64_t size) {
    return Scheme{.element = nf4, .scale = plain_parameter(Grouping::flat(size), DType::f32)};
  };
  check_quantized({flat(64), true}, 20, 128, {1, 2, 7}, random, false, level());
  check_quantized({flat(256), true}, 21, 128, {1, 2, 7}, random, false, level());
  check_quantized({flat(64), false}, 20, 100, {1, 2, 7}, random, false, level());
  check_quantized({flat(100), false}, 20, 128, {1, 2, 7}, random, false, level());
}

TEST_P(KernelsMatmul, GroupsByIndex) {
  Random random(5);
  const Parameter scale = plain_parameter({.kind = Grouping::Kind::index, .size = 32}, DType::f16);
  check_quantized({{.element = &integer_element(4, false), .scale = scale}, false}, 24, 96, {1, 2, 7}, random, false,
                  level());
}

std::vector<std::string_view> usable_levels() {
  std::vector<std::string_view> usable;
  for (const KernelLevel& level : kernel_levels())
    if (level.usable()) usable.push_back(level.name);
  return usable;
}

INSTANTIATE_TEST_SUITE_P(Levels, KernelsMatmul, testing::ValuesIn(usable_levels()),
                         [](const auto& row) { return std::string(row.param); });

TEST(Kernels, ThreadsDoNotChangeTheResult) {
  Random random(6);
  const size_t n = 700, k = 512;
  const std::vector<float> weights = draw_all(random, n * k, false);
  const PackedMatrix w = pack_matrix(DType::f32, std::as_bytes(std::span(weights)), n, k);
  for (const size_t m : {1, 9}) {
    const std::vector<float> x = draw_all(random, m * k, false);
    set_thread_count(1);
    const std::vector<float> alone = multiply_guarded(x, m, w, active_kernel_level());
    set_thread_count(2);
    EXPECT_EQ(multiply_guarded(x, m, w, active_kernel_level()), alone);
  }
  set_thread_count(std::thread::hardware_concurrency());
}

TEST(Kernels, LevelsByName) {
  EXPECT_EQ(find_kernel_level("scalar").name, "scalar");
  EXPECT_TRUE(find_kernel_level("").usable());
  EXPECT_EQ(kernel_levels().back().name, "scalar");
  try {
    find_kernel_level("mmx");
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), "unknown-kernel");
    EXPECT_NE(std::string(e.what()).find("scalar"), std::string::npos);
  }
}

TEST(Kernels, ParametersKeepTheirWidth) {
  Random random(7);
  const auto pack = [&](DType dtype) {
    const Scheme scheme = {.element = &integer_element(4, true), .scale = plain_parameter(Grouping::along(32), dtype)};
    return pack_matrix(std::make_shared<QuantizedTensor>(draw_tensor(random, scheme, {32, 64}, true)));
  };
  EXPECT_EQ(pack(DType::f16).scale.dtype, DType::f16);
  EXPECT_EQ(pack(DType::bf16).scale.dtype, DType::bf16);
  EXPECT_EQ(pack(DType::f32).scale.dtype, DType::f32);
}

}  // namespace
}  // namespace bitwright
