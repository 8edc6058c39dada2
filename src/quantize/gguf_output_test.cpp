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

OrderedJson write(const fs::path& model, const fs::path& out, const std::string& method, std::vector<Warning>& warnings,
                  std::optional<uint64_t> most_bytes = {}) {
  return quantize(Checkpoint(model), read_request(parse_config_value("quantization: {method: " + method + "}", "test")),
                  {.output = {.output = out, .max_shard_bytes = most_bytes},
                   .verify = most_bytes.has_value(),
                   .container = find_container("gguf")},
                  warnings);
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

// As gguf-split names and numbers them; the parts hold the bytes of the whole.
TEST(GgufOutput, IsCutIntoPartsWhereAsked) {
  const TemporaryDirectory dir;
  std::vector<Warning> warnings;
  write(test::example_model(), dir / "whole", "q4_0", warnings);
  write(test::example_model(), dir / "parts", "q4_0", warnings, 1'000'000);
  EXPECT_FALSE(fs::exists(dir / "parts/model.gguf"));
  EXPECT_FALSE(fs::exists(dir / "parts/model.safetensors.index.json"));
  const WeightFile first(dir / "parts/model-00001-of-00003.gguf"), third(dir / "parts/model-00003-of-00003.gguf");
  EXPECT_EQ((*first.facts())["split.no"], 0);
  EXPECT_EQ((*third.facts())["split.no"], 2);
  EXPECT_EQ((*third.facts())["split.count"], 3);
  EXPECT_FALSE(third.facts()->contains("general.architecture"));
  const Checkpoint whole(dir / "whole/model.gguf"), parts(dir / "parts/model-00002-of-00003.gguf");
  EXPECT_EQ((*parts.facts())["split.tensors.count"], whole.tensors().size());
  ASSERT_EQ(parts.tensors().size(), whole.tensors().size());
  for (const TensorEntry& entry : whole.tensors()) {
    const TensorEntry* const found = parts.find(entry.name);
    ASSERT_NE(found, nullptr) << entry.name;
    if (!entry.quantized()) continue;
    EXPECT_TRUE(parts.read(*found) == whole.read(entry)) << entry.name;
  }
  EXPECT_THROW(write(test::example_model(), dir / "parts", "q4_0", warnings), Error);
  const QuantizeOptions again = {.output = {.output = dir / "parts", .existing = Existing::replace},
                                 .verify = false,
                                 .container = find_container("gguf")};
  quantize(Checkpoint(test::example_model()), read_request(parse_config_value("quantization: {method: q8_0}", "test")),
           again, warnings);
  EXPECT_TRUE(fs::exists(dir / "parts/model.gguf"));
  EXPECT_FALSE(fs::exists(dir / "parts/model-00001-of-00003.gguf"));
}

}  // namespace
}  // namespace bitwright
