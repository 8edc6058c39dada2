#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iostream>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "tests/golden_cases.hpp"
#include "tests/memory_checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& quanto() { return *find_container("quanto"); }

Scheme eight_bits(const ElementType& element, DType dtype, Grouping grouping = Grouping::channel()) {
  return {.element = &element, .scale = parameter(grouping, plain(dtype))};
}
Scheme few_bits(int bits, const Grouping& grouping, DType dtype, bool zero_point = false) {
  return {.element = &integer_element(bits, false),
          .scale = parameter(grouping, plain(dtype)),
          .offset_kind = zero_point ? OffsetKind::zero_point : OffsetKind::minimum,
          .offset = parameter(grouping, zero_point ? Scheme{.element = &integer_element(8, false)} : plain(dtype))};
}

// ---- golden files ----

/// NaN is what the library makes of a row of zeros as float8.
void expect_same(const std::vector<float>& found, const std::vector<float>& expected, const char* what) {
  ASSERT_EQ(found.size(), expected.size());
  size_t different = 0;
  for (size_t i = 0; i < found.size(); ++i)
    different += !(found[i] == expected[i] || (std::isnan(found[i]) && std::isnan(expected[i])));
  EXPECT_EQ(different, 0u) << what;
}

/// The codes that follow from the shifts of an optimizer.
void check_codes_of_shifts(const GoldenCase& c, const QuantizedTensor& t) {
  const std::vector<float> input = c.floats("input"), scale = decode(*t.scale), shift = decode(*t.offset);
  const GroupMap groups(t.scheme.scale->grouping, t.shape);
  size_t different = 0;
  for (size_t i = 0; i < input.size(); ++i) {
    const auto g = static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)));
    const float code = std::clamp(std::nearbyint((input[i] + shift[g]) / scale[g]), 0.0f, t.scheme.element->highest);
    different += static_cast<std::byte>(code) != t.codes[i];
  }
  EXPECT_EQ(different, 0u) << "codes of the stored shifts";
}

/// How the library decodes scales of 16 bits: each step is rounded.
std::vector<float> decode_as_library(const QuantizedTensor& t) {
  const DType dtype = *dtype_of(*t.scheme.scale->scheme->element);
  std::vector<float> values = decode(t);
  if (t.scheme.offset_kind == OffsetKind::minimum) {
    const std::vector<float> scale = decode(*t.scale), shift = decode(*t.offset);
    const GroupMap groups(t.scheme.scale->grouping, t.shape);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto g = static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)));
      values[i] = round_to(dtype, static_cast<float>(std::to_integer<int>(t.codes[i])) * scale[g]) - shift[g];
    }
  }
  for (float& value : values) value = round_to(dtype, value);
  return values;
}

/// A case as the layer of a model, with the map that says its type.
MemoryCheckpoint layer_of_case(const GoldenCase& c) {
  MemoryCheckpoint files;
  for (const StoredArray& array : c.file.arrays())
    if (array.name.starts_with("weight."))
      files.add({"layer." + array.name, array.dtype, array.shape}, {array.data.begin(), array.data.end()});
  files.config = {{"hidden_size", c.at("input").shape[1]}};
  files.documents["quanto_qmap.json"]["layer"] = {{"weights", c.params.at("qtype")}, {"activations", "none"}};
  return files;
}

void check_case(const GoldenCase& c) {
  const StoredArray& input = c.at("input");
  const QuantizedTensor t = check_view(quanto(), layer_of_case(c).view());
  EXPECT_EQ(t.shape, input.shape);
  const std::vector<float> values = decode(t);
  expect_same(values, c.floats("dequantized"), "decoded values");
  if (c.find("dequantized_lib") != nullptr) {
    expect_same(decode_as_library(t), c.floats("dequantized_lib"), "decoded in the scales' type");
  }

  const QuantizedTensor own = quanto().encode(t.scheme, input.shape, {input.dtype, input.data});
  // Of 0 and -0 torch takes either for the least and for the largest.
  EXPECT_EQ(decode(*own.scale), decode(*t.scale)) << "scales";
  if (c.params.value("optimizer", "max") == "hqq") return check_codes_of_shifts(c, t);
  if (t.offset) {
    EXPECT_EQ(decode(*own.offset), decode(*t.offset)) << "shifts";
  }
  const std::vector<float> scale = decode(*t.scale);
  const GroupMap groups(t.scheme.scale->grouping, t.shape);
  size_t different = 0;
  for (size_t i = 0; i < t.codes.size(); ++i) {
    if (std::isnan(values[i])) {
      EXPECT_EQ(scale[static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)))], 0);
      EXPECT_EQ(own.codes[i], std::byte{0}) << "of a row of zeros we write zeros";
    } else {
      different += own.codes[i] != t.codes[i];
    }
  }
  EXPECT_EQ(different, 0u) << "codes";
}

StoredTensor stored_as(const Scheme& scheme, const Shape& shape, DType dtype) {
  return {.name = "layer.weight", .shape = shape, .scheme = scheme, .value_dtype = dtype};
}

MemoryCheckpoint written(const Scheme& scheme, const Shape& shape = {16, 64}, DType dtype = DType::bf16) {
  const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape));
  return written_model(quanto(), stored_as(scheme, shape, dtype), quanto().encode(scheme, shape, {dtype, bytes}));
}

void must_fit(const Scheme& scheme, const Shape& shape) {
  const Fit fit = quanto().fit(scheme, shape);
  if (fit.verdict == Verdict::impossible) throw Error({.code = "does-not-fit", .what = fit.reason});
}

/// The calls are Python's; here it is a scheme to be planned or a file.
void check_negative(const NegativeCase& n) {
  EXPECT_TRUE(n.raised);
  const auto says = [&](std::string_view words) { return n.message.find(words) != std::string::npos; };
  if (says("must be a divisor")) {
    check_refused([&] { must_fit(few_bits(4, Grouping::flat(64), DType::f32), {8, 100}); });
  } else if (says("axis parameter must be") ||
             says("along the first or last axis")) {  // of the schemes' two axes the other one
    check_refused([&] { must_fit(few_bits(4, Grouping::along(32, -1), DType::f32), {64, 64}); });
    check_refused([&] {
      must_fit(few_bits(4, {.kind = Grouping::Kind::axis, .axis = 2, .size = 32}, DType::f32), {64, 64});
    });
  } else if (says("must be a scalar") || says("multiple axis") || says("must be broadcastable")) {
    MemoryCheckpoint files = written(eight_bits(integer_element(8, true), DType::f32));
    files.add({"layer.weight._scale", DType::f32, {3}}, std::vector<std::byte>(12));
    check_refused([&] { quanto().list(files.view()); });
  } else if (says("1D Tensors")) {
    check_refused([&] { must_fit(eight_bits(integer_element(8, true), DType::f32), {64}); });
  } else {
    ADD_FAILURE() << "a kind of case that is not known: " << n.function << ": " << n.message;
  }
}

TEST(Golden, quanto) {
  const auto cases = golden_cases("quanto");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    check_case(c);
  }
  const auto models = golden_models("quanto");
  for (const auto& model : models) check_model(model, decode_as_library);
  const auto negative = negative_cases("quanto");
  for (const NegativeCase& n : negative) {
    SCOPED_TRACE(n.name);
    check_negative(n);
  }
  std::cout << "cases: " << cases.size() + models.size() + negative.size() << '\n';
}

TEST(Quanto, ModelsArePackedAsTheyWere) {
  for (const auto& path : golden_models("quanto")) {
    const WeightFile file(path / "model.safetensors");
    MemoryCheckpoint files;
    for (const StoredArray& array : file.arrays())
      files.add({array.name, array.dtype, array.shape}, {array.data.begin(), array.data.end()});
    files.documents["quanto_qmap.json"] = parse_json(read_file(path / "quanto_qmap.json"), "map");
    size_t packed = 0;
    for (const StoredTensor& t : quanto().list(files.view()))
      for (const NamedArray& array : quanto().pack(t, quanto().unpack(t, files.view()))) {
        EXPECT_EQ(array.spec.shape, files.arrays.at(array.spec.name).shape) << array.spec.name;
        EXPECT_EQ(array.spec.dtype, files.arrays.at(array.spec.name).dtype) << array.spec.name;
        EXPECT_TRUE(array.data == files.data.at(array.spec.name)) << array.spec.name;
        ++packed;
      }
    EXPECT_EQ(packed, file.arrays().size());
  }
}

// ---- round trips ----

TEST(Quanto, WrittenReadAndWrittenAgainIsTheSame) {
  size_t count = 0;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    std::vector<Scheme> schemes;
    for (const ElementType* element :
         {&integer_element(8, true), &float_element(DType::f8_e4m3), &float_element(DType::f8_e5m2)})
      for (const Grouping& grouping : {Grouping::channel(), Grouping::tensor(), Grouping::along(0, -2)})
        schemes.push_back(eight_bits(*element, dtype, grouping));
    for (const int bits : {4, 2})
      for (const bool zero_point : {false, true})
        for (const Grouping& grouping : {Grouping::flat(32), Grouping::flat(96), Grouping::flat(128),
                                         Grouping::flat(33), Grouping::along(32, -2), Grouping::along(4, -2)})
          schemes.push_back(few_bits(bits, grouping, dtype, zero_point));
    for (const Scheme& scheme : schemes)
      for (const Shape& shape : {Shape{5, 33}, Shape{7, 96}, Shape{3, 384}, Shape{64, 256}, Shape{32, 7}})
        for (const float zeros : {0.0f, 0.97f, 1.0f}) {
          if (quanto().fit(scheme, shape).verdict != Verdict::exact) continue;
          SCOPED_TRACE(describe(scheme) + " " + to_string(shape) + " " + std::string(info(dtype).name));
          ++count;
          const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape, zeros));
          const QuantizedTensor t = quanto().encode(scheme, shape, {dtype, bytes});
          check_sizes(t, "test");
          const MemoryCheckpoint files = written_model(quanto(), stored_as(scheme, shape, dtype), t);
          EXPECT_TRUE(check_view(quanto(), files.view()) == t);
          for (const float value : decode(t)) EXPECT_TRUE(std::isfinite(value));
        }
  }
  EXPECT_GT(count, 600u);
}

TEST(Quanto, NotFiniteIsRefusedWithItsPosition) {
  const Shape shape = {64, 256};
  for (const Scheme& scheme :
       {eight_bits(integer_element(8, true), DType::f32), eight_bits(float_element(DType::f8_e5m2), DType::f16),
        few_bits(4, Grouping::flat(128), DType::f32), few_bits(2, Grouping::along(32, -2), DType::f32)})
    for (const float bad : {NAN, INFINITY}) {
      std::vector<float> values = random_values(shape);
      values[777] = bad;
      try {
        quanto().encode(scheme, shape, {DType::f32, std::as_bytes(std::span(values))});
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "not-finite");
        EXPECT_NE(std::string(error.what()).find("777"), std::string::npos) << error.what();
      }
    }
}

// ---- the shape, which packed weights do not have ----

TEST(Quanto, ShapesOfPackedWeightsComeFromTheModel) {
  const Scheme scheme = few_bits(4, Grouping::flat(128), DType::bf16);
  const auto listed = [&](const std::string& name, const Shape& shape, const Json& config, bool with_map) {
    StoredTensor t = stored_as(scheme, shape, DType::bf16);
    t.name = name + ".weight";
    const std::vector<std::byte> bytes = as_dtype(DType::bf16, random_values(shape));
    MemoryCheckpoint files = written_model(quanto(), t, quanto().encode(scheme, shape, {DType::bf16, bytes}));
    files.config = config;
    if (!with_map) files.documents.clear();
    return quanto().list(files.view()).at(0).shape;
  };
  const Json config = {{"hidden_size", 256}};
  EXPECT_EQ(listed("model.layers.0.mlp.up_proj", {768, 256}, config, false), (Shape{768, 256}));
  EXPECT_EQ(listed("model.layers.0.mlp.down_proj", {256, 768}, config, false), (Shape{256, 768}));
  EXPECT_EQ(listed("model.layers.0.self_attn.k_proj", {64, 256}, config, false), (Shape{64, 256}));
  EXPECT_EQ(listed("h.0.x", {8, 256}, {{"text_config", {{"n_embd", 256}}}}, false), (Shape{8, 256}));
  EXPECT_EQ(listed("anything", {8, 1024}, Json::object(), true), (Shape{8, 1024})) << "our map says it";
  EXPECT_EQ(listed("anything", {8, 1024}, Json::object(), false), (Shape{64, 128})) << "nothing says it: the groups";
  EXPECT_THROW(listed("anything", {8, 1024}, {{"hidden_size", 768}}, false), Error);

  MemoryCheckpoint biased = written(scheme, {6, 256});
  biased.documents.clear();
  biased.add({"layer.bias", DType::bf16, {6}}, std::vector<std::byte>(12));
  EXPECT_EQ(quanto().list(biased.view()).at(0).shape, (Shape{6, 256}));
}

TEST(Quanto, GroupsAreThoseThatTheModuleChooses) {
  for (const auto& [columns, size] : std::vector<std::pair<int64_t, int64_t>>{
           {64, 64}, {100, 100}, {128, 128}, {256, 128}, {192, 96}, {320, 64}, {160, 32}, {200, 200}, {4096, 128}})
    EXPECT_EQ(quanto().group_size({}, {8, columns}), size) << columns;
  const StoredTensor usual = stored_as(few_bits(4, Grouping::flat(96), DType::bf16), {8, 192}, DType::bf16);
  const StoredTensor other = stored_as(few_bits(4, Grouping::flat(64), DType::bf16), {8, 192}, DType::bf16);
  EXPECT_EQ(quanto().fit_model(std::span(&usual, 1)).verdict, Verdict::exact);
  EXPECT_EQ(quanto().fit_model(std::span(&other, 1)).verdict, Verdict::impossible);
}

// ---- activations ----

TEST(Quanto, ScalesOfActivationsAreKept) {
  MemoryCheckpoint files = written(eight_bits(integer_element(8, true), DType::bf16));
  const float input = 0.25f, output = 0.5f;
  files.add({"layer.input_scale", DType::bf16, {}}, as_dtype(DType::bf16, std::span(&input, 1)));
  files.add({"layer.output_scale", DType::bf16, {}}, as_dtype(DType::bf16, std::span(&output, 1)));
  files.documents["quanto_qmap.json"]["layer"]["activations"] = "qfloat8_e4m3fn";
  files.documents["quanto_qmap.json"]["norm"] = {{"weights", "none"}, {"activations", "qint8"}};
  check_view(quanto(), files.view());
  const StoredTensor t = quanto().list(files.view()).at(0);
  ASSERT_TRUE(t.linear.input && t.linear.output);
  EXPECT_EQ(t.linear.input->scheme.element->name, "float8_e4m3");
  EXPECT_FALSE(t.linear.input->dynamic);
  EXPECT_EQ(decode(*t.linear.input->scale).at(0), 0.25f);
  EXPECT_EQ(decode(*t.linear.output->scale).at(0), 0.5f);
  files.add({"norm.output_scale", DType::bf16, {}}, as_dtype(DType::bf16, std::span(&output, 1)));
  EXPECT_EQ(quanto().model(files.view()).arrays, (std::vector<std::string>{"norm.output_scale"}));
}

// ---- damage ----

std::string listed(const MemoryCheckpoint& files) {
  try {
    quanto().list(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("layer"), std::string::npos) << error.what();
    return error.code();
  }
  return "none";
}

TEST(Quanto, DamageIsRefused) {
  for (const Scheme& scheme :
       {eight_bits(integer_element(8, true), DType::bf16), eight_bits(float_element(DType::f8_e4m3), DType::f32),
        few_bits(4, Grouping::flat(64), DType::bf16), few_bits(2, Grouping::flat(32), DType::f16)}) {
    SCOPED_TRACE(describe(scheme));
    const MemoryCheckpoint good = written(scheme);
    EXPECT_EQ(listed(good), "none");
    for (const auto& [name, spec] : good.arrays) {
      SCOPED_TRACE(name);
      MemoryCheckpoint missing = good, retyped = good, larger = good;
      retyped.add({name, DType::f64, spec.shape},
                  std::vector<std::byte>(8 * static_cast<size_t>(element_count(spec.shape))));
      EXPECT_EQ(listed(retyped), "bad-container");
      larger.arrays.at(name).shape.push_back(2);
      larger.data.at(name).resize(2 * good.data.at(name).size());
      EXPECT_EQ(listed(larger), "bad-container");
      if (name.ends_with("put_scale")) continue;  // that older files may lack
      missing.arrays.erase(name);
      EXPECT_EQ(listed(missing), "bad-container");
    }
    MemoryCheckpoint swapped = good;
    const std::string data =
        good.arrays.contains("layer.weight._data") ? "layer.weight._data" : "layer.weight._data._data";
    std::swap(swapped.arrays.at(data), swapped.arrays.at("layer.weight._scale"));
    std::swap(swapped.data.at(data), swapped.data.at("layer.weight._scale"));
    EXPECT_EQ(listed(swapped), "bad-container");
  }
}

TEST(Quanto, WrongMapsAreRefused) {
  const auto with = [](const Json& entry) {
    MemoryCheckpoint files = written(few_bits(4, Grouping::flat(64), DType::bf16));
    files.documents["quanto_qmap.json"]["layer"] = entry;
    return listed(files);
  };
  EXPECT_EQ(with({{"weights", "qint4"}, {"activations", "none"}}), "none");
  for (const char* type : {"qint2", "qint8", "qfloat8", "qint3", ""})
    EXPECT_EQ(with({{"weights", type}}), "bad-container");
  EXPECT_EQ(with({{"weights", 4}}), "bad-container");
  EXPECT_EQ(with({{"weights", "qint4"}, {"activations", "qint4"}}), "bad-container");
  for (const Json& shape :
       {Json({16, 65}), Json({0, 64}), Json({-16, -64}), Json({32, 32}), Json({INT32_MAX, INT32_MAX})})
    EXPECT_EQ(with({{"weights", "qint4"}, {"shape", shape}}), "bad-container") << shape;
  MemoryCheckpoint other = written(few_bits(4, Grouping::flat(64), DType::bf16));
  other.documents["quanto_qmap.json"]["layer.more"] = {{"weights", "qint4"}};
  EXPECT_EQ(listed(other), "bad-container");
}

}  // namespace
}  // namespace bitwright
