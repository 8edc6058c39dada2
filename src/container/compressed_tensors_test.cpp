#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <random>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "container/rows.hpp"
#include "tests/golden_cases.hpp"
#include "tests/memory_checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& ct() { return *find_container("compressed-tensors"); }

Json config_with(const Json& weights, const std::string& format) {
  return {{"quantization_config",
           {{"quant_method", "compressed-tensors"},
            {"format", format},
            {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}}}}}}}};
}

/// What the library would call the layout of a case.
std::string format_of(const GoldenCase& c) {
  if (c.find("weight_packed") == nullptr) {
    if (c.at("weight_scale").dtype == DType::u8) return "mxfp8-quantized";
    return c.params.value("type", "int") == "int" ? "int-quantized" : "float-quantized";
  }
  if (c.find("weight_global_scale") != nullptr) return "nvfp4-pack-quantized";
  return c.at("weight_packed").dtype == DType::u8 ? "mxfp4-pack-quantized" : "pack-quantized";
}

std::vector<std::string> stored_arrays(const GoldenCase& c) {
  std::vector<std::string> arrays;
  for (const StoredArray& array : c.file.arrays())
    if (array.name.starts_with("weight") || array.name.starts_with("input_")) arrays.push_back(array.name);
  return arrays;
}

size_t differences(std::span<const std::byte> a, std::span<const std::byte> b) {
  EXPECT_EQ(a.size(), b.size());
  size_t count = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) count += a[i] != b[i];
  return count;
}

/// What the library decodes where it guesses blocks from the number of scales (decompress without arguments).
void check_guessed_blocks(const GoldenCase& c, QuantizedTensor t) {
  const Shape scales = c.at("weight_scale").shape;
  Grouping guessed = t.scheme.scale->grouping;
  guessed.block_rows = t.shape[0] / scales[0];
  guessed.block_columns = t.shape[1] / scales[1];
  t.scheme.scale = parameter(guessed, *t.scheme.scale->scheme);
  check_values(c, decode(t));
}

void check_products(const GoldenCase& c, const std::vector<float>& weight) {
  if (c.find("x") == nullptr) return;
  const std::vector<float> x = c.floats("x");
  const auto columns = static_cast<size_t>(c.at("x").shape.back()), rows = weight.size() / columns;
  std::vector<double> expected(x.size() / columns * rows);
  ASSERT_EQ(c.at("y").dtype, DType::f64);
  std::memcpy(expected.data(), c.at("y").data.data(), expected.size() * sizeof(double));
  for (size_t i = 0; i < expected.size(); ++i) {
    double sum = 0, terms = 0;
    for (size_t k = 0; k < columns; ++k) {
      const double term =
          static_cast<double>(x[i / rows * columns + k]) * static_cast<double>(weight[i % rows * columns + k]);
      sum += term;
      terms += std::fabs(term);
    }
    EXPECT_NEAR(sum, expected[i], static_cast<double>(columns) * 0x1p-52 * terms);
  }
}

/// Reads, decodes, writes again, and quantizes its input as the library did: everything bit for bit.
void check_case(const GoldenCase& c) {
  SCOPED_TRACE(c.name);
  const Json config = config_with(c.params, format_of(c));
  const QuantizedTensor t = check_container(ct(), c, stored_arrays(c), "", config);
  const std::vector<float> values = decode(t);
  if (const StoredArray* const explicit_values = c.find("dequantized_explicit_args")) {
    std::vector<float> expected(values.size());
    to_f32(explicit_values->dtype, explicit_values->data, expected);
    EXPECT_TRUE(values == expected);
    check_guessed_blocks(c, t);
  } else {
    check_values(c, values);
  }
  check_products(c, values);
  if (const StoredArray* const zeros = c.find("zero_point_unpacked")) {
    std::vector<std::byte> stored(zeros->data.begin(), zeros->data.end());
    const int half = 1 << (t.scheme.element->bits - 1);
    for (std::byte& zero : stored) zero = static_cast<std::byte>(std::to_integer<int>(zero) + half);
    EXPECT_EQ(differences(stored, t.offset->codes), 0u) << "zero points";
  }
  if (c.params.value("actorder", Json()).is_string()) return;  // whose groups came from calibration
  const StoredArray& input = c.at("input");
  const QuantizedTensor encoded = ct().encode(t.scheme, input.shape, {input.dtype, input.data});
  EXPECT_EQ(differences(encoded.codes, t.codes), 0u) << "codes";
  EXPECT_EQ(differences(encoded.scale->codes, t.scale->codes), 0u) << "scales";
  EXPECT_TRUE(encoded == t);
}

void check_folder(const std::string& folder) {
  const auto cases = golden_cases(folder);
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) check_case(c);
  const auto models = golden_models(folder);
  for (const auto& model : models) check_model(model);
  std::cout << "cases: " << cases.size() + models.size() << '\n';
}

TEST(Golden, ct_pack_quantized) { check_folder("ct_pack_quantized"); }
TEST(Golden, ct_int_quantized) { check_folder("ct_int_quantized"); }
TEST(Golden, ct_float_quantized) { check_folder("ct_float_quantized"); }
TEST(Golden, ct_nvfp4) { check_folder("ct_nvfp4"); }
TEST(Golden, ct_mxfp4) { check_folder("ct_mxfp4"); }

// ---- what is made here ----

SchemeChoice choice(std::string_view type, int bits, bool symmetric = true, std::string_view granularity = "group",
                    int64_t group_size = 32) {
  return {
      .quant_type = type, .bits = bits, .symmetric = symmetric, .granularity = granularity, .group_size = group_size};
}

struct Variation {
  SchemeChoice choice;
  bool weight_only = true;
};

/// Every kind of weight that is held, with the columns it needs.
std::vector<Variation> variations() {
  std::vector<Variation> all;
  for (int bits = 1; bits <= 8; ++bits)
    for (const bool symmetric : {true, false})
      for (const std::string_view granularity : {"tensor", "channel", "group"})
        for (const bool weight_only : {true, false})
          all.push_back({choice("int", bits, symmetric, granularity), weight_only});
  for (const std::string_view granularity : {"tensor", "channel", "group", "block"})
    for (const bool weight_only : {true, false}) all.push_back({choice("e4m3", 8, true, granularity), weight_only});
  all.push_back({choice("nvfp4", 4, true, "group", 16)});
  all.push_back({choice("mxfp4", 4)});
  all.push_back({choice("mxfp8", 8)});
  return all;
}

StoredTensor stored_as(const Variation& v, const Shape& shape, DType dtype) {
  StoredTensor t = {.name = "model.layers.0.mlp.up_proj.weight",
                    .shape = shape,
                    .scheme = ct().make_scheme(v.choice, dtype),
                    .value_dtype = dtype};
  if (!v.weight_only && v.choice.quant_type != "nvfp4") t.linear = ct().make_linear(v.choice);
  return t;
}

QuantizedTensor encoded(const StoredTensor& t, std::span<const float> values) {
  const std::vector<std::byte> bytes = as_dtype(t.value_dtype, values);
  return ct().encode(t.scheme, t.shape, {t.value_dtype, bytes});
}

MemoryCheckpoint written(const Variation& v, const Shape& shape = {5, 64}, DType dtype = DType::bf16) {
  const StoredTensor t = stored_as(v, shape, dtype);
  return written_model(ct(), t, encoded(t, random_values(shape)));
}

const Variation kPackedAsymmetric = {choice("int", 4, false)};
const Variation kNvfp4 = {choice("nvfp4", 4, true, "group", 16)};

TEST(CompressedTensors, WrittenReadAndWrittenAgainIsTheSame) {
  for (const Variation& v : variations())
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
      for (const Shape& shape : {Shape{1, 32}, Shape{7, 96}, Shape{33, 64}, Shape{5, 33}, Shape{130, 160}})
        for (const float zeros : {0.0f, 0.97f, 1.0f}) {
          const StoredTensor t = stored_as(v, shape, dtype);
          SCOPED_TRACE(describe(t.scheme) + " " + to_string(shape) + " " + std::string(info(dtype).name));
          if (ct().fit(t.scheme, shape).verdict == Verdict::impossible) {
            EXPECT_EQ(shape[1], 33);  // which only rows, tensors and blocks can have
            continue;
          }
          const QuantizedTensor values = encoded(t, random_values(shape, zeros));
          check_sizes(values, "test");
          for (const float value : decode(values)) EXPECT_TRUE(std::isfinite(value));
          const MemoryCheckpoint files = written_model(ct(), t, values);
          const auto listed = ct().list(files.view());
          ASSERT_EQ(listed.size(), 1u);
          EXPECT_EQ(listed[0].shape, shape);
          EXPECT_EQ(listed[0].linear.input.has_value(), t.linear.input.has_value());
          if (t.linear.input) {
            EXPECT_EQ(listed[0].linear.input->scheme, t.linear.input->scheme);
          }
          EXPECT_TRUE(check_view(ct(), files.view()) == values);
        }
}

// How far a weight is from what it was: no more than half a step of its scale, or what its type's last bit is worth.
TEST(CompressedTensors, CodesAreNear) {
  const Shape shape = {64, 256};
  const std::vector<float> values = random_values(shape);
  for (const Variation& v : variations()) {
    const StoredTensor t = stored_as(v, shape, DType::f32);
    SCOPED_TRACE(describe(t.scheme));
    const QuantizedTensor q = encoded(t, values);
    const std::vector<float> decoded = decode(q);
    const Decoder decoder(q);
    const GroupMap groups(t.scheme.scale->grouping, shape);
    const bool is_float = t.scheme.element->kind == ElementKind::floating;
    const bool clips = v.choice.bits == 1 || v.choice.quant_type.starts_with("mx") || v.choice.quant_type == "nvfp4";
    for (size_t i = 0; i < values.size() && !clips; ++i) {
      const float step = decoder.scales()[static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)))];
      // Symmetric integers reach -2^(b-1) and half a step less above; a float has 3 bits, below 2^-6 steps of 2^-9.
      const float bound = is_float ? std::max(std::fabs(values[i]) / 16, step * 0x1p-10f) : step;
      EXPECT_LE(std::fabs(values[i] - decoded[i]), bound * 1.0001f) << i;
    }
  }
}

TEST(CompressedTensors, PiecesAreEncodedAsTheWholeIs) {
  const Shape shape = {300, 64};
  const std::vector<float> values = random_values(shape);
  for (const Variation& v : variations()) {
    const StoredTensor whole = stored_as(v, shape, DType::bf16);
    const auto step = row_step(whole.scheme, shape);
    if (!step) continue;
    SCOPED_TRACE(describe(whole.scheme));
    const std::vector<ArraySpec> all = ct().layout(whole);
    const std::vector<NamedArray> expected = ct().pack(whole, encoded(whole, values));
    for (int64_t begin = 0; begin < shape[0]; begin += *step) {
      const StoredTensor piece = rows_of(whole, begin, std::min(shape[0], begin + *step));
      const auto part = std::span(values).subspan(static_cast<size_t>(begin * shape[1]),
                                                  static_cast<size_t>(element_count(piece.shape)));
      const std::vector<ArraySpec> before = ct().layout(rows_of(whole, 0, begin));
      const std::vector<NamedArray> packed = ct().pack(piece, encoded(piece, part));
      for (size_t a = 0; a < packed.size(); ++a) {
        const Placement at = place(all[a], before[a], packed[a].spec);
        ASSERT_EQ(at.runs, 1u);
        const auto found = std::span(expected[a].data).subspan(at.offset, at.run);
        EXPECT_TRUE(std::ranges::equal(found, packed[a].data)) << all[a].name << " at " << begin;
      }
    }
  }
}

TEST(CompressedTensors, NotFiniteIsRefusedWithItsPosition) {
  for (const Variation& v : variations())
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> values = random_values({64, 256});
      values[777] = bad;
      values[7777] = bad;
      try {
        encoded(stored_as(v, {64, 256}, DType::f32), values);
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "not-finite");
        EXPECT_NE(std::string(error.what()).find(" 777 "), std::string::npos) << error.what();
      }
    }
}

// An f16 group whose width f16 cannot hold, and scales too small for f16.
TEST(CompressedTensors, ScalesThatDoNotFit) {
  std::vector<float> values(64);
  values[0] = -65504;
  values[1] = 65504;
  const StoredTensor t = stored_as({choice("int", 8, false)}, {1, 64}, DType::f16);
  check_refused([&] { encoded(t, values); });
  const std::vector<float> tiny(64, 1e-7f);
  for (const Variation& v : variations())
    for (const float value : decode(encoded(stored_as(v, {1, 64}, DType::f16), tiny)))
      EXPECT_LE(std::fabs(value), 1e-6f);
}

// What the library puts in place of a scale of 0, with any sign of the zeros.
TEST(CompressedTensors, GroupsOfZerosHaveTheScaleOfTheirType) {
  std::vector<float> values(64);
  values[63] = -3;
  values[16] = -0.0f;
  const auto first_scale = [&](const Variation& v, DType dtype) {
    QuantizedTensor t = encoded(stored_as(v, {1, 64}, dtype), values);
    EXPECT_EQ(decode(t).at(0), 0.0f);
    EXPECT_EQ(decode(t).at(16), 0.0f);
    return t;
  };
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    EXPECT_EQ(first_scale(kNvfp4, dtype).scale->codes.at(0), std::byte{0x20});  // 0.125
    // Where the weight's type cannot hold 2^-127, the exponent is taken for 0 and the scale for 1.
    EXPECT_EQ(first_scale({choice("mxfp4", 4)}, dtype).scale->codes.at(0),
              dtype == DType::f16 ? std::byte{127} : std::byte{0});
  }
  EXPECT_EQ(decode(*first_scale({choice("int", 4)}, DType::f32).scale).at(0), 0x1p-23f);
  EXPECT_EQ(decode(*first_scale({choice("int", 4)}, DType::f16).scale).at(0), 0x1p-10f);
  EXPECT_EQ(decode(*first_scale({choice("int", 4)}, DType::bf16).scale).at(0), 0x1p-7f);
}

TEST(CompressedTensors, ScalesOfAnotherType) {
  const Shape shape = {16, 128};
  const std::vector<float> values = random_values(shape);
  for (const DType weight : {DType::f32, DType::bf16, DType::f16})
    for (const std::string_view scales : {"float32", "float16", "bfloat16"}) {
      SchemeChoice wanted = choice("int", 4, false);
      wanted.scale_dtype = scales;
      const StoredTensor t = stored_as({wanted}, shape, weight);
      EXPECT_EQ(t.scheme.scale->scheme->element->name, scales);
      const QuantizedTensor q = encoded(t, values);
      const std::vector<float> decoded = decode(q);
      double error = 0, norm = 0;
      for (size_t i = 0; i < values.size(); ++i) {
        error += std::pow(static_cast<double>(values[i] - decoded[i]), 2);
        norm += std::pow(static_cast<double>(values[i]), 2);
      }
      EXPECT_LT(error / norm, 0.01);
    }
}

// ---- damage ----

std::string listed(const MemoryCheckpoint& files) {
  try {
    ct().list(files.view());
    ct().model(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.code();
  }
  return "none";
}

TEST(CompressedTensors, DamageIsRefused) {
  for (const Variation& v : variations()) {
    const MemoryCheckpoint good = written(v);
    SCOPED_TRACE(describe(stored_as(v, {5, 64}, DType::bf16).scheme) + (v.weight_only ? "" : ", activations"));
    EXPECT_EQ(listed(good), "none");
    for (const auto& [name, spec] : good.arrays) {
      SCOPED_TRACE(name);
      MemoryCheckpoint retyped = good, larger = good, missing = good;
      retyped.arrays.at(name).dtype = DType::f64;
      EXPECT_EQ(listed(retyped), "bad-container");
      larger.arrays.at(name).shape.push_back(2);
      EXPECT_EQ(listed(larger), "bad-container");
      MemoryCheckpoint more = good;
      ++more.arrays.at(name).shape[0];
      // Of bytes with a scale a tensor or block nothing but the file says how many rows there are.
      const bool any_rows =
          name.ends_with(".weight") && (v.choice.granularity == "tensor" || v.choice.granularity == "block");
      EXPECT_EQ(listed(more), any_rows ? "none" : "bad-container");
      missing.arrays.erase(name);
      // A weight without scale is a plain one: of that the model's type speaks, and here it is of 8 bits.
      const bool only =
          name.ends_with("weight_scale") && !missing.arrays.contains("model.layers.0.mlp.up_proj.weight_packed");
      EXPECT_EQ(listed(missing), only ? "none" : "bad-container");
    }
  }
}

TEST(CompressedTensors, SwappedArraysAreRefused) {
  for (const Variation& v : variations()) {
    const MemoryCheckpoint good = written(v);
    for (const auto& [a, first] : good.arrays)
      for (const auto& [b, second] : good.arrays) {
        if (a >= b || (first.dtype == second.dtype && first.shape == second.shape)) continue;
        MemoryCheckpoint swapped = good;
        std::swap(swapped.data.at(a), swapped.data.at(b));
        std::swap(swapped.arrays.at(a).dtype, swapped.arrays.at(b).dtype);
        std::swap(swapped.arrays.at(a).shape, swapped.arrays.at(b).shape);
        EXPECT_EQ(listed(swapped), "bad-container") << a << " and " << b;
      }
  }
}

TEST(CompressedTensors, DamagedShapesAreRefused) {
  const MemoryCheckpoint good = written(kPackedAsymmetric);
  const std::string name = "model.layers.0.mlp.up_proj.weight_shape";
  for (const std::array<int64_t, 2> shape : {std::array<int64_t, 2>{5, 65},
                                             {5, 56},
                                             {5, 0},
                                             {5, -64},
                                             {-5, 64},
                                             {6, 64},
                                             {64, 5},
                                             {5, INT64_MAX},
                                             {INT64_MIN, 64}}) {
    MemoryCheckpoint files = good;
    std::memcpy(files.data.at(name).data(), shape.data(), sizeof shape);
    EXPECT_EQ(listed(files), "bad-container") << shape[0] << " " << shape[1];
  }
}

/// `good` with the text `from` of its configuration replaced.
std::string with(const MemoryCheckpoint& good, const std::string& from, const std::string& to) {
  std::string text = good.config.dump();
  EXPECT_NE(text.find(from), std::string::npos) << from << " in " << text;
  text.replace(text.find(from), from.size(), to);
  MemoryCheckpoint files = good;
  files.config = Json::parse(text);
  return listed(files);
}

TEST(CompressedTensors, DamagedConfigurationsAreRefused) {
  const MemoryCheckpoint packed = written(kPackedAsymmetric), nvfp4 = written(kNvfp4),
                         blocks = written({choice("e4m3", 8, true, "block")});
  for (const auto& [from, to] : std::initializer_list<std::pair<const char*, const char*>>{
           {R"("num_bits":4)", R"("num_bits":8)"},
           {R"("num_bits":4)", R"("num_bits":9)"},
           {R"("num_bits":4)", R"("num_bits":0)"},
           {R"("num_bits":4)", R"("num_bits":"4")"},
           {R"("group_size":32)", R"("group_size":64)"},
           {R"("group_size":32)", R"("group_size":24)"},
           {R"("group_size":32)", R"("group_size":-7)"},
           {R"("group_size":32)", R"("group_size":null)"},
           {R"("strategy":"group")", R"("strategy":"channel")"},
           {R"("strategy":"group")", R"("strategy":"tensor_group")"},
           {R"("strategy":"group")", R"("strategy":"ring")"},
           {R"("symmetric":false)", R"("symmetric":true)"},
           {R"("symmetric":false)", R"("symmetric":"no")"},
           {R"("type":"int")", R"("type":"float")"},
           {R"("type":"int")", R"("type":"complex")"},
           {R"("weights":{)", R"("weights":null,"x":{)"},
           {R"("ignore":[])", R"("ignore":"lm_head")"},
           {R"("targets":["Linear"])", R"("targets":"Linear")"},
           {R"("kv_cache_scheme":null)", R"("kv_cache_scheme":8)"}})
    EXPECT_EQ(with(packed, from, to), "bad-container") << to;
  for (const auto& [from, to] : std::initializer_list<std::pair<const char*, const char*>>{
           {R"("format":"pack-quantized")", R"("format":"marlin-24")"},
           {R"("sparsity_config":{})", R"("sparsity_config":{"format":"sparse-24-bitmask"})"},
           {R"("transform_config":{})", R"("transform_config":{"config_groups":{"u":{}}})"},
           {R"("config_groups":{"group_0":{)", R"("config_groups":{"W4A16":["Linear"],"group_0":{)"}})
    EXPECT_EQ(with(packed, from, to), "unsupported-container") << to;
  EXPECT_EQ(with(packed, R"("format":"pack-quantized")", R"("format":"int-quantized")"), "bad-container");
  EXPECT_EQ(with(packed, R"("actorder":null)", R"("actorder":"weight")"), "none");
  EXPECT_EQ(with(packed, R"("version":"0.15.0")", R"("version":"99.0")"), "none");  // which its own loader ignores
  EXPECT_EQ(with(nvfp4, R"("symmetric":true)", R"("symmetric":false)"), "bad-container");
  EXPECT_EQ(with(nvfp4, R"("num_bits":4)", R"("num_bits":8)"), "bad-container");
  EXPECT_EQ(with(nvfp4, R"("group_size":16)", R"("group_size":32)"), "bad-container");
  EXPECT_EQ(with(blocks, R"("block_structure":[32,32])", R"("block_structure":[32,64])"), "bad-container");
  EXPECT_EQ(with(blocks, R"("block_structure":[32,32])", R"("block_structure":[0,32])"), "bad-container");
  EXPECT_EQ(with(blocks, R"("block_structure":[32,32])", R"("block_structure":"32x32")"), "none");
  EXPECT_EQ(with(blocks, R"("block_structure":[32,32])", R"("block_structure":"32x")"), "bad-container");
}

void retyped(const Variation& v, const std::string& suffix, DType dtype) {
  MemoryCheckpoint files = written(v);
  files.arrays.at("model.layers.0.mlp.up_proj." + suffix).dtype = dtype;
  ct().list(files.view());
}

void with_bits(int bits) {
  MemoryCheckpoint files = written(kPackedAsymmetric);
  files.config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = bits;
  ct().list(files.view());
}

void must_fit(const Scheme& scheme, const Shape& shape) {
  const Fit fit = ct().fit(scheme, shape);
  if (fit.verdict == Verdict::impossible) throw Error({.code = "does-not-fit", .what = fit.reason});
}

// The calls are Python's; what corresponds to each here: a scheme to be planned, or a file.
TEST(Golden, ct_negative_cases) {
  size_t count = 0;
  for (const char* folder : {"ct_pack_quantized", "ct_int_quantized", "ct_float_quantized", "ct_nvfp4", "ct_mxfp4"})
    for (const NegativeCase& n : negative_cases(folder)) {
      SCOPED_TRACE(n.name);
      ++count;
      EXPECT_TRUE(n.raised);
      const auto says = [&](std::string_view words) { return n.message.find(words) != std::string::npos; };
      if (says("must be quantized to torch.int8")) {
        check_refused([&] { retyped({choice("int", 8, true, "channel"), false}, "weight", DType::i16); });
      } else if (says("num_bits in [1, 8]")) {
        const int bits = std::stoi(n.message.substr(n.message.rfind(' ')));
        EXPECT_TRUE(bits < 1 || bits > 8);
        check_refused([&] { with_bits(bits); });
      } else if (says("Expected torch.int32")) {
        check_refused([&] { retyped(kPackedAsymmetric, "weight_packed", DType::i64); });
      } else if (says("divisble by the given group_size")) {
        long long size = 0, columns = 0;
        ASSERT_EQ(std::sscanf(n.message.c_str() + n.message.find("group_size"), "group_size %lld but got %lld", &size,
                              &columns),
                  2);
        check_refused([&] {
          must_fit(ct().make_scheme(choice("int", 4, true, "group", size), DType::bf16), {16, columns});
        });
      } else if (says("even number of columns")) {
        check_refused([&] { must_fit(stored_as(kNvfp4, {4, 16}, DType::f32).scheme, {4, 33}); });
      } else if (says("Asymmetric Quantization is not supported for FP4")) {
        MemoryCheckpoint files = written(kNvfp4);
        files.config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = false;
        check_refused([&] { ct().list(files.view()); });
      } else {
        ADD_FAILURE() << "a kind of case that is not known: " << n.function << ": " << n.message;
      }
    }
  if (count == 0) GTEST_SKIP() << "no golden cases here";
  std::cout << "cases: " << count << '\n';
}

// ---- what a model has beside its weights ----

NamedArray small(const std::string& name, DType dtype, const Shape& shape, float value) {
  NamedArray array = {{name, dtype, shape}, {}};
  const std::vector<float> values(static_cast<size_t>(element_count(shape)), value);
  array.data = as_dtype(dtype, values);
  return array;
}

const std::string kLayer = "model.layers.0.mlp.up_proj.";

TEST(CompressedTensors, StaticActivationsAreReadAndWritten) {
  MemoryCheckpoint files = written({choice("e4m3", 8, true, "tensor"), false});
  Json& group = files.config["quantization_config"]["config_groups"]["group_0"];
  group["input_activations"] = {{"num_bits", 8}, {"type", "float"}, {"strategy", "tensor"}, {"dynamic", false}};
  EXPECT_EQ(listed(files), "bad-container");  // it has no scale
  NamedArray scale = small(kLayer + "input_scale", DType::bf16, {1}, 0.25f);
  files.add(scale.spec, scale.data);
  check_view(ct(), files.view());
  const StoredTensor t = ct().list(files.view()).at(0);
  ASSERT_TRUE(t.linear.input && t.linear.input->scale);
  EXPECT_FALSE(t.linear.input->dynamic);
  EXPECT_EQ(decode(*t.linear.input->scale), std::vector<float>{0.25f});
  files.arrays.at(scale.spec.name).shape = {2};
  EXPECT_EQ(listed(files), "bad-container");
}

TEST(CompressedTensors, AsymmetricActivationsHaveZeroPoints) {
  MemoryCheckpoint files = written({choice("int", 8, true, "channel"), false});
  Json& group = files.config["quantization_config"]["config_groups"]["group_0"];
  group["input_activations"] = {{"num_bits", 8}, {"type", "int"}, {"strategy", "tensor"}, {"symmetric", false}};
  for (const NamedArray& array :
       {small(kLayer + "input_scale", DType::f32, {1}, 0.5f), small(kLayer + "input_zero_point", DType::i8, {1}, -3)})
    files.add(array.spec, array.data);
  check_view(ct(), files.view());
  const StoredTensor t = ct().list(files.view()).at(0);
  EXPECT_EQ(decode(*t.linear.input->offset), std::vector<float>{-3});
}

TEST(CompressedTensors, Nvfp4ActivationsHaveAGlobalScale) {
  MemoryCheckpoint files = written(kNvfp4);
  Json& group = files.config["quantization_config"]["config_groups"]["group_0"];
  group["input_activations"] = {{"num_bits", 4},    {"type", "float"},    {"strategy", "tensor_group"},
                                {"group_size", 16}, {"dynamic", "local"}, {"symmetric", true}};
  const NamedArray scale = small(kLayer + "input_global_scale", DType::f32, {1}, 300);
  files.add(scale.spec, scale.data);
  check_view(ct(), files.view());
  const StoredTensor t = ct().list(files.view()).at(0);
  EXPECT_TRUE(t.linear.input->dynamic);
  EXPECT_EQ(t.linear.input->scheme, t.scheme);
  OrderedJson config = OrderedJson::object();
  const OrderedJson record = OrderedJson::object();
  std::map<std::string, OrderedJson> others;
  ct().write_metadata({.tensors = std::span(&t, 1), .kept = {}, .record = record}, {.config = config, .files = others});
  EXPECT_EQ(config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"], "local");
}

TEST(CompressedTensors, ScalesOfTheCacheAreNoTensors) {
  MemoryCheckpoint files = written({choice("e4m3", 8, true, "channel"), false});
  files.config["quantization_config"]["ignore"] = {"lm_head", "re:.*gate$"};
  files.config["quantization_config"]["kv_cache_scheme"] = {
      {"num_bits", 8}, {"type", "float"}, {"strategy", "tensor"}, {"dynamic", false}, {"symmetric", true}};
  for (const std::string name : {"model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale",
                                 "model.layers.0.self_attn.k_proj.output_scale"}) {
    const NamedArray scale = small(name, DType::bf16, {1}, 0.5f);
    files.add(scale.spec, scale.data);
  }
  const QuantizedModel model = ct().model(files.view());
  EXPECT_EQ(model.arrays.size(), 3u);
  EXPECT_EQ(model.skipped, (std::vector<std::string>{"lm_head", "re:.*gate$"}));
  ASSERT_TRUE(model.kv_cache);
  EXPECT_EQ(model.kv_cache->scheme.element->name, "float8_e4m3");
  TemporaryDirectory directory;
  files.write(directory.path());
  EXPECT_EQ(Checkpoint(directory.path()).tensors().size(), 1u);
}

// An older file's: of a projection that is quantized itself.
TEST(CompressedTensors, OutputScalesOfTheCache) {
  MemoryCheckpoint files = written({choice("e4m3", 8, true, "tensor"), false});
  files.config["quantization_config"]["kv_cache_scheme"] = {{"num_bits", 8}, {"type", "float"}, {"strategy", "tensor"}};
  const NamedArray scale = small(kLayer + "output_scale", DType::bf16, {}, 0.5f);
  files.add(scale.spec, scale.data);
  check_view(ct(), files.view());
  EXPECT_TRUE(ct().list(files.view()).at(0).linear.output);
}

TEST(CompressedTensors, ActivationOrderIsKept) {
  MemoryCheckpoint files = written(kPackedAsymmetric);
  files.config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group";
  EXPECT_EQ(listed(files), "none");  // no index: columns as they come
  NamedArray index = {{kLayer + "weight_g_idx", DType::i32, {64}}, {}};
  std::vector<int32_t> groups(64);
  for (size_t i = 0; i < groups.size(); ++i) groups[i] = i % 3 == 0 ? 1 : 0;
  const auto set = [&] {
    const auto bytes = std::as_bytes(std::span(groups));
    index.data.assign(bytes.begin(), bytes.end());
    files.add(index.spec, index.data);
  };
  set();
  const QuantizedTensor t = check_view(ct(), files.view());
  EXPECT_EQ(t.scheme.scale->grouping.kind, Grouping::Kind::index);
  EXPECT_EQ(t.group_index, groups);
  const std::vector<float> values = decode(t), scales = decode(*t.scale), zeros = decode(*t.offset);
  for (size_t i = 0; i < 64; ++i) {
    const auto g = static_cast<size_t>(groups[i]);
    EXPECT_EQ(values[i], (static_cast<float>(std::to_integer<int>(t.codes[i])) - zeros[g]) * scales[g]);
  }
  groups[5] = 2;
  set();
  EXPECT_EQ(listed(files), "bad-container");
  groups[5] = -1;
  set();
  EXPECT_EQ(listed(files), "bad-container");
  groups.assign(64, -1);  // as it is before calibration, which the library takes for none
  set();
  EXPECT_EQ(check_view(ct(), files.view()).scheme.scale->grouping, Grouping::along(32));
}

// Older versions stored the zeros of symmetric weights.
TEST(CompressedTensors, ZeroPointsOfSymmetricWeights) {
  for (const Variation& v : {Variation{choice("int", 8, true, "channel"), false}, Variation{choice("int", 4)},
                             Variation{choice("e4m3", 8, true, "tensor")}}) {
    MemoryCheckpoint files = written(v);
    const bool is_float = v.choice.quant_type == "e4m3";
    const Shape shape = files.arrays.at(kLayer + "weight_scale").shape;
    NamedArray zero = small(kLayer + "weight_zero_point", is_float ? DType::f8_e4m3 : DType::i8, shape, 0);
    files.add(zero.spec, zero.data);
    check_view(ct(), files.view());
    files.data.at(zero.spec.name)[0] = std::byte{1};
    EXPECT_EQ(listed(files), "bad-container");
  }
}

TEST(CompressedTensors, ModulesFindTheirGroup) {
  MemoryCheckpoint both = written(kPackedAsymmetric);
  const MemoryCheckpoint other = written({choice("e4m3", 8, true, "channel"), false});
  for (const auto& [name, spec] : other.arrays) {
    ArraySpec renamed = spec;
    renamed.name = "model.layers.1.down_proj" + name.substr(name.rfind('.'));
    both.add(renamed, other.data.at(name));
  }
  Json& groups = both.config["quantization_config"]["config_groups"];
  groups["group_1"] = other.config["quantization_config"]["config_groups"]["group_0"];
  const auto with_targets = [&](const Json& first, const Json& second) {
    groups["group_0"]["targets"] = first;
    groups["group_1"]["targets"] = second;
    return listed(both);
  };
  EXPECT_EQ(with_targets({"Linear"}, {"model.layers.1.down_proj"}), "none");
  EXPECT_EQ(with_targets({"Linear"}, {"re:.*down_proj"}), "none");
  EXPECT_EQ(with_targets({"lm_head", "Linear"}, {"re:.*down_proj"}), "none");
  EXPECT_EQ(with_targets({"re:.*(up|gate)_proj$"}, {"re:model[.]layers[.]1"}), "none");
  EXPECT_EQ(with_targets({"re:up_proj"}, {"re:.*down_proj"}), "bad-container");  // from the start of the name
  EXPECT_EQ(with_targets({"Linear"}, {"re:.*up_proj"}), "bad-container");
  EXPECT_EQ(with_targets({"re:("}, {"re:.*up_proj"}), "unsupported-container");
  EXPECT_EQ(with_targets({"model.layers.0.mlp.up_proj"}, {"Linear"}), "none");
  groups["group_2"] = groups["group_0"];
  groups["group_2"]["targets"] = Json::array({"Linear"});
  groups["group_0"] = groups["group_1"];
  EXPECT_EQ(with_targets({"lm_head"}, {"model.layers.1.down_proj"}), "none");  // a name is no class
  groups["group_0"] = groups["group_2"];
  groups.erase("group_2");
  EXPECT_EQ(with_targets({"model.layers.0.mlp.up_proj"}, {"Linear"}), "none");
  const auto listed_now = ct().list(both.view());
  ASSERT_EQ(listed_now.size(), 2u);
  OrderedJson config = OrderedJson::object();
  const OrderedJson record = OrderedJson::object();
  std::map<std::string, OrderedJson> others;
  ct().write_metadata({.tensors = listed_now, .kept = {}, .record = record}, {.config = config, .files = others});
  const OrderedJson& written_config = config["quantization_config"];
  EXPECT_EQ(written_config["format"], "mixed-precision");
  EXPECT_EQ(written_config["config_groups"]["group_1"]["targets"], OrderedJson{"model.layers.1.down_proj"});
  both.config = Json::parse(config.dump());
  EXPECT_EQ(listed(both), "none");
}

// Beside a sparsity_config, as older versions wrote it.
TEST(CompressedTensors, OlderConfigurations) {
  MemoryCheckpoint files = written(kPackedAsymmetric);
  const Json config = files.config["quantization_config"];
  files.config = {{"compression_config", {{"quantization_config", config}, {"sparsity_config", Json::object()}}}};
  EXPECT_TRUE(ct().detect(files.view()));
  EXPECT_EQ(listed(files), "none");
  files.config = {{"quantization_config", {{"quant_method", "gptq"}}}};
  EXPECT_FALSE(ct().detect(files.view()));
}

TEST(CompressedTensors, ShapesThatTheLibraryRefuses) {
  const Scheme groups = ct().make_scheme(choice("int", 4, true, "group", 128), DType::bf16);
  EXPECT_EQ(ct().fit(groups, {8, 64}).verdict, Verdict::impossible);
  EXPECT_EQ(ct().fit(groups, {8, 256}).verdict, Verdict::exact);
  EXPECT_EQ(ct().fit(groups, {2, 8, 256}).verdict, Verdict::impossible);
  for (const SchemeChoice& odd : {choice("e5m2", 8), choice("int", 4, true, "flat"), choice("nvfp4", 4),
                                  choice("mxfp4", 4, true, "group", 64), choice("int", 4, true, "block")})
    EXPECT_EQ(ct().fit(ct().make_scheme(odd, DType::bf16), {128, 128}).verdict, Verdict::impossible)
        << odd.quant_type << " " << odd.granularity;
  check_refused([] { ct().make_linear(choice("nvfp4", 4)); });
}

}  // namespace
}  // namespace bitwright
