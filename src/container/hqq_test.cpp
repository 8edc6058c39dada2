#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
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

const Container& hqq() { return *find_container("hqq"); }

Scheme scheme_of(int bits, Grouping grouping, DType dtype = DType::f16) {
  return {.element = &integer_element(bits, false),
          .scale = parameter(grouping, plain(dtype)),
          .offset_kind = OffsetKind::float_zero,
          .offset = parameter(grouping, plain(dtype))};
}
Grouping by_columns(int64_t size) {
  Grouping grouping = Grouping::flat(size);
  grouping.interleaved = true;
  return grouping;
}

// ---- golden files ----

void add_number(MemoryCheckpoint& files, const std::string& name, const Json& value) {
  ArraySpec spec = {.name = "layer." + name, .dtype = DType::i32, .shape = {}};
  if (value.is_boolean()) spec.dtype = DType::u8;
  if (value.is_number_float()) spec.dtype = DType::f32;
  const float number = value.is_boolean() ? (value.get<bool>() ? 1.0f : 0.0f) : value.get<float>();
  files.add(spec, as_dtype(spec.dtype, std::span(&number, 1)));
}

void add_text(MemoryCheckpoint& files, const std::string& name, const std::string& text) {
  const auto bytes = std::as_bytes(std::span(text));
  files.add({.name = "layer." + name, .dtype = DType::u8, .shape = {static_cast<int64_t>(text.size())}},
            {bytes.begin(), bytes.end()});
}

/// A case as HQQLinear.state_dict stores it, its scales and zeros those of `suffix`.
MemoryCheckpoint layer_of(const GoldenCase& c, const std::string& suffix) {
  MemoryCheckpoint files;
  const auto take = [&](const std::string& from, const std::string& to) {
    const StoredArray& array = c.at(from);
    files.add({"layer." + to, array.dtype, array.shape}, {array.data.begin(), array.data.end()});
  };
  take("W_q", "W_q");
  take("scale" + suffix, "scale");
  take("zero" + suffix, "zero");
  for (const char* name : {"axis", "channel_wise", "group_size", "nbits", "optimize", "round_zero", "view_as_float"})
    if (!c.params[name].is_null()) add_number(files, name, c.params[name]);
  for (const char* name : {"quant_scale", "quant_zero"}) add_number(files, name, false);
  const std::string packing = c.params["packing"];
  add_text(files, "packing", packing);
  add_text(files, "unpack_view_dtype", packing == "3bit_32" ? "torch.int32" : "torch.uint8");
  add_text(files, "compute_dtype", suffix.empty() ? "torch.float32" : "torch.float16");
  const Shape& shape = c.at("input").shape;
  const auto bytes = std::as_bytes(std::span(shape));
  files.add({"layer.shape", DType::i64, {2}}, {bytes.begin(), bytes.end()});
  return files;
}

/// How the library decodes 16-bit scales: each step rounded.
std::vector<float> decode_as_library(const QuantizedTensor& t) {
  const DType dtype = *dtype_of(*t.scheme.scale->scheme->element);
  const std::vector<float> scale = decode(*t.scale), zero = decode(*t.offset);
  const GroupMap groups(t.scheme.scale->grouping, t.shape);
  std::vector<float> values;
  for (size_t i = 0; i < t.codes.size(); ++i) {
    const auto g = static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)));
    const float shifted = round_to(dtype, static_cast<float>(std::to_integer<int>(t.codes[i])) - zero[g]);
    values.push_back(round_to(dtype, shifted * scale[g]));
  }
  return values;
}

/// The last step of the optimizer, which gives the codes: with the scale that it leaves as it is and its last zero.
std::vector<std::byte> codes_of(std::span<const float> weights, const QuantizedTensor& t, float highest) {
  const std::vector<float> zero = decode(*t.offset);
  const GroupMap groups(t.scheme.scale->grouping, t.shape);
  std::vector<float> low(zero.size(), INFINITY), high(zero.size(), -INFINITY);
  const auto group = [&](size_t i) { return static_cast<size_t>(groups.group_of(static_cast<int64_t>(i))); };
  for (size_t i = 0; i < weights.size(); ++i) {
    low[group(i)] = std::min(low[group(i)], weights[i]);
    high[group(i)] = std::max(high[group(i)], weights[i]);
  }
  std::vector<std::byte> codes;
  for (size_t i = 0; i < weights.size(); ++i) {
    const float range = high[group(i)] - low[group(i)];
    const float inverse = std::min(range <= 1e-4f ? 1.0f : 1.0f / range * highest, 2e4f);
    const float code = std::nearbyint(weights[i] * inverse + zero[group(i)]);
    codes.push_back(static_cast<std::byte>(std::clamp(code, 0.0f, highest)));
  }
  return codes;
}

void check_case(const GoldenCase& c) {
  const QuantizedTensor t = check_view(hqq(), layer_of(c, "").view());
  check_values(c, decode(t));
  if (const StoredArray* codes = c.find("codes_grouped")) {
    EXPECT_TRUE(std::ranges::equal(t.codes, codes->data));
  }
  if (c.find("scale_f16") != nullptr) {
    const QuantizedTensor narrow = check_view(hqq(), layer_of(c, "_f16").view());
    if (c.find("dequantized_f16") != nullptr) {
      EXPECT_TRUE(decode_as_library(narrow) == c.floats("dequantized_f16"));
    }
  }

  const std::vector<float> input = c.floats("input");
  const auto bits = c.params["nbits"].get<double>();
  EXPECT_TRUE(codes_of(input, t, std::round(std::exp2(static_cast<float>(bits)) - 1)) == t.codes) << "codes";
  if (bits != t.scheme.element->bits) return;  // 1.58, which we do not write
  const StoredArray& weight = c.at("input");
  const QuantizedTensor own = hqq().encode(t.scheme, weight.shape, {weight.dtype, weight.data});
  EXPECT_TRUE(*own.scale == *t.scale) << "scales";
  const bool optimized = c.params["optimize"].get<bool>() && c.params["channel_wise"].get<bool>();
  if (optimized || c.params["round_zero"].get<bool>() != (bits == 4)) return;
  EXPECT_TRUE(own == t) << "all of it";
  QuantizedTensor narrow = hqq().encode(scheme_of(t.scheme.element->bits, t.scheme.scale->grouping), weight.shape,
                                        {weight.dtype, weight.data});
  EXPECT_TRUE(std::ranges::equal(narrow.scale->codes, c.at("scale_f16").data));
  EXPECT_TRUE(std::ranges::equal(narrow.offset->codes, c.at("zero_f16").data));
}

void must_fit(const Scheme& scheme, const Shape& shape) {
  const Fit fit = hqq().fit(scheme, shape);
  if (fit.verdict == Verdict::impossible) throw Error({.code = "does-not-fit", .what = fit.reason});
}

StoredTensor stored_as(const Scheme& scheme, const Shape& shape, DType dtype) {
  return {.name = "layer.weight", .shape = shape, .scheme = scheme, .value_dtype = dtype};
}

MemoryCheckpoint written(const Scheme& scheme, const Shape& shape = {16, 64}) {
  const std::vector<std::byte> bytes = as_dtype(DType::f16, random_values(shape));
  return written_model(hqq(), stored_as(scheme, shape, DType::f16), hqq().encode(scheme, shape, {DType::f16, bytes}));
}

void list_with(const std::string& name, const Json& value) {
  MemoryCheckpoint files = written(scheme_of(4, Grouping::flat(64)));
  add_number(files, name, value);
  hqq().list(files.view());
}

/// The calls are Python's; here it is a scheme to be planned or a file. What the library only garbles is refused, too.
void check_negative(const NegativeCase& n) {
  const Grouping usual = Grouping::flat(64);
  if (n.params.contains("nbits")) {
    const int bits = n.params["nbits"];
    if (bits >= 1 && bits <= 8) check_refused([&] { must_fit(scheme_of(bits, usual), {16, 64}); });
    check_refused([&] { list_with("nbits", bits); });
  } else if (n.params.contains("axis")) {
    check_refused([&] { list_with("axis", n.params["axis"]); });
  } else if (n.params.contains("group_size")) {
    const int64_t size = n.params["group_size"];
    const bool multiple = n.message.find("multiple of 8") != std::string::npos;
    check_refused([&] { must_fit(scheme_of(4, Grouping::flat(size)), multiple ? Shape{24, 64} : Shape{8, 100}); });
  } else if (n.function.starts_with("pack_")) {
    const int bits = n.function[5] - '0';
    const size_t at = n.function.find("with ");
    const bool counted = at != std::string::npos && std::isdigit(n.function[at + 5]) != 0;
    check_refused([&] { must_fit(scheme_of(bits, usual), {counted ? std::stoll(n.function.substr(at + 5)) : 7, 64}); });
  } else if (n.function.find("span") != std::string::npos) {
    must_fit(scheme_of(4, usual), {4, 96});
  } else {
    ADD_FAILURE() << "a kind of case that is not known: " << n.function << ": " << n.message;
  }
}

TEST(Golden, hqq) {
  const auto cases = golden_cases("hqq");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    check_case(c);
  }
  const auto models = golden_models("hqq");
  for (const auto& model : models) check_model(model, decode_as_library);
  const auto negative = negative_cases("hqq");
  for (const NegativeCase& n : negative) {
    SCOPED_TRACE(n.name);
    check_negative(n);
  }
  std::cout << "cases: " << cases.size() + models.size() + negative.size() << '\n';
}

/// The arrays of the two-layer models are written again as they were, whatever stands beside them.
TEST(Hqq, ModelsArePackedAsTheyWere) {
  for (const auto& path : golden_models("hqq")) {
    const WeightFile file(path / "model.safetensors");
    MemoryCheckpoint files;
    for (const StoredArray& array : file.arrays())
      files.add({array.name, array.dtype, array.shape}, {array.data.begin(), array.data.end()});
    for (const StoredTensor& t : hqq().list(files.view()))
      for (const NamedArray& array : hqq().pack(t, hqq().unpack(t, files.view()))) {
        EXPECT_EQ(array.spec.shape, files.arrays.at(array.spec.name).shape) << array.spec.name;
        EXPECT_EQ(array.spec.dtype, files.arrays.at(array.spec.name).dtype) << array.spec.name;
        EXPECT_TRUE(array.data == files.data.at(array.spec.name)) << array.spec.name;
      }
  }
}

// ---- round trips ----

TEST(Hqq, WrittenReadAndWrittenAgainIsTheSame) {
  size_t count = 0;
  for (const int bits : {1, 2, 3, 4, 5, 6, 8})
    for (const Grouping& grouping :
         {Grouping::flat(8), Grouping::flat(64), by_columns(8), by_columns(64), Grouping::flat(33), Grouping::tensor()})
      for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
        for (const Shape& shape : {Shape{8, 33}, Shape{7, 192}, Shape{6, 100}, Shape{64, 256}, Shape{24, 40}})
          for (const float zeros : {0.0f, 0.97f, 1.0f}) {
            const Scheme scheme = scheme_of(bits, grouping, dtype);
            if (hqq().fit(scheme, shape).verdict != Verdict::exact) continue;
            SCOPED_TRACE(describe(scheme) + " " + to_string(shape));
            ++count;
            const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape, zeros));
            const QuantizedTensor t = hqq().encode(scheme, shape, {dtype, bytes});
            check_sizes(t, "test");
            const MemoryCheckpoint files = written_model(hqq(), stored_as(scheme, shape, dtype), t);
            EXPECT_TRUE(check_view(hqq(), files.view()) == t);
            for (const float value : decode(t)) EXPECT_TRUE(std::isfinite(value));
          }
  EXPECT_GT(count, 500u);
}

TEST(Hqq, CodesMayBeLabelledAsFloats) {
  const Shape shape = {16, 64};
  for (const int bits : {8, 4, 3, 2, 1})
    for (const DType label : {DType::f16, DType::bf16, DType::f32}) {
      const Scheme scheme = scheme_of(bits, Grouping::flat(64));
      StoredTensor stored = stored_as(scheme, shape, DType::f16);
      const std::vector<float> values = random_values(shape);
      const QuantizedTensor t = hqq().encode(scheme, shape, {DType::f32, std::as_bytes(std::span(values))});
      const std::vector<std::byte> plain = hqq().pack(stored, t)[0].data;
      stored.storage_dtype = label;
      const MemoryCheckpoint files(hqq().pack(stored, t));
      EXPECT_EQ(files.arrays.at("layer.W_q").dtype, label);
      EXPECT_TRUE(files.data.at("layer.W_q") == plain);
      EXPECT_TRUE(check_view(hqq(), files.view()) == t);
    }
}

TEST(Hqq, NotFiniteIsRefusedWithItsPosition) {
  const Shape shape = {64, 256};
  for (const Grouping& grouping : {Grouping::flat(64), by_columns(64)})
    for (const float bad : {NAN, INFINITY}) {
      std::vector<float> values = random_values(shape);
      values[777] = bad;
      try {
        hqq().encode(scheme_of(4, grouping), shape, {DType::f32, std::as_bytes(std::span(values))});
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "not-finite");
        EXPECT_NE(std::string(error.what()).find("777"), std::string::npos) << error.what();
      }
    }
  std::vector<float> far(64, 1e4f);  // a zero of -1e4 / 2e-3 * 15 is more than f16 holds
  far[3] += 2e-3f;
  check_refused([&] {
    hqq().encode(scheme_of(8, Grouping::flat(64)), {1, 64}, {DType::f32, std::as_bytes(std::span(far))});
  });
}

// ---- damage ----

std::string listed(const MemoryCheckpoint& files) {
  try {
    hqq().list(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("layer"), std::string::npos) << error.what();
    return error.code();
  }
  return "none";
}

TEST(Hqq, DamageIsRefused) {
  for (const Scheme& scheme : {scheme_of(4, Grouping::flat(64)), scheme_of(3, by_columns(64))}) {
    const MemoryCheckpoint good = written(scheme);
    EXPECT_EQ(listed(good), "none");
    for (const char* name : {"W_q", "scale", "zero", "shape", "axis"}) {
      SCOPED_TRACE(name);
      const std::string array = std::string("layer.") + name;
      MemoryCheckpoint missing = good, retyped = good, larger = good;
      missing.arrays.erase(array);
      if (std::string_view(name) != "W_q") {
        EXPECT_EQ(listed(missing), "bad-container");
      }
      retyped.add({array, DType::f64, good.arrays.at(array).shape},
                  std::vector<std::byte>(8 * static_cast<size_t>(element_count(good.arrays.at(array).shape))));
      EXPECT_EQ(listed(retyped), "bad-container");
      larger.arrays.at(array).shape.push_back(2);
      larger.data.at(array).resize(2 * good.data.at(array).size());
      EXPECT_EQ(listed(larger), "bad-container");
    }
    MemoryCheckpoint swapped = good;
    std::swap(swapped.arrays.at("layer.W_q"), swapped.arrays.at("layer.scale"));
    std::swap(swapped.data.at("layer.W_q"), swapped.data.at("layer.scale"));
    EXPECT_EQ(listed(swapped), "bad-container");
  }
}

TEST(Hqq, WrongFactsAreRefused) {
  const auto with = [](const std::string& name, const Json& value) {
    MemoryCheckpoint files = written(scheme_of(4, Grouping::flat(64)));
    if (value.is_string())
      add_text(files, name, value);
    else
      add_number(files, name, value);
    return listed(files);
  };
  EXPECT_EQ(with("optimize", true), "none");
  for (const Json& bits : {Json(7), Json(0), Json(9), Json(-4), Json(2), Json(4.5), Json(1e30), Json(NAN)})
    EXPECT_EQ(with("nbits", bits), "bad-container") << bits;
  for (const Json& size : {Json(0), Json(-64), Json(48), Json(128), Json(2000000000)})
    EXPECT_EQ(with("group_size", size), "bad-container") << size;
  for (const Json& axis : {Json(2), Json(-1), Json(0)}) EXPECT_EQ(with("axis", axis), "bad-container") << axis;
  for (const char* packing : {"4bit_u16", "8bit_u8", ""}) EXPECT_EQ(with("packing", packing), "bad-container");
  for (const char* type : {"torch.int8", "float16", "torch.", "torch.float17"})
    EXPECT_EQ(with("compute_dtype", type), "bad-container") << type;
  EXPECT_EQ(with("channel_wise", false), "bad-container");
  EXPECT_EQ(with("view_as_float", true), "bad-container");
  EXPECT_EQ(with("quant_scale", true), "bad-container");
  EXPECT_EQ(with("quant_zero", true), "bad-container");
  EXPECT_EQ(with("packing", std::string(1000, 'x')), "bad-container");
  for (const std::vector<int64_t>& dims : {std::vector<int64_t>{16},
                                           {64, 16, 1},
                                           {0, 64},
                                           {-16, -64},
                                           {16, 65},
                                           {INT64_MAX, 64},
                                           {INT64_MAX, INT64_MAX}}) {
    MemoryCheckpoint files = written(scheme_of(4, Grouping::flat(64)));
    const auto bytes = std::as_bytes(std::span(dims));
    files.add({"layer.shape", DType::i64, {static_cast<int64_t>(dims.size())}}, {bytes.begin(), bytes.end()});
    EXPECT_EQ(listed(files), "bad-container");
  }
}

// ---- files of torch.save (tests/golden/torch/make_hqq.py) ----

std::filesystem::path native_file() { return "tests/golden/torch/hqq.pt"; }

TEST(Hqq, NativeFilesAreRead) {
  const Checkpoint model(native_file());
  ASSERT_NE(model.container(), nullptr);
  EXPECT_EQ(model.container()->name, "hqq");
  const std::vector<float> norm = model.read_f32(*model.find("model.norm.weight"));
  EXPECT_EQ(norm, std::vector<float>(8, 2.0f));
  EXPECT_EQ(model.read_f32(*model.find("model.layers.0.new.bias")).size(), 4u);
  for (const char* name : {"model.layers.0.new", "model.layers.0.old"}) {
    SCOPED_TRACE(name);
    const TensorEntry* entry = model.find(std::string(name) + ".weight");
    ASSERT_NE(entry, nullptr);
    EXPECT_EQ(entry->shape, (Shape{4, 16}));
    EXPECT_EQ(entry->dtype, DType::f16);
    EXPECT_EQ(entry->scheme.element->bits, 4);
    EXPECT_EQ(entry->scheme.scale->grouping, Grouping::flat(8));
    const std::vector<float> values = model.read_f32(*entry);
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t group = i / 8;
      EXPECT_EQ(values[i], (static_cast<float>(i * 7 % 16) - static_cast<float>(group)) * 0.5f) << i;
    }
  }
  EXPECT_EQ(model.find("model.layers.0.columns.weight")->scheme.scale->grouping, by_columns(8));
}

TEST(Hqq, NativeFilesCutShortAreRefused) {
  const std::string bytes = read_file(native_file());
  TemporaryDirectory directory;
  for (size_t length = 0; length < bytes.size(); length += length + 64 < bytes.size() ? 7 : 1) {
    write_file(directory / "qmodel.pt", bytes.substr(0, length));
    check_refused([&] { const Checkpoint refused(directory / "qmodel.pt"); });
  }
}

// ---- configuration ----

TEST(Hqq, ConfigurationSaysWhatTheLayersHave) {
  StoredTensor four = stored_as(scheme_of(4, Grouping::flat(64)), {16, 64}, DType::f16);
  StoredTensor eight = stored_as(scheme_of(8, Grouping::flat(32)), {16, 64}, DType::f16);
  four.name = "model.layers.0.mlp.up_proj.weight";
  eight.name = "model.layers.0.self_attn.q_proj.weight";
  const std::vector<std::string> kept = {"lm_head"};
  const auto config_of = [&](const std::vector<StoredTensor>& tensors) {
    OrderedJson config = OrderedJson::object();
    const OrderedJson record = OrderedJson::object();
    std::map<std::string, OrderedJson> files;
    hqq().write_metadata({.tensors = tensors, .kept = kept, .record = record}, {.config = config, .files = files});
    EXPECT_TRUE(files.empty());
    return config["quantization_config"];
  };
  const OrderedJson one = config_of({four}), two = config_of({four, eight});
  EXPECT_EQ(one["quant_method"], "hqq");
  EXPECT_EQ(one["skip_modules"], OrderedJson(kept));
  EXPECT_EQ(one["quant_config"]["weight_quant_params"]["nbits"], 4);
  EXPECT_EQ(one["quant_config"]["weight_quant_params"]["group_size"], 64);
  EXPECT_EQ(two["quant_config"]["mlp.up_proj"]["weight_quant_params"]["nbits"], 4);
  EXPECT_EQ(two["quant_config"]["self_attn.q_proj"]["weight_quant_params"]["group_size"], 32);
}

}  // namespace
}  // namespace bitwright
