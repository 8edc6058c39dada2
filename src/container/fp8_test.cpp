#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/error.hpp"
#include "container/rows.hpp"
#include "tests/golden_cases.hpp"
#include "tests/memory_checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& fp8() { return *find_container("fp8"); }

Grouping blocks(int64_t side) { return {.kind = Grouping::Kind::block, .block_rows = side, .block_columns = side}; }
Scheme e4m3(const Grouping& grouping, DType scales = DType::f32) {
  return {.element = &float_element(DType::f8_e4m3), .scale = parameter(grouping, plain(scales))};
}
StoredTensor stored(const Scheme& scheme, const Shape& shape, DType dtype) {
  return {.name = "layer.weight", .shape = shape, .scheme = scheme, .value_dtype = dtype};
}

TEST(Fp8, WrittenReadAndWrittenAgainIsTheSame) {
  for (const Scheme& scheme : {e4m3(blocks(128)), e4m3(blocks(64)), e4m3(blocks(16), DType::bf16),
                               e4m3(Grouping::tensor()), e4m3(Grouping::channel())})
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
      for (const Shape& shape : {Shape{1, 1}, Shape{7, 33}, Shape{130, 257}, Shape{576, 128}})
        for (const float zeros : {0.0f, 0.97f, 1.0f}) {
          SCOPED_TRACE(describe(scheme) + " " + to_string(shape) + " " + std::string(info(dtype).name));
          const StoredTensor whole = stored(scheme, shape, dtype);
          const QuantizedTensor t = encoded(fp8(), whole, random_values(shape, zeros));
          check_comes_back(fp8(), whole, t);
          for (const float value : decode(t)) EXPECT_TRUE(std::isfinite(value));
        }
}

// A block's step is at most 2^-3 of a value (three bits of mantissa), and 2^-9 of its scale near 0; half of either.
TEST(Fp8, CodesAreTheNearest) {
  const Shape shape = {130, 257};
  const std::vector<float> values = random_values(shape);
  for (const Scheme& scheme : {e4m3(blocks(128)), e4m3(Grouping::channel()), e4m3(Grouping::tensor())}) {
    const QuantizedTensor t = fp8().encode(scheme, shape, {DType::f32, std::as_bytes(std::span(values))});
    const std::vector<float> decoded = decode(t), scales = decode(*t.scale);
    const GroupMap groups(scheme.scale->grouping, shape);
    for (size_t i = 0; i < values.size(); ++i) {
      const float scale = scales[static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)))];
      const float step = std::max(std::fabs(values[i]) * 0x1p-3f, scale * 0x1p-9f);
      EXPECT_LE(std::fabs(decoded[i] - values[i]), 0.5001f * step) << i;
    }
  }
}

// transformers' two roundings, by hand: 448 / 3 is 448 times the reciprocal of 3.
TEST(Fp8, ScalesAreTransformers) {
  const std::vector<float> values = {3.0f, -1.0f, 0.1f, 0.0f};
  const QuantizedTensor t = fp8().encode(e4m3(blocks(128)), {2, 2}, {DType::f32, std::as_bytes(std::span(values))});
  const float by = (1.0f / 3.0f) * 448.0f;
  EXPECT_EQ(decode(*t.scale).at(0), 1.0f / by);
  EXPECT_NE(1.0f / by, 3.0f / 448.0f);
  for (size_t i = 0; i < values.size(); ++i)
    EXPECT_EQ(std::to_integer<uint8_t>(t.codes[i]), f32_to_e4m3(std::clamp(values[i] * by, -448.0f, 448.0f))) << i;
  // AutoFP8 in bfloat16: each step is rounded to it, but for the last reciprocal.
  const std::vector<std::byte> half = as_dtype(DType::bf16, values);
  const QuantizedTensor one = fp8().encode(e4m3(Grouping::tensor()), {2, 2}, {DType::bf16, half});
  const float rough = round_to(DType::bf16, round_to(DType::bf16, 1.0f / 3.0f) * 448.0f);
  EXPECT_EQ(decode(*one.scale).at(0), 1.0f / rough);
  for (size_t i = 0; i < values.size(); ++i) {
    const float scaled = round_to(DType::bf16, round_to(DType::bf16, values[i]) * rough);
    EXPECT_EQ(std::to_integer<uint8_t>(one.codes[i]), f32_to_e4m3(std::clamp(scaled, -448.0f, 448.0f))) << i;
  }
}

TEST(Fp8, ExtremesStayFinite) {
  for (const float value : {1e-45f, 1e-40f, 1e-38f, 1e-20f, 3.4e38f})
    for (const Scheme& scheme : {e4m3(blocks(128)), e4m3(Grouping::tensor()), e4m3(Grouping::channel())}) {
      const std::vector<float> values = {value, 0.0f, -value / 2, value / 4};
      const QuantizedTensor t = fp8().encode(scheme, {2, 2}, {DType::f32, std::as_bytes(std::span(values))});
      const std::vector<float> decoded = decode(t);
      for (size_t i = 0; i < values.size(); ++i) {
        EXPECT_TRUE(std::isfinite(decoded[i])) << value;
        EXPECT_LE(std::fabs(decoded[i] - values[i]), std::max(std::fabs(values[i]) * 0.07f, 1e-8f)) << value;
      }
    }
}

TEST(Fp8, NotFiniteIsRefusedWithItsPosition) {
  for (const Scheme& scheme : {e4m3(blocks(16)), e4m3(Grouping::tensor()), e4m3(Grouping::channel())})
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> values = random_values({64, 256});
      values[777] = bad;
      values[7777] = bad;
      try {
        fp8().encode(scheme, {64, 256}, {DType::f32, std::as_bytes(std::span(values))});
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "not-finite");
        EXPECT_NE(std::string(error.what()).find("777"), std::string::npos) << error.what();
        EXPECT_EQ(std::string(error.what()).find("7777"), std::string::npos) << error.what();
      }
    }
}

MemoryCheckpoint written(const Scheme& scheme, const Shape& shape = {128, 130}) {
  return written_by(fp8(), stored(scheme, shape, DType::bf16), random_values(shape));
}

TEST(Fp8, DamageIsRefused) {
  MemoryCheckpoint more_rows = written(e4m3(blocks(128)));
  more_rows.arrays.at("layer.weight").shape[0] += 1;
  EXPECT_EQ(code_of_listing(fp8(), more_rows), "bad-container");
}

// The blocks of ragged matrices do not follow from shapes: without weight_block_size nothing is guessed.
TEST(Fp8, ConfigurationIsNeededAndChecked) {
  const MemoryCheckpoint good = written(e4m3(blocks(128)));
  Json& config = const_cast<MemoryCheckpoint&>(good).config["quantization_config"];
  EXPECT_EQ(config["weight_block_size"], (Json{128, 128}));
  EXPECT_EQ(config["activation_scheme"], "dynamic");
  for (const Json& sides : {Json(), Json(128), Json{128}, Json{128, 0}, Json{128, -1}, Json{128, "128"}, Json{64, 64},
                            Json{1, 1e30}, Json{128, 128, 128}}) {
    MemoryCheckpoint files = good;
    files.config["quantization_config"]["weight_block_size"] = sides;
    EXPECT_EQ(code_of_listing(fp8(), files), "bad-container") << sides;
  }
  MemoryCheckpoint none = good;
  none.config = Json::object();
  EXPECT_TRUE(fp8().detect(none.view()));
  EXPECT_EQ(code_of_listing(fp8(), none), "bad-container");
  MemoryCheckpoint other = good;
  other.config["quantization_config"]["activation_scheme"] = "static";
  EXPECT_EQ(code_of_listing(fp8(), other), "bad-container");
}

void add_float(MemoryCheckpoint& files, const std::string& name, DType dtype, const Shape& shape, float value) {
  files.add({name, dtype, shape}, as_dtype(dtype, std::vector<float>{value}));
}

// What is stored beside weights comes back: static activations by either name, an upper bound, scales of the cache.
TEST(Fp8, ActivationsAndCache) {
  for (const char* name : {"layer.input_scale", "layer.activation_scale"})
    for (const Shape& shape : {Shape{}, Shape{1}}) {
      MemoryCheckpoint files = written(e4m3(Grouping::tensor()));
      files.config["quantization_config"]["activation_scheme"] = "static";
      add_float(files, name, DType::f32, shape, 0.25f);
      check_view(fp8(), files.view());
      const StoredTensor t = fp8().list(files.view()).at(0);
      ASSERT_TRUE(t.linear.input && t.linear.input->scale);
      EXPECT_FALSE(t.linear.input->dynamic);
      EXPECT_EQ(decode(*t.linear.input->scale).at(0), 0.25f);
      EXPECT_EQ(t.arrays.size(), 3u);
    }
  MemoryCheckpoint bounded = written(e4m3(Grouping::channel()));
  EXPECT_EQ(bounded.config["quantization_config"]["quant_method"], "fbgemm_fp8");
  add_float(bounded, "layer.input_scale_ub", DType::f32, {1}, 1200);
  check_view(fp8(), bounded.view());
  EXPECT_TRUE(fp8().list(bounded.view()).at(0).linear.input->dynamic);

  MemoryCheckpoint cache = written(e4m3(Grouping::tensor()));
  add_float(cache, "layers.0.self_attn.k_scale", DType::f32, {}, 0.5f);
  cache.config["quantization_config"]["ignored_layers"] = {"lm_head"};
  const QuantizedModel model = fp8().model(cache.view());
  EXPECT_EQ(model.arrays, std::vector<std::string>{"layers.0.self_attn.k_scale"});
  EXPECT_EQ(model.skipped, std::vector<std::string>{"lm_head"});
  ASSERT_TRUE(model.kv_cache);
  EXPECT_FALSE(model.kv_cache->dynamic);
  EXPECT_EQ(code_of_listing(fp8(), cache), "none");
}

// As transformers saves a model without blocks: WEIGHT_scale_inv of one number.
TEST(Fp8, OneInverseScaleIsRead) {
  MemoryCheckpoint files = written(e4m3(Grouping::tensor()));
  files.add({"layer.weight_scale_inv", DType::bf16, {}}, as_dtype(DType::bf16, std::vector<float>{0.5f}));
  EXPECT_EQ(code_of_listing(fp8(), files), "bad-container");  // two scales
  files.arrays.erase("layer.weight_scale");
  const QuantizedTensor t = check_view(fp8(), files.view());
  EXPECT_EQ(t.scheme, e4m3(Grouping::tensor(), DType::bf16));
}

TEST(Fp8, PiecesAreParts) {
  for (const Scheme& scheme : {e4m3(blocks(128)), e4m3(blocks(96)), e4m3(Grouping::channel())}) {
    const StoredTensor t = stored(scheme, {700, 130}, DType::bf16);
    const int64_t step = row_step(scheme, t.shape).value();
    const std::vector<std::byte> bytes = as_dtype(DType::bf16, random_values(t.shape));
    for (const int64_t rows : {step, 2 * step}) check_pieces(fp8(), t, {DType::bf16, bytes}, rows);
  }
}

// One tensor of all experts; a scale a block of each.
TEST(Fp8, ExpertsInOneTensor) {
  StoredTensor t = stored(e4m3(blocks(128)), {3, 130, 200}, DType::bf16);
  t.name = "model.layers.0.mlp.experts.gate_up_proj";
  const MemoryCheckpoint files = written_by(fp8(), t, random_values(t.shape));
  EXPECT_TRUE(files.arrays.contains(t.name + "_scale_inv"));
  EXPECT_EQ(files.arrays.at(t.name + "_scale_inv").shape, (Shape{3, 2, 2}));
  const QuantizedTensor read = check_view(fp8(), files.view());
  // Each expert by itself.
  const std::vector<float> values = random_values(t.shape);
  const auto last = std::span(values).subspan(2 * 130 * 200);
  const std::vector<std::byte> bytes = as_dtype(DType::bf16, last);
  const QuantizedTensor alone = fp8().encode(t.scheme, {130, 200}, {DType::bf16, bytes});
  EXPECT_TRUE(std::ranges::equal(alone.codes, std::span(read.codes).subspan(2 * 130 * 200)));
}

TEST(Fp8, WhatDoesNotFit) {
  const auto refused = [](const Scheme& scheme, const Shape& shape) {
    return fp8().fit(scheme, shape).verdict == Verdict::impossible;
  };
  EXPECT_TRUE(refused(e4m3(blocks(128)), {128}));
  EXPECT_TRUE(refused(e4m3(Grouping::along(128)), {128, 128}));
  EXPECT_TRUE(refused({.element = &integer_element(8, true), .scale = e4m3(blocks(128)).scale}, {128, 128}));
  EXPECT_FALSE(refused(e4m3(blocks(128)), {100, 100}));
  const std::vector<StoredTensor> mixed = {stored(e4m3(blocks(128)), {4, 4}, DType::f32),
                                           stored(e4m3(Grouping::tensor()), {4, 4}, DType::f32)};
  EXPECT_EQ(fp8().fit_model(mixed).verdict, Verdict::impossible);
  EXPECT_EQ(fp8().fit_model(std::span(mixed).first(1)).verdict, Verdict::exact);
}

}  // namespace
}  // namespace bitwright
