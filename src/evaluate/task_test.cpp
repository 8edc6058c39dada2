#include "evaluate/task.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using Ids = std::vector<int32_t>;

const Tokenizer& tokenizer() {
  static const Tokenizer instance(test::example_model());
  return instance;
}
const Model& model() {
  static const Checkpoint checkpoint(test::example_model());
  static const Model instance(checkpoint);
  return instance;
}
const Task& lambada() { return *find_task("lambada"); }
const Task& choices() { return *find_task("choices"); }

Example read(const Task& task, const std::string& line) { return read_examples(task, line, 0).at(0); }

void expect_error(const std::string& code, const std::string& words, const std::function<void()>& act) {
  try {
    act();
    ADD_FAILURE() << "no error " << code;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

void expect_requests(const std::string& line, const std::vector<std::pair<std::string, std::string>>& expected,
                     int64_t answer) {
  SCOPED_TRACE(line);
  const Example example = read(choices(), line);
  EXPECT_EQ(example.answer, answer);
  ASSERT_EQ(example.requests.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(example.requests[i].context, expected[i].first);
    EXPECT_EQ(example.requests[i].continuation, expected[i].second);
  }
}

TEST(Task, LambadaAsksForTheLastWord) {
  const Example example = read(lambada(), R"({"text": "\"Yes,\" said  Tom"})");
  ASSERT_EQ(example.requests.size(), 1U);
  EXPECT_EQ(example.requests[0].context, "\"Yes,\" said ");
  EXPECT_EQ(example.requests[0].continuation, " Tom");
  for (const char* line : {R"({"text": "word"})", R"({"text": "ends in a space "})", R"({"text": 1})", R"({"x": ""})",
                           "[]", "\"a b\"", "{"})
    expect_error("bad-task", "line 1", [&] { read(lambada(), line); });
}

TEST(Task, ReadsLinesUpToALimit) {
  const std::string text = "{\"text\": \"a b\"}\r\n\n  \n{\"text\": \"c d\"}\n{\"text\": \"e f\"}";
  EXPECT_EQ(read_examples(lambada(), text, 0).size(), 3U);
  EXPECT_EQ(read_examples(lambada(), text, 2).back().requests[0].continuation, " d");
  EXPECT_EQ(read_examples(lambada(), text + "\n{", 3).size(), 3U);
  expect_error("bad-task", "line 6", [&] { read_examples(lambada(), text + "\n{", 0); });
  for (const char* none : {"", "\n\n"})
    expect_error("bad-task", "no example", [&] { read_examples(lambada(), none, 0); });
}

TEST(Task, ReadsPublishedFormsOfChoices) {
  expect_requests(R"({"context": "The sky is", "choices": ["blue", "loud"], "answer": 0})",
                  {{"The sky is", " blue"}, {"The sky is", " loud"}}, 0);
  expect_requests(R"({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1})",
                  {{"Question: 2 + 2?\nAnswer:", " 3"}, {"Question: 2 + 2?\nAnswer:", " 4"}}, 1);
  expect_requests(R"({"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"})",
                  {{"Question: Why?\nAnswer:", " a"}, {"Question: Why?\nAnswer:", " b"}}, 1);
  expect_requests(
      R"({"question_stem": "Frogs", "choices": {"text": ["hop", "bark"], "label": ["A", "B"]}, "answerKey": "A"})",
      {{"Frogs", " hop"}, {"Frogs", " bark"}}, 0);
  expect_requests(R"({"goal": "Dry", "sol1": "wipe", "sol2": "wet", "label": 0})",
                  {{"Question: Dry\nAnswer:", " wipe"}, {"Question: Dry\nAnswer:", " wet"}}, 0);
  expect_requests(R"({"sentence": "Ann saw Eve so _ waved .", "option1": "Ann", "option2": "Eve", "answer": "2"})",
                  {{"Ann saw Eve so Ann", " waved ."}, {"Ann saw Eve so Eve", " waved ."}}, 1);
  expect_requests(
      R"({"activity_label": "Cook", "ctx_a": "A man.", "ctx_b": "he Sits", "endings": ["a [x] b ", "c"], "label": "1"})",
      {{"Cook: A man. He sits", " a b"}, {"Cook: A man. He sits", " c"}}, 1);
  expect_requests(R"({"ctx": "How to [title] Win [step", "endings": ["[a]b", "c\u3000"], "label": 0})",
                  {{"How to. Win [step", " b"}, {"How to. Win [step", " c"}}, 0);
  EXPECT_EQ(read(choices(), R"({"context": "x", "choices": ["\u00e9\u4e2d\ud83d\ude00", "b"], "answer": 0})")
                .requests[0]
                .characters,
            3U);
}

TEST(Task, RefusesChoicesThatMakeNoQuestion) {
  for (const char* line :
       {R"({})", R"({"context": "x"})", R"({"context": "x", "choices": [], "answer": 0})",
        R"({"context": "x", "choices": ["a"], "answer": 0})", R"({"context": "x", "choices": ["a", ""], "answer": 0})",
        R"({"context": "x", "choices": ["a", "b"], "answer": 2})",
        R"({"context": "x", "choices": ["a", "b"], "answer": -1})",
        R"({"context": "x", "choices": ["a", "b"], "answer": "1x"})", R"({"context": "x", "choices": ["a", "b"]})",
        R"({"context": 1, "choices": ["a", "b"], "answer": 0})",
        R"({"context": "x", "choices": ["a", 1], "answer": 0})",
        R"({"question": "x", "choices": {"text": ["a", "b"], "label": ["1"]}, "answerKey": "1"})",
        R"({"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "3"})",
        R"({"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"})",
        R"({"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "0"})",
        R"({"goal": "x", "sol1": "a", "label": 0})"})
    expect_error("bad-task", "line 1", [&] { read(choices(), line); });
}

Ids joined(const Ids& a, const Ids& b) {
  Ids out = a;
  out.insert(out.end(), b.begin(), b.end());
  return out;
}

TEST(Task, EncodesContextAndContinuationAsOneText) {
  const Ids all = tokenizer().encode("One day a dog ran away"), context = tokenizer().encode("One day a dog");
  EncodedRequest r = encode_request(tokenizer(), {"One day a dog", " ran away"}, std::nullopt, 256);
  EXPECT_EQ(r.tokens, all);
  EXPECT_EQ(r.context, context.size());
  r = encode_request(tokenizer(), {"One day a dog ", "ran away"}, std::nullopt, 256);
  EXPECT_EQ(r.tokens, all);
  EXPECT_EQ(r.context, context.size()) << "the space belongs to the continuation";
  r = encode_request(tokenizer(), {"One day a dog", " ran away"}, 0, 256);
  EXPECT_EQ(r.tokens, joined({0}, all));
  EXPECT_EQ(r.context, context.size() + 1);
  for (const char* none : {"", " \n"}) {
    r = encode_request(tokenizer(), {none, "One day"}, std::nullopt, 256);
    EXPECT_EQ(r.tokens, joined({*tokenizer().bos_id()}, tokenizer().encode(std::string(none) + "One day")));
    EXPECT_EQ(r.context, 1U);
  }
}

TEST(Task, KeepsTheEndOfWhatIsTooLong) {
  const Request request = {"One day a dog and a cat", " ran away"};
  const EncodedRequest whole = encode_request(tokenizer(), request, 0, 256);
  const size_t asked = whole.tokens.size() - whole.context;
  for (size_t most = asked; most < whole.tokens.size(); ++most) {
    const EncodedRequest cut = encode_request(tokenizer(), request, 0, static_cast<int64_t>(most));
    EXPECT_EQ(cut.tokens, Ids(whole.tokens.end() - static_cast<std::ptrdiff_t>(most + 1), whole.tokens.end()));
    EXPECT_EQ(cut.tokens.size() - cut.context, asked);
  }
  expect_error("bad-task", "does not fit",
               [&] { encode_request(tokenizer(), request, 0, static_cast<int64_t>(asked) - 1); });
}

/// Each token of the continuation after all before it, in double, with no cache shared by anything.
Reply naive_reply(const Request& request, bool bos) {
  Ids tokens = tokenizer().encode(request.context + request.continuation);
  size_t context = tokenizer().encode(request.context).size();
  if (bos) tokens.insert(tokens.begin(), 0);
  if (bos) ++context;
  Reply reply = {.log_likelihood = 0, .greedy = true};
  for (size_t i = context; i < tokens.size(); ++i) {
    KvCache cache(model().config(), 256);
    const std::vector<float> logits = model().forward(std::span(tokens).first(i), cache, Model::Logits::last);
    double sum = 0;
    for (const float v : logits) sum += std::exp(static_cast<double>(v));
    reply.log_likelihood += static_cast<double>(logits[static_cast<size_t>(tokens[i])]) - std::log(sum);
    reply.greedy = reply.greedy && std::ranges::max_element(logits) - logits.begin() == tokens[i];
  }
  return reply;
}

// The model's own words, so that some answers are right, and some that it would not say.
const char* const kPassages =
    "{\"text\": \"Once upon a time\"}\n{\"text\": \"Once upon a tax\"}\n{\"text\": \"Lily was very happy\"}\n"
    "{\"text\": \"One day, a little girl named Lily\"}\n{\"text\": \"He said he was sorrowful\"}";

TEST(Task, LambadaAgreesWithEachTokenByItself) {
  for (const bool bos : {false, true}) {
    const std::vector<Example> examples = read_examples(lambada(), kPassages, 0);
    double right = 0, log_likelihood = 0;
    for (const Example& example : examples) {
      const Reply reply = naive_reply(example.requests[0], bos);
      right += reply.greedy ? 1 : 0;
      log_likelihood += reply.log_likelihood;
    }
    const auto count = static_cast<double>(examples.size());
    ASSERT_GT(right, 0) << "the test needs right answers";
    ASSERT_LT(right, count) << "and wrong ones";
    const TaskQuality q =
        evaluate_task(lambada(), examples, model(), nullptr, tokenizer(), bos ? std::optional(0) : std::nullopt, 256);
    EXPECT_EQ(q.examples, 5);
    EXPECT_DOUBLE_EQ(q.figures.accuracy, right / count);
    EXPECT_NEAR(q.figures.second / std::exp(-log_likelihood / count), 1, 1e-5);
    EXPECT_NEAR(q.figures.standard_error, std::sqrt(right / count * (1 - right / count) / (count - 1)), 1e-12);
    EXPECT_FALSE(q.reference.has_value());
  }
}

TEST(Task, ChoicesAgreeWithEachTokenByItself) {
  const std::string text =
      "{\"context\": \"Once upon a time, there was a little\", \"choices\": [\"girl\", \"photosynthesis equation\"], "
      "\"answer\": 0}\n"
      "{\"context\": \"Once upon a time, there was a\", \"choices\": [\"tax\", \"girl named Lily. She loved to "
      "play\"], \"answer\": 0}\n"
      "{\"sentence\": \"Tom saw a dog and _ was happy\", \"option1\": \"he\", \"option2\": \"seventeen\", \"answer\": "
      "\"1\"}\n"
      "{\"context\": \"She was\", \"choices\": [\"happy\", \"hap\", \"happy to see her friends play in the park\"], "
      "\"answer\": 2}";
  const std::vector<Example> examples = read_examples(choices(), text, 0);
  double right = 0, normalized = 0;
  for (const Example& example : examples) {
    std::vector<double> plain, by_length;
    for (const Request& request : example.requests) {
      plain.push_back(naive_reply(request, true).log_likelihood);
      by_length.push_back(plain.back() / static_cast<double>(request.continuation.size() - 1));
    }
    right += std::ranges::max_element(plain) - plain.begin() == example.answer ? 1 : 0;
    normalized += std::ranges::max_element(by_length) - by_length.begin() == example.answer ? 1 : 0;
  }
  ASSERT_NE(right, normalized) << "the test needs a question in which length counts";
  const TaskQuality q = evaluate_task(choices(), examples, model(), &model(), tokenizer(), 0, 256);
  EXPECT_DOUBLE_EQ(q.figures.accuracy, right / 4);
  EXPECT_DOUBLE_EQ(q.figures.second, normalized / 4);
  EXPECT_EQ(q.reference->accuracy, q.figures.accuracy);
  EXPECT_EQ(*q.agreement, 1);
  int64_t apart = 0;  // what it would take to read every request by itself
  for (const Example& example : examples)
    for (const Request& request : example.requests)
      apart += std::ssize(encode_request(tokenizer(), request, 0, 256).tokens) - 1;
  EXPECT_LT(q.tokens, apart) << "what choices begin with alike is read once";
}

/// All log-likelihoods, each with a weight of its own.
double weighted(std::span<const Example>, const std::vector<std::vector<Reply>>& replies) {
  double sum = 0, weight = 1;
  for (const std::vector<Reply>& some : replies)
    for (const Reply& reply : some) sum += reply.log_likelihood * weight++;
  return sum;
}

TEST(Task, WhatIsSharedChangesNoReply) {
  Task task = choices();
  task.second = weighted;
  const std::vector<Example> examples = read_examples(
      task, R"({"context": "Tom was", "choices": ["happy", "sad and went home", "a tax", "happy"], "answer": 0})", 0);
  std::vector<Reply> replies;
  for (const Request& request : examples[0].requests) replies.push_back(naive_reply(request, true));
  const double expected = weighted(examples, {replies});
  EXPECT_NEAR(evaluate_task(task, examples, model(), nullptr, tokenizer(), 0, 256).figures.second, expected, 1e-3);
}

TEST(Task, PicksTheFirstOfTheBest) {
  const Example example = read(choices(), R"({"context": "x", "choices": ["ab", "abcd", "ef"], "answer": 1})");
  EXPECT_EQ(choices().pick(example, std::vector<Reply>{{-2, false}, {-2, true}, {-3, false}}), 0);
  EXPECT_EQ(choices().pick(example, std::vector<Reply>{{-2, false}, {-3, false}, {-1, false}}), 2);
  EXPECT_EQ(choices().second(std::span(&example, 1), {{{-2, false}, {-3, false}, {-2, false}}}), 1) << "-0.75 a letter";
  EXPECT_EQ(choices().second(std::span(&example, 1), {{{-2, false}, {-4, false}, {-2, false}}}), 0);
}

TEST(Task, RefusesTokensThatTheModelLacks) {
  const std::vector<Example> examples = read_examples(lambada(), kPassages, 1);
  expect_error("vocabulary-mismatch", "token 4096",
               [&] { evaluate_task(lambada(), examples, model(), nullptr, tokenizer(), 4096, 256); });
}

TEST(ModelsTask, LambadaOfTheBundledModel) {
  const auto file = test::shared_dir() / "data/text/lambada_test.jsonl";
  if (!std::filesystem::exists(file)) GTEST_SKIP() << "no text here";
  const std::vector<Example> examples = read_examples(lambada(), test::read_file(file), 0);
  EXPECT_EQ(examples.size(), 5153U);
  const TaskQuality q = evaluate_task(lambada(), std::span(examples).first(100), model(), nullptr, tokenizer(),
                                      tokenizer().bos_id(), model().config().context);
  EXPECT_EQ(q.examples, 100);
  EXPECT_LT(q.figures.accuracy, 0.2) << "a model of children's stories knows few of these words";
  EXPECT_GT(q.figures.second, 1000);
  std::cout << "cases: 100, accuracy " << q.figures.accuracy << ", perplexity " << q.figures.second << '\n';
}

}  // namespace
}  // namespace bitwright
