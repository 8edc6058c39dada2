#include <gtest/gtest.h>

#include <filesystem>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/json.hpp"
#include "tests/support.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

using Ids = std::vector<int32_t>;

std::filesystem::path data() { return test::shared_dir() / "data"; }

TEST(ModelsTokenizer, TinyStoriesAgreesWithItsReference) {
  const auto model = data() / "models/tinystories4M";
  if (!std::filesystem::exists(model)) GTEST_SKIP() << "no model here";
  const Tokenizer tokenizer(model / "hf");
  const auto file = model / "reference/reference.json";
  const Json reference = parse_json(test::read_file(file), file.string());
  ASSERT_TRUE(tokenizer.bos_id().has_value());
  EXPECT_TRUE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.vocabulary_size(), 4096u);
  Ids ids = tokenizer.encode(reference["prompt"].get<std::string>());
  ids.insert(ids.begin(), *tokenizer.bos_id());
  EXPECT_EQ(ids, reference["prompt_ids"].get<Ids>());
  EXPECT_EQ(tokenizer.decode(reference["greedy"]["ids"].get<Ids>()), reference["greedy"]["text"].get<std::string>());
  std::cout << "cases: 2\n";
}

/// What llama.cpp's own tests hold for GPT-2's vocabulary: texts, and for each a line of the ids that transformers
/// gave.
TEST(ModelsTokenizer, Gpt2AgreesWithTransformers) {
  const auto tokenizers = data() / "tokenizers";
  const auto cases = tokenizers / "llama.cpp_vocabs/ggml-vocab-gpt-2.gguf";
  if (!std::filesystem::exists(tokenizers / "gpt2") || !std::filesystem::exists(cases.string() + ".inp"))
    GTEST_SKIP() << "no tokenizer here";
  const Tokenizer tokenizer(tokenizers / "gpt2");
  const std::string texts = test::read_file(cases.string() + ".inp"), separator = "\n__ggml_vocab_test__\n";
  std::istringstream lines(test::read_file(cases.string() + ".out"));
  size_t count = 0;
  for (size_t begin = 0, end = 0; end != texts.npos; begin = end + separator.size(), ++count) {
    end = texts.find(separator, begin);
    const std::string text = texts.substr(begin, end == texts.npos ? end : end - begin);
    std::string line;
    std::getline(lines, line);
    std::istringstream numbers(line);
    const Ids expected{std::istream_iterator<int32_t>(numbers), {}};
    EXPECT_EQ(tokenizer.encode(text), expected) << text;
    EXPECT_EQ(tokenizer.decode(expected), text);
  }
  EXPECT_GT(count, 30u);
  std::cout << "cases: " << count << '\n';
}

TEST(ModelsTokenizer, RoundTripsText) {
  const auto text_file = data() / "text/wikitext2_raw_test.txt";
  if (!std::filesystem::exists(text_file)) GTEST_SKIP() << "no text here";
  const std::string text = test::read_file(text_file);
  size_t count = 0;
  for (const char* directory : {"models/tinystories4M/hf", "tokenizers/gpt2", "tokenizers/minimind"}) {
    if (!std::filesystem::exists(data() / directory)) continue;
    const Tokenizer tokenizer(data() / directory);
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text), false), text) << directory;
    ++count;
  }
  if (count == 0) GTEST_SKIP() << "no tokenizer here";
  std::cout << "cases: " << count << '\n';
}

}  // namespace
}  // namespace bitwright
