#include "evaluate/task.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/progress.hpp"
#include "base/threads.hpp"
#include "evaluate/score.hpp"
#include "evaluate/white_space.hpp"

namespace bitwright {

#define TASK(name) extern const Task name##_task;
#include "evaluate/tasks.def"

namespace {

[[noreturn]] void fail(const std::string& code, const std::string& why, const std::string& fix,
                       const std::string& where = "") {
  throw Error({.code = code, .what = "cannot evaluate", .where = where, .why = why, .fix = fix});
}

/// Every request of every example.
using Encoded = std::vector<std::vector<EncodedRequest>>;
using Replies = std::vector<std::vector<Reply>>;

/// How many tokens all requests of an example begin with, before any that is asked for.
size_t shared_tokens(std::span<const EncodedRequest> requests) {
  size_t shared = requests[0].context - 1;
  for (const EncodedRequest& r : requests) {
    const auto [end, unused] = std::ranges::mismatch(requests[0].tokens, r.tokens);
    shared = std::min({shared, r.context - 1, static_cast<size_t>(end - requests[0].tokens.begin())});
  }
  return shared;
}

/// A model that is asked, and what that took.
class Asked {
 public:
  Asked(const Model& model, int64_t capacity) : model_(model), cache_(model.config(), capacity) {}

  /// What the requests of an example begin with alike is read once.
  std::vector<Reply> ask(std::span<const EncodedRequest> requests, size_t example) {
    const size_t shared = shared_tokens(requests);
    cache_.truncate(0);
    forward(std::span(requests[0].tokens).first(shared), Model::Logits::last);
    std::vector<Reply> replies;
    for (const EncodedRequest& request : requests) {
      cache_.truncate(static_cast<int64_t>(shared));
      replies.push_back(reply(request, shared));
      if (!std::isfinite(replies.back().log_likelihood))
        fail("not-finite", fmt::format("logits at example {} are NaN or infinite", example + 1),
             "the model's weights are damaged, or its numbers too large for their type");
    }
    return replies;
  }
  int64_t tokens() const { return tokens_; }
  double seconds() const { return seconds_; }

 private:
  std::vector<float> forward(std::span<const int32_t> tokens, Model::Logits which) {
    if (tokens.empty()) return {};
    const auto start = std::chrono::steady_clock::now();
    std::vector<float> logits = model_.forward(tokens, cache_, which);
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    tokens_ += static_cast<int64_t>(tokens.size());
    return logits;
  }

  /// `done` of its tokens are in the cache.
  Reply reply(const EncodedRequest& request, size_t done) {
    const size_t first = request.context - 1;  // predicts the continuation's first token
    const std::span tokens(request.tokens);
    forward(tokens.subspan(done, first - done), Model::Logits::last);
    const std::span targets = tokens.subspan(request.context);
    const std::vector<float> logits = forward(tokens.subspan(first, targets.size()), Model::Logits::all);
    const auto vocabulary = static_cast<size_t>(model_.config().vocabulary);
    std::vector<Score> scores(targets.size());
    parallel_for(targets.size(), [&](size_t i) {
      scores[i] = score(std::span(logits).subspan(i * vocabulary, vocabulary), {}, targets[i]);
    });
    Reply reply = {.log_likelihood = 0, .greedy = true};
    for (const Score& s : scores) {
      reply.log_likelihood -= s.nll;
      reply.greedy = reply.greedy && s.greedy;
    }
    return reply;
  }

  const Model& model_;
  KvCache cache_;
  int64_t tokens_ = 0;
  double seconds_ = 0;
};

TaskFigures figures(const Task& task, std::span<const Example> examples, const Replies& replies) {
  const auto count = static_cast<double>(examples.size());
  double right = 0;
  for (size_t i = 0; i < examples.size(); ++i)
    right += task.pick(examples[i], replies[i]) == examples[i].answer ? 1 : 0;
  const double mean = right / count;
  return {.accuracy = mean,
          .standard_error = examples.size() < 2 ? 0 : std::sqrt(mean * (1 - mean) / (count - 1)),
          .second = task.second(examples, replies)};
}

Encoded encode_all(std::span<const Example> examples, const Tokenizer& tokenizer, std::optional<int32_t> bos,
                   int64_t context) {
  Encoded encoded;
  for (const Example& example : examples) {
    encoded.emplace_back();
    for (const Request& request : example.requests)
      encoded.back().push_back(encode_request(tokenizer, request, bos, context));
  }
  return encoded;
}

}  // namespace

std::span<const Task* const> all_tasks() {
#define TASK(name) &name##_task,
  static constexpr auto all = std::to_array<const Task*>({
#include "evaluate/tasks.def"
  });
  return all;
}

const Task* find_task(std::string_view name) {
  for (const Task* task : all_tasks())
    if (task->name == name) return task;
  return nullptr;
}

std::vector<Example> read_examples(const Task& task, std::string_view text, int64_t limit) {
  std::vector<Example> examples;
  for (int64_t number = 1; !text.empty() && (limit == 0 || std::ssize(examples) < limit); ++number) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    if (stripped(line).empty()) continue;
    try {
      const Json object = parse_json(line, "");
      if (!object.is_object()) throw Error({.why = "it is no JSON object"});
      examples.push_back(task.read(object));
    } catch (const Error& error) {
      fail("bad-task", error.report().why, fmt::format("give JSON Lines of the form that --task {} takes", task.name),
           fmt::format("line {}", number));
    }
  }
  if (examples.empty()) fail("bad-task", "the text has no example", "give JSON Lines");
  return examples;
}

EncodedRequest encode_request(const Tokenizer& tokenizer, const Request& request, std::optional<int32_t> bos,
                              int64_t most) {
  const std::string_view context = right_stripped(request.context);
  EncodedRequest out;
  if (bos || context.empty()) {
    if (!bos) bos = tokenizer.bos_id() ? tokenizer.bos_id() : tokenizer.eos_id();
    if (!bos) fail("no-bos", "an example has no context, and the tokenizer names no token to begin with", "");
    out.tokens.push_back(*bos);
  }
  const std::vector<int32_t> all = tokenizer.encode(request.context + request.continuation);
  out.context = out.tokens.size() + (context.empty() ? 0 : tokenizer.encode(context).size());
  out.tokens.insert(out.tokens.end(), all.begin(), all.end());
  out.context = std::min(out.context, out.tokens.size() - 1);  // a merge across the border may leave nothing to ask for
  const auto kept = static_cast<size_t>(most) + 1;
  if (out.context == 0 || out.tokens.size() - out.context > static_cast<size_t>(most))
    fail("bad-task", fmt::format("a continuation of {} tokens does not fit the context of {}", all.size(), most),
         "give shorter texts");
  if (out.tokens.size() > kept) {
    const size_t cut = out.tokens.size() - kept;
    out.tokens.erase(out.tokens.begin(), out.tokens.begin() + static_cast<std::ptrdiff_t>(cut));
    out.context -= cut;
  }
  return out;
}

TaskQuality evaluate_task(const Task& task, std::span<const Example> examples, const Model& model,
                          const Model* reference, const Tokenizer& tokenizer, std::optional<int32_t> bos,
                          int64_t context) {
  const Encoded encoded = encode_all(examples, tokenizer, bos, context);
  size_t longest = 1;
  for (const std::vector<EncodedRequest>& requests : encoded)
    for (const EncodedRequest& request : requests) {
      longest = std::max(longest, request.tokens.size());
      check_tokens(request.tokens, model);
      if (reference != nullptr) check_tokens(request.tokens, *reference);
    }
  Asked asked(model, static_cast<int64_t>(longest));
  std::optional<Asked> asked_reference;
  if (reference != nullptr) asked_reference.emplace(*reference, static_cast<int64_t>(longest));
  Replies replies, reference_replies;
  Progress progress("evaluating", encoded.size());
  double same = 0;
  for (size_t i = 0; i < encoded.size(); ++i) {
    throw_if_interrupted();
    replies.push_back(asked.ask(encoded[i], i));
    if (asked_reference) {
      reference_replies.push_back(asked_reference->ask(encoded[i], i));
      same += task.pick(examples[i], replies[i]) == task.pick(examples[i], reference_replies[i]) ? 1 : 0;
    }
    progress.advance(1);
  }
  TaskQuality quality = {.examples = std::ssize(examples),
                         .tokens = asked.tokens(),
                         .seconds = asked.seconds(),
                         .figures = figures(task, examples, replies),
                         .reference = std::nullopt,
                         .agreement = std::nullopt};
  if (reference != nullptr) {
    quality.reference = figures(task, examples, reference_replies);
    quality.agreement = same / static_cast<double>(examples.size());
  }
  return quality;
}

}  // namespace bitwright
