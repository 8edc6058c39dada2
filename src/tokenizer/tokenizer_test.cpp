#include "tokenizer/tokenizer.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "base/json.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using Ids = std::vector<int32_t>;

/// GPT-2's encoder.py, bytes_to_unicode, written the way it is there.
std::string in_alphabet(std::string_view bytes) {
  static const std::vector<int> code_points = [] {
    std::vector<int> table(256, -1);
    for (const auto& [first, last] : {std::pair<int, int>('!', '~'), {0xa1, 0xac}, {0xae, 0xff}})
      for (int b = first; b <= last; ++b) table[static_cast<size_t>(b)] = b;
    int n = 0;
    for (int& c : table)
      if (c < 0) c = 256 + n++;
    return table;
  }();
  std::string out;
  for (const char byte : bytes) {
    const int c = code_points[static_cast<unsigned char>(byte)];
    if (c < 0x80) {
      out += static_cast<char>(c);
    } else {
      out += {static_cast<char>(0xc0 | c >> 6), static_cast<char>(0x80 | (c & 0x3f))};
    }
  }
  return out;
}

/// Byte b has id b; each of `merges` adds a token, from 256 on; <s> is the last.
Json small_tokenizer(const std::vector<std::pair<std::string, std::string>>& merges) {
  Json vocabulary = Json::object(), list = Json::array();
  for (int b = 0; b < 256; ++b) vocabulary[in_alphabet(std::string(1, static_cast<char>(b)))] = b;
  for (const auto& [left, right] : merges) {
    vocabulary[in_alphabet(left + right)] = vocabulary.size();
    list.push_back(in_alphabet(left) + " " + in_alphabet(right));
  }
  const Json start = {{"id", vocabulary.size()}, {"content", "<s>"}, {"special", true}};
  return {{"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
          {"decoder", {{"type", "ByteLevel"}}},
          {"added_tokens", Json::array({start})},
          {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", list}}}};
}

const std::vector<std::pair<std::string, std::string>> kMerges = {{"h", "e"}, {"l", "l"}, {"he", "ll"}, {" ", "hell"},
                                                                  {"a", "b"}, {"b", "c"}, {"a", "a"}};
constexpr int kHe = 256, kLl = 257, kHell = 258, kSpaceHell = 259, kAb = 260, kAa = 262, kStart = 263;

Tokenizer make(const Json& json, std::string_view config = "") {
  return Tokenizer::from_json(json.dump(), config, "model");
}

std::string random_bytes(std::mt19937& random, size_t size, int alphabet) {
  std::uniform_int_distribution<int> byte(0, alphabet - 1);
  std::string out(size, '\0');
  for (char& c : out) c = static_cast<char>(byte(random));
  return out;
}

TEST(Tokenizer, MergesInRankOrderLeftmostFirst) {
  const Tokenizer t = make(small_tokenizer(kMerges));
  EXPECT_EQ(t.vocabulary_size(), 264u);
  EXPECT_EQ(t.encode("hell"), Ids{kHell});
  EXPECT_EQ(t.encode("hello hello"), (Ids{kHell, 'o', kSpaceHell, 'o'}));
  EXPECT_EQ(t.encode("helll"), (Ids{kHell, 'l'}));
  EXPECT_EQ(t.encode("heell"), (Ids{kHe, 'e', kLl}));
  EXPECT_EQ(t.encode("abc"), (Ids{kAb, 'c'})) << "a b comes before b c";
  EXPECT_EQ(t.encode("aaaaa"), (Ids{kAa, kAa, 'a'}));
  EXPECT_EQ(t.encode("aaab"), (Ids{kAa, kAb})) << "a b comes before a a";
  EXPECT_EQ(t.encode(""), Ids{});
}

/// The definition, quadratic: again and again the first merge of the list that is possible, everywhere, from the left.
Ids merged_by_definition(const std::string& piece) {
  std::vector<std::string> parts;
  for (const char c : piece) parts.emplace_back(1, c);
  for (size_t m = 0; m < kMerges.size(); ++m) {
    bool merged = false;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      if (parts[i] != kMerges[m].first || parts[i + 1] != kMerges[m].second) continue;
      parts[i] += parts[i + 1];
      parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(i) + 1);
      merged = true;
    }
    if (merged) m = std::numeric_limits<size_t>::max();
  }
  Ids ids;
  for (const std::string& part : parts) {
    int id = static_cast<unsigned char>(part[0]);
    for (size_t m = 0; m < kMerges.size(); ++m)
      if (part == kMerges[m].first + kMerges[m].second) id = 256 + static_cast<int>(m);
    ids.push_back(id);
  }
  return ids;
}

TEST(Tokenizer, AgreesWithTheDefinitionOfBpe) {
  const Tokenizer t = make(small_tokenizer(kMerges));
  std::mt19937 random(7);
  for (int i = 0; i < 2000; ++i) {
    std::string piece = random_bytes(random, 1 + static_cast<size_t>(i) % 17, 6);
    for (char& c : piece) c = "abchel"[static_cast<unsigned char>(c)];
    EXPECT_EQ(t.encode(piece), merged_by_definition(piece)) << piece;
  }
}

TEST(Tokenizer, SplitsAsGpt2) {
  // A merge inside a piece is made, one across pieces is not.
  const auto joined = [](const std::string& left, const std::string& right) {
    return make(small_tokenizer({{left, right}})).encode(left + right).size() == 1;
  };
  EXPECT_TRUE(joined("a", "b"));
  EXPECT_TRUE(joined(" ", "b"));
  EXPECT_TRUE(joined("1", "2"));
  EXPECT_TRUE(joined("'", "s"));
  EXPECT_TRUE(joined(" ", "!"));
  EXPECT_TRUE(joined("\n", "\n"));
  EXPECT_FALSE(joined("a", " "));
  EXPECT_FALSE(joined("a", "1"));
  EXPECT_FALSE(joined("1", "!"));
  EXPECT_FALSE(joined("\n", "a"));
  EXPECT_FALSE(joined("'", "S"));
  const Tokenizer spaces = make(small_tokenizer({{" ", " "}, {" ", "a"}}));
  EXPECT_EQ(spaces.encode("   a"), (Ids{256, 257})) << "the last space goes with the word";
  const Tokenizer mongolian = make(small_tokenizer({{" ", "\xe1"}}));
  EXPECT_EQ(mongolian.encode(" \u180e").size(), 3u) << "U+180E is no white space";
}

TEST(Tokenizer, RoundTripsAnyBytes) {
  const Tokenizer t = make(small_tokenizer(kMerges));
  std::mt19937 random(1);
  for (int b = 0; b < 256; ++b) {
    const std::string byte(1, static_cast<char>(b));
    EXPECT_EQ(t.encode(byte), Ids{b});
    EXPECT_EQ(t.decode(Ids{b}), byte);
  }
  for (size_t size = 0; size < 400; ++size) {
    const std::string bytes = random_bytes(random, size, 256);
    EXPECT_EQ(t.decode(t.encode(bytes), false), bytes);
  }
}

TEST(Tokenizer, BytesThatAreNoCharactersAreBytesAsOthers) {
  const Tokenizer t = make(small_tokenizer({{"\xc3", "\xa9"}, {"\xff", "\xff"}, {"\xed", "\xa0"}, {"a", "b"}}));
  EXPECT_EQ(t.encode("\u00e9"), Ids{256});
  EXPECT_EQ(t.encode("ab\xff\xff"
                     "ab"),
            (Ids{259, 257, 259}));
  EXPECT_EQ(t.encode("\xed\xa0\x80"), (Ids{258, 0x80})) << "a surrogate";
  EXPECT_EQ(t.encode("\xed\xb2\x80"), (Ids{0xed, 0xb2, 0x80})) << "as stray bytes are written inside";
  EXPECT_EQ(t.encode("\xc3"), Ids{0xc3});
  EXPECT_EQ(t.encode("\xf4\x90\x80\x80"), (Ids{0xf4, 0x90, 0x80, 0x80})) << "past U+10FFFF";
  EXPECT_EQ(t.encode("\xe0\x80\x80"), (Ids{0xe0, 0x80, 0x80})) << "overlong";
}

TEST(Tokenizer, LongPiecesTakeNoQuadraticTime) {
  const Tokenizer t = make(small_tokenizer(kMerges));
  const std::string text(1'000'000, 'a');
  const Ids ids = t.encode(text);
  EXPECT_EQ(ids.size(), 500'000u);
  EXPECT_EQ(t.decode(ids), text);
  EXPECT_EQ(t.encode(std::string(1'000'000, ' ')).size(), 1'000'000u);
}

TEST(Tokenizer, FindsAddedTokensLongestFirst) {
  Json json = small_tokenizer(kMerges);
  json["added_tokens"].push_back({{"id", 300}, {"content", "<s>2"}, {"special", true}});
  json["added_tokens"].push_back({{"id", 301}, {"content", "<t>"}, {"special", false}});
  json["added_tokens"].push_back({{"id", 302}, {"content", "t><s"}, {"special", false}});
  const Tokenizer t = make(json);
  EXPECT_EQ(t.vocabulary_size(), 303u);
  EXPECT_EQ(t.encode("<s>a<s>2<s>"), (Ids{kStart, 'a', 300, kStart}));
  EXPECT_EQ(t.encode("<t><s>"), (Ids{301, kStart})) << "the leftmost, not the longest of all";
  EXPECT_EQ(t.encode("<t>", false), Ids{301});
  EXPECT_EQ(t.encode("<s>", false), (Ids{'<', 's', '>'}));
  EXPECT_EQ(t.decode(Ids{kStart, 'a', 301, 300}), "a<t>");
  EXPECT_EQ(t.decode(Ids{kStart, 'a', 301, 300}, false), "<s>a<t><s>2");
}

TEST(Tokenizer, AddedTokensOfTheVocabularyKeepTheirBytes) {
  Json json = small_tokenizer(kMerges);
  json["added_tokens"][0] = {{"id", kSpaceHell}, {"content", in_alphabet(" hell")}};
  const Tokenizer t = make(json);
  EXPECT_EQ(t.encode("a hell" + in_alphabet(" hell")), (Ids{'a', kSpaceHell, kSpaceHell}));
  EXPECT_EQ(t.decode(Ids{kSpaceHell}), " hell");
}

TEST(Tokenizer, FindsNormalizedAddedTokensLast) {
  Json json = small_tokenizer(kMerges);
  json["added_tokens"].push_back({{"id", 300}, {"content", "xy"}, {"normalized", true}});
  json["added_tokens"].push_back({{"id", 301}, {"content", "yz"}, {"normalized", false}});
  EXPECT_EQ(make(json).encode("xyz xy"), (Ids{'x', 301, ' ', 300}));
}

TEST(Tokenizer, AddsThePrefixSpace) {
  Json json = small_tokenizer(kMerges);
  json["pre_tokenizer"]["add_prefix_space"] = true;
  const Tokenizer t = make(json);
  EXPECT_EQ(t.encode("hell"), Ids{kSpaceHell});
  EXPECT_EQ(t.encode(" hell<s>hell"), (Ids{kSpaceHell, kStart, kSpaceHell}));
  EXPECT_EQ(t.encode(""), Ids{});
  EXPECT_EQ(t.encode("<s>"), Ids{kStart});
}

TEST(Tokenizer, IgnoreMergesTakesWholePieces) {
  Json json = small_tokenizer(kMerges);
  json["model"]["vocab"]["xyz"] = 270;
  EXPECT_EQ(make(json).encode("xyz"), (Ids{'x', 'y', 'z'}));
  json["model"]["ignore_merges"] = true;
  EXPECT_EQ(make(json).encode("xyz xyz"), (Ids{270, ' ', 'x', 'y', 'z'}));
}

TEST(Tokenizer, ReadsBothFormsOfMergesAndFilesWithoutType) {
  Json json = small_tokenizer(kMerges);
  json["model"].erase("type");
  for (Json& merge : json["model"]["merges"]) {
    const std::string text = merge;
    merge = {text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1)};
  }
  EXPECT_EQ(make(json).encode("hell"), Ids{kHell});
}

TEST(Tokenizer, ReadsTheConfiguration) {
  const Json json = small_tokenizer(kMerges);
  const Tokenizer none = make(json);
  EXPECT_EQ(none.bos_id(), std::nullopt);
  EXPECT_FALSE(none.adds_bos());
  const Tokenizer t = make(json, R"({"bos_token": {"content": "<s>"}, "eos_token": "a", "add_bos_token": true})");
  EXPECT_EQ(t.bos_id(), kStart);
  EXPECT_EQ(t.eos_id(), 'a');
  EXPECT_TRUE(t.adds_bos());
}

TEST(Tokenizer, ReadsADirectory) {
  const test::TemporaryDirectory temporary;
  const std::filesystem::path& directory = temporary.path();
  EXPECT_THROW(Tokenizer{directory}, Error);
  test::write_file(directory / "tokenizer.json", small_tokenizer(kMerges).dump());
  EXPECT_EQ(Tokenizer(directory).bos_id(), std::nullopt);
  test::write_file(directory / "tokenizer_config.json", R"({"bos_token": "<s>"})");
  EXPECT_EQ(Tokenizer(directory).bos_id(), kStart);
}

/// Its message has the code, the file and `words`.
void expect_error(const std::function<void()>& act, const std::string& code, const std::string& words) {
  SCOPED_TRACE(words);
  try {
    act();
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

TEST(Tokenizer, RefusesWhatItDoesNotSupport) {
  const auto refused = [](const std::string& words, const std::function<void(Json&)>& change) {
    Json json = small_tokenizer(kMerges);
    change(json);
    expect_error([&] { make(json); }, "unsupported-tokenizer", words);
  };
  refused("model/tokenizer.json: normalizer: type 'NFX'", [](Json& j) { j["normalizer"] = {{"type", "NFX"}}; });
  refused("pre_tokenizer: type 'UnicodeScripts'", [](Json& j) { j["pre_tokenizer"] = {{"type", "UnicodeScripts"}}; });
  refused("decoder: type 'X'", [](Json& j) { j["decoder"] = {{"type", "X"}}; });
  refused("post_processor: type 'X'", [](Json& j) { j["post_processor"] = {{"type", "X"}}; });
  refused("model: type 'X'", [](Json& j) { j["model"]["type"] = "X"; });
  refused("model: dropout", [](Json& j) { j["model"]["dropout"] = 0.1; });
  refused("an affix", [](Json& j) { j["model"]["end_of_word_suffix"] = "</w>"; });
  for (const char* regex : {"[a[b]]", "[\\p{L}&&[a]]", "(", "\\p{Nonsense}"})
    refused("the expression", [&](Json& j) {
      j["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", "Isolated"}};
    });
}

TEST(Tokenizer, RefusesDamagedFiles) {
  const auto refused = [](const std::string& words, const std::function<void(Json&)>& change) {
    Json json = small_tokenizer(kMerges);
    change(json);
    expect_error([&] { make(json); }, "bad-tokenizer", words);
  };
  refused("model/tokenizer.json: not an object", [](Json& j) { j = 1; });
  refused("'model' is missing", [](Json& j) { j.erase("model"); });
  refused("pre_tokenizer: 'add_prefix_space' is missing",
          [](Json& j) { j["pre_tokenizer"].erase("add_prefix_space"); });
  refused("model: not an object", [](Json& j) { j["model"] = "BPE"; });
  refused("model: 'vocab' is missing", [](Json& j) { j["model"].erase("vocab"); });
  refused("model.vocab: not an object", [](Json& j) { j["model"]["vocab"] = Json::array(); });
  refused("model.merges: not an array", [](Json& j) { j["model"]["merges"] = 7; });
  refused("'ignore_merges' is neither", [](Json& j) { j["model"]["ignore_merges"] = 1; });
  for (const Json& id : {Json(-1), Json(1.5), Json("1"), Json(1 << 22), Json(UINT64_MAX)})
    refused("the id of 'q'", [&](Json& j) { j["model"]["vocab"]["q"] = id; });
  refused("id 5 of", [](Json& j) { j["model"]["vocab"]["q"] = 5; });
  refused("merge 2 is neither", [](Json& j) { j["model"]["merges"][2] = "h"; });
  refused("merge 2 is neither", [](Json& j) { j["model"]["merges"][2] = "h e l"; });
  refused("merge 2 is neither", [](Json& j) { j["model"]["merges"][2] = {"h", 1}; });
  refused("merge 2: 'hx' is not in", [](Json& j) { j["model"]["merges"][2] = "h x"; });
  refused("merge 2: 'he2' is not in", [](Json& j) { j["model"]["merges"][2] = "he2 l"; });
  refused("appears twice", [](Json& j) { j["model"]["merges"].push_back("h e"); });
  refused("added_tokens: not an array", [](Json& j) { j["added_tokens"] = 1; });
  refused("added_tokens: not an object", [](Json& j) { j["added_tokens"][0] = 1; });
  refused("'content' is missing", [](Json& j) { j["added_tokens"][0].erase("content"); });
  refused("'id' is missing", [](Json& j) { j["added_tokens"][0].erase("id"); });
  refused("empty or appears twice", [](Json& j) { j["added_tokens"][0]["content"] = ""; });
  refused("empty or appears twice", [](Json& j) { j["added_tokens"].push_back(j["added_tokens"][0]); });
  refused("id 7 of '<s>' is that of another", [](Json& j) { j["added_tokens"][0]["id"] = 7; });
  refused("is 104 in the vocabulary", [](Json& j) { j["added_tokens"][0]["content"] = "h"; });
  expect_error([] { Tokenizer::from_json("{", "", "model"); }, "bad-json", "model/tokenizer.json");
}

TEST(Tokenizer, RefusesDamagedConfigurations) {
  const auto refused = [](const std::string& config, const std::string& code, const std::string& words) {
    expect_error([&] { make(small_tokenizer(kMerges), config); }, code, words);
  };
  refused("[", "bad-json", "model/tokenizer_config.json");
  refused("[]", "bad-tokenizer", "model/tokenizer_config.json: not an object");
  refused(R"({"bos_token": 1})", "bad-tokenizer", "'bos_token' is missing or not a string");
  refused(R"({"bos_token": "<b>"})", "bad-tokenizer", "bos_token '<b>' is not in the vocabulary");
  refused(R"({"eos_token": {}})", "bad-tokenizer", "eos_token: 'content' is missing");
  refused(R"({"add_bos_token": true})", "bad-tokenizer", "there is no bos_token");
  refused(R"({"add_bos_token": "yes"})", "bad-tokenizer", "'add_bos_token' is neither");
}

TEST(Tokenizer, RefusesIdsThatAreNoTokens) {
  Json json = small_tokenizer(kMerges);
  json["added_tokens"][0]["id"] = 265;
  const Tokenizer t = make(json);
  for (const int32_t id : {-1, 264, 266, INT32_MAX, INT32_MIN})
    expect_error([&] { t.decode(Ids{'a', id}); }, "bad-token", std::to_string(id) + " is not a token");
}

TEST(Tokenizer, TheMapTellsWhichAddedTokensAreSpecial) {
  const test::TemporaryDirectory dir;
  test::write_file(dir / "vocab.json", R"({"a": 0, "b": 1, "<": 2, ">": 3})");
  test::write_file(dir / "merges.txt", "");
  test::write_file(dir / "added_tokens.json", R"({"<a>": 4, "<b>": 5, "ab": 6})");
  const std::vector<int32_t> all = {4, 5, 6};
  EXPECT_EQ(Tokenizer(dir.path()).encode("<a><b>ab"), all);
  EXPECT_EQ(Tokenizer(dir.path()).decode(all), "") << "without the map all are";
  test::write_file(dir / "special_tokens_map.json",
                   R"({"bos_token": {"content": "<a>"}, "additional_special_tokens": ["<b>"]})");
  EXPECT_EQ(Tokenizer(dir.path()).encode("<a><b>ab"), all);
  EXPECT_EQ(Tokenizer(dir.path()).decode(all), "ab");
  EXPECT_EQ(Tokenizer(dir.path()).encode("<a>ab", false), (std::vector<int32_t>{2, 0, 3, 6}));
}

}  // namespace
}  // namespace bitwright
