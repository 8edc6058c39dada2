#include <gtest/gtest.h>

#include <algorithm>
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

const Container& modelopt() { return *find_container("modelopt"); }

Scheme scheme_of(std::string_view type, std::string_view granularity, int64_t size = 0) {
  return modelopt().make_scheme(
      {.quant_type = type, .bits = 8, .granularity = granularity, .group_size = size, .scale_dtype = "float32"},
      DType::bf16);
}
Scheme nvfp4() { return scheme_of("nvfp4", "group", 16); }
Scheme channel() { return scheme_of("e4m3", "channel"); }
Scheme block() { return scheme_of("e4m3", "block", 128); }
Scheme tensor() { return scheme_of("e4m3", "tensor"); }

StoredTensor stored(const Scheme& scheme, const Shape& shape, DType dtype = DType::bf16) {
  return {.name = "layer.weight", .shape = shape, .scheme = scheme, .value_dtype = dtype};
}

/// With the scale that ModelOpt calibrates for the layer's inputs.
StoredTensor calibrated(StoredTensor t) {
  const float scale = 0.03125f;
  const auto bytes = std::as_bytes(std::span(&scale, 1));
  const bool four = t.scheme.element->bits == 4;
  t.linear.input = ActivationScheme{.scheme = t.scheme, .dynamic = four};
  t.linear.input->scale = std::make_shared<QuantizedTensor>(
      QuantizedTensor{.scheme = plain(DType::f32), .shape = {}, .codes = {bytes.begin(), bytes.end()}});
  return t;
}

TEST(ModelOpt, WrittenReadAndWrittenAgainIsTheSame) {
  for (const Scheme& scheme : {nvfp4(), channel(), block(), tensor()})
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
      for (const Shape& shape : {Shape{1, 16}, Shape{7, 48}, Shape{130, 272}})
        for (const float zeros : {0.0f, 0.97f, 1.0f})
          for (const bool with_input : {false, true}) {
            SCOPED_TRACE(describe(scheme) + " " + to_string(shape) + " " + std::string(info(dtype).name));
            if (with_input ? scheme == channel() || scheme == block() : scheme == tensor()) continue;
            const StoredTensor plain_one = stored(scheme, shape, dtype);
            const StoredTensor t = with_input ? calibrated(plain_one) : plain_one;
            const QuantizedTensor q = encoded(modelopt(), t, random_values(shape, zeros));
            check_comes_back(modelopt(), t, q);
            for (const float value : decode(q)) EXPECT_TRUE(std::isfinite(value));
          }
}

// NVFP4QTensor's steps, one after the other in f32; its table of bounds, ties to the even code.
TEST(ModelOpt, Nvfp4IsModelOpts) {
  const Shape shape = {5, 64};
  std::vector<float> values = random_values(shape, 0.1f);
  std::fill_n(values.begin() + 64, 16, 0.0f);
  std::fill_n(values.begin() + 128, 16, 1e-9f);
  const QuantizedTensor t = modelopt().encode(nvfp4(), shape, {DType::f32, std::as_bytes(std::span(values))});
  float most = 0;
  for (const float value : values) most = std::max(most, std::fabs(value));
  const float scale_2 = most / (6.0f * 448.0f);
  EXPECT_EQ(decode(*t.scale->scale).at(0), scale_2);
  const float bounds[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  for (size_t g = 0; g < values.size() / 16; ++g) {
    float largest = 0;
    for (size_t i = 16 * g; i < 16 * g + 16; ++i) largest = std::max(largest, std::fabs(values[i]));
    float scale = largest / (6.0f * scale_2);
    if (scale == 0) scale = 1;
    const uint8_t code = f32_to_e4m3(std::clamp(scale, 0x1p-9f, 448.0f));
    EXPECT_EQ(std::to_integer<uint8_t>(t.scale->codes[g]), code) << g;
    for (size_t i = 16 * g; i < 16 * g + 16; ++i) {
      const float scaled = values[i] / (e4m3_to_f32(code) * scale_2), magnitude = std::fabs(scaled);
      int expected = 0;  // searchsorted from the left, one more on the bounds of odd index
      while (expected < 7 && bounds[expected] < magnitude) ++expected;
      if (magnitude == 0.75f || magnitude == 1.75f || magnitude == 3.5f) ++expected;
      if (scaled < 0) expected |= 8;
      EXPECT_EQ(std::to_integer<int>(t.codes[i]), expected) << i;
    }
  }
}

TEST(ModelOpt, Fp8IsModelOpts) {
  const std::vector<float> values = {3.0f, -1.0f, 0.3f, 0.7f};
  const std::vector<std::byte> half = as_dtype(DType::bf16, values);
  const QuantizedTensor t = modelopt().encode(tensor(), {2, 2}, {DType::bf16, half});
  const float scale = 3.0f / 448;
  EXPECT_EQ(decode(*t.scale).at(0), scale);
  const QuantizedTensor rows = modelopt().encode(channel(), {1, 4}, {DType::bf16, half});
  for (size_t i = 0; i < values.size(); ++i) {
    const float value = round_to(DType::bf16, values[i]);  // by a number the quotient stays bfloat16, by a row's not
    EXPECT_EQ(std::to_integer<uint8_t>(t.codes[i]), f32_to_e4m3(round_to(DType::bf16, value / scale))) << i;
    EXPECT_EQ(std::to_integer<uint8_t>(rows.codes[i]), f32_to_e4m3(std::min(value / scale, 448.0f))) << i;
  }
}

TEST(ModelOpt, NotFiniteIsRefusedWithItsPosition) {
  for (const Scheme& scheme : {nvfp4(), channel(), block(), tensor()}) {
    std::vector<float> values = random_values({64, 256});
    values[777] = NAN;
    try {
      modelopt().encode(scheme, {64, 256}, {DType::f32, std::as_bytes(std::span(values))});
      ADD_FAILURE() << "not refused";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), "not-finite");
      EXPECT_NE(std::string(error.what()).find("777"), std::string::npos) << error.what();
    }
  }
}

MemoryCheckpoint written(const StoredTensor& t) { return written_by(modelopt(), t, random_values(t.shape)); }

TEST(ModelOpt, DamageIsRefused) {
  const Shape shape = {128, 144};
  for (const StoredTensor& t : {calibrated(stored(nvfp4(), shape)), calibrated(stored(tensor(), shape))}) {
    SCOPED_TRACE(describe(t.scheme));
    check_damage(modelopt(), written(t));
  }
  MemoryCheckpoint ragged = written(stored(nvfp4(), shape));
  ragged.arrays.at("layer.weight").shape = {128, 68};
  EXPECT_EQ(code_of_listing(modelopt(), ragged), "bad-container");
}

TEST(ModelOpt, ConfigurationsAreTheOwners) {
  const MemoryCheckpoint files = written(calibrated(stored(nvfp4(), {4, 32})));
  const Json& own = files.documents.at("hf_quant_config.json");
  EXPECT_EQ(own["producer"]["name"], "modelopt");
  EXPECT_EQ(own["quantization"]["quant_algo"], "NVFP4");
  EXPECT_EQ(own["quantization"]["group_size"], 16);
  const Json& config = files.config["quantization_config"];
  EXPECT_EQ(config["quant_method"], "modelopt");
  EXPECT_EQ(config["config_groups"]["group_0"]["input_activations"]["num_bits"], 4);
  EXPECT_EQ(written(stored(nvfp4(), {4, 32})).config["quantization_config"]["quant_algo"], "W4A16_NVFP4");
  EXPECT_EQ(written(stored(channel(), {4, 32})).config["quantization_config"]["quant_algo"],
            "FP8_PER_CHANNEL_PER_TOKEN");
  // Either file alone says enough; another library's configuration is not ModelOpt's.
  MemoryCheckpoint alone = files;
  alone.config.erase("quantization_config");
  check_view(modelopt(), alone.view());
  MemoryCheckpoint other = files;
  other.documents.clear();
  check_view(modelopt(), other.view());
  other.config["quantization_config"]["quant_method"] = "compressed-tensors";
  EXPECT_FALSE(modelopt().detect(other.view()));
}

TEST(ModelOpt, AlgorithmsMustBeKnownAndAgree) {
  const MemoryCheckpoint files = written(stored(nvfp4(), {4, 32}));
  const auto as = [&](const Json& algorithm) {
    MemoryCheckpoint changed = files;
    changed.config["quantization_config"]["quant_algo"] = algorithm;
    return code_of_listing(modelopt(), changed);
  };
  EXPECT_EQ(as("w4a16_nvfp4"), "none");
  EXPECT_EQ(as("NVFP4"), "bad-container");  // no input_scale
  EXPECT_EQ(as("FP8"), "bad-container");
  EXPECT_EQ(as("MIXED_PRECISION"), "bad-container");  // no quantized_layers
  EXPECT_EQ(as("W4A8_AWQ"), "unsupported-container");
  EXPECT_EQ(as("NVFP5"), "unsupported-container");
  MemoryCheckpoint smoothed = files;
  smoothed.add({"layer.pre_quant_scale", DType::bf16, {32}}, std::vector<std::byte>(64));
  EXPECT_EQ(code_of_listing(modelopt(), smoothed), "unsupported-container");
}

TEST(ModelOpt, MixedByLayerWithACache) {
  std::vector<StoredTensor> tensors = {calibrated(stored(nvfp4(), {4, 32})), calibrated(stored(tensor(), {4, 32})),
                                       stored(nvfp4(), {4, 32})};
  MemoryCheckpoint files;
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i].name = "layers." + std::to_string(i) + ".k_proj.weight";
    const auto one = written(tensors[i]);
    files.arrays.insert(one.arrays.begin(), one.arrays.end());
    files.data.insert(one.data.begin(), one.data.end());
  }
  const std::vector<std::string> kept = {"lm_head"};
  OrderedJson config = OrderedJson::object();
  const OrderedJson record = OrderedJson::object();
  std::map<std::string, OrderedJson> documents;
  modelopt().write_metadata({.tensors = tensors, .kept = kept, .record = record},
                            {.config = config, .files = documents});
  files.config = Json(config);
  files.documents["hf_quant_config.json"] = Json(documents.at("hf_quant_config.json"));
  EXPECT_EQ(files.config["quantization_config"]["quant_algo"], "MIXED_PRECISION");
  files.config["quantization_config"]["kv_cache_scheme"] = {{"dynamic", false}, {"num_bits", 8}, {"type", "float"}};
  files.add({"layers.0.k_proj.k_scale", DType::f32, {}}, as_dtype(DType::f32, std::vector<float>{1.0f}));
  for (const bool own_file : {false, true}) {
    const std::vector<StoredTensor> found = modelopt().list(files.view());
    ASSERT_EQ(found.size(), 3u);
    for (size_t i = 0; i < 3; ++i) {
      EXPECT_EQ(found[i].scheme, tensors[i].scheme) << i;
      EXPECT_EQ(found[i].linear.input && found[i].linear.input->scale, tensors[i].linear.input.has_value()) << i;
    }
    const QuantizedModel model = modelopt().model(files.view());
    EXPECT_EQ(model.skipped, kept);
    EXPECT_EQ(model.arrays, std::vector<std::string>{"layers.0.k_proj.k_scale"});
    EXPECT_TRUE(model.kv_cache);
    if (!own_file) files.config.erase("quantization_config");
  }
  // A layer that is stored and not named.
  files.documents["hf_quant_config.json"]["quantization"]["quantized_layers"].erase("layers.1.k_proj");
  EXPECT_EQ(code_of_listing(modelopt(), files), "bad-container");
}

TEST(ModelOpt, PiecesAreParts) {
  for (const Scheme& scheme : {channel(), block()}) {
    const StoredTensor t = stored(scheme, {700, 130});
    const int64_t step = row_step(scheme, t.shape).value();
    const std::vector<std::byte> bytes = as_dtype(t.value_dtype, random_values(t.shape));
    for (const int64_t rows : {step, 2 * step}) check_pieces(modelopt(), t, {t.value_dtype, bytes}, rows);
  }
  EXPECT_FALSE(row_step(nvfp4(), {700, 144}));  // all groups hang on one number
}

// Arrays as other versions shape them: blocks [N/128, K/128], rows [N, 1]; MXFP8, which is read only.
TEST(ModelOpt, OtherShapes) {
  MemoryCheckpoint blocks = written(stored(block(), {130, 256}));
  EXPECT_EQ(blocks.arrays.at("layer.weight_scale").shape, (Shape{2, 1, 2, 1}));
  blocks.arrays.at("layer.weight_scale").shape = {2, 2};
  EXPECT_EQ(code_of_listing(modelopt(), blocks), "none");
  MemoryCheckpoint rows = written(stored(channel(), {4, 32}));
  EXPECT_EQ(rows.arrays.at("layer.weight_scale").shape, Shape{4});
  rows.arrays.at("layer.weight_scale").shape = {4, 1};
  EXPECT_EQ(code_of_listing(modelopt(), rows), "none");

  MemoryCheckpoint micro = written(stored(channel(), {4, 64}));
  micro.config["quantization_config"]["quant_algo"] = "MXFP8";
  micro.add({"layer.weight_scale", DType::u8, {4, 2}}, std::vector<std::byte>(8, std::byte{128}));
  const QuantizedTensor t = check_view(modelopt(), micro.view());
  const float first = e4m3_to_f32(std::to_integer<uint8_t>(micro.data.at("layer.weight")[0]));
  EXPECT_EQ(decode(t).at(0), 2 * first);
}

// Configurations of published models: each is recognised by its container and no other.
TEST(ModelOpt, PublishedConfigurationsAreRecognised) {
  size_t found = 0;
  for (const auto& path : files_in(shared_dir() / "data" / "quant_configs", "_config.json")) {
    SCOPED_TRACE(path.filename().string());
    MemoryCheckpoint files;
    const Json json = parse_json(read_file(path), path.string());
    const bool own = path.filename().string().ends_with("hf_quant_config.json");
    if (own)
      files.documents["hf_quant_config.json"] = json;
    else
      files.config = json;
    const Json config = json.value("quantization_config", Json::object());
    const std::string method =
        own ? "modelopt" : config.value("quant_method", config.contains("quant_algo") ? "modelopt" : "");
    if (method != "modelopt" && method != "fp8" && method != "mxfp4") continue;
    ++found;
    for (const Container* container : all_containers())
      EXPECT_EQ(container->detect(files.view()), container->name == method) << container->name;
    EXPECT_NO_THROW(find_container(method)->model(files.view()));
    EXPECT_TRUE(find_container(method)->list(files.view()).empty());
  }
  if (found == 0) GTEST_SKIP() << "no configurations here";
}

TEST(ModelOpt, WhatDoesNotFit) {
  const auto refused = [](const Scheme& scheme, const Shape& shape) {
    return modelopt().fit(scheme, shape).verdict == Verdict::impossible;
  };
  EXPECT_TRUE(refused(nvfp4(), {4, 40}));
  EXPECT_TRUE(refused(nvfp4(), {2, 4, 32}));
  EXPECT_TRUE(refused(scheme_of("e4m3", "block", 64), {128, 128}));
  EXPECT_TRUE(refused(scheme_of("nvfp4", "group", 32), {128, 128}));
  EXPECT_FALSE(refused(block(), {100, 100}));
  // One scale a tensor needs a calibrated scale of the inputs.
  const StoredTensor bare = stored(tensor(), {4, 32}), full = calibrated(bare);
  EXPECT_EQ(modelopt().fit_model(std::span(&bare, 1)).verdict, Verdict::impossible);
  EXPECT_EQ(modelopt().fit_model(std::span(&full, 1)).verdict, Verdict::exact);
}

}  // namespace
}  // namespace bitwright
