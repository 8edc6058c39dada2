#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iostream>
#include <random>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "tests/golden_cases.hpp"
#include "tests/memory_checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& gptq() { return *find_container("gptq"); }

Scheme scheme_of(int bits, bool symmetric, const Grouping& grouping, DType scale = DType::f16) {
  Scheme scheme = {.element = &integer_element(bits, symmetric), .scale = parameter(grouping, plain(scale))};
  if (symmetric) return scheme;
  scheme.offset_kind = OffsetKind::zero_point;
  scheme.offset = parameter(grouping, {.element = scheme.element});
  return scheme;
}

StoredTensor stored_as(const Scheme& scheme, const Shape& shape, DType dtype = DType::f16) {
  return {.name = "model.layers.0.mlp.up_proj.weight", .shape = shape, .scheme = scheme, .value_dtype = dtype};
}

QuantizedTensor encoded(const Scheme& scheme, const Shape& shape, DType dtype = DType::f16, float zero_share = 0) {
  const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape, zero_share));
  return gptq().encode(scheme, shape, {dtype, bytes});
}

MemoryCheckpoint written(const Scheme& scheme, const Shape& shape = {64, 128}) {
  return written_model(gptq(), stored_as(scheme, shape), encoded(scheme, shape));
}

// ---- golden files ----

/// Codes [N, K] as the libraries mean them, 0 and up: signed ones with 2^(bits - 1) added.
std::vector<int> unsigned_codes(const QuantizedTensor& t) {
  const int bits = t.scheme.element->bits;
  const unsigned sign = t.scheme.offset_kind == OffsetKind::none ? 1u << (bits - 1) : 0;
  std::vector<int> codes;
  for (const std::byte code : t.codes) codes.push_back(static_cast<int>(std::to_integer<unsigned>(code) ^ sign));
  return codes;
}

/// The arrays of a case as a layer of a model, under its checkpoint_format: `zeros` is the file's name for qzeros.
MemoryCheckpoint layer_of_case(const GoldenCase& c, const std::string& zeros, const Json& config) {
  MemoryCheckpoint files;
  for (const char* name : {"qweight", "qzeros", "scales", "g_idx"}) {
    const StoredArray& a = c.at(std::string(name) == "qzeros" ? zeros : name);
    files.add({"layer." + std::string(name), a.dtype, a.shape}, {a.data.begin(), a.data.end()});
  }
  files.config["quantization_config"] = config;
  return files;
}

/// What the case's name of qzeros and its parameters mean in a model's configuration.
Json config_of_case(const GoldenCase& c, const std::string& zeros) {
  Json config = {{"quant_method", "gptq"},
                 {"bits", c.params.at("bits")},
                 {"group_size", c.params.at("group_size")},
                 {"sym", c.params.at("sym")}};
  const bool planar = c.params.value("planar", false);
  config["checkpoint_format"] = planar ? "gptq_p" : zeros == "qzeros_v2" ? "gptq_v2" : "gptq";
  if (c.find("qzeros_v2") != nullptr) config["meta"] = {{"quantizer", Json::array({"gptqmodel:4.0.0"})}};
  return config;
}

/// The quantizer's grid of a case: a scale and a zero point for each group of columns.
struct Grid {
  std::vector<float> scale, zero;
  GroupMap groups;
  float most;  ///< the largest code
  size_t group_of(size_t i) const { return static_cast<size_t>(groups.group_of(static_cast<int64_t>(i))); }
};

Grid grid_of(const GoldenCase& c, const QuantizedTensor& t) {
  return {.scale = c.floats("scale_f32"),
          .zero = c.floats("zero_f32"),
          .groups = GroupMap(t.scheme.scale->grouping, t.shape, t.group_index),
          .most = static_cast<float>((1 << t.scheme.element->bits) - 1)};
}

/// The quantizer's codes, 0 and up.
std::vector<float> rounded_codes(const GoldenCase& c, const Grid& grid) {
  std::vector<float> codes = c.floats("input");
  for (size_t i = 0; i < codes.size(); ++i) {
    const size_t g = grid.group_of(i);
    codes[i] = std::clamp(std::nearbyint(codes[i] / grid.scale[g]) + grid.zero[g], 0.0f, grid.most);
  }
  return codes;
}

/// Values as the quantizer rounds them, in the dtype that the weight had.
std::vector<float> fake_quantized(const GoldenCase& c, const Grid& grid) {
  if (c.find("gptq_fakequant") != nullptr) return c.floats("gptq_fakequant");
  const std::string dtype = c.params.value("weight_dtype", "f16");
  std::vector<float> values = rounded_codes(c, grid);
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t g = grid.group_of(i);
    values[i] = round_to(dtype == "f16"    ? DType::f16
                         : dtype == "bf16" ? DType::bf16
                                           : DType::f32,
                         grid.scale[g] * (values[i] - grid.zero[g]));
  }
  return values;
}

/// A number as torch and NumPy turn it into 32 bits without a sign.
uint32_t as_word(float value) {
  return std::fabs(value) < 2147483648.0f ? static_cast<uint32_t>(static_cast<int32_t>(value)) : 0x80000000u;
}

/// AutoGPTQ's packing: a number that has more bits than its place runs into what lies above it in the word.
std::vector<uint32_t> pack_unmasked(std::span<const uint32_t> values, int bits) {
  std::vector<uint32_t> words(values.size() * static_cast<size_t>(bits) / 32);
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t at = i * static_cast<size_t>(bits), shift = at % 32;
    words[at / 32] |= values[i] << shift;
    if (shift + static_cast<size_t>(bits) > 32) words[at / 32 + 1] |= (values[i] & ((1u << bits) - 1)) >> (32 - shift);
  }
  return words;
}

/// AutoGPTQ's codes: of values that are rounded already, with the scale as stored; not clamped.
void check_autogptq_codes(const GoldenCase& c, const QuantizedTensor& t, const Grid& grid) {
  const std::vector<float> rounded = fake_quantized(c, grid), stored = decode(*t.scale);
  const StoredArray& packed = c.at("qweight");
  const auto rows = static_cast<size_t>(t.shape[0]), columns = static_cast<size_t>(t.shape[1]);
  std::vector<uint32_t> codes(columns);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t k = 0; k < columns; ++k) {
      const size_t i = r * columns + k, g = grid.group_of(i);
      const float offset = grid.scale[g] * grid.zero[g];
      codes[k] = as_word(std::nearbyint((rounded[i] + offset) / stored[g]));
    }
    const std::vector<uint32_t> expected = pack_unmasked(codes, t.scheme.element->bits);
    for (size_t w = 0; w < expected.size(); ++w) {
      uint32_t found = 0;
      std::memcpy(&found, &packed.data[(w * rows + r) * sizeof found], sizeof found);
      ASSERT_EQ(found, expected[w]) << "row " << r << ", word " << w;
    }
  }
}

/// AutoGPTQ's zero points: less one, which makes 2^32 - 1 of a 0.
void check_autogptq_zeros(const GoldenCase& c, int bits) {
  const std::vector<float> zero = c.floats("zero_f32");
  const StoredArray& packed = c.at("qzeros");
  const auto groups = static_cast<size_t>(packed.shape[0]);
  for (size_t g = 0; g < groups; ++g) {
    std::vector<uint32_t> zeros;
    for (size_t at = g; at < zero.size(); at += groups) zeros.push_back(as_word(zero[at] - 1));
    const std::vector<uint32_t> expected = pack_unmasked(zeros, bits);
    ASSERT_EQ(std::memcmp(expected.data(), &packed.data[g * expected.size() * sizeof(uint32_t)],
                          expected.size() * sizeof(uint32_t)),
              0)
        << "group " << g;
  }
}

/// GPTQModel's codes: of rounded values too, with the scale as it was before it was stored; clamped.
void check_gptqmodel_codes(const GoldenCase& c, const QuantizedTensor& t, const Grid& grid) {
  const std::vector<float> rounded = fake_quantized(c, grid);
  const std::vector<int> codes = unsigned_codes(t);
  size_t different = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    const size_t g = grid.group_of(i);
    const float offset = grid.scale[g] * grid.zero[g];
    const float code = std::clamp(std::nearbyint((rounded[i] + offset) / grid.scale[g]), 0.0f, grid.most);
    different += static_cast<float>(codes[i]) != code;
  }
  EXPECT_EQ(different, 0u) << "GPTQModel's packing";
}

/// A range of the quantizer's search (mse = True), shrunk to the part p: what it rounds to and how far that is off,
/// |x - q|^2.4.
struct Shrunk {
  float scale, zero;
  double error;
};

Shrunk shrunk(std::span<const float> values, int bits, bool symmetric, int step) {
  float low = 0, high = 0;
  for (const float value : values) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  if (symmetric) high = std::max(-low, high);
  if (symmetric && low < 0) low = -high;
  if (low == 0 && high == 0) low = -1, high = 1;
  const auto p = static_cast<float>(1 - step / 100.0), top = static_cast<float>((1 << bits) - 1);
  Shrunk tried = {.scale = (p * high - p * low) / top, .zero = static_cast<float>(1 << (bits - 1)), .error = 0};
  if (!symmetric) tried.zero = std::nearbyint(-(p * low) / tried.scale);
  for (const float value : values) {
    const float code = std::clamp(std::nearbyint(value / tried.scale) + tried.zero, 0.0f, top);
    tried.error += std::pow(std::fabs(static_cast<double>(tried.scale * (code - tried.zero) - value)), 2.4);
  }
  return tried;
}

/// The search's 80 ranges have the scale and zero point of the file, and none is better. The library adds up float32
/// in an order of its own, so that of two as good ones it may take either.
void check_search(const GoldenCase& c, const QuantizedTensor& t, const Grid& grid) {
  constexpr double kTolerance = 1e-5;
  constexpr int kSteps = 80;
  const std::vector<float> input = c.floats("input");
  std::vector<std::vector<float>> values(grid.scale.size());
  for (size_t i = 0; i < input.size(); ++i) values[grid.group_of(i)].push_back(input[i]);
  for (size_t g = 0; g < values.size(); ++g) {
    double best = INFINITY, found = INFINITY;
    for (int step = 0; step < kSteps; ++step) {
      const Shrunk tried = shrunk(values[g], t.scheme.element->bits, t.scheme.offset_kind == OffsetKind::none, step);
      best = std::min(best, tried.error);
      if (tried.scale == grid.scale[g] && tried.zero == grid.zero[g]) found = tried.error;
    }
    EXPECT_LE(found, best * (1 + kTolerance)) << "group " << g;
  }
}

/// Ours: the quantizer's codes, scales as stored, zero points.
void check_encoder(const GoldenCase& c, const QuantizedTensor& t, const Grid& grid) {
  const StoredArray& input = c.at("input");
  const QuantizedTensor ours = gptq().encode(t.scheme, t.shape, {input.dtype, input.data});
  const std::vector<int> codes = unsigned_codes(ours);
  EXPECT_EQ(std::vector<float>(codes.begin(), codes.end()), rounded_codes(c, grid));
  EXPECT_TRUE(ours.scale->codes == t.scale->codes) << "scales";
  if (t.offset == nullptr) return;
  EXPECT_TRUE(decode(*ours.offset) == grid.zero);
}

/// The first layout stores a zero point of 0 as one less, and AutoGPTQ's modules read it as 0 or, not masked, as
/// 2^bits: as 0 here.
void check_case_values(const GoldenCase& c, const QuantizedTensor& t, const Grid& grid, bool first_layout) {
  const std::vector<float> expected = c.floats("dequantized"), found = decode(t), scale = decode(*t.scale);
  const std::vector<float> zero = t.offset == nullptr ? grid.zero : decode(*t.offset);
  const std::vector<int> codes = unsigned_codes(t);
  ASSERT_EQ(found.size(), expected.size());
  size_t different = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const size_t g = grid.group_of(i);
    const bool unmasked =
        first_layout && zero[g] == 0 && expected[i] == scale[g] * (static_cast<float>(codes[i]) - grid.most - 1);
    different += expected[i] != found[i] && !unmasked;
  }
  EXPECT_EQ(different, 0u) << "decoded values";
}

void check_case(const GoldenCase& c, const std::string& zeros) {
  SCOPED_TRACE(c.name + " " + zeros);
  const MemoryCheckpoint files = layer_of_case(c, zeros, config_of_case(c, zeros));
  // AutoGPTQ takes groups of any size; those that GPTQModel does not have are read, not written.
  const auto size = c.params["group_size"].get<int64_t>();
  const bool usual = size == -1 || (size >= 16 && size <= 1024 && std::has_single_bit(static_cast<uint64_t>(size)));
  const QuantizedTensor t = check_view(gptq(), files.view(), usual ? Verdict::exact : Verdict::impossible);
  EXPECT_EQ(t.scheme.offset_kind == OffsetKind::none, c.params["sym"].get<bool>());
  EXPECT_EQ(t.scheme.scale->grouping.size, std::max<int64_t>(size, 0));
  const Grid grid = grid_of(c, t);
  const bool autogptq = c.find("qzeros") != nullptr;
  check_case_values(c, t, grid, zeros != "qzeros_v2");
  if (autogptq) {
    check_autogptq_codes(c, t, grid);
    check_autogptq_zeros(c, t.scheme.element->bits);
  } else {
    check_gptqmodel_codes(c, t, grid);
  }
  if (c.find("gptq_fakequant") != nullptr) return;  // codes by a Hessian
  if (c.params.value("mse", false))
    check_search(c, t, grid);
  else
    check_encoder(c, t, grid);
}

/// What the full algorithm works on: of n batches of inputs, 2 / n times the sum of x x^T. The file does not say n.
void check_hessian(const GoldenCase& c) {
  constexpr double kTolerance = 1e-5;
  const std::vector<float> x = c.floats("calib"), h = c.floats("H");
  const auto columns = static_cast<size_t>(c.at("calib").shape.back());
  ASSERT_EQ(h.size(), columns * columns);
  double batches = 0;
  for (size_t i = 0; i < columns; ++i)
    for (size_t j = 0; j < columns; ++j) {
      double sum = 0, magnitude = 0;
      for (size_t r = 0; r < x.size(); r += columns) {
        const double product = static_cast<double>(x[r + i]) * static_cast<double>(x[r + j]);
        sum += product;
        magnitude += std::fabs(product);
      }
      const auto found = static_cast<double>(h[i * columns + j]);
      if (batches == 0) batches = std::round(sum * 2 / found);
      ASSERT_GE(batches, 1);
      ASSERT_NEAR(found, sum * 2 / batches, kTolerance * magnitude);
    }
}

TEST(Golden, gptq) {
  const auto cases = golden_cases("gptq");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    if (c.find("qweight") == nullptr) {
      check_hessian(c);
      continue;
    }
    size_t kinds = 0;
    for (const char* zeros : {"qzeros", "qzeros_v1", "qzeros_v2"})
      if (c.find(zeros) != nullptr) {
        check_case(c, zeros);
        ++kinds;
      }
    EXPECT_GT(kinds, 0u);
  }
  const auto models = golden_models("gptq");
  for (const auto& model : models) check_model(model);
  std::cout << "cases: " << cases.size() + models.size() << '\n';
}

// ---- what the library refuses ----

void list_with_empty_arrays() {
  MemoryCheckpoint files = written(scheme_of(4, true, Grouping::along(32)));
  for (auto& [name, spec] : files.arrays) spec.shape[0] = 0;
  for (auto& [name, bytes] : files.data) bytes.clear();
  gptq().list(files.view());
}

void must_fit(const Container& container, const Scheme& scheme, const Shape& shape) {
  const Fit fit = container.fit(scheme, shape);
  if (fit.verdict == Verdict::impossible) throw Error({.code = "does-not-fit", .what = fit.reason});
}

TEST(Golden, gptq_negative_cases) {
  const auto cases = negative_cases("gptq");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const NegativeCase& n : cases) {
    SCOPED_TRACE(n.name);
    EXPECT_TRUE(n.raised);
    const auto says = [&](std::string_view words) { return n.message.find(words) != std::string::npos; };
    if (says("Only 2,3,4,8 bits")) {
      // AutoGPTQ has no 5 bits; GPTQModel has, in a layout of its own, which another format must not be taken for.
      MemoryCheckpoint files = written(scheme_of(5, false, Grouping::along(32)));
      files.config["quantization_config"]["checkpoint_format"] = "gptq_5";
      check_refused([&] { gptq().list(files.view()); });
    } else if (says("supports only bits=4")) {  // a kernel's limit; here that one model has one layout
      const std::vector<StoredTensor> mixed = {stored_as(scheme_of(3, false, Grouping::along(32)), {32, 32}),
                                               stored_as(scheme_of(6, false, Grouping::along(32)), {32, 32})};
      EXPECT_EQ(gptq().fit_model(mixed).verdict, Verdict::impossible);
    } else if (says("non-zero size")) {
      check_refused([&] { list_with_empty_arrays(); });
    } else if (says("not positive-definite")) {  // of NaN
      const std::vector<float> values(32 * 32, NAN);
      check_refused([&] {
        gptq().encode(scheme_of(4, true, Grouping::along(32)), {32, 32},
                      {DType::f32, std::as_bytes(std::span(values))});
      });
    } else if (says("-bit qweight expects") || says("-bit qzeros expects")) {
      MemoryCheckpoint files = written(scheme_of(6, false, Grouping::along(32)));
      for (auto& [name, spec] : files.arrays)
        if (name.ends_with(says("qweight") ? "qweight" : "qzeros")) ++spec.shape[says("rows") ? 0 : 1];
      check_refused([&] { gptq().list(files.view()); });
    } else if (says("divisible by 32")) {
      check_refused([&] { must_fit(gptq(), scheme_of(6, false, Grouping::along(32)), {4, 33}); });
      check_refused([&] { must_fit(gptq(), scheme_of(6, false, Grouping::along(32)), {33, 32}); });
    } else if (says("supports bits")) {
      check_refused([&] { must_fit(gptq(), {.element = &integer_element(8, false)}, {32, 32}); });
      check_refused([&] { must_fit(gptq(), plain(DType::f32), {32, 32}); });
    } else {
      ADD_FAILURE() << "a kind of case that is not known: " << n.function << ": " << n.message;
    }
  }
  std::cout << "cases: " << cases.size() << '\n';
}

// ---- round trips and damage ----

TEST(Gptq, WrittenReadAndWrittenAgainIsTheSame) {
  for (const int bits : {2, 3, 4, 5, 6, 7, 8})
    for (const bool symmetric : {true, false})
      for (const Grouping& grouping :
           {Grouping::channel(), Grouping::along(32), Grouping::along(64), Grouping::along(128)})
        for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
          for (const Shape& shape : {Shape{32, 32}, Shape{64, 96}, Shape{96, 160}, Shape{160, 416}})
            for (const float zeros : {0.0f, 0.97f, 1.0f}) {
              const Scheme scheme = scheme_of(bits, symmetric, grouping, dtype);
              SCOPED_TRACE(describe(scheme) + " " + to_string(shape));
              ASSERT_EQ(gptq().fit(scheme, shape).verdict, Verdict::exact);
              const QuantizedTensor t = encoded(scheme, shape, dtype, zeros);
              check_sizes(t, "test");
              const MemoryCheckpoint files = written_model(gptq(), stored_as(scheme, shape, dtype), t);
              ASSERT_TRUE(check_view(gptq(), files.view()) == t);
              for (const float value : decode(t)) ASSERT_TRUE(std::isfinite(value));
            }
}

/// Zero points of 0 and of the largest code, in each layout that a model may have.
TEST(Gptq, EachLayoutOfZeroPointsComesBack) {
  for (const int bits : {2, 3, 4, 8})
    for (const char* variant : {"gptq", "gptq, borrowing", "gptq_v2", "gptq_p"}) {
      SCOPED_TRACE(std::to_string(bits) + " bits, " + variant);
      QuantizedTensor t = encoded(scheme_of(bits, false, Grouping::along(32)), {64, 128});
      QuantizedTensor zeros = *t.offset;
      for (size_t i = 0; i < zeros.codes.size(); ++i)
        zeros.codes[i] = static_cast<std::byte>(i % 3 == 0 ? 0 : i % (1u << bits));
      t.offset = std::make_shared<const QuantizedTensor>(zeros);
      StoredTensor stored = stored_as(t.scheme, t.shape);
      stored.variant = variant;
      MemoryCheckpoint files = written_model(gptq(), stored, t);
      Json& config = files.config["quantization_config"];
      config["checkpoint_format"] = std::string(variant).substr(0, stored.variant.find(','));
      if (stored.variant.find(',') != std::string_view::npos) config["meta"]["quantizer"] = "gptqmodel:5.0.0";
      EXPECT_TRUE(check_view(gptq(), files.view()) == t);
    }
}

/// desc_act: the columns of a group lie anywhere.
TEST(Gptq, GroupsInAnyOrderComeBack) {
  const Scheme in_order = scheme_of(4, true, Grouping::along(32));
  QuantizedTensor t = encoded(in_order, {64, 128});
  const Grouping indexed = {.kind = Grouping::Kind::index, .size = 32};
  t.scheme = scheme_of(4, true, indexed);
  for (int32_t k = 0; k < 128; ++k) t.group_index.push_back(k * 7 % 128 / 32);
  const MemoryCheckpoint files = written_model(gptq(), stored_as(t.scheme, t.shape), t);
  EXPECT_EQ(files.config["quantization_config"]["desc_act"], true);
  EXPECT_TRUE(check_view(gptq(), files.view()) == t);
}

TEST(Gptq, PiecesAreTheWhole) {
  for (const int bits : {3, 4, 6, 8})
    for (const bool symmetric : {true, false})
      for (const Shape& shape : {Shape{160, 96}, Shape{96, 256}}) {
        const Scheme scheme = scheme_of(bits, symmetric, Grouping::along(32));
        SCOPED_TRACE(describe(scheme) + " " + to_string(shape));
        const std::vector<std::byte> bytes = as_dtype(DType::bf16, random_values(shape));
        for (const int64_t step : {32, 64}) check_pieces(gptq(), stored_as(scheme, shape), {DType::bf16, bytes}, step);
      }
}

/// The code of the Error that listing throws, or "none".
std::string listed(const MemoryCheckpoint& files) {
  try {
    gptq().list(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.code();
  }
  return "none";
}

/// The same, of a model whose configuration was changed.
std::string configured(MemoryCheckpoint files, const std::function<void(Json& config)>& change) {
  change(files.config["quantization_config"]);
  return listed(files);
}

TEST(Gptq, OldModelsHaveTheirConfigurationInAnotherFile) {
  const QuantizedTensor t = encoded(scheme_of(4, true, Grouping::along(64)), {64, 128});
  MemoryCheckpoint files = written_model(gptq(), stored_as(t.scheme, t.shape), t);
  ASSERT_TRUE(files.documents.contains("quantize_config.json"));
  files.config = Json::object();
  EXPECT_TRUE(check_view(gptq(), files.view()) == t);
  // With none at all the arrays say all but whether zero points in the middle are meant so.
  files.documents.clear();
  for (const auto& name : {"g_idx", "bias"}) files.arrays.erase("model.layers.0.mlp.up_proj." + std::string(name));
  ASSERT_TRUE(gptq().detect(files.view()));
  const QuantizedTensor bare = gptq().unpack(gptq().list(files.view()).at(0), files.view());
  EXPECT_EQ(bare.scheme, scheme_of(4, false, Grouping::along(64)));
  EXPECT_EQ(decode(bare), decode(t));
}

TEST(Gptq, WhatDisagreesIsRefused) {
  const MemoryCheckpoint good = written(scheme_of(4, false, Grouping::along(32)));
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
    if (name.ends_with("qweight")) continue;  // which makes it GPTQ's
    missing.arrays.erase(name);
    EXPECT_EQ(listed(missing), name.ends_with("g_idx") ? "none" : "bad-container");
  }
  MemoryCheckpoint swapped = good;
  const std::string layer = "model.layers.0.mlp.up_proj.";
  std::swap(swapped.arrays.at(layer + "qweight"), swapped.arrays.at(layer + "qzeros"));
  EXPECT_EQ(listed(swapped), "bad-container");
  MemoryCheckpoint beyond = good;
  beyond.data.at(layer + "g_idx")[0] = std::byte{4};  // of 4 groups
  EXPECT_EQ(listed(beyond), "bad-container");
  beyond.data.at(layer + "g_idx")[3] = std::byte{0x80};  // negative
  EXPECT_EQ(listed(beyond), "bad-container");
}

TEST(Gptq, SettingsThatDisagreeAreRefused) {
  const MemoryCheckpoint good = written(scheme_of(4, false, Grouping::along(32)));
  EXPECT_EQ(configured(good, [](Json& c) { c["checkpoint_format"] = "gptq_v3"; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["checkpoint_format"] = "marlin"; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["bits"] = 8; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["bits"] = "four"; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["bits"] = 4.5; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["group_size"] = 64; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["group_size"] = -1; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["group_size"] = -7; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["group_size"] = INT64_MAX; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c["group_size"] = 0; }), "bad-container");
  EXPECT_EQ(configured(good, [](Json& c) { c.erase("group_size"); }), "none");
  EXPECT_EQ(configured(good, [](Json& c) { c.erase("checkpoint_format"); }), "none");
}

TEST(Gptq, OverridesOfLayersAreRead) {
  const QuantizedTensor t = encoded(scheme_of(8, true, Grouping::along(64)), {64, 128});
  MemoryCheckpoint files = written_model(gptq(), stored_as(t.scheme, t.shape), t);
  Json& config = files.config["quantization_config"];
  config["bits"] = 4;
  config["group_size"] = 32;
  EXPECT_EQ(listed(files), "bad-container");
  config["dynamic"] = {{R"(+:.*\.up_proj)", {{"bits", 8}, {"group_size", 64}}}, {R"(-:.*\.gate)", Json::object()}};
  EXPECT_TRUE(check_view(gptq(), files.view()) == t);
  EXPECT_EQ(gptq().model(files.view()).skipped, std::vector<std::string>{R"(.*\.gate)"});
}

TEST(Gptq, NotFiniteIsRefusedWithItsPosition) {
  for (const bool symmetric : {true, false})
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> values = random_values({64, 128});
      values[777] = bad;
      try {
        gptq().encode(scheme_of(4, symmetric, Grouping::along(32)), {64, 128},
                      {DType::f32, std::as_bytes(std::span(values))});
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "not-finite");
        EXPECT_NE(std::string(error.what()).find("777"), std::string::npos) << error.what();
      }
    }
}

TEST(Gptq, ExtremeWeightsGiveFiniteValuesOrAnError) {
  const auto encode = [](float value, DType scale) {
    std::vector<float> values(32 * 32, value);
    values[0] = -value;
    return gptq().encode(scheme_of(4, false, Grouping::along(32), scale), {32, 32},
                         {DType::f32, std::as_bytes(std::span(values))});
  };
  for (const float tiny : {1e-45f, 1e-40f, 1e-8f, 0.0f})
    for (const float value : decode(encode(tiny, DType::f16))) EXPECT_TRUE(std::isfinite(value));
  check_refused([&] { encode(1e6f, DType::f16); });
  check_refused([&] { encode(3e38f, DType::f32); });
  for (const float value : decode(encode(1e6f, DType::f32))) EXPECT_TRUE(std::isfinite(value));
}

// ---- what is written beside ----

TEST(Gptq, ConfigurationSaysWhatTheLayersHave) {
  const Scheme symmetric = scheme_of(4, true, Grouping::along(128));
  std::vector<StoredTensor> tensors = {
      {.name = "model.layers.0.mlp.up_proj.weight", .shape = {32, 128}, .scheme = symmetric},
      {.name = "model.layers.0.mlp.down_proj.weight", .shape = {32, 128}, .scheme = symmetric}};
  const auto config_of = [&](const std::vector<std::string>& kept) {
    OrderedJson config = OrderedJson::object();
    const OrderedJson record = OrderedJson::object();
    std::map<std::string, OrderedJson> files;
    gptq().write_metadata({.tensors = tensors, .kept = kept, .record = record}, {.config = config, .files = files});
    EXPECT_EQ(files.at("quantize_config.json"), config["quantization_config"]);
    return config["quantization_config"];
  };
  const OrderedJson usual = config_of({"model.embed_tokens", "lm_head"});
  EXPECT_EQ(usual["quant_method"], "gptq");
  EXPECT_EQ(usual["checkpoint_format"], "gptq");
  EXPECT_EQ(usual["bits"], 4);
  EXPECT_EQ(usual["group_size"], 128);
  EXPECT_EQ(usual["sym"], true);
  EXPECT_EQ(usual["desc_act"], false);
  EXPECT_EQ(usual["lm_head"], false);
  EXPECT_FALSE(usual.contains("dynamic"));
  tensors[1].scheme = scheme_of(8, true, Grouping::channel());
  const OrderedJson mixed = config_of({"model.layers.0.self_attn.q_proj"});
  const OrderedJson expected = {{R"(-:^model\.layers\.0\.self_attn\.q_proj$)", OrderedJson::object()},
                                {R"(+:^model\.layers\.0\.mlp\.down_proj$)", {{"bits", 8}, {"group_size", -1}}}};
  EXPECT_EQ(mixed["dynamic"], expected);
  EXPECT_EQ(mixed["modules_in_block_to_quantize"][0].size(), 2u);
  EXPECT_EQ(gptq().fit_model(tensors).verdict, Verdict::exact);
  tensors.push_back(tensors[1]);  // then 8 bits are the usual ones
  EXPECT_EQ(config_of({})["bits"], 8);
  tensors.pop_back();
  tensors[1].scheme = scheme_of(4, false, Grouping::along(128));
  EXPECT_EQ(gptq().fit_model(tensors).verdict, Verdict::impossible);
  tensors.erase(tensors.begin());
  tensors[0].name = "lm_head.weight";
  const OrderedJson second = config_of({});
  EXPECT_EQ(second["checkpoint_format"], "gptq_v2");
  EXPECT_EQ(second["sym"], false);
  EXPECT_EQ(second["lm_head"], true);
  tensors[0].scheme = scheme_of(6, true, Grouping::along(128));
  EXPECT_EQ(config_of({})["checkpoint_format"], "gptq_p");
}

TEST(Gptq, FitRefusesWhatTheLayoutCannotHold) {
  const auto verdict = [](const Scheme& scheme, const Shape& shape) { return gptq().fit(scheme, shape).verdict; };
  const Scheme good = scheme_of(4, true, Grouping::along(32));
  EXPECT_EQ(verdict(good, {32, 64}), Verdict::exact);
  EXPECT_EQ(verdict(good, {40, 64}), Verdict::impossible);
  EXPECT_EQ(verdict(good, {32, 72}), Verdict::impossible);
  EXPECT_EQ(verdict(good, {2, 32, 64}), Verdict::impossible);
  EXPECT_EQ(verdict(scheme_of(4, true, Grouping::along(48)), {32, 64}), Verdict::impossible);
  EXPECT_EQ(verdict(scheme_of(4, true, Grouping::flat(32)), {32, 64}), Verdict::impossible);
  EXPECT_EQ(verdict(scheme_of(4, true, Grouping::along(32, -2)), {32, 64}), Verdict::impossible);
  EXPECT_EQ(verdict(scheme_of(4, true, Grouping::along(32), DType::f8_e4m3), {32, 64}), Verdict::impossible);
  EXPECT_EQ(verdict({.element = find_element("nf4"), .scale = good.scale}, {32, 64}), Verdict::impossible);
  EXPECT_EQ(verdict({.element = &integer_element(4, false), .scale = good.scale}, {32, 64}), Verdict::impossible);
  EXPECT_EQ(verdict({.element = &integer_element(1, false), .scale = good.scale}, {32, 64}), Verdict::impossible);
}

}  // namespace
}  // namespace bitwright
