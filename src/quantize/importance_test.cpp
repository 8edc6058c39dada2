#include "quantize/importance.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "checkpoint/safetensors.hpp"
#include "container/gguf_rounding.hpp"
#include "kernels/decode.hpp"
#include "model/gguf_export.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::TemporaryDirectory;
namespace fs = std::filesystem;

OrderedJson quantize_to(const fs::path& model, const fs::path& out, const std::string& settings, const fs::path& stats,
                        std::vector<Warning>& warnings, const char* format = "gguf", bool verify = true) {
  return quantize(Checkpoint(model), read_request(parse_config_value("quantization: {" + settings + "}", "test")),
                  {.output = {.output = out, .existing = Existing::replace},
                   .verify = verify,
                   .container = find_container(format),
                   .stats = stats},
                  warnings);
}

/// Numbers of no meaning for every matrix of the layers.
Imatrix random_importance(const Checkpoint& arranged) {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> uniform(0.01f, 10);
  Imatrix out = {.datasets = {"text"}, .chunks = 1, .chunk_size = 7};
  for (const TensorEntry& tensor : arranged.tensors()) {
    if (tensor.shape.size() < 2 || !tensor.name.starts_with("blk.")) continue;
    const int64_t matrices = tensor.shape.size() == 3 ? tensor.shape[0] : 1;
    InputSquares& entry = out.entries[tensor.name];
    entry.counts.assign(static_cast<size_t>(matrices), 7);
    if (matrices > 1) entry.counts[1] = 0;
    entry.sums.resize(static_cast<size_t>(matrices * tensor.shape.back()));
    for (float& v : entry.sums) v = uniform(random);
  }
  return out;
}

/// A tensor of the written file is what ggml's rounding makes of each matrix with that matrix's importance.
void check_tensor(const TensorEntry& tensor, const Checkpoint& written, const Checkpoint& arranged,
                  const Imatrix& imatrix) {
  const auto found = imatrix.entries.find(tensor.name);
  const std::vector<float> values = arranged.read_f32(*arranged.find(tensor.name)), now = written.read_f32(tensor);
  const int64_t rows = tensor.shape[tensor.shape.size() - 2], columns = tensor.shape.back();
  const auto size = static_cast<size_t>(rows * columns);
  for (size_t at = 0; at < values.size(); at += size) {
    const std::span matrix = std::span(values).subspan(at, size);
    std::vector<float> importance;
    if (found != imatrix.entries.end())
      importance = mean_squares(found->second, at / static_cast<size_t>(rows), static_cast<size_t>(columns));
    const QuantizedTensor expected =
        round_to_gguf(tensor.scheme, {rows, columns}, {DType::f32, std::as_bytes(matrix)}, importance);
    const std::span got = std::span(now).subspan(at, size);
    EXPECT_TRUE(std::ranges::equal(got, decode(expected))) << tensor.name << " matrix " << at / size;
  }
}

/// A Mixtral of one layer with three experts.
void write_experts(const fs::path& model) {
  fs::create_directory(model);
  test::write_file(model / "config.json",
                   R"({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 64,
                       "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 64,
                       "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "num_local_experts": 3,
                       "num_experts_per_tok": 2, "tie_word_embeddings": false, "hidden_act": "silu"})");
  const std::string layer = "model.layers.0.", experts = layer + "block_sparse_moe.experts.";
  std::vector<ArraySpec> specs = {{"model.embed_tokens.weight", DType::f32, {32, 64}},
                                  {"model.norm.weight", DType::f32, {64}},
                                  {"lm_head.weight", DType::f32, {32, 64}},
                                  {layer + "input_layernorm.weight", DType::f32, {64}},
                                  {layer + "post_attention_layernorm.weight", DType::f32, {64}},
                                  {layer + "self_attn.q_proj.weight", DType::f32, {64, 64}},
                                  {layer + "self_attn.k_proj.weight", DType::f32, {32, 64}},
                                  {layer + "self_attn.v_proj.weight", DType::f32, {32, 64}},
                                  {layer + "self_attn.o_proj.weight", DType::f32, {64, 64}},
                                  {layer + "block_sparse_moe.gate.weight", DType::f32, {3, 64}}};
  for (const char* expert : {"0", "1", "2"}) {
    specs.push_back({experts + expert + ".w1.weight", DType::f32, {96, 64}});
    specs.push_back({experts + expert + ".w2.weight", DType::f32, {64, 96}});
    specs.push_back({experts + expert + ".w3.weight", DType::f32, {96, 64}});
  }
  SafetensorsWriter writer(model / "model.safetensors", specs);
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 0.05f);
  for (const ArraySpec& spec : specs) {
    std::vector<float> values(static_cast<size_t>(element_count(spec.shape)));
    for (float& v : values) v = normal(random);
    writer.add(std::as_bytes(std::span(values)));
  }
  writer.finish();
}

TEST(Importance, OfEachExpertIsItsOwn) {
  const TemporaryDirectory dir;
  write_experts(dir / "model");
  const Checkpoint model(dir / "model"), arranged = open_as_gguf(model, gguf_model(model));
  write_imatrix(random_importance(arranged), dir / "stats", ImatrixForm::gguf);
  std::vector<Warning> warnings;
  quantize_to(dir / "model", dir / "out", "gguf_type: Q5_1", dir / "stats", warnings);
  const Checkpoint written(dir / "out");
  const Imatrix imatrix = read_imatrix(dir / "stats");
  size_t stacks = 0;
  for (const TensorEntry& tensor : written.tensors()) {
    if (!tensor.quantized() || !tensor.name.starts_with("blk.")) continue;
    stacks += tensor.shape.size() == 3 ? 1 : 0;
    check_tensor(tensor, written, arranged, imatrix);
  }
  EXPECT_EQ(stacks, 3u);
}

class StatsOfExample : public ::testing::Test {
 protected:
  StatsOfExample() : imatrix(read_imatrix("tests/golden/imatrix/tinystories-4m.gguf")) {}
  OrderedJson run(const std::string& settings, const char* format = "gguf") {
    write_imatrix(imatrix, dir / "stats.gguf", ImatrixForm::gguf);
    return quantize_to(test::example_model(), dir / "out", settings, dir / "stats.gguf", warnings, format, false);
  }
  /// The code and the text of the error.
  std::pair<std::string, std::string> failure(const std::string& settings, const char* format = "gguf") {
    try {
      run(settings, format);
    } catch (const Error& error) {
      return {error.code(), error.what()};
    }
    return {"none", ""};
  }
  const TemporaryDirectory dir;
  Imatrix imatrix;
  std::vector<Warning> warnings;
};

TEST_F(StatsOfExample, AreNamedInTheFile) {
  EXPECT_EQ(run("gguf_type: Q4_K_M")["algorithm"], "imatrix");
  EXPECT_TRUE(warnings.empty());
  const Checkpoint written(dir / "out");
  const Json& facts = *written.facts();
  EXPECT_EQ(facts["quantize.imatrix.file"], (dir / "stats.gguf").string());
  EXPECT_EQ(facts["quantize.imatrix.dataset"], imatrix.datasets.front());
  EXPECT_EQ(facts["quantize.imatrix.entries_count"], 28);
  EXPECT_EQ(facts["quantize.imatrix.chunks_count"], 20);
}

TEST_F(StatsOfExample, ThatLackATensorWarn) {
  imatrix.entries.erase("blk.1.ffn_up.weight");
  run("gguf_type: Q4_0");
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].code, "NO_IMPORTANCE");
  EXPECT_NE(warnings[0].message.find("blk.1.ffn_up.weight"), std::string::npos) << warnings[0].message;
}

TEST_F(StatsOfExample, OfAnotherModelAreRefused) {
  imatrix.entries["blk.1.ffn_up.weight"].sums.push_back(1);
  auto [code, message] = failure("gguf_type: Q4_0");
  EXPECT_EQ(code, "bad-imatrix");
  EXPECT_NE(message.find("tensor 'blk.1.ffn_up.weight' has 256 columns"), std::string::npos) << message;
  imatrix.entries.clear();
  imatrix.entries["blk.99.ffn_up.weight"] = {.sums = {1}, .counts = {1}};
  EXPECT_EQ(failure("gguf_type: Q4_0").first, "bad-imatrix");
}

TEST_F(StatsOfExample, WithoutUseWarn) {
  EXPECT_EQ(run("gguf_type: Q4_0, algorithm: rtn")["algorithm"], "rtn");
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].code, "STATS_UNUSED");
  EXPECT_FALSE(Checkpoint(dir / "out").facts()->contains("quantize.imatrix.file"));
  run("gguf_type: F16");
  EXPECT_FALSE(Checkpoint(dir / "out").facts()->contains("quantize.imatrix.file"));
  warnings.clear();
  run("method: int4", "mlx");
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_EQ(warnings[0].code, "STATS_UNUSED");
  EXPECT_EQ(failure("method: int4, algorithm: imatrix", "mlx").first, "bad-value");
}

}  // namespace
}  // namespace bitwright
