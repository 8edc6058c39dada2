#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/json.hpp"
#include "tests/support.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/gguf_vocabulary.hpp"
#include "tokenizer/scored_vocabulary.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

using Ids = std::vector<int32_t>;
using Texts = std::vector<std::string>;

/// A tokenizer whose tokens are whole pieces, `words`; id 0 is the unknown one.
Json word_level(const Texts& words) {
  Json vocabulary = {{"[UNK]", 0}};
  for (const std::string& word : words) vocabulary.emplace(word, vocabulary.size());
  return {{"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", "[UNK]"}}}};
}

Tokenizer make(const Json& json) { return Tokenizer::from_json(json.dump(), "", "model"); }

/// The pieces that `part` (a pre_tokenizer, or a normalizer) makes of `text` are `expected`.
void expect_pieces(const char* key, const Json& part, const std::string& text, const Texts& expected) {
  Json json = word_level(expected);
  json[key] = part;
  Ids ids;
  for (const std::string& piece : expected) ids.push_back(json["model"]["vocab"][piece].get<int32_t>());
  EXPECT_EQ(make(json).encode(text), ids) << part.dump() << " of " << text;
}

TEST(Pipeline, SplitBehaviors) {  // the examples of tokenizers' documentation of SplitDelimiterBehavior
  const auto split = [](const char* behavior, bool invert = false) {
    return Json{{"type", "Split"}, {"pattern", {{"String", "-"}}}, {"behavior", behavior}, {"invert", invert}};
  };
  const std::string text = "the-final--countdown";
  expect_pieces("pre_tokenizer", split("Removed"), text, {"the", "final", "countdown"});
  expect_pieces("pre_tokenizer", split("Isolated"), text, {"the", "-", "final", "-", "-", "countdown"});
  expect_pieces("pre_tokenizer", split("MergedWithPrevious"), text, {"the-", "final-", "-", "countdown"});
  expect_pieces("pre_tokenizer", split("MergedWithNext"), text, {"the", "-final", "-", "-countdown"});
  expect_pieces("pre_tokenizer", split("Contiguous"), text, {"the", "-", "final", "--", "countdown"});
  expect_pieces("pre_tokenizer", split("Removed", true), text, {"-", "-", "-"});
}

TEST(Pipeline, PreTokenizers) {
  expect_pieces("pre_tokenizer", {{"type", "Whitespace"}}, "Hey man! d\u00e9j\u00e0_vu",
                {"Hey", "man", "!", "d\u00e9j\u00e0_vu"});
  expect_pieces("pre_tokenizer", {{"type", "WhitespaceSplit"}}, "Hey man!\u3000x", {"Hey", "man!", "x"});
  expect_pieces("pre_tokenizer", {{"type", "BertPreTokenizer"}}, "Hey friend!  Ok?", {"Hey", "friend", "!", "Ok", "?"});
  expect_pieces("pre_tokenizer", {{"type", "Digits"}}, "a12\u00b2b3", {"a", "12\u00b2", "b", "3"});
  expect_pieces("pre_tokenizer", {{"type", "Digits"}, {"individual_digits", true}}, "a12", {"a", "1", "2"});
  expect_pieces("pre_tokenizer", {{"type", "Punctuation"}}, "a!?\u3002b", {"a", "!", "?", "\u3002", "b"});
  expect_pieces("pre_tokenizer", {{"type", "Punctuation"}, {"behavior", "Contiguous"}}, "a!?b", {"a", "!?", "b"});
  expect_pieces("pre_tokenizer", {{"type", "CharDelimiterSplit"}, {"delimiter", "|"}}, "a|b||c", {"a", "b", "c"});
  expect_pieces("pre_tokenizer", {{"type", "Metaspace"}}, "Hey  my", {"\u2581Hey", "\u2581", "\u2581my"});
  expect_pieces("pre_tokenizer", {{"type", "Metaspace"}, {"add_prefix_space", false}}, "Hey my", {"Hey", "\u2581my"});
  expect_pieces("pre_tokenizer", {{"type", "Metaspace"}, {"prepend_scheme", "never"}, {"split", false}}, "a b",
                {"a\u2581"
                 "b"});
}

TEST(Pipeline, MetaspaceFirstIsOnlyTheBeginning) {
  Json json =
      word_level({"\u2581"
                  "a",
                  "a"});
  json["pre_tokenizer"] = {{"type", "Metaspace"}, {"prepend_scheme", "first"}};
  json["added_tokens"] = Json::array({{{"id", 3}, {"content", "<s>"}, {"special", true}}});
  EXPECT_EQ(make(json).encode("a<s>a"), (Ids{1, 3, 2}));
  EXPECT_EQ(make(json).encode("<s>a"), (Ids{3, 2}));
  json["pre_tokenizer"]["prepend_scheme"] = "always";
  EXPECT_EQ(make(json).encode("a<s>a"), (Ids{1, 3, 1}));
}

TEST(Pipeline, Normalizers) {
  const auto type = [](const char* name) { return Json{{"type", name}}; };
  expect_pieces("normalizer", type("NFC"), "e\u0301\u1100\u1161", {"\u00e9\uac00"});
  expect_pieces("normalizer", type("NFD"), "\u00e9\uac00", {"e\u0301\u1100\u1161"});
  expect_pieces("normalizer", type("NFKC"), "\ufb01\u2460", {"fi1"});
  expect_pieces("normalizer", type("NFKD"), "\ufb01\u00e9", {"fie\u0301"});
  expect_pieces("normalizer", type("NFC"), "\u0958", {"\u0915\u093c"});  // excluded from composition
  expect_pieces("normalizer", type("Lowercase"), "\u0130STANBUL \u03a3", {"i\u0307stanbul \u03c3"});
  expect_pieces("normalizer", type("Strip"), " \u3000a b\n", {"a b"});
  expect_pieces("normalizer", {{"type", "Strip"}, {"strip_left", false}}, " a ", {" a"});
  expect_pieces("normalizer", {{"type", "Strip"}, {"strip_right", false}}, " a ", {"a "});
  expect_pieces("normalizer", type("StripAccents"), "e\u0301", {"e"});
  expect_pieces("normalizer", type("Nmt"), "a\u200b\u0001b", {"a b"});
  expect_pieces("normalizer", {{"type", "Prepend"}, {"prepend", "_"}}, "a", {"_a"});
  expect_pieces("normalizer", {{"type", "Replace"}, {"pattern", {{"Regex", "\\s+"}}}, {"content", "_"}}, "a \t\u0085b",
                {"a_b"});
  expect_pieces("normalizer", {{"type", "BertNormalizer"}}, "H\u00c9\u4e2d\t\u0007x", {"he \u4e2d  x"});
  expect_pieces("normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "NFD"}}, {{"type", "StripAccents"}}}}},
                "\u00e9", {"e"});
}

TEST(Pipeline, AddedTokensTakeSpacesAndStandAlone) {
  Json json = word_level({"a", " a"});
  const auto with = [&](const Json& flags) {
    Json token = {{"id", 3}, {"content", "<m>"}, {"normalized", false}};
    token.update(flags);
    json["added_tokens"] = Json::array({token});
    return make(json);
  };
  EXPECT_EQ(with(Json::object()).encode("a <m> a"), (Ids{0, 3, 2})) << "'a ' is unknown";
  EXPECT_EQ(with({{"lstrip", true}}).encode("a <m> a"), (Ids{1, 3, 2}));
  EXPECT_EQ(with({{"lstrip", true}, {"rstrip", true}}).encode("a \n<m>\u3000 a"), (Ids{1, 3, 1}));
  EXPECT_EQ(with({{"single_word", true}}).encode("a<m>"), Ids{0});
  EXPECT_EQ(with({{"single_word", true}}).encode("<m> a"), (Ids{3, 2}));
}

TEST(Pipeline, Unigram) {  // the example in tokenizers' unigram/model.rs
  const Json vocabulary = Json::parse(
      R"([["<unk>", 0], ["a", 0], ["b", 0], ["c", 0], ["d", 0], ["cd", 1], ["ab", 2], ["abc", 5], ["abcd", 10]])");
  Json json = {{"model", {{"type", "Unigram"}, {"vocab", vocabulary}, {"unk_id", 0}}}, {"decoder", {{"type", "Fuse"}}}};
  EXPECT_EQ(make(json).encode("abcdacdxx"), (Ids{8, 1, 5, 0}));
  EXPECT_EQ(make(json).encode("x\xff"
                              "a"),
            (Ids{0, 1}));
  json["model"].erase("unk_id");
  EXPECT_EQ(make(json).encode("xa"), Ids{1});
  json["model"]["unk_id"] = 9;
  EXPECT_THROW(make(json), Error);
}

TEST(Pipeline, WordPiece) {
  const Json vocabulary = {{"[UNK]", 0}, {"un", 1}, {"##aff", 2}, {"##able", 3}, {"a", 4}};
  Json json = {{"model", {{"type", "WordPiece"}, {"vocab", vocabulary}, {"unk_token", "[UNK]"}}},
               {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
               {"decoder", {{"type", "WordPiece"}}}};
  EXPECT_EQ(make(json).encode("unaffable a unx"), (Ids{1, 2, 3, 4, 0}));
  EXPECT_EQ(make(json).decode(Ids{1, 2, 3, 4}), "unaffable a");
  json["model"]["max_input_chars_per_word"] = 8;
  EXPECT_EQ(make(json).encode("unaffable"), Ids{0});
}

/// Merges over characters: unknown ones become bytes, or the unknown token; affixes are part of the texts.
TEST(Pipeline, BpeOverCharacters) {
  Json vocabulary = {{"<unk>", 0}, {"a", 1}, {"b", 2}, {"ab", 3}};
  Json json = {{"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", {"a b"}}, {"unk_token", "<unk>"}}}};
  EXPECT_EQ(make(json).encode("abx\u00e9xa"), (Ids{3, 0, 0, 0, 1}));
  json["model"]["fuse_unk"] = true;
  EXPECT_EQ(make(json).encode("abx\u00e9xa"), (Ids{3, 0, 1}));
  for (int byte = 0; byte < 256; ++byte) {
    const std::string digits = "0123456789ABCDEF";
    vocabulary["<0x" + digits.substr(static_cast<size_t>(byte) / 16, 1) +
               digits.substr(static_cast<size_t>(byte) % 16, 1) + ">"] = 4 + byte;
  }
  json["model"]["vocab"] = vocabulary;
  json["model"]["byte_fallback"] = true;
  json["decoder"] = {{"type", "ByteFallback"}};
  EXPECT_EQ(make(json).encode("ab\u00e9\xff"), (Ids{3, 4 + 0xc3, 4 + 0xa9, 4 + 0xff}));
  EXPECT_EQ(make(json).decode(Ids{3, 4 + 0xc3, 4 + 0xa9, 4 + 0xff}), "ab\u00e9\xff");
  const Json affixed = {{"a", 0}, {"##b", 1}, {"b</w>", 2}, {"##b</w>", 3}, {"ab</w>", 4}};
  json = {{"model",
           {{"type", "BPE"},
            {"vocab", affixed},
            {"merges", {"a ##b</w>"}},
            {"continuing_subword_prefix", "##"},
            {"end_of_word_suffix", "</w>"}}},
          {"pre_tokenizer", {{"type", "WhitespaceSplit"}}}};
  EXPECT_EQ(make(json).encode("ab b abb"), (Ids{4, 2, 0, 1, 3}));
}

/// A long piece is cut where no merge joins: the same ids as in one go.
TEST(Pipeline, LongPiecesAreCutOnlyWhereNothingJoins) {
  const Json vocabulary = {{"a", 0}, {"b", 1}, {"c", 2}, {"ab", 3}, {"abc", 4}, {"ca", 5}};
  const Json json = {{"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", {"a b", "ab c", "c a"}}}}};
  const Tokenizer t = make(json);
  std::string text;
  Ids expected;
  for (int i = 0; i < 500; ++i) {
    text += "abcab";
    const Ids ids = t.encode("abcab");
    expected.insert(expected.end(), ids.begin(), ids.end());
  }
  EXPECT_EQ(t.encode(text), expected);
}

TEST(Pipeline, PostProcessorTellsBos) {
  Json json = word_level({"a", "<s>"});
  EXPECT_FALSE(make(json).adds_bos());
  json["post_processor"] = {{"type", "Sequence"},
                            {"processors",
                             {{{"type", "ByteLevel"}},
                              {{"type", "TemplateProcessing"},
                               {"single", {{{"SpecialToken", {{"id", "<s>"}}}}, {{"Sequence", {{"id", "A"}}}}}},
                               {"special_tokens", {{"<s>", {{"ids", {2}}}}}}}}}};
  EXPECT_TRUE(make(json).adds_bos());
  EXPECT_EQ(make(json).bos_id(), 2);
  const std::string off = R"({"add_bos_token": false})";
  EXPECT_FALSE(Tokenizer::from_json(json.dump(), off, "model").adds_bos());
  json["post_processor"] = {{"type", "RobertaProcessing"}, {"cls", {"<s>", 2}}, {"sep", {"<s>", 2}}};
  EXPECT_TRUE(make(json).adds_bos());
}

TEST(Pipeline, GgufVocabularies) {
  GgufVocabulary v = {.model = "llama",
                      .tokens = {"<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab",
                                 "\u2581"
                                 "ab"},
                      .scores = {0, 0, 0, -3, -4, -5, -1, -2},
                      .types = {2, 3, 3, 1, 1, 1, 1, 1}};
  const Tokenizer t = Tokenizer::from_gguf(v, "x.gguf");
  EXPECT_EQ(t.encode("ab b"), (Ids{7, 3, 5}));
  EXPECT_EQ(t.decode(Ids{1, 7, 3, 5}), "ab b");
  EXPECT_EQ(t.encode("<s>", true), Ids{1});
  EXPECT_TRUE(t.adds_bos());
  v.add_space_prefix = false;
  EXPECT_EQ(Tokenizer::from_gguf(v, "x.gguf").encode("ab"), Ids{6});
  for (const auto& damage : std::vector<std::function<void(GgufVocabulary&)>>{
           [](auto& g) { g.scores.pop_back(); }, [](auto& g) { g.types.pop_back(); }, [](auto& g) { g.bos = 8; },
           [](auto& g) { g.tokens.clear(); }, [](auto& g) { g.model = "rwkv"; },
           [](auto& g) { g.model = "gpt2", g.pre = "nonsense"; }, [](auto& g) { g.model = "gpt2", g.merges = {"a"}; },
           [](auto& g) { g.tokens[4].clear(); }}) {
    GgufVocabulary damaged = v;
    damage(damaged);
    EXPECT_THROW(Tokenizer::from_gguf(damaged, "x.gguf"), Error);
  }
}

/// As SentencePiece 0.1.97 does: a piece of the user's costs 0.1, however long it is and rare the others are.
TEST(Pipeline, UnigramPrefersTheUsersPieces) {
  ScoredVocabulary v = {.pieces = {{"<unk>", 0, PieceType::unknown},
                                   {"t", -2},
                                   {"his", -3},
                                   {"is", -4},
                                   {"th", 0, PieceType::user_defined},
                                   {"h", -9}},
                        .unigram = true,
                        .normalization = {},
                        .bos = {},
                        .eos = {}};
  v.normalization.add_dummy_prefix = false;
  EXPECT_EQ(Tokenizer(pipeline_of(v, "x")).encode("this"), (Ids{4, 3}));
  v.pieces[4].type = PieceType::normal;
  v.pieces[4].score = -2;
  EXPECT_EQ(Tokenizer(pipeline_of(v, "x")).encode("this"), (Ids{1, 2}));
}

/// Both orders of "!" and "!!" cost the same; what SentencePiece 0.1.97 says depends on what was added before.
TEST(Pipeline, UnigramRoundsAsSentencePiece) {
  ScoredVocabulary v = {.pieces = {{"<unk>", 0, PieceType::unknown},
                                   {"\u2581", -1.693242073059082F},
                                   {"b", -6.0574631690979F},
                                   {"!", -5.9671502113342285F},
                                   {"!!", 0, PieceType::user_defined}},
                        .unigram = true,
                        .single_precision = true,
                        .normalization = {},
                        .bos = {},
                        .eos = {}};
  const Tokenizer t(pipeline_of(v, "x"));
  EXPECT_EQ(t.encode("!!!"), (Ids{1, 3, 4}));
  EXPECT_EQ(t.encode("b!!!"), (Ids{1, 2, 4, 3}));
  EXPECT_EQ(t.encode("bb!!!"), (Ids{1, 2, 2, 3, 4}));
}

/// Every beginning of each file of the corpus is read or refused, and the whole is read unless it says too little.
TEST(Pipeline, TruncatedFilesAreRefused) {
  using Read = TokenizerPipeline (*)(std::string_view, const std::string&);
  const std::pair<const char*, Read> cases[] = {
      {"bpe", read_sentencepiece}, {"unigram", read_sentencepiece}, {"llama2c", read_llama2c}};
  for (const auto& [name, read] : cases) {
    SCOPED_TRACE(name);
    const std::string bytes = test::read_file(std::filesystem::path("tests/corpus/vocabulary_files") / name).substr(1);
    EXPECT_NO_THROW(read(bytes, name));
    size_t refused = 0;
    for (size_t size = 0; size < bytes.size(); ++size) {
      try {
        read(bytes.substr(0, size), name);
      } catch (const Error&) {
        ++refused;
      }
    }
    EXPECT_GT(refused, bytes.size() / 2);
  }
  EXPECT_THROW(read_tiktoken("IQ== 0\nIg== 1\n", "x"), Error) << "no encoding has two ranks";
  EXPECT_THROW(read_tiktoken("IQ== 0\nIg== x\n", "x"), Error);
}

}  // namespace
}  // namespace bitwright
