#include "evaluate/evaluate.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "evaluate/score.hpp"
#include "evaluate/white_space.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using Ids = std::vector<int32_t>;
using Floats = std::vector<float>;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const Tokenizer& tokenizer() {
  static const Tokenizer instance(test::example_model());
  return instance;
}

struct Example {
  Checkpoint checkpoint{test::example_model()};
  Model model{checkpoint};
};
const Example& example() {
  static const Example instance;
  return instance;
}

Ids joined(std::initializer_list<std::string_view> documents, bool bos) {
  Ids out;
  for (const std::string_view document : documents) {
    if (bos) out.push_back(0);
    for (const int32_t id : tokenizer().encode(document)) out.push_back(id);
  }
  return out;
}

void expect_error(const std::string& code, const std::function<void()>& act) {
  try {
    act();
    ADD_FAILURE() << "no error " << code;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
  }
}

TEST(Evaluate, StreamOfDocuments) {
  const std::string text = " One day.\n<|endoftext|> \n<|endoftext|>\nThe end.\n\n";
  Protocol p;
  p.split = "<|endoftext|>";
  EXPECT_EQ(token_stream(tokenizer(), text, p), joined({"One day.", "The end."}, false));
  p.bos = Protocol::Bos::window;
  EXPECT_EQ(token_stream(tokenizer(), text, p), joined({"One day.", "The end."}, false));
  p.bos = Protocol::Bos::document;
  EXPECT_EQ(token_stream(tokenizer(), text, p), joined({"One day.", "The end."}, true));
  p.split = "";
  EXPECT_EQ(token_stream(tokenizer(), " One day.\nThe end. ", p), joined({" One day.\nThe end. "}, true));
  EXPECT_EQ(token_stream(tokenizer(), "", p), Ids{});
}

TEST(Evaluate, StripsWhiteSpaceAsPythonDoes) {
  for (const std::string space : {" ", "\n", "\t\v\f\r", "\x1c\x1f", "\u0085", "\u00a0", "\u1680", "\u2000\u200a",
                                  "\u2028\u2029", "\u202f", "\u205f", "\u3000 \u3000"}) {
    EXPECT_EQ(stripped(space + "a b" + space), "a b");
    EXPECT_EQ(right_stripped(space + "a" + space), space + "a");
    EXPECT_EQ(stripped(space), "");
  }
  for (const std::string text : {"", "\u200b", "\ufeff", "\u180e", "\u00e0", "a\x80", "\xa0", "\xc2", "\u0400"})
    EXPECT_EQ(stripped(text), text);
  Protocol p;
  p.split = "--";
  EXPECT_EQ(token_stream(tokenizer(), "\u3000One day.\u00a0--\u2003", p), joined({"One day."}, false));
}

TEST(Evaluate, StreamOfJsonLines) {
  Protocol p;
  p.bos = Protocol::Bos::document;
  const std::string text = "\n{\"text\": \"One day. \", \"id\": 1}\n{\"text\": \"\"}\r\n\n{\"text\": \"The\\nend.\"}";
  EXPECT_EQ(token_stream(tokenizer(), text, p), joined({"One day.", "The\nend."}, true));
  p.split = "\n";
  EXPECT_EQ(token_stream(tokenizer(), text, p), joined({"One day.", "The", "end."}, true));
  p.split = "";
  for (const std::string plain :
       {"{\"txt\": \"a\"}", "{\"text\": 1}", "{text}\n{\"text\": \"a\"}", "a\n{\"text\": \"a\"}"})
    EXPECT_EQ(token_stream(tokenizer(), plain, p), joined({plain}, true));
  expect_error("bad-text", [&] { token_stream(tokenizer(), "{\"text\": \"a\"}\n{\"text\": \"b\"", p); });
}

TEST(Evaluate, StreamNeedsABosWhereAsked) {
  const std::string json = test::read_file(test::example_model() / "tokenizer.json");
  Protocol p;
  p.bos = Protocol::Bos::document;
  expect_error("no-bos", [&] { token_stream(Tokenizer::from_json(json, "", "model"), "a", p); });
}

std::vector<std::pair<size_t, int64_t>> windows(size_t stream, const Protocol& protocol) {
  std::vector<std::pair<size_t, int64_t>> out;
  for (const Window& w : cut(stream, protocol)) out.emplace_back(w.begin, w.first_scored);
  return out;
}

TEST(Evaluate, CutsFullWindows) {
  using Windows = std::vector<std::pair<size_t, int64_t>>;
  Protocol p = {.context = 4, .stride = 4};
  EXPECT_EQ(windows(0, p), Windows{});
  EXPECT_EQ(windows(4, p), Windows{});
  EXPECT_EQ(windows(8, p), (Windows{{0, 0}}));
  EXPECT_EQ(windows(9, p), (Windows{{0, 0}, {4, 0}}));
  p.bos = Protocol::Bos::window;
  EXPECT_EQ(windows(3, p), Windows{});
  EXPECT_EQ(windows(8, p), (Windows{{0, 0}, {4, 0}}));
  p = {.context = 4, .stride = 3};
  EXPECT_EQ(windows(11, p), (Windows{{0, 0}, {3, 1}, {6, 1}}));
  p.max_windows = 2;
  EXPECT_EQ(windows(11, p), (Windows{{0, 0}, {3, 1}}));
  p = {.context = 4, .stride = 6};
  EXPECT_EQ(windows(11, p), (Windows{{0, 0}, {6, 0}}));
  p = {.context = std::numeric_limits<int64_t>::max(), .stride = std::numeric_limits<int64_t>::max()};
  EXPECT_EQ(windows(11, p), Windows{});
}

TEST(Evaluate, StridesScoreEachTokenOnce) {
  for (int64_t stride = 1; stride <= 5; ++stride) {
    int64_t next = 0;
    for (const Window& w : cut(40, {.context = 5, .stride = stride}))
      for (int64_t i = w.first_scored; i < 5; ++i) EXPECT_EQ(static_cast<int64_t>(w.begin) + i, next++);
    EXPECT_GT(next, 40 - 1 - stride);
  }
}

TEST(Evaluate, ScoresByHand) {
  EXPECT_DOUBLE_EQ(score(Floats{0, 0}, {}, 1).nll, std::log(2.0));
  EXPECT_DOUBLE_EQ(score(Floats{1, 2, 3}, {}, 2).nll, 0.40760596444438046);
  EXPECT_DOUBLE_EQ(score(Floats{10000, 9999}, {}, 1).nll, 1.3132616875182228);
  EXPECT_DOUBLE_EQ(score(Floats{-10000, 10000}, {}, 0).nll, 20000);
  const Score s = score(Floats{1, 0}, Floats{0, 0}, 1);  // p 0.731, 0.269 against a half each
  EXPECT_DOUBLE_EQ(s.nll, 1.3132616875182228);
  EXPECT_DOUBLE_EQ(s.reference_nll, std::log(2.0));
  EXPECT_NEAR(s.divergence, 0.12011450695827752, 1e-15);
  EXPECT_NEAR(score(Floats{0, 0}, Floats{1, 0}, 1).divergence, 0.11094407167172737, 1e-15) << "not symmetric";
  EXPECT_NEAR(score(Floats{10001, 10000}, Floats{-10000, -10000}, 1).divergence, 0.12011450695827752, 1e-12);
  EXPECT_DOUBLE_EQ(score(Floats{0, 10000}, Floats{10000, 0}, 0).divergence, 10000);
}

TEST(Evaluate, AgreesOnTheLowestOfEqualLogits) {
  EXPECT_TRUE(score(Floats{2, 2, 0}, Floats{3, 3, 3}, 0).same_top);
  EXPECT_FALSE(score(Floats{1, 1, 0}, Floats{0, 5, 5}, 0).same_top);
  EXPECT_TRUE(score(Floats{-3, -2, -2}, Floats{0, 1, 0.5}, 0).same_top);
  EXPECT_TRUE(score(Floats{1, 2, 2}, {}, 1).greedy);
  EXPECT_FALSE(score(Floats{1, 2, 2}, {}, 2).greedy);
}

TEST(Evaluate, EqualLogitsDoNotDiverge) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 8);
  std::vector<Score> scores;
  for (int i = 0; i < 50; ++i) {
    Floats logits(1000);
    for (float& v : logits) v = normal(random);
    scores.push_back(score(logits, logits, i));
    EXPECT_EQ(scores.back().nll, scores.back().reference_nll);
    EXPECT_EQ(scores.back().nll, score(logits, {}, i).nll);
  }
  const Divergence d = summarize(scores);
  EXPECT_EQ(d.kl_mean, 0);
  EXPECT_EQ(d.kl_max, 0);
  EXPECT_EQ(d.top1_agreement, 1);
}

TEST(Evaluate, MarksLogitsThatAreNotFinite) {
  for (const float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    EXPECT_TRUE(std::isnan(score(Floats{0, bad, 1}, {}, 0).nll));
    EXPECT_TRUE(std::isnan(score(Floats{0, bad, 1}, Floats{0, 0, 0}, 0).nll));
    const Score s = score(Floats{0, 0, 0}, Floats{0, bad, 1}, 0);
    EXPECT_DOUBLE_EQ(s.nll, std::log(3.0));
    EXPECT_TRUE(std::isnan(s.reference_nll));
  }
}

TEST(Evaluate, Summarizes) {
  std::vector<Score> scores;
  for (int i = 200; i > 0; --i)
    scores.push_back({.nll = 0, .reference_nll = i % 2 + 1.0, .divergence = double(i), .same_top = i > 50});
  const Divergence d = summarize(scores);
  EXPECT_DOUBLE_EQ(d.reference_perplexity, std::exp(1.5));
  EXPECT_EQ(d.kl_mean, 100.5);
  EXPECT_EQ(d.kl_p99, 198);
  EXPECT_EQ(d.kl_max, 200);
  EXPECT_EQ(d.top1_agreement, 0.75);
  EXPECT_EQ(summarize(std::span(scores).first(1)).kl_p99, 200);
  EXPECT_EQ(summarize(std::span(scores).first(101)).kl_p99, 199) << "rank 100 of 101";
}

TEST(Evaluate, StatesItsProtocol) {
  const Protocol p = {.context = 4, .stride = 2, .bos = Protocol::Bos::window, .split = "--"};
  EXPECT_EQ(to_json(p, "abc", 7).dump(),
            R"({"text_sha256":"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",)"
            R"("context":4,"stride":2,"bos":"window","split":"--","windows":7})");
}

TEST(Evaluate, BundlesTheExampleText) {
  EXPECT_EQ(bundled_text(), test::read_file(test::example_model() / "tinystories_valid.txt"));
}

Ids example_tokens(Protocol::Bos bos) {
  Protocol p;
  p.bos = bos;
  p.split = "<|endoftext|>";
  return token_stream(tokenizer(), bundled_text().substr(0, 6000), p);
}

/// The mean of what `model` loses on `targets` after each of `inputs`, from `first` on; all in double, naively.
double naive_nll(const Model& model, const Ids& inputs, const Ids& targets, size_t first) {
  KvCache cache(model.config(), static_cast<int64_t>(inputs.size()));
  const Floats logits = model.forward(inputs, cache);
  const auto vocabulary = static_cast<size_t>(model.config().vocabulary);
  double sum = 0;
  for (size_t i = first; i < inputs.size(); ++i) {
    double z = 0;
    for (size_t v = 0; v < vocabulary; ++v) z += std::exp(double(logits[i * vocabulary + v]));
    sum += std::log(z) - double(logits[i * vocabulary + static_cast<size_t>(targets[i])]);
  }
  return sum / static_cast<double>(inputs.size() - first);
}

TEST(Evaluate, ReadsWindowsAsTheProtocolSays) {
  const Model& model = example().model;
  const Ids tokens = example_tokens(Protocol::Bos::document);
  const auto at = [&](size_t begin, size_t end) {
    return Ids(tokens.begin() + static_cast<std::ptrdiff_t>(begin), tokens.begin() + static_cast<std::ptrdiff_t>(end));
  };
  Protocol p = {.context = 32, .stride = 20, .bos = Protocol::Bos::document, .max_windows = 2};
  const Quality q = evaluate(model, nullptr, tokens, p, tokenizer().bos_id());
  EXPECT_EQ(q.windows, 2);
  EXPECT_EQ(q.tokens, 52);
  EXPECT_FALSE(q.reference.has_value());
  const double first = naive_nll(model, at(0, 32), at(1, 33), 0), second = naive_nll(model, at(20, 52), at(21, 53), 12);
  EXPECT_NEAR(q.nll, (32 * first + 20 * second) / 52, 1e-6);
  EXPECT_DOUBLE_EQ(q.perplexity, std::exp(q.nll));

  p = {.context = 32, .stride = 32, .bos = Protocol::Bos::window, .max_windows = 1};
  Ids inputs = at(0, 31);
  inputs.insert(inputs.begin(), 0);
  EXPECT_NEAR(evaluate(model, nullptr, tokens, p, 0).nll, naive_nll(model, inputs, at(0, 32), 0), 1e-6);
}

TEST(Evaluate, APartOfAWindowAtATimeGivesTheSame) {
  const Model& model = example().model;
  const Ids tokens = example_tokens(Protocol::Bos::none);
  const Protocol p = {.context = 200, .stride = 200, .max_windows = 1};  // logits of 128 positions at once
  const Ids inputs(tokens.begin(), tokens.begin() + 200), targets(tokens.begin() + 1, tokens.begin() + 201);
  EXPECT_NEAR(evaluate(model, nullptr, tokens, p, {}).nll, naive_nll(model, inputs, targets, 0), 1e-6);
}

TEST(Evaluate, TheSameModelDoesNotDiverge) {
  const Protocol p = {.context = 64, .stride = 64, .max_windows = 3};
  const Model& model = example().model;
  const Quality q = evaluate(model, &model, example_tokens(p.bos), p, std::nullopt);
  ASSERT_TRUE(q.reference.has_value());
  EXPECT_EQ(q.reference->reference_perplexity, q.perplexity);
  EXPECT_EQ(q.reference->kl_max, 0);
  EXPECT_EQ(q.reference->top1_agreement, 1);
}

TEST(Evaluate, ThreadsDoNotChangeABit) {
  const Protocol p = {.context = 64, .stride = 48, .max_windows = 3};
  const Ids tokens = example_tokens(p.bos);
  const size_t threads = thread_count();
  const Quality many = evaluate(example().model, nullptr, tokens, p, std::nullopt);
  set_thread_count(1);
  const Quality one = evaluate(example().model, nullptr, tokens, p, std::nullopt);
  set_thread_count(threads);
  EXPECT_EQ(one.nll, many.nll);
}

TEST(Evaluate, RefusesWhatItCannotMeasure) {
  const Model& model = example().model;
  const Ids tokens(100, 1);
  Protocol p = {.context = 100, .stride = 100};
  expect_error("text-too-short", [&] { evaluate(model, nullptr, tokens, p, {}); });
  p = {.context = 0, .stride = 1};
  expect_error("bad-protocol", [&] { evaluate(model, nullptr, tokens, p, {}); });
  p = {.context = 1, .stride = 0};
  expect_error("bad-protocol", [&] { evaluate(model, nullptr, tokens, p, {}); });
  p = {.context = 10, .stride = 10, .bos = Protocol::Bos::window};
  expect_error("no-bos", [&] { evaluate(model, nullptr, tokens, p, {}); });
  expect_error("vocabulary-mismatch", [&] { evaluate(model, nullptr, tokens, p, 4096); });
  p.bos = Protocol::Bos::none;
  expect_error("vocabulary-mismatch", [&] { evaluate(model, nullptr, Ids(100, 4096), p, {}); });
  expect_error("vocabulary-mismatch", [&] { evaluate(model, nullptr, Ids(100, -1), p, {}); });
}

TEST(Evaluate, RefusesLogitsThatAreNotFinite) {
  const test::TemporaryDirectory directory;
  test::write_file(directory / "config.json", test::read_file(test::example_model() / "config.json"));
  std::string weights = test::read_file(test::example_model() / "model.safetensors");
  std::fill(weights.end() - 512, weights.end(), '\x7f');  // 0x7f7f: 3.4e38 in bfloat16
  test::write_file(directory / "model.safetensors", weights);
  const Checkpoint checkpoint(directory.path());
  const Model damaged(checkpoint);
  const Protocol p = {.context = 16, .stride = 16, .max_windows = 1};
  const Ids tokens = example_tokens(p.bos);
  expect_error("not-finite", [&] { evaluate(damaged, nullptr, tokens, p, {}); });
  expect_error("not-finite", [&] { evaluate(example().model, &damaged, tokens, p, {}); });
}

TEST(ModelsEvaluate, TinyStoriesPerplexityAgreesWithItsReference) {
  const auto model_dir = test::shared_dir() / "data/models/tinystories4M";
  const auto file = model_dir / "reference/reference.json";
  if (!std::filesystem::exists(file)) GTEST_SKIP() << "no model here";
  const Json reference = parse_json(test::read_file(file), file.string());
  const Tokenizer model_tokenizer(model_dir / "hf");
  const Checkpoint checkpoint(model_dir / "hf");
  const Model model(checkpoint);
  size_t cases = 0;
  for (const char* name : {"tinystories_valid", "wikitext2_raw_test"}) {
    SCOPED_TRACE(name);
    const auto text_file = test::shared_dir() / "data/text" / (std::string(name) + ".txt");
    if (!std::filesystem::exists(text_file)) continue;
    std::string text = test::read_file(text_file);
    Protocol p = {.context = 256, .stride = 256, .bos = Protocol::Bos::document, .split = "<|endoftext|>"};
    if (std::string_view(name) == "wikitext2_raw_test") {  // as the reference's note says: 300000 characters of it
      size_t characters = 0, end = 0;
      for (; end < text.size() && characters <= 300000; ++end) characters += (text[end] & 0xc0) != 0x80;
      text.resize(end - 1);
      p.split.clear();
      p.max_windows = 50;
    }
    const Ids tokens = token_stream(model_tokenizer, text, p);
    const Quality q = evaluate(model, nullptr, tokens, p, model_tokenizer.bos_id());
    const Json& expected = reference["eval"][name];
    EXPECT_EQ(q.windows, expected["windows"].get<int64_t>());
    EXPECT_EQ(q.tokens, expected["predicted_tokens"].get<int64_t>());
    EXPECT_NEAR(q.perplexity / expected["ppl_per_token"].get<double>(), 1, 1e-4);
    std::cout << name << ": " << q.perplexity << '\n';
    ++cases;
  }
  if (cases == 0) GTEST_SKIP() << "no text here";
  std::cout << "cases: " << cases << '\n';
}

/// `name`: a text of the shared data, .txt or .jsonl.
std::optional<std::string> shared_text(const std::string& name) {
  for (const char* suffix : {".txt", ".jsonl"})
    if (const auto file = test::shared_dir() / "data/text" / (name + suffix); std::filesystem::exists(file))
      return test::read_file(file);
  return std::nullopt;
}

TEST(ModelsEvaluate, SmallModelsAgreeWithTheirReferences) {
  size_t cases = 0;
  for (const char* name : {"stories260K", "babyllama_tok105", "babyllama_tok361"}) {
    SCOPED_TRACE(name);
    const auto directory = test::shared_dir() / "data/models" / name;
    const auto file = directory / "reference/reference.json";
    if (!std::filesystem::exists(file)) continue;
    const Json reference = parse_json(test::read_file(file), file.string());
    const Tokenizer model_tokenizer(directory / "hf");
    const Checkpoint checkpoint(directory / "hf");
    const Model model(checkpoint);
    for (const auto& [text_name, expected] : reference["eval"].items()) {
      SCOPED_TRACE(text_name);
      const std::optional<std::string> text = shared_text(text_name);
      if (!text) continue;
      const auto window = expected["window"].get<int64_t>();
      const Protocol p = {.context = window,
                          .stride = window,
                          .bos = Protocol::Bos::document,
                          .split = text_name == "wikitext2_raw_test" ? "" : "<|endoftext|>",
                          .max_windows = expected["windows"].get<int64_t>()};
      const Ids tokens = token_stream(model_tokenizer, *text, p);
      const Quality q = evaluate(model, nullptr, tokens, p, model_tokenizer.bos_id());
      EXPECT_EQ(q.tokens, expected["predicted_tokens"].get<int64_t>());
      EXPECT_NEAR(q.perplexity / expected["ppl_per_token"].get<double>(), 1, 1e-6);
      ++cases;
    }
  }
  if (cases == 0) GTEST_SKIP() << "no models here";
  std::cout << "cases: " << cases << '\n';
}

}  // namespace
}  // namespace bitwright
