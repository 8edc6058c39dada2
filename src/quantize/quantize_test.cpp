#include "quantize/quantize.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "checkpoint/safetensors.hpp"
#include "evaluate/evaluate.hpp"
#include "kernels/decode.hpp"
#include "model/model.hpp"
#include "quantize/model_card.hpp"
#include "quantize/verify.hpp"
#include "recipe/config.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::read_file;
using test::TemporaryDirectory;
using test::write_file;

/// A model of no known architecture: two matrices (one with ragged groups), a norm, an integer buffer.
class Quantize : public ::testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directory(model());
    write_file(model() / "config.json", R"({"z": 1, "architectures": ["SomethingElse"], "torch_dtype": "float32"})");
    write_file(model() / "merges.txt", "#");
    write_file(model() / "code.py", "raise SystemExit");
    std::mt19937 random(3);
    std::normal_distribution<float> normal(0, 0.05f);
    SafetensorsWriter writer(model() / "model.safetensors", {{"a.weight", DType::f32, {40, 64}},
                                                             {"b.weight", DType::f32, {24, 33}},
                                                             {"norm.weight", DType::f32, {64}},
                                                             {"ids", DType::i64, {2}}});
    for (const size_t count : {40 * 64, 24 * 33, 64}) {
      std::vector<float> values(count);
      for (float& value : values) value = normal(random);
      writer.add(std::as_bytes(std::span(values)));
    }
    const std::array<int64_t, 2> ids = {1, 2};
    writer.add(std::as_bytes(std::span(ids)));
    writer.finish();
  }
  std::filesystem::path model() const { return dir / "model"; }
  std::filesystem::path output() const { return dir / "out"; }

  OrderedJson run(const std::string& yaml, const std::function<void(QuantizeOptions&)>& change = {}) {
    QuantizeOptions options = {.output = {.output = output()}, .container = find_container("native")};
    if (change) change(options);
    warnings.clear();
    return quantize(Checkpoint(model()), read_request(parse_config_value(yaml, "test")), options, warnings);
  }
  std::string code(const std::string& yaml, const std::function<void(QuantizeOptions&)>& change = {}) {
    try {
      run(yaml, change);
    } catch (const Error& error) {
      EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir.path()), {}), 1) << "something was left";
      return error.code();
    }
    return "none";
  }
  const TemporaryDirectory dir;
  std::vector<Warning> warnings;
};

TEST_F(Quantize, AnyModelIsQuantizedAndReadBack) {
  const OrderedJson result = run("quantization: {method: int4, scheme: {group_size: 32}}");
  EXPECT_EQ(result["layers"].size(), 2u);
  EXPECT_EQ(result["verification"]["read_back"], true);
  EXPECT_FALSE(result["verification"].contains("perplexity"));
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].code, "NOT_JUDGED");
  EXPECT_NE(read_file(output() / "README.md").find("Not judged"), std::string::npos);
  EXPECT_TRUE(std::filesystem::exists(output() / "merges.txt"));
  EXPECT_FALSE(std::filesystem::exists(output() / "code.py"));
  EXPECT_TRUE(read_file(output() / "config.json").find("\"z\"") < read_file(output() / "config.json").find("\"arch"));
  const Checkpoint written(output());
  // a: 40 x 64 codes, 80 scales and zeros; b: 24 x 33 codes, 48 of each, its stream not shaped by rows.
  EXPECT_EQ(written.find("a.weight")->stored_bytes, 40u * 64 / 2 + 80 * 2 + 80 / 2);
  EXPECT_EQ(written.find("b.weight")->stored_bytes, 24u * 33 / 2 + 48 * 2 + 48 / 2);
  EXPECT_EQ(written.find("ids")->dtype, DType::i64);
}

TEST_F(Quantize, DequantizedModelHasTheDecodedValues) {
  run("quantization: {method: nf4}");
  const Checkpoint written(output());
  dequantize(written, {.output = dir / "plain"}, DType::f32);
  const Checkpoint plain(dir / "plain");
  EXPECT_EQ(plain.container(), nullptr);
  EXPECT_FALSE(plain.config().contains("quantization_config"));
  EXPECT_EQ(plain.config()["torch_dtype"], "float32");
  for (const TensorEntry& entry : plain.tensors())
    EXPECT_EQ(plain.read_f32(entry), written.read_f32(*written.find(entry.name)));
}

TEST_F(Quantize, VerificationSeesEveryDamage) {
  constexpr uint64_t kMemory = uint64_t{1} << 30;
  run("quantization: {method: int8}");
  const Checkpoint source(model());
  std::vector<LayerResult> layers;
  for (const char* name : {"a.weight", "b.weight"}) {
    const Checkpoint written(output());
    const double error =
        relative_error({DType::f32, source.plain_bytes(*source.find(name))}, written.read(*written.find(name)));
    EXPECT_GT(error, 1e-4);
    EXPECT_LT(error, 0.02);
    layers.push_back(
        {.name = name, .scheme = written.find(name)->scheme, .algorithm = "rtn", .relative_error = error, .bytes = 0});
  }
  EXPECT_NO_THROW(verify_tensors(source, Checkpoint(output()), layers, kMemory));
  const std::string good = read_file(output() / "model.safetensors");
  uint64_t header = 0;
  std::memcpy(&header, good.data(), sizeof header);
  for (size_t at = 8 + header; at < good.size(); at += 97) {
    std::string damaged = good;
    damaged[at] = static_cast<char>(damaged[at] ^ 0x10);
    write_file(output() / "model.safetensors", damaged);
    EXPECT_THROW(verify_tensors(source, Checkpoint(output()), layers, kMemory), Error) << at;
    EXPECT_THROW(Checkpoint(output()).verify_digests(), Error) << at;
  }
}

TEST_F(Quantize, FailuresLeaveNothing) {
  EXPECT_EQ(code("quantization: {method: int4}", [](QuantizeOptions& o) { o.max_kl = 0.1; }), "not-judged");
  EXPECT_EQ(code("quantization: {method: int4}", [this](QuantizeOptions& o) { o.output.output = model() / "sub"; }),
            "output-is-input");
  EXPECT_EQ(code("quantization: {method: none}"), "nothing-to-quantize");
  std::string bytes = read_file(model() / "model.safetensors");
  const float nan = std::nanf("");
  std::memcpy(bytes.data() + bytes.size() - 16 - 4 * 64, &nan, sizeof nan);  // in the norm, which is kept
  write_file(model() / "model.safetensors", bytes);
  EXPECT_EQ(code("quantization: {method: int4}"), "not-finite");
}

TEST_F(Quantize, WhatTheOwnerWouldNotLoadIsRefusedBeforeTheWork) {
  write_file(model() / "config.json", R"({"model_type": "qwen3_moe"})");
  SafetensorsWriter writer(model() / "model.safetensors", {{"mlp.experts.0.up_proj.weight", DType::f32, {2, 64}}});
  writer.add(std::vector<std::byte>(512));
  writer.finish();
  std::filesystem::create_directory(dir / ".out.partial");
  write_file(dir / ".out.partial/.bitwright-partial", "{}\n");  // of hours of work
  const auto as_mlx = [](QuantizeOptions& o) {
    o.container = find_container("mlx");
    o.output.existing = Existing::resume;
  };
  try {
    run("quantization: {method: int4}", as_mlx);
    ADD_FAILURE() << "not refused";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), "not-loadable");
  }
  EXPECT_EQ(read_file(dir / ".out.partial/.bitwright-partial"), "{}\n");
}

TEST_F(Quantize, WhatCannotBeJudgedIsSaidBeforeTheWork) {
  write_file(model() / "tokenizer.json", "{damaged");
  std::filesystem::create_directory(dir / ".out.partial");
  write_file(dir / ".out.partial/.bitwright-partial", "{}\n");  // of hours of work
  EXPECT_THROW(run("quantization: {method: int4}", [](QuantizeOptions& o) { o.output.existing = Existing::resume; }),
               Error);
  EXPECT_EQ(read_file(dir / ".out.partial/.bitwright-partial"), "{}\n");
  std::filesystem::remove_all(dir / ".out.partial");
  EXPECT_EQ(run("quantization: {method: int4}", [](QuantizeOptions& o) { o.verify = false; })["layers"].size(), 2u);
}

TEST_F(Quantize, ScalesTooSmallForTheirTypeAreSaid) {
  std::string bytes = read_file(model() / "model.safetensors");
  const size_t data = bytes.size() - 16 - 4 * 64 - 4 * 24 * 33 - 4 * 40 * 64;
  std::vector<float> tiny(40 * 64, 1e-9f);
  std::memcpy(bytes.data() + data, tiny.data(), 4 * tiny.size());
  write_file(model() / "model.safetensors", bytes);
  run("quantization: {method: int4}");
  EXPECT_EQ(warnings.at(0).code, "HIGH_ERROR");
}

TEST_F(Quantize, ASingleFileIsAModelToo) {
  std::filesystem::create_directory(dir / "single");
  std::filesystem::rename(model() / "model.safetensors", dir / "single/weights.safetensors");
  write_file(dir / "single/tokenizer_config.json", "{}");
  write_file(dir / "single/unrelated.json", "{}");
  dequantize(Checkpoint(dir / "single/weights.safetensors"), {.output = dir / "single/out"}, DType::f16);
  EXPECT_EQ(Checkpoint(dir / "single/out").find("a.weight")->dtype, DType::f16);
  EXPECT_TRUE(std::filesystem::exists(dir / "single/out/tokenizer_config.json"));
  EXPECT_FALSE(std::filesystem::exists(dir / "single/out/unrelated.json"));
}

TEST_F(Quantize, ShardsHoldTheSameTensors) {
  run("quantization: {method: int4}");
  std::filesystem::rename(output(), dir / "single");
  const OrderedJson result =
      run("quantization: {method: int4}", [](QuantizeOptions& o) { o.output.max_shard_bytes = 1500; });
  EXPECT_EQ(test::files_in(output(), ".safetensors").size(), 2u);
  const Json index = parse_json(read_file(output() / "model.safetensors.index.json"), "index");
  EXPECT_EQ(index["weight_map"]["a.weight.codes"], "model-00001-of-00002.safetensors");
  EXPECT_EQ(index["weight_map"]["norm.weight"], "model-00002-of-00002.safetensors");
  const Checkpoint sharded(output()), single(dir / "single");
  sharded.verify_digests();
  uint64_t total = 0;
  for (const TensorEntry& entry : single.tensors()) {
    EXPECT_EQ(sharded.read_f32(*sharded.find(entry.name)), single.read_f32(entry)) << entry.name;
    total += entry.stored_bytes;
  }
  EXPECT_EQ(index["metadata"]["total_size"], total);
  dequantize(sharded, {.output = dir / "plain", .max_shard_bytes = 1}, DType::f32);
  EXPECT_EQ(Checkpoint(dir / "plain").tensors().size(), 4u);
  EXPECT_EQ(test::files_in(dir / "plain", ".safetensors").size(), 4u);
}

TEST_F(Quantize, ModelsOfUnknownKindsAreDoneTensorByTensor) {
  std::filesystem::remove_all(model());
  std::filesystem::create_directory(model());
  const std::vector<ArraySpec> specs = {{"vision.patch_embed.proj.weight", DType::f16, {8, 3, 4, 4}},
                                        {"temporal.conv.weight", DType::bf16, {8, 1, 4}},
                                        {"mlp.experts.gate_up_proj", DType::bf16, {3, 16, 24}},
                                        {"odd name/\u00e9 \"quoted\".weight", DType::f64, {5, 7}},
                                        {"8bit.weight", DType::f8_e4m3, {16, 16}},
                                        {"position_ids", DType::i64, {1, 6}},
                                        {"mask", DType::boolean, {2, 3}},
                                        {"scalar", DType::f32, {}},
                                        {"nothing.weight", DType::f32, {0, 4}},
                                        {"logit_scale", DType::f32, {1}}};
  SafetensorsWriter writer(model() / "weights.safetensors", specs);
  for (const ArraySpec& spec : specs) writer.add(std::vector<std::byte>(spec.bytes(), std::byte{0x01}));
  writer.finish();
  const auto quantize_file = [&](const std::string& method) {
    QuantizeOptions options = {.output = {.output = output(), .existing = Existing::replace},
                               .container = find_container("native")};
    const std::string yaml = "quantization: {method: " + method + "}";
    return quantize(Checkpoint(model() / "weights.safetensors"), read_request(parse_config_value(yaml, "test")),
                    options, warnings);
  };
  for (const char* method : {"int8", "int4", "nf4"}) {
    SCOPED_TRACE(method);
    EXPECT_EQ(quantize_file(method)["layers"].size(), 2u);  // the experts and the odd name
    const Checkpoint written(output());
    EXPECT_EQ(written.tensors().size(), specs.size());
    EXPECT_TRUE(written.find("mlp.experts.gate_up_proj")->quantized());
    EXPECT_FALSE(written.find("vision.patch_embed.proj.weight")->quantized());
    const std::string record = written.quantization_metadata()["skipped_layers"].dump();
    EXPECT_NE(record.find("a kernel of 4 dimensions"), std::string::npos);
    EXPECT_NE(record.find("three dimensions, and not experts"), std::string::npos);
    EXPECT_NE(read_file(output() / "README.md").find("Not judged"), std::string::npos);
  }
}

TEST_F(Quantize, MemoryLimitsAreRefusedBeforehand) {
  EXPECT_EQ(code("quantization: {method: int4}", [](QuantizeOptions& o) { o.output.max_memory = 1 << 20; }),
            "memory-limit");
}

TEST_F(Quantize, ManyTensorsTakeNoQuadraticTime) {
  constexpr size_t kTensors = 30'000;
  std::vector<ArraySpec> specs;
  for (size_t i = 0; i < kTensors; ++i)
    specs.push_back({"layers." + std::to_string(i) + ".weight", DType::bf16, {8, 8}});
  SafetensorsWriter writer(model() / "model.safetensors", specs);
  for (size_t i = 0; i < kTensors; ++i) writer.add(std::vector<std::byte>(specs[i].bytes(), std::byte{0x11}));
  writer.finish();
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(run("quantization: {method: int8}")["layers"].size(), kTensors);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

TEST_F(Quantize, SameBytesOnEveryRun) {
  run("quantization: {method: int3, range: mse}");
  std::map<std::string, std::string> first;
  for (const auto& path : test::files_in(output())) first[path.filename()] = read_file(path);
  run("quantization: {method: int3, range: mse}", [](QuantizeOptions& o) { o.output.existing = Existing::replace; });
  for (const auto& [name, bytes] : first) EXPECT_EQ(read_file(output() / name), bytes) << name;
}

TEST_F(Quantize, LeastSquaresBeatsExtremes) {
  const double extremes = run("quantization: {method: int3, range: minmax}")["layers"][0]["relative_error"];
  const double searched = run("quantization: {method: int3, range: mse}", [](QuantizeOptions& o) {
    o.output.existing = Existing::replace;
  })["layers"][0]["relative_error"];
  EXPECT_LT(searched, 0.97 * extremes);
}

TEST(ModelCard, SaysHowMuchWorse) {
  EXPECT_NE(quality_sentence(1.0001, 0.0001).find("Practically equal"), std::string::npos);
  EXPECT_NE(quality_sentence(1.005, 0.01).find("Close"), std::string::npos);
  EXPECT_NE(quality_sentence(1.005, 0.02).find("Visibly worse"), std::string::npos);
  EXPECT_NE(quality_sentence(1.5, 0.02).find("Much worse"), std::string::npos);
}

/// llama2.c's Q8_0 of stories260K: every matrix, the embeddings too, in groups that run across rows (172 is no multiple
/// of 8). Its figures against the floats are in the shared data.
TEST(ModelsEvaluateQuantized, FlatGroupsOfEightReproduceTheFiguresOfLlama2C) {
  const auto model = test::shared_dir() / "data/models/stories260K";
  const auto text = test::shared_dir() / "data/text/tinystories_train_slice_4MB.txt";
  const auto figures = model / "reference/q8_vs_fp32.json";
  if (!std::filesystem::exists(figures) || !std::filesystem::exists(text)) GTEST_SKIP() << "no model here";
  const Json expected = parse_json(test::read_file(figures), figures.string());
  const test::TemporaryDirectory dir;
  std::vector<Warning> warnings;
  const std::string yaml =
      "quantization: {scheme: {bits: 8, symmetric: true, granularity: flat, group_size: 8, scale_dtype: float32}, "
      "skip_modules: [], layer_configs: {embed_tokens: {bits: 8}}}";
  const Checkpoint source(model / "hf");
  quantize(source, read_request(parse_config_value(yaml, "test")),
           {.output = {.output = dir / "q8"}, .verify = false, .container = find_container("native")}, warnings);
  const Checkpoint written(dir / "q8");
  const Model original(source), quantized(written);
  const Tokenizer tokenizer(model / "hf");
  const Protocol protocol = {.context = 512,
                             .stride = 512,
                             .bos = Protocol::Bos::document,
                             .split = "<|endoftext|>",
                             .max_windows = expected["windows"].get<int64_t>()};
  const auto tokens = token_stream(tokenizer, test::read_file(text), protocol);
  const Quality q = evaluate(quantized, &original, tokens, protocol, tokenizer.bos_id());
  EXPECT_EQ(q.tokens, expected["tokens"].get<int64_t>());
  EXPECT_NEAR(q.nll, expected["q8_nll"].get<double>(), 1e-6);
  EXPECT_NEAR(q.reference->kl_mean, expected["mean_kl_fp32_to_q8_nats"].get<double>(), 1e-8);
  EXPECT_NEAR(q.reference->top1_agreement, expected["top1_agreement"].get<double>(), 1e-4);
}

}  // namespace
}  // namespace bitwright
