#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <random>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "container/bitsandbytes_rounding.hpp"
#include "tests/golden_cases.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& bitsandbytes() { return *find_container("bitsandbytes"); }

const Scheme kAbsmax = {.element = find_element("dynamic8"),
                        .scale = parameter(Grouping::flat(256), plain(DType::f32)),
                        .offset_kind = OffsetKind::bias,
                        .offset = parameter(Grouping::tensor(), plain(DType::f32))};

Scheme four_bits(const std::string& type, int64_t block, bool nested = false) {
  return {.element = find_element(type),
          .scale = parameter(Grouping::flat(block), nested ? kAbsmax : plain(DType::f32))};
}
Scheme eight_bits() {
  return bitsandbytes().make_scheme({.bits = 8, .symmetric = true, .granularity = "channel", .scale_dtype = "float32"},
                                    DType::f16);
}

bool is_cuda(const GoldenCase& c) { return c.backend.starts_with("cuda"); }

// ---- rounding to the dynamic map, by backend ----

/// bitsandbytes' own C++ code: the value is rounded to one of 65536 levels, and the level has a code.
uint8_t by_levels(float value) {
  const ElementType& map = *find_element("dynamic8");
  constexpr float kLevels = 65535;
  const float clamped = std::clamp(value, -1.0f, 1.0f);
  const float level = std::floor((clamped + 1.0f) * 0.5f * kLevels + 0.5f);
  return static_cast<uint8_t>(map.nearest(map, level * (2.0f / kLevels) - 1.0f));
}

/// Codes of blocks, by the rounding of the case's backend.
std::vector<std::byte> dynamic_codes(const GoldenCase& c, std::span<const float> values, size_t block) {
  const Scheme scheme = {.element = find_element("dynamic8"),
                         .scale = parameter(Grouping::flat(static_cast<int64_t>(block)), plain(DType::f32))};
  const bool levels = c.backend.starts_with("C++");
  if (!is_cuda(c) && !levels) return encode(scheme, {static_cast<int64_t>(values.size())}, values).codes;
  std::vector<std::byte> codes;
  for (size_t begin = 0; begin < values.size(); begin += block) {
    float most = 0;
    const auto part = values.subspan(begin, std::min(block, values.size() - begin));
    for (const float value : part) most = std::max(most, std::fabs(value));
    for (const float value : part) {
      const float scaled = value * (1.0f / most);
      codes.push_back(levels ? static_cast<std::byte>(most == 0 ? 0 : by_levels(scaled))
                             : static_cast<std::byte>(round_to_dynamic8(scaled)));
    }
  }
  return codes;
}

/// As bytes of float32. The torch backend lets the absmax of a short last block be no less than 1e-38.
std::vector<std::byte> stored_absmax(const GoldenCase& c, const QuantizedTensor& t, int64_t block) {
  std::vector<float> absmax = decode(*t.scale);
  if (c.backend.starts_with("pure torch") && element_count(t.shape) % block != 0)
    absmax.back() = std::max(absmax.back(), 1e-38f);
  const auto bytes = std::as_bytes(std::span(absmax));
  return {bytes.begin(), bytes.end()};
}

size_t differences(std::span<const std::byte> a, std::span<const std::byte> b) {
  EXPECT_EQ(a.size(), b.size());
  size_t count = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) count += a[i] != b[i];
  return count;
}

// ---- nf4 and fp4 ----

std::vector<std::byte> packed(const QuantizedTensor& t) {
  const StoredTensor stored = {.name = "weight", .shape = t.shape, .scheme = t.scheme, .value_dtype = DType::f32};
  return bitsandbytes().pack(stored, t).at(0).data;
}

/// The file's scales around its own mean (whose order of summation the library leaves open), its codes by its backend.
void check_nested(const GoldenCase& c, const std::vector<float>& absmax) {
  std::vector<float> centred = absmax;
  for (float& value : centred) value -= c.floats("offset").at(0);
  EXPECT_EQ(differences(dynamic_codes(c, centred, 256), c.at("weight.absmax").data), 0u) << "nested codes";
  const QuantizedTensor outer = encode(four_bits("nf4", 256), {static_cast<int64_t>(centred.size())}, centred);
  EXPECT_EQ(differences(stored_absmax(c, outer, 256), c.at("weight.nested_absmax").data), 0u) << "nested absmax";
}

void check_encoder(const GoldenCase& c, const std::string& type) {
  const auto block = c.params["blocksize"].get<int64_t>();
  const Scheme scheme = four_bits(type, block);
  const StoredArray& input = c.at("input");
  const QuantizedTensor t = is_cuda(c) ? bitsandbytes().encode(scheme, input.shape, {input.dtype, input.data})
                                       : encode(scheme, input.shape, c.floats("input"));
  EXPECT_EQ(differences(packed(t), c.at("weight").data), 0u) << "codes";
  const bool nested = c.params.value("compress_statistics", false);
  if (nested) return check_nested(c, decode(*t.scale));
  const StoredArray* const absmax = c.find("weight.absmax_f32");
  EXPECT_EQ(differences(stored_absmax(c, t, block), (absmax != nullptr ? *absmax : c.at("weight.absmax")).data), 0u);
  check_values(c, decode(t));
}

void check_folder(const std::string& type) {
  const std::string folder = "bnb_" + type;
  const auto cases = golden_cases(folder);
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    check_encoder(c, type);
    if (c.find("weight.quant_state.bitsandbytes__" + type) == nullptr) continue;  // CUDA's functions write no state
    std::vector<std::string> arrays;
    for (const StoredArray& array : c.file.arrays())
      if (array.name.starts_with("weight")) arrays.push_back(array.name);
    check_values(c, decode(check_container(bitsandbytes(), c, arrays, "", Json::object())));
  }
  const auto models = golden_models(folder);
  for (const auto& model : models) check_model(model);
  std::cout << "cases: " << cases.size() + models.size() << '\n';
}

TEST(Golden, bnb_nf4) { check_folder("nf4"); }
TEST(Golden, bnb_fp4) { check_folder("fp4"); }

TEST(Golden, bnb_8bit_blockwise) {
  const auto cases = golden_cases("bnb_8bit_blockwise");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    if (c.find("dynamic_signed") != nullptr) {  // tables
      for (const auto& [array, name] : {std::pair("dynamic_signed", "dynamic8"), {"nf4", "nf4"}, {"fp4", "fp4"}}) {
        const ElementType& type = *find_element(name);
        const std::vector<float> map = c.floats(array);
        for (uint32_t code = 0; code < map.size(); ++code) EXPECT_EQ(type.decode(type, code), map[code]) << name;
      }
      continue;
    }
    const auto block = c.params["blocksize"].get<size_t>();
    const std::vector<float> input = c.floats("input");
    EXPECT_EQ(differences(dynamic_codes(c, input, block), c.at("q").data), 0u) << "codes";
    Scheme scheme = {.element = find_element("dynamic8"),
                     .scale = parameter(Grouping::flat(static_cast<int64_t>(block)), plain(DType::f32))};
    QuantizedTensor t = encode(scheme, c.at("input").shape, input);
    t.codes.assign(c.at("q").data.begin(), c.at("q").data.end());
    if (c.params["nested"]) {
      std::vector<float> centred = decode(*t.scale);
      for (float& value : centred) value -= c.floats("offset").at(0);
      EXPECT_EQ(differences(dynamic_codes(c, centred, block), c.at("absmax").data), 0u) << "nested codes";
      continue;
    }
    const std::vector<std::byte> absmax = stored_absmax(c, t, static_cast<int64_t>(block));
    EXPECT_EQ(differences(absmax, c.at("absmax").data), 0u) << "absmax";
    check_values(c, decode(t));
  }
  std::cout << "cases: " << cases.size() << '\n';
}

// ---- LLM.int8 ----

TEST(Golden, bnb_int8) {
  const auto cases = golden_cases("bnb_int8");
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    const StoredArray& input = c.at("input");
    const std::vector<float> values = c.floats("input"), maxima = c.floats("SCB");
    const auto threshold = c.params["threshold"].get<float>();
    const auto columns = static_cast<size_t>(input.shape.back());
    std::vector<int8_t> codes(values.size());
    for (size_t r = 0; r < maxima.size(); ++r)
      EXPECT_EQ(round_int8_row(std::span(values).subspan(r * columns, columns), threshold,
                               std::span(codes).subspan(r * columns, columns)),
                maxima[r]);
    if (maxima.size() > 1)  // of several rows, a column with an outlier is multiplied in floats as a whole
      for (size_t i = 0; i < values.size() && threshold > 0; ++i)
        if (std::fabs(values[i]) >= threshold)
          for (size_t r = 0; r < maxima.size(); ++r) codes[r * columns + i % columns] = 0;
    EXPECT_EQ(differences(std::as_bytes(std::span(codes)), c.at("weight").data), 0u) << "codes";
    check_values(c, decode(check_container(bitsandbytes(), c, {"weight", "SCB"}, "", Json::object())));
    if (input.dtype != DType::f16 || threshold > 0) continue;  // weights are rounded without a threshold
    const QuantizedTensor t = bitsandbytes().encode(eight_bits(), input.shape, {input.dtype, input.data});
    EXPECT_EQ(differences(t.codes, c.at("weight").data), 0u);
  }
  const auto models = golden_models("bnb_int8");
  for (const auto& model : models) check_model(model);
  std::cout << "cases: " << cases.size() + models.size() << '\n';
}

// ---- what the library refuses ----

/// Three arrays as they lie in a file.
struct Files {
  std::map<std::string, ArraySpec, std::less<>> arrays;
  std::map<std::string, std::vector<std::byte>> data;
  Json config = Json::object(), metadata = Json::object();

  explicit Files(std::vector<NamedArray> named = {}) {
    for (NamedArray& array : named) {
      data[array.spec.name] = std::move(array.data);
      arrays[array.spec.name] = array.spec;
    }
  }
  CheckpointView view() const {
    return {.arrays = arrays,
            .config = config,
            .quantization_metadata = metadata,
            .bytes = [this](const std::string& name) { return std::span<const std::byte>(data.at(name)); },
            .where = "memory"};
  }
};

std::vector<float> random_values(const Shape& shape, float zero_share = 0) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> values(static_cast<size_t>(element_count(shape)));
  for (float& value : values) value = uniform(random) < zero_share ? 0.0f : normal(random);
  if (!values.empty()) values[values.size() / 2] *= 40;  // an outlier
  return values;
}

std::vector<std::byte> as_dtype(DType dtype, std::span<const float> values) {
  std::vector<std::byte> bytes(values.size() * size_bytes(dtype));
  from_f32(dtype, values, bytes);
  return bytes;
}

StoredTensor stored_as(const Scheme& scheme, const Shape& shape, DType dtype) {
  return {.name = "layer.weight", .shape = shape, .scheme = scheme, .value_dtype = dtype};
}

Files written(const Scheme& scheme, const Shape& shape = {4, 64}, DType dtype = DType::bf16) {
  const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape));
  return Files(
      bitsandbytes().pack(stored_as(scheme, shape, dtype), bitsandbytes().encode(scheme, shape, {dtype, bytes})));
}

void list_renamed(const std::string& from, const std::string& to) {
  Files files = written(four_bits("nf4", 64));
  if (!to.empty()) {
    files.arrays[to] = files.arrays.at(from);
    files.data[to] = files.data.at(from);
  }
  files.arrays.erase(from);
  if (bitsandbytes().detect(files.view())) {
    bitsandbytes().list(files.view());
  } else {  // nothing says what the bytes are
    TemporaryDirectory directory;
    write_file(directory / "config.json", R"({"quantization_config": {"quant_method": "bitsandbytes"}})");
    std::vector<ArraySpec> specs;
    for (const auto& [name, spec] : files.arrays) specs.push_back(spec);
    SafetensorsWriter writer(directory / "model.safetensors", specs);
    for (const auto& [name, spec] : files.arrays) writer.add(files.data.at(name));
    writer.finish();
    const Checkpoint refused(directory.path());
  }
}

void must_fit(const Scheme& scheme) {
  const Fit fit = bitsandbytes().fit(scheme, {4, 64});
  if (fit.verdict == Verdict::impossible) throw Error({.code = "does-not-fit", .what = fit.reason});
}

void list_retyped(const Scheme& scheme, const std::string& array, DType dtype) {
  Files files = written(scheme);
  files.arrays.at(array).dtype = dtype;
  bitsandbytes().list(files.view());
}

// The calls are Python's; what corresponds to each here: a scheme to be planned, a weight to be quantized, a file.
TEST(Golden, bnb_negative_cases) {
  const std::string state = "layer.weight.quant_state.bitsandbytes__nf4";
  size_t count = 0;
  for (const char* folder : {"bnb_nf4", "bnb_fp4", "bnb_int8", "bnb_8bit_blockwise"})
    for (const NegativeCase& n : negative_cases(folder)) {
      SCOPED_TRACE(n.name);
      ++count;
      EXPECT_TRUE(n.raised);
      const auto block = n.params.value("blocksize", int64_t{0});
      const std::string message = n.message;
      const auto says = [&](std::string_view words) { return message.find(words) != std::string::npos; };
      if (says("blocksize")) {
        check_refused([&] { must_fit(four_bits("nf4", block)); });
      } else if (says("only supports 16/32-bit floats")) {
        const std::vector<std::byte> bytes(4 * 64 * sizeof(double));
        const auto dtype = dtype_from_name(message.substr(message.rfind('.') + 1)).value();
        check_refused([&] { bitsandbytes().encode(four_bits("nf4", 64), {4, 64}, {dtype, bytes}); });
      } else if (says("quant_type must be")) {
        check_refused([&] { must_fit({.element = &integer_element(4, true), .scale = four_bits("nf4", 64).scale}); });
      } else if (says("found neither") || says("is not provided")) {
        check_refused([&] { list_renamed(state, ""); });
      } else if (says("There should be exactly one")) {
        check_refused([&] { list_renamed(state, "layer.weight.quant_state.bitsandbytes__int4"); });
      } else if (says("must be int32") || says("stats must be float32")) {
        check_refused([&] { list_retyped(eight_bits(), "layer.SCB", DType::f16); });
      } else if (says("must be uint8")) {
        check_refused([&] { list_retyped(four_bits("nf4", 64, true), "layer.weight.absmax", DType::i8); });
      } else {
        ADD_FAILURE() << "a kind of case that is not known: " << n.function << ": " << n.message;
      }
    }
  if (count == 0) GTEST_SKIP() << "no golden cases here";
  std::cout << "cases: " << count << '\n';
}

// ---- round trips and damage ----

TEST(Bitsandbytes, WrittenReadAndWrittenAgainIsTheSame) {
  std::vector<Scheme> schemes = {eight_bits()};
  for (const char* type : {"nf4", "fp4"})
    for (int64_t block = 32; block <= 4096; block *= 2)
      for (const bool nested : {false, true}) schemes.push_back(four_bits(type, block, nested));
  for (const Scheme& scheme : schemes)
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
      for (const Shape& shape : {Shape{1, 1}, Shape{7, 33}, Shape{5, 100}, Shape{64, 256}})
        for (const float zeros : {0.0f, 0.97f, 1.0f}) {
          SCOPED_TRACE(describe(scheme) + " " + to_string(shape) + " " + std::string(info(dtype).name));
          ASSERT_EQ(bitsandbytes().fit(scheme, shape).verdict, Verdict::exact);
          const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape, zeros));
          const QuantizedTensor t = bitsandbytes().encode(scheme, shape, {dtype, bytes});
          check_sizes(t, "test");
          const Files files(bitsandbytes().pack(stored_as(scheme, shape, dtype), t));
          EXPECT_TRUE(check_view(bitsandbytes(), files.view()) == t);
          for (const float value : decode(t)) EXPECT_TRUE(std::isfinite(value));
        }
}

TEST(Bitsandbytes, TwoRoundingsAgreeButOnThresholds) {
  const Shape shape = {64, 256};
  const std::vector<float> values = random_values(shape);
  for (const char* type : {"nf4", "fp4"}) {
    const Scheme scheme = four_bits(type, 64);
    const QuantizedTensor cuda = bitsandbytes().encode(scheme, shape, {DType::f32, std::as_bytes(std::span(values))});
    const QuantizedTensor cpu = encode(scheme, shape, values);
    EXPECT_EQ(cuda.scale->codes, cpu.scale->codes);
    const std::vector<float> a = decode(cuda), b = decode(cpu);
    size_t different = 0;
    for (size_t i = 0; i < a.size(); ++i) different += a[i] != b[i];
    EXPECT_LE(different, 2u);
  }
}

TEST(Bitsandbytes, NotFiniteIsRefusedWithItsPosition) {
  for (const Scheme& scheme : {four_bits("nf4", 64), four_bits("fp4", 128, true), eight_bits()})
    for (const float bad : {NAN, INFINITY}) {
      std::vector<float> values = random_values({64, 256});
      values[777] = bad;
      try {
        bitsandbytes().encode(scheme, {64, 256}, {DType::f32, std::as_bytes(std::span(values))});
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "not-finite");
        EXPECT_NE(std::string(error.what()).find("777"), std::string::npos) << error.what();
      }
    }
  const std::vector<float> large(64, 1e5f);  // more than f16 holds
  check_refused([&] { bitsandbytes().encode(eight_bits(), {1, 64}, {DType::f32, std::as_bytes(std::span(large))}); });
}

/// The code of the Error that listing throws, or "none".
std::string listed(const Files& files) {
  try {
    bitsandbytes().list(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.code();
  }
  return "none";
}

TEST(Bitsandbytes, DamageIsRefused) {
  for (const Scheme& scheme : {four_bits("nf4", 64), four_bits("fp4", 64, true), eight_bits()}) {
    SCOPED_TRACE(describe(scheme));
    const Files good = written(scheme);
    EXPECT_EQ(listed(good), "none");
    for (const auto& [name, spec] : good.arrays) {
      SCOPED_TRACE(name);
      Files larger = good, retyped = good;
      retyped.arrays.at(name).dtype = DType::f64;
      EXPECT_EQ(listed(retyped), "bad-container");
      larger.arrays.at(name).shape.push_back(2);  // of a state any length is right that JSON has
      if (name.find("quant_state") == std::string::npos) {
        EXPECT_EQ(listed(larger), "bad-container");
      }
      if (name.find("quant_state") != std::string::npos || name.ends_with("weight_format") || name.ends_with("SCB"))
        continue;  // what makes it one of bitsandbytes', and what older files lack
      Files missing = good;
      missing.arrays.erase(name);
      // A U8 absmax without its map is as wrong as no absmax; without nested_absmax it must be F32.
      EXPECT_EQ(listed(missing), "bad-container");
    }
  }
}

TEST(Bitsandbytes, DamagedStatesAreRefused) {
  const std::string name = "layer.weight.quant_state.bitsandbytes__fp4";
  const Files good = written(four_bits("fp4", 64, true));
  const std::vector<std::byte>& state = good.data.at(name);
  const auto with = [&](std::string_view text) {
    Files files = good;
    const auto bytes = std::as_bytes(std::span(text));
    files.data[name].assign(bytes.begin(), bytes.end());
    files.arrays.at(name).shape = {static_cast<int64_t>(text.size())};
    return files;
  };
  const std::string text(reinterpret_cast<const char*>(state.data()), state.size());
  EXPECT_EQ(listed(with(text)), "none");
  for (size_t length = 0; length < text.size(); ++length)
    EXPECT_NE(listed(with(text.substr(0, length))), "none") << length;
  const auto replaced = [&](const std::string& from, const std::string& to) {
    std::string changed = text;
    EXPECT_NE(changed.find(from), std::string::npos) << from;
    changed.replace(changed.find(from), from.size(), to);
    return listed(with(changed));
  };
  EXPECT_EQ(replaced("\"fp4\"", "\"nf4\""), "bad-container");
  EXPECT_EQ(replaced("\"blocksize\": 64", "\"blocksize\": 48"), "bad-container");
  EXPECT_EQ(replaced("\"blocksize\": 64", "\"blocksize\": 128"), "bad-container");
  EXPECT_EQ(replaced("\"blocksize\": 64", "\"blocksize\": -64"), "bad-container");
  EXPECT_EQ(replaced("bfloat16", "int4"), "bad-container");
  EXPECT_EQ(replaced("[4, 64]", "[64, 4]"), "none");  // as many elements: what a matrix is, only the state says
  EXPECT_EQ(replaced("[4, 64]", "[4, 65]"), "bad-container");
  EXPECT_EQ(replaced("[4, 64]", "[4, 9223372036854775807]"), "bad-container");
  EXPECT_EQ(replaced("\"nested_blocksize\": 256", "\"nested_blocksize\": 0"), "bad-container");
  EXPECT_EQ(replaced("\"nested_offset\": ", "\"nested_offset\": 1e99, \"x\": "), "bad-container");
}

TEST(Bitsandbytes, ConfigurationSaysWhatTheLayersHave) {
  const StoredTensor four = stored_as(four_bits("nf4", 64, true), {4, 64}, DType::bf16);
  const StoredTensor eight = stored_as(eight_bits(), {4, 64}, DType::f16);
  const std::vector<std::string> kept = {"model.embed_tokens", "lm_head"};
  const auto config_of = [&](const StoredTensor& tensor) {
    OrderedJson config = OrderedJson::object();
    const OrderedJson record = OrderedJson::object();
    std::map<std::string, OrderedJson> files;
    bitsandbytes().write_metadata({.tensors = std::span(&tensor, 1), .kept = kept, .record = record},
                                  {.config = config, .files = files});
    EXPECT_TRUE(files.empty());
    return config["quantization_config"];
  };
  const OrderedJson a = config_of(four), b = config_of(eight);
  EXPECT_EQ(a["load_in_4bit"], true);
  EXPECT_EQ(a["bnb_4bit_quant_type"], "nf4");
  EXPECT_EQ(a["bnb_4bit_use_double_quant"], true);
  EXPECT_EQ(a["bnb_4bit_compute_dtype"], "bfloat16");
  EXPECT_EQ(a["llm_int8_skip_modules"], OrderedJson(kept));
  EXPECT_EQ(b["load_in_8bit"], true);
  EXPECT_EQ(b["llm_int8_threshold"], 6.0);
  const std::vector<StoredTensor> mixed = {four, eight};
  EXPECT_EQ(bitsandbytes().fit_model(mixed).verdict, Verdict::impossible);
  EXPECT_EQ(bitsandbytes().fit_model(std::span(&four, 1)).verdict, Verdict::exact);
}

}  // namespace
}  // namespace bitwright
