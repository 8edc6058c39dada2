#include <gtest/gtest.h>

#include <filesystem>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "tests/mixed_text.hpp"
#include "tests/support.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

using Ids = std::vector<int32_t>;

std::filesystem::path data() { return test::shared_dir() / "data"; }

std::string hash_of(const Ids& ids) {
  return sha256(std::string_view(reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(int32_t)));
}

/// The first ids of documents with BOS each, and how many of them the reference hashed: all windows and one more.
Ids stream(const Tokenizer& tokenizer, const std::vector<std::string>& documents, size_t count) {
  Ids ids;
  for (const std::string& document : documents) {
    ids.push_back(*tokenizer.bos_id());
    const Ids encoded = tokenizer.encode(document);
    ids.insert(ids.end(), encoded.begin(), encoded.end());
    if (ids.size() >= count) break;
  }
  ids.resize(std::min(ids.size(), count));
  return ids;
}

std::string stripped(const std::string& text) {
  constexpr const char* kSpace = " \t\r\n";
  const size_t begin = text.find_first_not_of(kSpace);
  return begin == text.npos ? "" : text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin);
}

/// The documents of a text as the references' protocol cuts it.
std::vector<std::string> documents_of(const std::string& name) {
  std::vector<std::string> out;
  if (name == "tinystories_5k") {
    const auto file = data() / "text/tinystories_5k.jsonl";
    if (!std::filesystem::exists(file)) return {};
    std::istringstream lines(test::read_file(file));
    for (std::string line; std::getline(lines, line);)
      if (!line.empty()) out.push_back(stripped(parse_json(line, name)["text"].get<std::string>()));
    return out;
  }
  const auto file = data() / "text" / (name + ".txt");
  if (!std::filesystem::exists(file)) return {};
  std::string text = test::read_file(file);
  if (name == "wikitext2_raw_test") {
    size_t characters = 0, end = 0;
    for (; end < text.size() && characters <= 400000; ++end) characters += (text[end] & 0xc0) != 0x80;
    return {text.substr(0, end - 1)};
  }
  const std::string separator = "<|endoftext|>";
  for (size_t begin = 0, end = 0; end != text.npos; begin = end + separator.size()) {
    end = text.find(separator, begin);
    const std::string document = stripped(text.substr(begin, end == text.npos ? end : end - begin));
    if (!document.empty()) out.push_back(document);
  }
  return out;
}

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

/// The models whose vocabularies are SentencePiece's: the prompt's ids, the greedy text and the ids of whole texts.
TEST(ModelsTokenizer, SmallModelsAgreeWithTheirReferences) {
  size_t cases = 0;
  for (const char* name : {"stories260K", "babyllama_tok105", "babyllama_tok361"}) {
    SCOPED_TRACE(name);
    const auto model = data() / "models" / name;
    if (!std::filesystem::exists(model)) continue;
    const auto file = model / "reference/reference.json";
    const Json reference = parse_json(test::read_file(file), file.string());
    const Tokenizer tokenizer(model / "hf");
    EXPECT_TRUE(tokenizer.adds_bos());
    ASSERT_TRUE(tokenizer.bos_id().has_value());
    EXPECT_EQ(stream(tokenizer, {reference["prompt"].get<std::string>()}, SIZE_MAX),
              reference["prompt_ids"].get<Ids>());
    for (const std::string from : {"prompt", "bos"})
      EXPECT_EQ(tokenizer.decode(reference["greedy_from_" + from + "_ids"].get<Ids>()),
                reference["greedy_from_" + from + "_text"].get<std::string>());
    for (const auto& [text, expected] : reference["eval"].items()) {
      const std::vector<std::string> documents = documents_of(text);
      if (documents.empty()) continue;
      const size_t count = expected["windows"].get<size_t>() * expected["window"].get<size_t>() + 1;
      EXPECT_EQ(hash_of(stream(tokenizer, documents, count)), expected["stream_sha256_int32le"].get<std::string>())
          << text;
      ++cases;
    }
  }
  if (cases == 0) GTEST_SKIP() << "no model here";
  std::cout << "cases: " << cases << '\n';
}

/// What llama.cpp's own tests hold for a vocabulary: texts, and for each a line of the ids that transformers gave.
/// Those whose GGUF file is not here may be here in another form.
TEST(ModelsTokenizer, AgreesWithLlamaCppsTests) {
  const std::map<std::string, std::string> other_forms = {
      {"qwen2", "qwen2"}, {"deepseek-r1-qwen", "qwen2"}, {"llama-bpe", "llama3/tokenizer.model"}};
  const auto tokenizers = data() / "tokenizers";
  size_t pairs = 0;
  for (const auto& input : test::files_in(tokenizers / "llama.cpp_vocabs", ".gguf.inp")) {
    std::filesystem::path vocabulary = input;
    vocabulary.replace_extension();
    const std::string name = vocabulary.stem().string().substr(std::string("ggml-vocab-").size());
    SCOPED_TRACE(name);
    if (!std::filesystem::exists(vocabulary)) {
      if (!other_forms.contains(name)) continue;
      vocabulary = tokenizers / other_forms.at(name);
    }
    const Tokenizer tokenizer(vocabulary);
    const std::string texts = test::read_file(input), separator = "\n__ggml_vocab_test__\n";
    std::istringstream lines(test::read_file(input.parent_path() / input.stem().concat(".out")));
    size_t count = 0;
    for (size_t begin = 0, end = 0; end != texts.npos; begin = end + separator.size(), ++count) {
      end = texts.find(separator, begin);
      const std::string text = texts.substr(begin, end == texts.npos ? end : end - begin);
      std::string line;
      std::getline(lines, line);
      std::istringstream numbers(line);
      const Ids expected{std::istream_iterator<int32_t>(numbers), {}};
      EXPECT_EQ(tokenizer.encode(text, false), expected) << text;
      if (name != "bert-bge") {
        EXPECT_EQ(tokenizer.decode(expected), text);
      }
    }
    EXPECT_GT(count, 30u);
    ++pairs;
  }
  if (pairs == 0) GTEST_SKIP() << "no vocabularies here";
  std::cout << "cases: " << pairs << '\n';
}

/// The ids of one megabyte of mixed text, as other programs gave them: npm's @huggingface/tokenizers 0.2.0
/// (tools/peers/tokenizers.mjs), SentencePiece 0.1.97, npm's tiktoken 1.0.22.
TEST(ModelsTokenizer, MixedTextAgreesWithPeers) {
  struct Case {
    const char* file;
    bool special;  ///< does the peer read special tokens in text?
    const char* hash;
  };
  constexpr Case kCases[] = {
      {"tokenizers/gpt2/tokenizer.json", true, "f99490e14bf6de145410dfdc705ec26656e1fb7e34f09a695298c4278c3cd1d1"},
      {"tokenizers/gpt_neox/20B_tokenizer.json", true,
       "3ff5aaecc6f09052dd7ad7f7fa1d0379517d6bb68ebc075f808da8d420351a32"},
      {"tokenizers/llama2/tokenizer.json", true, "41cb60c4dcb97b7d848174010a98698ee9f11d84f0ef61c5904d804f9584cab1"},
      {"tokenizers/minimind/tokenizer.json", true, "9b22d79f3e8c308dc79400f8d6a80843e68397560d727ff6dcab8ada2ae72edc"},
      {"models/stories260K/hf", true, "a7118036b021bab207a9dd439c62d74abe4e8832dcc45434a122c7bccff3d09e"},
      {"models/babyllama_tok105/hf", true, "c0bc22d86781cc7eb9edb551e49a4a094b232e7e2043e3c71c540cd742f8b5d5"},
      {"models/babyllama_tok361/hf", true, "840db6ba49fcf80b9aaec02a20abb52a064f02eb613a64f7bc805059f616c008"},
      {"models/tinystories4M/hf", true, "5525c5c9e5609fdd5d42aab44ce7a91acac3250daf91928b3b7cbd2f2ff55260"},
      {"tokenizers/llama2/tokenizer.model", false, "d500ee09e7e85f1f47c8fcf22e5b513ff7ef6f39ad750afeacc207982304f2db"},
      {"tokenizers/misc/tinystories_tokenizer_4096.model", false,
       "f070f8621e85d25e05539a21ecc62d5b194acab50505ac15886e88a3747dedc9"},
      {"tokenizers/mistral/mistral_instruct_tokenizer_240323.model.v3", false,
       "0289bcf1f9248c53578f62b2f90b307b41925363a082580b642c69e7df721d71"},
      {"tokenizers/mistral/tokenizer.model.v1", false,
       "04c38969a1af1b330d2b7890d2ac039f9b698708b6d3afbc61d5a146b4cc7b53"},
      {"models/stories260K/original/tok512.model", false,
       "fd0bc88ab89a7adaa174acc61399122a0eaf32819d3882d1a08ba64f0c73715e"},
      {"models/babyllama_tok105/original/tok105.model", false,
       "b69f2d6805e34cb9822a714013d1c054e221273abffe76b4b674392b255cba53"},
      {"tokenizers/tiktoken/cl100k_base.tiktoken", true,
       "af4a06da9e1c4c6ee689ad5878702feb0f4e971817a24b95ed724268c1fedb58"},
      {"tokenizers/tiktoken/o200k_base.tiktoken", true,
       "29ace8e662958f4660396c620ba2edcba99c6fae820f7459db46a6dca7cd51b1"},
      {"tokenizers/tiktoken/r50k_base.tiktoken", true,
       "f99490e14bf6de145410dfdc705ec26656e1fb7e34f09a695298c4278c3cd1d1"},
  };
  const std::string text = test::mixed_text();
  ASSERT_EQ(sha256(text), "35cc5be0c64e3b8f7195d2049c396338e4ad0e1211fad99e4c9c25deb4388179");
  size_t count = 0;
  for (const Case& c : kCases) {
    if (!std::filesystem::exists(data() / c.file)) continue;
    EXPECT_EQ(hash_of(Tokenizer(data() / c.file).encode(text, c.special)), c.hash) << c.file;
    ++count;
  }
  if (count == 0) GTEST_SKIP() << "no tokenizer here";
  std::cout << "cases: " << count << '\n';
}

/// Files that hold one and the same vocabulary give the same ids.
TEST(ModelsTokenizer, FormsOfOneVocabularyAgree) {
  const std::pair<const char*, const char*> pairs[] = {
      {"tokenizers/qwen2", "tokenizers/qwen2/qwen.tiktoken"},
      {"tokenizers/llama2/tokenizer.model", "tokenizers/llama2/tokenizer.bin"},
      {"tokenizers/llama2/tokenizer.model", "tokenizers/llama.cpp_vocabs/ggml-vocab-llama-spm.gguf"},
      {"tokenizers/gpt2/tokenizer.json", "tokenizers/llama.cpp_vocabs/ggml-vocab-gpt-2.gguf"},
      {"models/stories260K/hf", "models/stories260K/original/tok512.bin"}};
  const std::string text = test::mixed_text();
  size_t count = 0;
  for (const auto& [one, other] : pairs) {
    if (!std::filesystem::exists(data() / one) || !std::filesystem::exists(data() / other)) continue;
    EXPECT_EQ(hash_of(Tokenizer(data() / one).encode(text)), hash_of(Tokenizer(data() / other).encode(text))) << other;
    ++count;
  }
  if (count == 0) GTEST_SKIP() << "no tokenizer here";
  std::cout << "cases: " << count << '\n';
}

TEST(ModelsTokenizer, LinesMayEndInCrLf) {
  const auto qwen = data() / "tokenizers/qwen2";
  if (!std::filesystem::exists(qwen / "merges_crlf_as_committed.txt")) GTEST_SKIP() << "no tokenizer here";
  const test::TemporaryDirectory directory;
  for (const char* name : {"vocab.json", "tokenizer_config.json", "added_tokens.json"})
    std::filesystem::copy_file(qwen / name, directory / name);
  std::filesystem::copy_file(qwen / "merges_crlf_as_committed.txt", directory / "merges.txt");
  const std::string text = test::mixed_text().substr(0, 100000);
  EXPECT_EQ(Tokenizer(directory.path()).encode(text), Tokenizer(qwen).encode(text));
  EXPECT_EQ(Tokenizer(qwen).eos_id(), 151645);
  EXPECT_FALSE(Tokenizer(qwen).adds_bos());
}

/// Where there are tokens for all bytes (Falcon and MPT lack some) and no normalizer, any bytes come back.
TEST(ModelsTokenizer, RoundTripsAnyBytes) {
  std::string text = test::mixed_text();
  for (size_t i = 0; i < text.size(); i += 333) text[i] = static_cast<char>(i / 333 * 37);
  size_t count = 0;
  for (const char* file :
       {"models/tinystories4M/hf", "tokenizers/gpt2", "tokenizers/minimind", "tokenizers/llama3",
        "tokenizers/tiktoken/cl100k_base.tiktoken", "tokenizers/llama2/tokenizer.model", "models/stories260K/hf",
        "tokenizers/mistral/tokenizer.model.v1", "tokenizers/llama.cpp_vocabs/ggml-vocab-gpt-2.gguf"}) {
    if (!std::filesystem::exists(data() / file)) continue;
    const Tokenizer tokenizer(data() / file);
    // SentencePiece cannot tell U+2581 from a space.
    std::string expected = text, back = tokenizer.decode(tokenizer.encode(text, false), false);
    for (std::string* s : {&expected, &back})
      for (size_t at = 0; (at = s->find("\u2581", at)) != s->npos;) s->replace(at, 3, " ");
    EXPECT_TRUE(back == expected) << file;
    ++count;
  }
  if (count == 0) GTEST_SKIP() << "no tokenizer here";
  std::cout << "cases: " << count << '\n';
}

}  // namespace
}  // namespace bitwright
