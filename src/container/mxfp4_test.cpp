#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "container/rows.hpp"
#include "tests/golden_cases.hpp"
#include "tests/memory_checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& mxfp4() { return *find_container("mxfp4"); }
Scheme scheme() { return mxfp4().make_scheme(mxfp4().choices.front(), DType::bf16); }

const std::string kName = "model.layers.0.mlp.experts.gate_up_proj";

StoredTensor stored(const Shape& shape, DType dtype = DType::bf16) {
  return {.name = kName, .shape = shape, .scheme = scheme(), .value_dtype = dtype};
}

TEST(Mxfp4, WrittenReadAndWrittenAgainIsTheSame) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const Shape& shape : {Shape{1, 32, 1}, Shape{3, 64, 7}, Shape{2, 160, 33}})
      for (const float zeros : {0.0f, 0.97f, 1.0f}) {
        SCOPED_TRACE(to_string(shape) + " " + std::string(info(dtype).name));
        const QuantizedTensor t = encoded(mxfp4(), stored(shape, dtype), random_values(shape, zeros));
        check_comes_back(mxfp4(), stored(shape, dtype), t);
        for (const float value : decode(t)) EXPECT_TRUE(std::isfinite(value));
      }
}

// [E, K, N] in the model; in the file row n of expert e has its K inputs one after the other, the first in the low
// nibble. By hand: groups of 32 inputs whose largest is 6 times a power of two have that power.
TEST(Mxfp4, LiesAsGptOssHasIt) {
  const Shape shape = {2, 64, 3};
  std::vector<float> values(2 * 64 * 3);
  const auto at = [&](size_t e, size_t k, size_t n) -> float& { return values[(e * 64 + k) * 3 + n]; };
  at(1, 32, 2) = 6.0f * 8;   // code 7 in byte 0 of block 1 of row 2 of expert 1
  at(1, 33, 2) = -1.5f * 8;  // code 3 | 8, the high nibble
  at(1, 63, 2) = 0.5f * 8;   // code 1 in the high nibble of the last byte
  at(0, 0, 0) = 6.25f;       // above 6: the next power
  const std::vector<std::byte> bytes = as_dtype(DType::f32, values);
  const QuantizedTensor t = mxfp4().encode(scheme(), shape, {DType::f32, bytes});
  const std::vector<NamedArray> arrays = mxfp4().pack(stored(shape), t);
  ASSERT_EQ(arrays.size(), 2u);
  EXPECT_EQ(arrays[0].spec.name, kName + "_blocks");
  EXPECT_EQ(arrays[0].spec.shape, (Shape{2, 3, 2, 16}));
  EXPECT_EQ(arrays[1].spec.shape, (Shape{2, 3, 2}));
  const size_t block = (1 * 3 + 2) * 2 + 1;
  EXPECT_EQ(arrays[0].data[block * 16], std::byte{0xb7});
  EXPECT_EQ(arrays[0].data[block * 16 + 15], std::byte{0x10});
  EXPECT_EQ(arrays[1].data[block], std::byte{127 + 3});
  EXPECT_EQ(arrays[1].data[0], std::byte{127 + 1});
  EXPECT_EQ(arrays[0].data[0], std::byte{5});  // 3.125 is 3
  EXPECT_EQ(arrays[1].data[1], std::byte{0});  // of zeros
}

// Each code is the nearest to its value by the group's power of two, ties to even; the power the least that reaches.
TEST(Mxfp4, RoundsAsTritonKernels) {
  const Shape shape = {2, 96, 17};
  std::vector<float> values = random_values(shape);
  values[0] = -0.0f;
  values[17] = 1e-30f;
  const QuantizedTensor t = mxfp4().encode(scheme(), shape, {DType::f32, std::as_bytes(std::span(values))});
  const GroupMap groups(scheme().scale->grouping, shape);
  std::vector<float> largest(static_cast<size_t>(groups.group_count()));
  for (size_t i = 0; i < values.size(); ++i) {
    float& most = largest[static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)))];
    most = std::max(most, std::fabs(values[i]));
  }
  for (size_t i = 0; i < values.size(); ++i) {
    const auto g = static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)));
    const int exponent = static_cast<int>(std::ceil(std::log2(static_cast<double>(largest[g] / 6.0f))));
    EXPECT_EQ(std::to_integer<int>(t.scale->codes[g]), 127 + exponent) << g;
    const float scaled = std::ldexp(values[i], -exponent);
    const uint32_t magnitude = t.scheme.element->nearest(*t.scheme.element, std::fabs(scaled));
    EXPECT_EQ(std::to_integer<uint32_t>(t.codes[i]), magnitude | (std::signbit(values[i]) ? 8u : 0u)) << i;
  }
}

// Pieces are whole experts: their arrays are parts of the whole's, in the file and in what they decode to.
TEST(Mxfp4, PiecesAreExperts) {
  const Shape shape = {5, 64, 40};
  const StoredTensor whole = stored(shape);
  const auto step = row_step(whole.scheme, shape);
  ASSERT_TRUE(step);
  EXPECT_EQ(*step, 64);
  const std::vector<std::byte> bytes = as_dtype(DType::bf16, random_values(shape));
  check_pieces(mxfp4(), whole, {DType::bf16, bytes}, 2 * *step);
}

TEST(Mxfp4, DamageIsRefused) {
  MemoryCheckpoint files = written_by(mxfp4(), stored({2, 64, 3}), random_values({2, 64, 3}));
  for (const Shape& shape : {Shape{2, 3, 2, 8}, Shape{2, 3, 32}, Shape{3, 2, 2, 16}, Shape{0, 3, 2, 16},
                             Shape{2, 3, 0, 16}, Shape{int64_t{1} << 31, int64_t{1} << 31, 2, 16}}) {
    MemoryCheckpoint other = files;
    other.arrays.at(kName + "_blocks").shape = shape;
    EXPECT_EQ(code_of_listing(mxfp4(), other), "bad-container") << to_string(shape);
  }
}

TEST(Mxfp4, NotFiniteIsRefusedWithItsPosition) {
  std::vector<float> values = random_values({2, 64, 8});
  values[777] = NAN;
  try {
    mxfp4().encode(scheme(), {2, 64, 8}, {DType::f32, std::as_bytes(std::span(values))});
    ADD_FAILURE() << "not refused";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), "not-finite");
    EXPECT_NE(std::string(error.what()).find("777"), std::string::npos) << error.what();
  }
}

TEST(Mxfp4, TakesExpertsOfGptOssAlone) {
  EXPECT_TRUE(mxfp4().takes(kName, {2, 64, 8}));
  EXPECT_TRUE(mxfp4().takes("model.layers.0.mlp.experts.down_proj", {2, 64, 8}));
  EXPECT_FALSE(mxfp4().takes("model.layers.0.mlp.experts.gate_up_proj_bias", {2, 64}));
  EXPECT_FALSE(mxfp4().takes("model.layers.0.mlp.gate_up_proj", {2, 64, 8}));
  EXPECT_FALSE(mxfp4().takes("model.layers.0.self_attn.q_proj.weight", {64, 64}));
  EXPECT_EQ(mxfp4().fit(scheme(), {2, 40, 8}).verdict, Verdict::impossible);
  EXPECT_EQ(mxfp4().fit(scheme(), {64, 8}).verdict, Verdict::impossible);
  const StoredTensor t = stored({1, 32, 1});
  OrderedJson config = {{"model_type", "qwen3_moe"}};
  const OrderedJson record = OrderedJson::object();
  std::map<std::string, OrderedJson> files;
  check_refused([&] {
    mxfp4().write_metadata({.tensors = std::span(&t, 1), .kept = {}, .record = record},
                           {.config = config, .files = files});
  });
}

}  // namespace
}  // namespace bitwright
