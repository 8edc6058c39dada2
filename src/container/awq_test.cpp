#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <iostream>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "container/awq_rounding.hpp"
#include "tests/golden_cases.hpp"
#include "tests/memory_checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& awq() { return *find_container("awq"); }

Scheme scheme_of(const Grouping& grouping) {
  const ElementType* const codes = &integer_element(4, false);
  return {.element = codes,
          .scale = parameter(grouping, plain(DType::f16)),
          .offset_kind = OffsetKind::zero_point,
          .offset = parameter(grouping, {.element = codes})};
}

StoredTensor stored_as(const Scheme& scheme, const Shape& shape, DType dtype = DType::f16) {
  return {.name = "model.layers.0.mlp.up_proj.weight", .shape = shape, .scheme = scheme, .value_dtype = dtype};
}

QuantizedTensor encoded(const Scheme& scheme, const Shape& shape, DType dtype = DType::f16, float zero_share = 0) {
  const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape, zero_share));
  return awq().encode(scheme, shape, {dtype, bytes});
}

MemoryCheckpoint written(const Scheme& scheme, const Shape& shape = {64, 128}, std::string_view variant = {}) {
  StoredTensor stored = stored_as(scheme, shape);
  stored.variant = variant;
  return written_model(awq(), stored, encoded(scheme, shape));
}

// ---- golden files ----

MemoryCheckpoint layer_of_case(const GoldenCase& c) {
  MemoryCheckpoint files;
  for (const char* name : {"qweight", "qzeros", "scales"}) {
    const StoredArray& a = c.at(name);
    files.add({"layer." + std::string(name), a.dtype, a.shape}, {a.data.begin(), a.data.end()});
  }
  files.config["quantization_config"] = {{"quant_method", "awq"},
                                         {"bits", c.params.at("w_bit")},
                                         {"group_size", c.params.at("group_size")},
                                         {"zero_point", c.params.at("zero_point")},
                                         {"version", c.params.at("version")}};
  return files;
}

/// The library's floats [N, G], or its codes transposed [K, N] -> [N, K].
std::vector<float> transposed_floats(const GoldenCase& c, const std::string& array) {
  const StoredArray& a = c.at(array);
  const auto rows = static_cast<size_t>(a.shape[0]), columns = static_cast<size_t>(a.shape[1]);
  const std::vector<float> values = c.floats(array);
  std::vector<float> out;
  for (size_t k = 0; k < columns; ++k)
    for (size_t r = 0; r < rows; ++r) out.push_back(values[r * columns + k]);
  return out;
}

std::vector<float> as_floats(std::span<const std::byte> codes) {
  std::vector<float> values;
  for (const std::byte code : codes) values.push_back(static_cast<float>(std::to_integer<int>(code)));
  return values;
}

/// A word of eight codes, each shifted to its place; one with more than four bits runs into what lies above it.
uint32_t word_of(std::span<const int32_t> codes, std::span<const size_t> order) {
  uint32_t word = 0;
  for (size_t i = 0; i < order.size(); ++i) word |= static_cast<uint32_t>(codes[order[i]]) << (4 * i);
  return word;
}

/// AutoAWQ in float32: the codes are of the grid's values and of the scale as stored, float16; they are not clamped.
void check_float_packing(const GoldenCase& c, const QuantizedTensor& ours) {
  constexpr std::array<size_t, 8> kGemm = {0, 2, 4, 6, 1, 3, 5, 7}, kGemv = {0, 1, 2, 3, 4, 5, 6, 7};
  const bool gemm = c.params["version"] == "gemm";
  const std::vector<float> scale = c.floats("scale_raw"), zero = c.floats("zero_raw"), stored = decode(*ours.scale);
  const GroupMap groups(ours.scheme.scale->grouping, ours.shape);
  const auto rows = static_cast<size_t>(ours.shape[0]), columns = static_cast<size_t>(ours.shape[1]);
  std::vector<int32_t> codes(rows * columns);
  for (size_t i = 0; i < codes.size(); ++i) {
    const auto g = static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)));
    const float value = (static_cast<float>(std::to_integer<int>(ours.codes[i])) - zero[g]) * scale[g];
    const float offset = zero[g] * scale[g];
    codes[gemm ? i % columns * rows + i / columns : i] =
        static_cast<int32_t>(std::nearbyint((value + offset) / stored[g]));
  }
  const StoredArray& packed = c.at("qweight");
  for (size_t w = 0; w < codes.size() / 8; ++w) {
    uint32_t found = 0;
    std::memcpy(&found, &packed.data[w * sizeof found], sizeof found);
    ASSERT_EQ(found, word_of(std::span(codes).subspan(w * 8, 8), gemm ? kGemm : kGemv)) << "word " << w;
  }
}

void check_encoder(const GoldenCase& c, const QuantizedTensor& t) {
  const StoredArray& input = c.at("input");
  const DType arithmetic = c.params["compute_dtype"] == "f16" ? DType::f16 : DType::f32;
  const WeightView weight = {input.dtype, input.data};
  const QuantizedTensor ours = encode_awq_in(arithmetic, t.scheme, t.shape, weight);
  EXPECT_TRUE(*ours.scale == *t.scale) << "scales";
  EXPECT_TRUE(*ours.offset == *t.offset) << "zero points";
  if (arithmetic == DType::f32) return check_float_packing(c, ours);
  EXPECT_TRUE(ours == t) << "codes";
  EXPECT_TRUE(awq().encode(t.scheme, t.shape, weight) == t);
}

/// AutoAWQ's fake-quantized weights, in half: (code - zero) * scale, rounded.
void check_rounded_values(const GoldenCase& c, const QuantizedTensor& t) {
  std::vector<float> values = decode(t);
  for (float& value : values) value = round_to(DType::f16, value);
  EXPECT_TRUE(values == c.floats("fakequant")) << "fakequant";
}

/// AWQ's layers as exllama's kernels take them, which is GPTQ's first layout; a zero point of 0 borrows.
void check_exllama(const GoldenCase& c, const QuantizedTensor& t) {
  StoredTensor stored = stored_as(t.scheme, t.shape);
  stored.variant = "gptq, borrowing";
  const std::vector<NamedArray> arrays = find_container("gptq")->pack(stored, t);
  EXPECT_TRUE(std::ranges::equal(arrays.at(0).data, c.at("exllama_qweight").data));
  EXPECT_TRUE(std::ranges::equal(arrays.at(1).data, c.at("exllama_qzeros").data));
}

/// Without zero points AutoAWQ rounds, but has no layer for it: codes -8 to 7, the largest magnitude is 7.
void check_symmetric(const GoldenCase& c) {
  const auto half = [](float value) { return round_to(DType::f16, value); };
  const std::vector<float> input = c.floats("input"), expected = c.floats("fakequant"), scales = c.floats("scale_raw");
  const auto size = c.params["group_size"].get<size_t>();
  for (size_t g = 0; g < scales.size(); ++g) {
    float most = 1e-5f;
    for (size_t i = 0; i < size; ++i) most = std::max(most, std::fabs(half(input[g * size + i])));
    EXPECT_EQ(half(half(most) / 7), scales[g]);
    for (size_t i = g * size; i < (g + 1) * size; ++i)
      EXPECT_EQ(half(std::clamp(std::nearbyint(half(half(input[i]) / scales[g])), -8.0f, 7.0f) * scales[g]),
                expected[i]);
  }
}

TEST(Golden, awq) {
  const auto cases = golden_cases("awq");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    if (c.find("qweight") == nullptr) {
      check_symmetric(c);
      continue;
    }
    const MemoryCheckpoint files = layer_of_case(c);
    const StoredTensor stored = awq().list(files.view()).at(0);
    // The library writes version gemv with fewer rows than gemm must have.
    const bool odd = stored.shape[0] % 32 != 0;
    const QuantizedTensor t = check_view(awq(), files.view(), odd ? Verdict::impossible : Verdict::exact);
    EXPECT_EQ(stored.variant, c.params["version"].get<std::string>());
    if (c.find("dequantized") != nullptr) check_values(c, decode(t));
    if (c.find("codes_kn") != nullptr) {
      EXPECT_EQ(as_floats(t.codes), transposed_floats(c, "codes_kn"));
    }
    EXPECT_EQ(decode(*t.offset), c.floats("zero_raw"));
    if (c.find("fakequant") != nullptr) check_rounded_values(c, t);
    if (c.find("exllama_qweight") != nullptr) check_exllama(c, t);
    check_encoder(c, t);
  }
  const auto models = golden_models("awq");
  for (const auto& model : models) check_model(model);
  std::cout << "cases: " << cases.size() + models.size() << '\n';
}

void must_fit(const Shape& shape, const Grouping& grouping) {
  const Fit fit = awq().fit(scheme_of(grouping), shape);
  if (fit.verdict == Verdict::impossible) throw Error({.code = "does-not-fit", .what = fit.reason});
}

TEST(Golden, awq_negative_cases) {
  const auto cases = negative_cases("awq");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const NegativeCase& n : cases) {
    SCOPED_TRACE(n.name);
    EXPECT_TRUE(n.raised);
    const auto says = [&](std::string_view words) {
      return n.message.find(words) != std::string::npos || n.function.find(words) != std::string::npos;
    };
    const auto number_after = [&](const std::string& key) {
      const size_t at = n.function.find(key);
      return at == std::string::npos ? 0 : std::stoll(n.function.substr(at + key.size()));
    };
    if (says("w_bit=")) {
      MemoryCheckpoint files = written(scheme_of(Grouping::along(32)));
      files.config["quantization_config"]["bits"] = number_after("w_bit=");
      check_refused([&] { awq().list(files.view()); });
    } else if (says(" in=")) {
      check_refused([&] { must_fit({64, number_after(" in=")}, Grouping::along(number_after(" g="))); });
    } else if (says("out=")) {
      check_refused([&] { must_fit({number_after("out="), 128}, Grouping::along(32)); });
    } else if (says("out_features=")) {
      check_refused([&] { must_fit({number_after("out_features="), 128}, Grouping::along(32)); });
    } else if (says("NaN")) {
      const std::vector<float> values(32 * 32, NAN);
      check_refused([&] {
        awq().encode(scheme_of(Grouping::along(32)), {32, 32}, {DType::f32, std::as_bytes(std::span(values))});
      });
    } else if (says("without scales")) {
      MemoryCheckpoint files = written(scheme_of(Grouping::along(32)));
      files.arrays.erase("model.layers.0.mlp.up_proj.scales");
      check_refused([&] { awq().list(files.view()); });
    } else {
      ADD_FAILURE() << "a kind of case that is not known: " << n.function << ": " << n.message;
    }
  }
  std::cout << "cases: " << cases.size() << '\n';
}

// ---- round trips and damage ----

TEST(Awq, WrittenReadAndWrittenAgainIsTheSame) {
  for (const Grouping& grouping : {Grouping::channel(), Grouping::along(32), Grouping::along(64), Grouping::along(128)})
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
      for (const Shape& shape : {Shape{32, 128}, Shape{64, 384}, Shape{96, 640}, Shape{288, 128}})
        for (const float zeros : {0.0f, 0.97f, 1.0f})
          for (const char* variant : {"", "gemm", "gemv"}) {
            const Scheme scheme = scheme_of(grouping);
            SCOPED_TRACE(describe(scheme) + " " + to_string(shape) + " " + variant);
            ASSERT_EQ(awq().fit(scheme, shape).verdict, Verdict::exact);
            const QuantizedTensor t = encoded(scheme, shape, dtype, zeros);
            check_sizes(t, "test");
            StoredTensor stored = stored_as(scheme, shape, dtype);
            stored.variant = variant;
            const MemoryCheckpoint files = written_model(awq(), stored, t);
            ASSERT_TRUE(check_view(awq(), files.view()) == t);
            for (const float value : decode(t)) ASSERT_TRUE(std::isfinite(value));
          }
}

TEST(Awq, OldModelsHaveTheirConfigurationInAnotherFile) {
  const QuantizedTensor t = encoded(scheme_of(Grouping::along(64)), {64, 128});
  MemoryCheckpoint files = written_model(awq(), stored_as(t.scheme, t.shape), t);
  files.config = Json::object();
  files.documents["quant_config.json"] = {
      {"zero_point", true}, {"q_group_size", 64}, {"w_bit", 4}, {"version", "GEMM"}};
  EXPECT_TRUE(check_view(awq(), files.view()) == t);
  EXPECT_FALSE(find_container("gptq")->detect(files.view()));
  files.documents.clear();  // the arrays say it all
  EXPECT_TRUE(check_view(awq(), files.view()) == t);
  EXPECT_FALSE(find_container("gptq")->detect(files.view()));
}

TEST(Awq, PiecesAreTheWhole) {
  for (const char* variant : {"gemm", "gemv"})
    for (const Shape& shape : {Shape{160, 96}, Shape{96, 256}}) {
      SCOPED_TRACE(variant);
      StoredTensor stored = stored_as(scheme_of(Grouping::along(32)), shape);
      stored.variant = variant;
      const std::vector<std::byte> bytes = as_dtype(DType::bf16, random_values(shape));
      for (const int64_t step : {32, 64}) check_pieces(awq(), stored, {DType::bf16, bytes}, step);
    }
}

/// The code of the Error that listing throws, or "none".
std::string listed(const MemoryCheckpoint& files) {
  try {
    awq().list(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.code();
  }
  return "none";
}

TEST(Awq, WhatDisagreesIsRefused) {
  const std::string layer = "model.layers.0.mlp.up_proj.";
  for (const char* variant : {"gemm", "gemv"}) {
    SCOPED_TRACE(variant);
    const MemoryCheckpoint good = written(scheme_of(Grouping::along(32)), {64, 128}, variant);
    EXPECT_EQ(listed(good), "none");
    for (const auto& [name, spec] : good.arrays) {
      SCOPED_TRACE(name);
      MemoryCheckpoint larger = good, retyped = good, smaller = good, missing = good;
      retyped.arrays.at(name).dtype = DType::f64;
      EXPECT_EQ(listed(retyped), "bad-container");
      larger.arrays.at(name).shape.push_back(2);
      EXPECT_EQ(listed(larger), "bad-container");
      smaller.arrays.at(name).shape[0] /= 2;
      EXPECT_EQ(listed(smaller), "bad-container");
      if (name.ends_with("qweight")) continue;  // which makes it AWQ's
      missing.arrays.erase(name);
      EXPECT_EQ(listed(missing), "bad-container");
    }
    MemoryCheckpoint swapped = good;
    std::swap(swapped.arrays.at(layer + "qweight"), swapped.arrays.at(layer + "qzeros"));
    EXPECT_EQ(listed(swapped), "bad-container");
    const auto configured = [&](const char* key, const Json& value) {
      MemoryCheckpoint files = good;
      files.config["quantization_config"][key] = value;
      return listed(files);
    };
    EXPECT_EQ(configured("version", "gemv_fast"), "bad-container");
    EXPECT_EQ(configured("version", variant == std::string("gemm") ? "gemv" : "gemm"), "bad-container");
    EXPECT_EQ(configured("bits", 8), "bad-container");
    EXPECT_EQ(configured("bits", "4"), "bad-container");
    for (const int64_t size : {int64_t{64}, int64_t{-1}, int64_t{0}, int64_t{-5}, INT64_MAX})
      EXPECT_EQ(configured("group_size", size), "bad-container") << size;
  }
}

TEST(Awq, WhatHalfCannotHoldIsRefused) {
  const auto refused = [](size_t at, float value) {
    std::vector<float> values = random_values({64, 128});
    values[at] = value;
    try {
      awq().encode(scheme_of(Grouping::along(32)), {64, 128}, {DType::f32, std::as_bytes(std::span(values))});
    } catch (const Error& error) {
      return error.code() + " " + error.what();
    }
    return std::string("none");
  };
  for (const float bad : {NAN, INFINITY, -INFINITY, 1e5f}) {
    const std::string error = refused(777, bad);
    EXPECT_TRUE(error.starts_with("not-finite")) << error;
    EXPECT_NE(error.find("777"), std::string::npos) << error;
  }
  std::vector<float> wide(64 * 128, 60000.0f);
  wide[1] = -60000.0f;
  check_refused([&] {
    awq().encode(scheme_of(Grouping::along(32)), {64, 128}, {DType::f32, std::as_bytes(std::span(wide))});
  });
  for (const float tiny : {1e-45f, 1e-8f, 0.37f}) {
    const std::vector<float> values(64 * 128, tiny);
    const QuantizedTensor t =
        awq().encode(scheme_of(Grouping::along(32)), {64, 128}, {DType::f32, std::as_bytes(std::span(values))});
    for (const float value : decode(t)) EXPECT_TRUE(std::isfinite(value));
  }
}

// ---- what is written beside ----

TEST(Awq, ConfigurationSaysWhatTheLayersHave) {
  StoredTensor tensor = stored_as(scheme_of(Grouping::along(64)), {32, 128});
  const std::vector<std::string> kept = {"lm_head"};
  const auto config_of = [&] {
    OrderedJson config = OrderedJson::object();
    const OrderedJson record = OrderedJson::object();
    std::map<std::string, OrderedJson> files;
    awq().write_metadata({.tensors = std::span(&tensor, 1), .kept = kept, .record = record},
                         {.config = config, .files = files});
    return config["quantization_config"];
  };
  EXPECT_EQ(config_of(), (OrderedJson{{"bits", 4},
                                      {"group_size", 64},
                                      {"modules_to_not_convert", {"lm_head"}},
                                      {"quant_method", "awq"},
                                      {"version", "gemm"},
                                      {"zero_point", true}}));
  tensor.scheme = scheme_of(Grouping::channel());
  tensor.variant = "gemv";
  EXPECT_EQ(config_of()["group_size"], -1);
  EXPECT_EQ(config_of()["version"], "gemv");
  const std::vector<StoredTensor> mixed = {stored_as(scheme_of(Grouping::along(64)), {32, 128}),
                                           stored_as(scheme_of(Grouping::along(32)), {32, 128})};
  EXPECT_EQ(awq().fit_model(mixed).verdict, Verdict::impossible);
  EXPECT_EQ(awq().fit_model(std::span(mixed).first(1)).verdict, Verdict::exact);
}

TEST(Awq, FitRefusesWhatTheLayoutCannotHold) {
  const auto verdict = [](const Scheme& scheme, const Shape& shape) { return awq().fit(scheme, shape).verdict; };
  const Scheme good = scheme_of(Grouping::along(32));
  EXPECT_EQ(verdict(good, {32, 64}), Verdict::exact);
  EXPECT_EQ(verdict(good, {40, 64}), Verdict::impossible);
  EXPECT_EQ(verdict(good, {32, 48}), Verdict::impossible);
  EXPECT_EQ(verdict(good, {2, 32, 64}), Verdict::impossible);
  EXPECT_EQ(verdict(scheme_of(Grouping::channel()), {32, 0}), Verdict::impossible);
  EXPECT_EQ(verdict(scheme_of(Grouping::flat(32)), {32, 64}), Verdict::impossible);
  Scheme other = good;
  other.scale = parameter(Grouping::along(32), plain(DType::f32));
  EXPECT_EQ(verdict(other, {32, 64}), Verdict::impossible);
  other = good;
  other.offset = parameter(Grouping::along(64), *good.offset->scheme);
  EXPECT_EQ(verdict(other, {32, 64}), Verdict::impossible);
}

}  // namespace
}  // namespace bitwright
