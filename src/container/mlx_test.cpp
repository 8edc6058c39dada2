#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "tests/golden_cases.hpp"
#include "tests/memory_checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

const Container& mlx() { return *find_container("mlx"); }

Scheme affine(int bits, int64_t group_size, DType dtype = DType::bf16) {
  return mlx().make_scheme({.bits = bits, .group_size = group_size}, dtype);
}
Scheme floats(const std::string& mode, bool global = false) {
  return mlx().make_scheme({.quant_type = mode,
                            .bits = mode == "mxfp8" ? 8 : 4,
                            .symmetric = true,
                            .group_size = mode == "nvfp4" ? 16 : 32,
                            .nested_scales = global},
                           DType::bf16);
}

// ---- as MLX's CPU rounds ----

struct CpuResult {
  std::vector<std::byte> codes, scales, biases;
};

CpuResult cpu_affine(std::span<const float> values, size_t group_size, int bits, DType dtype) {
  CpuResult out;
  std::vector<float> scales, biases;
  const auto most = static_cast<float>((1 << bits) - 1);
  for (size_t begin = 0; begin < values.size(); begin += group_size) {
    const auto group = values.subspan(begin, group_size);
    const auto [low, high] = std::minmax_element(group.begin(), group.end());
    const bool from_low = std::fabs(*low) > std::fabs(*high);
    float scale = std::max((*high - *low) / most, 1e-7f), bias = 0;
    if (!from_low) scale = -scale;
    const float edge = from_low ? *low : *high, steps = std::nearbyint(edge / scale);
    if (steps != 0) {
      scale = edge / steps;
      bias = edge;
    }
    for (const float value : group)
      out.codes.push_back(static_cast<std::byte>(std::clamp(std::nearbyint((value - bias) / scale), 0.0f, most)));
    scales.push_back(scale);
    biases.push_back(bias);
  }
  out.scales = as_dtype(dtype, scales);
  out.biases = as_dtype(dtype, biases);
  return out;
}

/// The code whose value is nearest, the first of several. Differences are numbers of `dtype`.
std::byte first_nearest(float value, DType dtype) {
  const ElementType& type = *find_element("float4_e2m1");
  uint32_t best = 0;
  float least = INFINITY;
  for (uint32_t code = 0; code < 16; ++code) {
    const float difference = std::fabs(round_to(dtype, value - type.decode(type, code)));
    if (difference < least) {
      least = difference;
      best = code;
    }
  }
  return static_cast<std::byte>(best);
}

std::byte fp8(float value) {
  const ElementType& type = float_element(DType::f8_e4m3);
  return static_cast<std::byte>(type.nearest(type, value));
}

/// Each operation gives a number of the weight's type; what meets f32 (nvfp4's global scale, or 1) becomes f32.
CpuResult cpu_floats(std::span<const float> values, const std::string& mode, DType dtype, float global) {
  CpuResult out;
  const size_t group_size = mode == "nvfp4" ? 16 : 32;
  const float spread = global == 0 ? 1 : 2688 / global;
  for (size_t begin = 0; begin < values.size(); begin += group_size) {
    const auto group = values.subspan(begin, group_size);
    float most = 0;
    for (const float value : group) most = std::max(most, std::fabs(value));
    const float ideal = round_to(dtype, most / (mode == "mxfp8" ? 448.0f : 6.0f));
    float divisor = 1;
    if (mode == "nvfp4") {
      out.scales.push_back(fp8(ideal * spread));
      divisor = e4m3_to_f32(std::to_integer<uint8_t>(out.scales.back()));
    } else {
      const float power = ideal == 0 ? 0 : std::nearbyint(round_to(dtype, std::log2(ideal)));
      out.scales.push_back(static_cast<std::byte>(static_cast<int>(power) + 127));
      divisor = round_to(dtype, std::exp2(power));
    }
    for (const float value : group) {
      const float scaled = round_to(dtype, value / divisor);
      if (mode == "mxfp8")
        out.codes.push_back(fp8(scaled));
      else
        out.codes.push_back(mode == "nvfp4" ? first_nearest(scaled * spread, DType::f32)
                                            : first_nearest(scaled, dtype));
    }
  }
  return out;
}

// ---- golden/mlx_*: written by mlx 0.32.2, never by this program ----

DType dtype_of(const GoldenCase& c) {
  return *dtype_from_name(c.params["dtype"] == "bf16"  ? "bfloat16"
                          : c.params["dtype"] == "f16" ? "float16"
                                                       : "float32");
}

void expect_array(const GoldenCase& c, const std::string& array, std::span<const std::byte> found) {
  const auto expected = c.at(array).data;
  ASSERT_EQ(found.size(), expected.size()) << array;
  size_t different = 0;
  for (size_t i = 0; i < found.size(); ++i) different += found[i] != expected[i];
  EXPECT_EQ(different, 0u) << array;
}

/// As Metal's fp_quantize_dequantize has it, which divides by the factor that scales were multiplied by; a scale is
/// multiplied by its reciprocal, rounded, where a checkpoint is decoded.
std::vector<float> decode_as_written(const QuantizedTensor& t) {
  if (t.scale->scale == nullptr) return decode(t);
  QuantizedTensor scales = *t.scale;
  scales.scheme = plain(DType::f8_e4m3);
  scales.scale = nullptr;
  float global = 0;
  std::memcpy(&global, t.scale->scale->codes.data(), sizeof global);
  std::vector<float> values = decode(scales);
  for (float& value : values) value /= 2688 / global;
  QuantizedTensor divided = t;
  divided.scheme.scale->scheme = std::make_shared<const Scheme>(plain(DType::f32));
  const auto bytes = std::as_bytes(std::span(values));
  divided.scale = std::make_shared<QuantizedTensor>(
      QuantizedTensor{.scheme = plain(DType::f32), .shape = scales.shape, .codes = {bytes.begin(), bytes.end()}});
  return decode(divided);
}

/// What this program writes is what MLX's kernels for Metal make: metal_* where they differ from the CPU.
void check_written(const GoldenCase& c, const Scheme& scheme) {
  const Shape& shape = c.at("input").shape;
  const std::vector<std::byte> weight = as_dtype(dtype_of(c), c.floats("input"));
  const QuantizedTensor t = mlx().encode(scheme, shape, {dtype_of(c), weight});
  const StoredTensor stored = {.name = "weight", .shape = shape, .scheme = scheme};
  for (const NamedArray& array : mlx().pack(stored, t)) {
    const std::string name = array.spec.name.substr(array.spec.name.rfind('.') + 1);
    expect_array(c, c.find("metal_" + name) != nullptr ? "metal_" + name : name, array.data);
  }
  if (c.find("metal_dequantized") != nullptr) {
    EXPECT_EQ(decode_as_written(t), c.floats("metal_dequantized"));
  }
}

void check_cpu(const GoldenCase& c, const QuantizedTensor& found, const std::string& mode) {
  std::vector<float> values = c.floats("input");
  for (float& value : values) value = round_to(dtype_of(c), value);
  const auto group_size = c.params["group_size"].get<size_t>();
  const float global = c.find("global_scale") == nullptr ? 0 : c.floats("global_scale")[0];
  const CpuResult cpu = mode == "affine" ? cpu_affine(values, group_size, c.params["bits"].get<int>(), dtype_of(c))
                                         : cpu_floats(values, mode, dtype_of(c), global);
  EXPECT_TRUE(found.codes == cpu.codes) << "codes of the CPU";
  EXPECT_TRUE(found.scale->codes == cpu.scales) << "scales of the CPU";
  if (found.offset != nullptr) {
    EXPECT_TRUE(found.offset->codes == cpu.biases) << "biases of the CPU";
  }
}

/// Codes of e4m3 and their values. Of 127 and 255, which no encoder makes, MLX makes ±480; they are NaN here.
void check_table(const GoldenCase& c) {
  const std::vector<float> input = c.floats("input"), decoded = c.floats("decoded");
  std::vector<std::byte> codes;
  for (const float value : input) codes.push_back(fp8(value));
  expect_array(c, "encoded", codes);
  for (size_t i = 0; i < decoded.size(); ++i) {
    const auto code = std::to_integer<uint8_t>(c.at("codes").data[i]);
    if ((code & 127) == 127)
      EXPECT_EQ(std::fabs(decoded[i]), 480);
    else
      EXPECT_EQ(e4m3_to_f32(code), decoded[i]) << int{code};
  }
}

void check_folder(const std::string& mode) {
  const std::string folder = "mlx_" + mode;
  const auto cases = golden_cases(folder);
  if (cases.empty()) GTEST_SKIP() << "no golden cases here";
  for (const GoldenCase& c : cases) {
    SCOPED_TRACE(c.name);
    if (c.find("encoded") != nullptr) {
      check_table(c);
      continue;
    }
    std::vector<std::string> arrays;
    for (const char* name : {"weight", "scales", "biases", "global_scale"})
      if (c.find(name) != nullptr) arrays.emplace_back(name);
    const Json config = {
        {"quantization",
         {{"bits", c.params["bits"]}, {"group_size", c.params["group_size"]}, {"mode", c.params["mode"]}}}};
    const QuantizedTensor t = check_container(mlx(), c, arrays, "layer.", config);
    if (mode == "affine") check_values(c, decode_in_scale_dtype(t));
    if (mode != "affine" || dtype_of(c) == DType::f32) check_values(c, decode(t));
    check_cpu(c, t, mode);
    check_written(c, t.scheme);
  }
  const auto models = golden_models(folder);
  for (const auto& model : models) check_model(model, mode == "affine" ? decode_in_scale_dtype : decode);
  std::cout << "cases: " << cases.size() + models.size() << '\n';
}

TEST(Golden, mlx_affine) { check_folder("affine"); }
TEST(Golden, mlx_mxfp4) { check_folder("mxfp4"); }
TEST(Golden, mlx_mxfp8) { check_folder("mxfp8"); }
TEST(Golden, mlx_nvfp4) { check_folder("nvfp4"); }

// ---- what the library refuses ----

/// Arrays as a writer would make them who does not ask.
MemoryCheckpoint careless(const Json& params) {
  const auto shape = params["shape"].get<Shape>();
  const auto narrowed = [&](int64_t columns) {
    Shape narrow = shape;
    narrow.back() = columns;
    return narrow;
  };
  const auto bits = params["bits"].get<int64_t>(), group_size = params["group_size"].get<int64_t>();
  const bool eight = params["mode"].get<std::string>().find("fp") != std::string::npos;
  MemoryCheckpoint files;
  const auto add = [&](const std::string& name, DType dtype, const Shape& of) {
    const ArraySpec spec = {name, dtype, of};
    files.add(spec, std::vector<std::byte>(spec.bytes()));
  };
  add("layer.weight", DType::u32, narrowed(shape.back() * bits / 32));
  add("layer.scales", eight ? DType::u8 : DType::f32, narrowed(shape.back() / group_size));
  if (!eight) add("layer.biases", DType::f32, narrowed(shape.back() / group_size));
  if (params["global_scale"] != 0) add("layer.global_scale", DType::f32, {});
  files.config["quantization"] = {{"bits", bits}, {"group_size", group_size}, {"mode", params["mode"]}};
  return files;
}

// The calls are Python's; what corresponds to each here: a checkpoint that was written so, and a weight to be
// quantized.
TEST(Golden, mlx_negative_cases) {
  size_t count = 0;
  for (const char* folder : {"mlx_affine", "mlx_mxfp4", "mlx_mxfp8", "mlx_nvfp4"})
    for (const NegativeCase& n : negative_cases(folder)) {
      SCOPED_TRACE(n.name);
      ++count;
      const std::string type = n.params["dtype"];
      if (!type.starts_with("f") && !type.starts_with("bf")) {
        const std::vector<std::byte> bytes(4 * 64 * 8);
        check_refused([&] { mlx().encode(affine(4, 64), {8, 64}, {DType::i32, bytes}); });
        continue;
      }
      const MemoryCheckpoint files = careless(n.params);
      if (n.raised)
        check_refused([&] { mlx().list(files.view()); });
      else
        EXPECT_EQ(mlx().list(files.view()).size(), 1u);
    }
  if (count == 0) GTEST_SKIP() << "no golden cases here";
  std::cout << "cases: " << count << '\n';
}

TEST(Mlx, FitsWhatTheLibraryTakes) {
  const auto verdict = [](const Scheme& scheme, const Shape& shape = {4, 256}) {
    const Fit fit = mlx().fit(scheme, shape);
    EXPECT_EQ(fit.reason.empty(), fit.verdict == Verdict::exact);
    return fit.verdict;
  };
  for (const int bits : {2, 3, 4, 5, 6, 8})
    for (const int64_t group : {32, 64, 128}) EXPECT_EQ(verdict(affine(bits, group)), Verdict::exact);
  for (const int bits : {1, 7}) EXPECT_EQ(verdict(affine(bits, 64)), Verdict::impossible);
  for (const int64_t group : {16, 48, 256}) EXPECT_EQ(verdict(affine(4, group)), Verdict::impossible);
  EXPECT_EQ(verdict(affine(4, 64), {4, 200}), Verdict::impossible);
  EXPECT_EQ(verdict(affine(4, 64), {256}), Verdict::impossible);
  EXPECT_EQ(verdict(affine(4, 64), {2, 4, 256}), Verdict::exact);  // experts
  for (const char* mode : {"mxfp4", "mxfp8", "nvfp4"}) EXPECT_EQ(verdict(floats(mode)), Verdict::exact);
  EXPECT_EQ(verdict(floats("nvfp4"), {4, 48}), Verdict::exact);
  EXPECT_EQ(verdict(floats("mxfp4"), {4, 48}), Verdict::impossible);
  EXPECT_EQ(verdict(floats("nvfp4", true)), Verdict::exact);
  EXPECT_EQ(verdict(floats("nvfp4", true), {2, 4, 256}), Verdict::impossible);
  EXPECT_EQ(verdict(floats("mxfp4", true)), Verdict::impossible);
  EXPECT_EQ(verdict(mlx().make_scheme({.quant_type = "mxfp4", .symmetric = true, .group_size = 64}, DType::bf16)),
            Verdict::impossible);
  EXPECT_EQ(verdict(mlx().make_scheme(
                {.quant_type = "mxfp4", .symmetric = true, .group_size = 32, .scale_dtype = "float32"}, DType::bf16)),
            Verdict::impossible);
  for (const SchemeChoice& wrong :
       {SchemeChoice{.symmetric = true, .group_size = 64}, SchemeChoice{.granularity = "channel"},
        SchemeChoice{.group_size = 64, .nested_scales = true}})
    EXPECT_EQ(verdict(mlx().make_scheme(wrong, DType::bf16)), Verdict::impossible);
  EXPECT_EQ(verdict(plain(DType::f32)), Verdict::impossible);
  EXPECT_EQ(verdict({.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))}),
            Verdict::impossible);
}

// ---- round trips ----

StoredTensor stored_as(const Scheme& scheme, const Shape& shape, DType dtype) {
  return {.name = "layer.weight", .shape = shape, .scheme = scheme, .value_dtype = dtype};
}

MemoryCheckpoint written(const Scheme& scheme, const Shape& shape = {4, 128}, DType dtype = DType::bf16) {
  const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape));
  return written_model(mlx(), stored_as(scheme, shape, dtype), mlx().encode(scheme, shape, {dtype, bytes}));
}

std::vector<Scheme> all_schemes(DType dtype) {
  std::vector<Scheme> schemes;
  for (const int bits : {2, 3, 4, 5, 6, 8})
    for (const int64_t group : {32, 64, 128}) schemes.push_back(affine(bits, group, dtype));
  for (const char* mode : {"mxfp4", "mxfp8", "nvfp4"}) schemes.push_back(floats(mode));
  schemes.push_back(floats("nvfp4", true));
  return schemes;
}

TEST(Mlx, WrittenReadAndWrittenAgainIsTheSame) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const Scheme& scheme : all_schemes(dtype))
      for (Shape shape : {Shape{1, 1}, Shape{7, 3}, Shape{33, 5}, Shape{64, 2}, Shape{0, 1}, Shape{2, 3, 2}}) {
        shape.back() *= scheme.scale->grouping.size;
        if (mlx().fit(scheme, shape).verdict != Verdict::exact) continue;
        for (const float zeros : {0.0f, 0.97f, 1.0f}) {
          SCOPED_TRACE(describe(scheme) + " " + to_string(shape) + " " + std::string(info(dtype).name));
          const std::vector<std::byte> bytes = as_dtype(dtype, random_values(shape, zeros));
          const QuantizedTensor t = mlx().encode(scheme, shape, {dtype, bytes});
          check_sizes(t, "test");
          const MemoryCheckpoint files = written_model(mlx(), stored_as(scheme, shape, dtype), t);
          EXPECT_TRUE(check_view(mlx(), files.view()) == t);
          for (const float value : decode(t)) EXPECT_TRUE(std::isfinite(value));
        }
      }
}

/// Of every mode, no value is further from its code than a step (a power of two below the next, a tie).
TEST(Mlx, ValuesAreNearTheirCodes) {
  const Shape shape = {16, 256};
  const std::vector<float> values = random_values(shape);
  const std::vector<std::byte> bytes = as_dtype(DType::f32, values);
  for (const Scheme& scheme : all_schemes(DType::f32)) {
    SCOPED_TRACE(describe(scheme));
    const QuantizedTensor t = mlx().encode(scheme, shape, {DType::f32, bytes});
    const std::vector<float> decoded = decode(t), scales = decode(*t.scale);
    const GroupMap groups(scheme.scale->grouping, shape);
    for (size_t i = 0; i < values.size(); ++i) {
      const float scale = std::fabs(scales[static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)))]);
      const float steps = std::fabs(values[i] - decoded[i]) / scale;
      const bool integer = scheme.offset.has_value();
      // Integers: a step at the far end. e2m1 up to 6, its widest step 2; e4m3 up to 448, its widest 32. A power of two
      // may be too small by 2^0.5, and what is beyond the largest code is cut off.
      const float bound = integer ? 1.001f : scheme.element->bits == 4 ? 2.5f : 190.0f;
      EXPECT_LE(steps, bound) << i;
    }
  }
}

TEST(Mlx, NotFiniteIsRefusedWithItsPosition) {
  for (const Scheme& scheme : all_schemes(DType::f32))
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      std::vector<float> values = random_values({64, 256});
      values[777] = bad;
      try {
        mlx().encode(scheme, {64, 256}, {DType::f32, std::as_bytes(std::span(values))});
        ADD_FAILURE() << "not refused";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "not-finite");
        EXPECT_NE(std::string(error.what()).find("777"), std::string::npos) << error.what();
      }
    }
  std::vector<float> wide(64, 3e38f);
  wide[0] = -3e38f;
  for (const DType scales : {DType::f32, DType::f16})
    check_refused([&] { mlx().encode(affine(4, 64, scales), {1, 64}, {DType::f32, std::as_bytes(std::span(wide))}); });
}

// ---- damage ----

/// The code of the Error that listing throws, or "none".
std::string listed(const MemoryCheckpoint& files) {
  try {
    mlx().list(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.code();
  }
  return "none";
}

TEST(Mlx, DamageIsRefused) {
  for (const Scheme& scheme :
       {affine(4, 64), affine(3, 32), floats("mxfp4"), floats("mxfp8"), floats("nvfp4"), floats("nvfp4", true)}) {
    SCOPED_TRACE(describe(scheme));
    const MemoryCheckpoint good = written(scheme);
    EXPECT_EQ(listed(good), "none");
    for (const auto& [name, spec] : good.arrays) {
      SCOPED_TRACE(name);
      for (size_t axis = 0; axis < spec.shape.size(); ++axis)
        for (const int64_t wrong : {int64_t{0}, spec.shape[axis] + 1, spec.shape[axis] * 2, INT64_MAX / 2}) {
          MemoryCheckpoint changed = good;
          changed.arrays.at(name).shape[axis] = wrong;
          EXPECT_EQ(listed(changed), "bad-container") << axis << " " << wrong;
        }
      for (const DTypeInfo& dtype : all_dtypes()) {
        if (dtype.dtype == spec.dtype) continue;
        MemoryCheckpoint changed = good;
        changed.arrays.at(name).dtype = dtype.dtype;
        EXPECT_EQ(listed(changed), "bad-container") << dtype.name;
      }
      MemoryCheckpoint deeper = good, missing = good;
      deeper.arrays.at(name).shape.push_back(1);
      EXPECT_EQ(listed(deeper), "bad-container");
      missing.arrays.erase(name);
      if (name != "layer.weight" && name != "layer.global_scale") {
        EXPECT_EQ(listed(missing), "bad-container");
      }
    }
    MemoryCheckpoint swapped = good;
    std::swap(swapped.arrays.at("layer.weight"), swapped.arrays.at("layer.scales"));
    EXPECT_EQ(listed(swapped), "bad-container");
  }
  MemoryCheckpoint extra = written(floats("mxfp4"));
  extra.add({"layer.biases", DType::bf16, {4, 4}}, std::vector<std::byte>(32));
  EXPECT_EQ(listed(extra), "bad-container");
}

TEST(Mlx, SettingsThatDisagreeAreRefused) {
  const MemoryCheckpoint good = written(affine(4, 64));
  const auto with = [&](const Json& quantization) {
    MemoryCheckpoint files = good;
    files.config["quantization"] = quantization;
    return listed(files);
  };
  EXPECT_EQ(with({{"bits", 4}, {"group_size", 64}}), "none");  // older files have no mode
  EXPECT_EQ(with({{"bits", nullptr}, {"group_size", nullptr}, {"mode", nullptr}}), "none");
  EXPECT_EQ(with({{"bits", 8}, {"group_size", 64}}), "bad-container");
  EXPECT_EQ(with({{"bits", 8}, {"group_size", 32}}), "none");  // as many words and scales: [4, 64]
  EXPECT_EQ(with({{"bits", 4}, {"group_size", 48}}), "bad-container");
  EXPECT_EQ(with({{"bits", -4}, {"group_size", -64}}), "bad-container");
  EXPECT_EQ(with({{"bits", "4"}, {"group_size", 64}}), "bad-container");
  EXPECT_EQ(with({{"bits", 4.5}, {"group_size", 64}}), "bad-container");
  EXPECT_EQ(with({{"bits", UINT64_MAX}, {"group_size", 64}}), "bad-container");
  EXPECT_EQ(with({{"bits", 4}, {"group_size", 64}, {"mode", "q4"}}), "bad-container");
  EXPECT_EQ(with({{"bits", 4}, {"group_size", 64}, {"mode", 4}}), "bad-container");
  EXPECT_EQ(with({{"bits", 4}, {"group_size", 32}, {"mode", "mxfp4"}}), "bad-container");
  EXPECT_EQ(with({{"bits", 4}, {"group_size", 64}, {"layer", false}}), "bad-container");
  EXPECT_EQ(with({{"bits", 4}, {"group_size", 64}, {"layer", 4}}), "bad-container");
  EXPECT_EQ(with("affine"), "bad-container");
  MemoryCheckpoint none = good;
  none.config = Json::object();
  EXPECT_EQ(listed(none), "bad-container");
  none.config["quantization_config"] = good.config["quantization_config"];  // alone is enough
  EXPECT_EQ(listed(none), "none");
}

// ---- models ----

void add_layer(MemoryCheckpoint& files, const std::string& name, const Scheme& scheme) {
  const Shape shape = {4, 128};
  const std::vector<std::byte> bytes = as_dtype(DType::bf16, random_values(shape));
  StoredTensor stored = stored_as(scheme, shape, DType::bf16);
  stored.name = name + ".weight";
  for (NamedArray& array : mlx().pack(stored, mlx().encode(scheme, shape, {DType::bf16, bytes})))
    files.add(array.spec, std::move(array.data));
}

// As mlx-lm has it: a layer's own settings stand alone, the mode's defaults in place of what they leave out.
TEST(Mlx, LayersHaveTheirOwnSettings) {
  MemoryCheckpoint files;
  add_layer(files, "model.embed_tokens", affine(8, 64));
  add_layer(files, "model.layers.0.up", floats("mxfp4"));
  add_layer(files, "model.layers.1.up", affine(4, 64));
  add_layer(files, "model.layers.2.up", floats("nvfp4"));
  add_layer(files, "model.layers.3.up", floats("mxfp4"));
  files.add({"model.norm.weight", DType::bf16, {128}}, std::vector<std::byte>(256));
  files.config = {{"torch_dtype", "float16"},
                  {"quantization",
                   {{"bits", 4},
                    {"group_size", 32},
                    {"mode", "mxfp4"},
                    {"model.embed_tokens", {{"bits", 8}, {"group_size", 64}}},
                    {"model.layers.1.up", {{"bits", 4}}},
                    {"model.layers.2.up", {{"mode", "nvfp4"}}},
                    {"model.layers.3.up", true},
                    {"lm_head", false}}}};
  TemporaryDirectory directory;
  files.write(directory.path());
  const Checkpoint model(directory.path());
  EXPECT_EQ(model.container(), &mlx());
  const auto entry = [&](const std::string& name) { return *model.find(name + ".weight"); };
  EXPECT_EQ(entry("model.embed_tokens").scheme, affine(8, 64));
  EXPECT_EQ(entry("model.layers.0.up").scheme, floats("mxfp4"));
  EXPECT_EQ(entry("model.layers.0.up").dtype, DType::f16);
  EXPECT_EQ(entry("model.layers.1.up").scheme, affine(4, 64));
  EXPECT_EQ(entry("model.layers.1.up").dtype, DType::bf16);  // its scales'
  EXPECT_EQ(entry("model.layers.2.up").scheme, floats("nvfp4"));
  EXPECT_EQ(entry("model.layers.3.up").scheme, floats("mxfp4"));
  EXPECT_FALSE(entry("model.norm").quantized());
  EXPECT_EQ(model.quantized_model().skipped, std::vector<std::string>{"lm_head"});
}

OrderedJson config_of(const std::vector<StoredTensor>& tensors, OrderedJson config = OrderedJson::object()) {
  const OrderedJson record = OrderedJson::object();
  const std::vector<std::string> kept = {"lm_head"};
  std::map<std::string, OrderedJson> files;
  mlx().write_metadata({.tensors = tensors, .kept = kept, .record = record}, {.config = config, .files = files});
  EXPECT_TRUE(files.empty());
  return config;
}

TEST(Mlx, ConfigurationSaysWhatTheLayersHave) {
  std::vector<StoredTensor> tensors;
  for (const Scheme& scheme : {affine(8, 64), affine(4, 32), floats("mxfp8"), affine(4, 32)}) {
    tensors.push_back(stored_as(scheme, {4, 128}, DType::bf16));
    tensors.back().name = "model.layers." + std::to_string(tensors.size() - 1) + ".up.weight";
  }
  const OrderedJson config = config_of(tensors);
  const OrderedJson expected = {{"group_size", 32},
                                {"bits", 4},
                                {"mode", "affine"},
                                {"model.layers.0.up", {{"group_size", 64}, {"bits", 8}, {"mode", "affine"}}},
                                {"model.layers.2.up", {{"group_size", 32}, {"bits", 8}, {"mode", "mxfp8"}}}};
  EXPECT_EQ(config["quantization"], expected);
  EXPECT_EQ(config["quantization_config"], expected);
  EXPECT_FALSE(config.contains("quantize_activations"));

  EXPECT_EQ(mlx().fit_model(tensors).verdict, Verdict::exact);
  tensors[0].name = "model.layers.0.experts.gate_up_proj";
  EXPECT_EQ(mlx().fit_model(tensors).verdict, Verdict::impossible);
  const std::vector<StoredTensor> global = {stored_as(floats("nvfp4", true), {4, 128}, DType::bf16)};
  EXPECT_EQ(mlx().fit_model(global).verdict, Verdict::impossible);
}

TEST(Mlx, InputsThatAreQuantizedAreReadAndWritten) {
  MemoryCheckpoint files = written(floats("nvfp4"));
  EXPECT_FALSE(mlx().list(files.view())[0].linear.input.has_value());
  files.config["quantize_activations"] = true;
  const std::vector<StoredTensor> tensors = mlx().list(files.view());
  ASSERT_TRUE(tensors[0].linear.input.has_value());
  EXPECT_TRUE(tensors[0].linear.input->dynamic);
  EXPECT_EQ(tensors[0].linear.input->scheme, floats("nvfp4"));
  EXPECT_EQ(config_of(tensors)["quantize_activations"], true);
}

TEST(Mlx, ModelsThatMlxLmWouldNotLoadAreRefused) {
  StoredTensor expert = stored_as(affine(4, 64), {4, 128}, DType::bf16);
  expert.name = "model.layers.0.mlp.experts.0.up_proj.weight";
  const OrderedJson qwen = {{"model_type", "qwen3_moe"}}, olmoe = {{"model_type", "olmoe"}};
  check_refused([&] { config_of({expert}, qwen); });
  EXPECT_TRUE(config_of({expert}, olmoe).contains("quantization"));
  expert.name = "model.layers.0.self_attn.q_proj.weight";
  EXPECT_TRUE(config_of({expert}, qwen).contains("quantization"));
}

}  // namespace
}  // namespace bitwright
