// A model written as GGUF is the same model when it is opened again.
#include "quantize/gguf_output.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "container/gguf_file_types.hpp"
#include "container/gguf_types.hpp"
#include "model/model.hpp"
#include "model/open_model.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"
#include "tests/support.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

using test::TemporaryDirectory;
namespace fs = std::filesystem;

OrderedJson write(const fs::path& model, const fs::path& out, const std::string& method,
                  std::vector<Warning>& warnings) {
  return quantize(Checkpoint(model), read_request(parse_config_value("quantization: {method: " + method + "}", "test")),
                  {.output = {.output = out}, .verify = false, .container = find_container("gguf")}, warnings);
}

// Names, order of rows, stacks of experts, norms: undone by open_model, so every number is where it was.
TEST(ModelReference, GgufWritingIsUndoneByReading) {
  if (!fs::is_directory(BITWRIGHT_REFERENCES)) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
  std::set<std::string> covered;
  size_t refused = 0;
  for (const auto& entry : fs::directory_iterator(BITWRIGHT_REFERENCES)) {
    SCOPED_TRACE(entry.path().filename());
    const TemporaryDirectory dir;
    const Checkpoint original(entry.path() / "model");
    std::vector<Warning> warnings;
    try {
      write(entry.path() / "model", dir / "out", "none", warnings);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), "no-gguf") << error.what();
      ++refused;
      continue;
    }
    const Checkpoint written = open_model(dir / "out");
    size_t compared = 0;
    for (const TensorEntry& tensor : written.tensors()) {
      const TensorEntry* before = original.find(tensor.name);
      if (before == nullptr) continue;  // another prefix, or experts in one tensor
      // Gemma's norms are stored as 1 + weight, which rounds; everything else is moved.
      const bool moved = !tensor.name.ends_with("norm.weight");
      const std::vector<float> now = written.read_f32(tensor), then = original.read_f32(*before);
      ASSERT_EQ(now.size(), then.size()) << tensor.name;
      size_t different = 0;
      for (size_t i = 0; i < now.size(); ++i) different += std::abs(now[i] - then[i]) > (moved ? 0 : 1.2e-7f);
      EXPECT_EQ(different, 0u) << tensor.name;
      ++compared;
    }
    if (compared > 0) covered.insert(original.config()["architectures"][0]);
  }
  for (const char* name :
       {"LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "Phi3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"})
    EXPECT_TRUE(covered.contains(name)) << name;
  std::cout << "cases: " << covered.size() << ", refused: " << refused << '\n';
}

TEST(GgufFileTypes, FollowLlamaCpp) {
  const TensorRole role = {.layers = 32, .queries_a_key = 1};
  const auto type = [&](const char* file, const char* name, const Shape& shape = {512, 512}) {
    TensorRole of = role;
    of.name = name;
    return gguf_type_for(*find_gguf_file_type(file), of, shape);
  };
  EXPECT_EQ(type("q4_k_m", "blk.0.ffn_down.weight"), "Q6_K");  // the first eighth
  EXPECT_EQ(type("q4_k_m", "blk.4.ffn_down.weight"), "Q4_K");
  EXPECT_EQ(type("q4_k_m", "blk.6.attn_v.weight"), "Q6_K");  // every third
  EXPECT_EQ(type("q4_k_m", "blk.31.attn_v.weight"), "Q6_K");
  EXPECT_EQ(type("q4_k_m", "blk.0.attn_q.weight"), "Q4_K");
  EXPECT_EQ(type("q4_k_m", "output.weight"), "Q6_K");
  EXPECT_EQ(type("q4_k_m", "token_embd.weight"), "Q4_K");
  EXPECT_EQ(type("q3_k_l", "blk.9.attn_output.weight"), "Q5_K");
  EXPECT_EQ(type("q4_k_m", "blk.4.attn_q.weight", {512, 288}), "Q5_0");  // no whole blocks of 256
  EXPECT_EQ(type("q6_k", "blk.4.attn_q.weight", {512, 288}), "Q8_0");
  EXPECT_EQ(type("q6_k", "blk.4.attn_q.weight", {512, 300}), "F16");
  EXPECT_EQ(type("f16", "output.weight"), "F16");
  EXPECT_EQ(type("q8_0", "position_embd.weight"), "F32");
  const TensorRole large = {.name = "blk.30.attn_v.weight", .layers = 80, .queries_a_key = 8};
  EXPECT_EQ(gguf_type_for(*find_gguf_file_type("q4_k_s"), large, {512, 512}), "Q5_K");
}

TEST(GgufOutput, IsTheModelWithItsVocabulary) {
  const TemporaryDirectory dir;
  std::vector<Warning> warnings;
  const OrderedJson result = write(test::example_model(), dir / "out", "q4_k_m", warnings);
  EXPECT_TRUE(warnings.empty());
  const Checkpoint original(test::example_model()), written = open_model(dir / "out");
  EXPECT_EQ(written.config()["num_hidden_layers"], original.config()["num_hidden_layers"]);
  EXPECT_EQ((*written.facts())["general.file_type"], 15);
  EXPECT_EQ((*written.facts())["tokenizer.ggml.tokens"].size(), 4096u);
  const Tokenizer theirs(dir / "out/model.gguf"), own(test::example_model());
  EXPECT_EQ(theirs.encode("Once upon a time, 1234 <|endoftext|>"), own.encode("Once upon a time, 1234 <|endoftext|>"));
  for (const TensorEntry& entry : original.tensors()) ASSERT_NE(written.find(entry.name), nullptr) << entry.name;
}

std::vector<float> logits_of(const Checkpoint& checkpoint) {
  const Model model(checkpoint);
  KvCache cache(model.config(), 40);
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 40; ++i) tokens.push_back(7 * i % 250);
  return model.forward(tokens, cache);
}

// YaRN with other turns than llama.cpp's goes through rope_freqs.weight.
TEST(ModelReference, GgufKeepsYarn) {
  if (!fs::is_directory(BITWRIGHT_REFERENCES)) GTEST_SKIP() << "tools/reference has written no cases (ctest runs it)";
  for (const char* name : {"llama-yarn", "llama-yarn5", "phi3-long"}) {
    const TemporaryDirectory dir;
    const fs::path model = fs::path(BITWRIGHT_REFERENCES) / name / "model";
    std::vector<Warning> warnings;
    write(model, dir / "out", "none", warnings);
    const std::vector<float> now = logits_of(open_model(dir / "out")), then = logits_of(Checkpoint(model));
    ASSERT_EQ(now.size(), then.size());
    float most = 0;
    for (size_t i = 0; i < now.size(); ++i) most = std::max(most, std::abs(now[i] - then[i]));
    EXPECT_LT(most, 1e-4f) << name;
  }
}

DType dtype_in(const Checkpoint& checkpoint, const char* tensor) { return checkpoint.find(tensor)->dtype; }

TEST(GgufOutput, FloatsOfTheTypeAskedFor) {
  constexpr const char *kMatrix = "model.layers.0.self_attn.q_proj.weight", *kList = "model.norm.weight";
  const Checkpoint original(test::example_model());
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32}) {
    const TemporaryDirectory dir;
    std::vector<Warning> warnings;
    const std::string method = dtype == DType::f16 ? "f16" : dtype == DType::bf16 ? "bf16" : "f32";
    const OrderedJson result =
        quantize(original, read_request(parse_config_value("quantization: {method: " + method + "}", "test")),
                 {.output = {.output = dir / "out"}, .container = find_container("gguf")}, warnings);
    EXPECT_TRUE(result["verification"]["read_back"].get<bool>());
    const Checkpoint written = open_model(dir / "out");
    EXPECT_EQ(dtype_in(written, kMatrix), dtype);
    EXPECT_EQ(dtype_in(written, kList), DType::f32);
    const std::vector<float> now = written.read_f32(*written.find(kMatrix));
    std::vector<float> then = original.read_f32(*original.find(kMatrix));
    std::vector<std::byte> rounded(then.size() * size_bytes(dtype));
    from_f32(dtype, then, rounded);
    to_f32(dtype, rounded, then);
    EXPECT_EQ(now, then) << method;
  }
}

TEST(GgufOutput, AFloatFileIsASourceToo) {
  const TemporaryDirectory dir;
  std::vector<Warning> warnings;
  write(test::example_model(), dir / "float", "none", warnings);
  write(test::example_model(), dir / "direct", "q4_0", warnings);
  const auto convert = [&](const fs::path& from, const fs::path& to) {
    quantize(open_model(from), read_request(parse_config_value("quantization: {method: q4_0}", "test")),
             {.output = {.output = to}, .verify = false, .container = find_container("gguf")}, warnings);
  };
  convert(dir / "float", dir / "again");
  const Checkpoint direct = open_model(dir / "direct"), again = open_model(dir / "again");
  ASSERT_EQ(direct.tensors().size(), again.tensors().size());
  for (const TensorEntry& entry : direct.tensors())
    EXPECT_EQ(direct.read(entry).codes, again.read(*again.find(entry.name)).codes) << entry.name;
  EXPECT_EQ((*again.facts())["general.file_type"], 2);
  for (const auto& [key, value] : direct.facts()->items())
    if (key != "general.name") EXPECT_EQ(again.facts()->value(key, Json()), value) << key;
  EXPECT_THROW(convert(dir / "direct", dir / "twice"), Error);
}

}  // namespace
}  // namespace bitwright
