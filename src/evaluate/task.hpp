#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "model/model.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {

/// How likely is `continuation` after `context`?
struct Request {
  std::string context, continuation;
  size_t characters = 0;  ///< of the choice it stands for: what its log-likelihood is divided by, to be normalized
};

/// One question of a task.
struct Example {
  std::vector<Request> requests;  ///< one for each possible answer
  int64_t answer = 0;             ///< the right one
};

/// What a model says to a request.
struct Reply {
  double log_likelihood;  ///< of all tokens of the continuation, in nats
  bool greedy;            ///< each of them is the most likely one after those before it
};

/// A way of asking a model questions and counting its right answers: a row of a table (tasks.def).
struct Task {
  std::string_view name;    ///< as in --task
  std::string_view source;  ///< the protocol followed
  /// Reads a line of the task's text, which is an object. Throws Error saying what it lacks.
  Example (*read)(const Json& line);
  /// The answer that the model gives: a place in `replies`, or -1. replies: one for each request.
  int64_t (*pick)(const Example& example, std::span<const Reply> replies);

  std::string_view second_name;  ///< of a second figure: "perplexity"
  /// That figure; replies[i]: those to examples[i]. examples: not empty.
  double (*second)(std::span<const Example> examples, const std::vector<std::vector<Reply>>& replies);
};
std::span<const Task* const> all_tasks();
const Task* find_task(std::string_view name);  ///< null: there is none

/// The examples of a JSON Lines text, at most `limit` (0: all). Throws Error{"bad-task"} naming the line.
std::vector<Example> read_examples(const Task& task, std::string_view text, int64_t limit);

/// A request as tokens: position i predicts token i + 1.
struct EncodedRequest {
  std::vector<int32_t> tokens;
  size_t context = 0;  ///< of them, at least 1, less than all
};
/// As lm-evaluation-harness does: white space at the end of the context goes to the continuation, both are encoded as
/// one text, and the context counts as many tokens as it has alone. `bos`: a token before it. At most `most` + 1
/// tokens, the last. An empty context without `bos` is the tokenizer's BOS, else EOS. Throws Error{"no-bos"} where it
/// has neither, and Error{"bad-task"} where the continuation alone has more than `most` tokens.
EncodedRequest encode_request(const Tokenizer& tokenizer, const Request& request, std::optional<int32_t> bos,
                              int64_t most);

struct TaskFigures {
  double accuracy, standard_error;  ///< the mean over examples, and the standard error of that mean
  double second;                    ///< as the task names it
};
struct TaskQuality {
  int64_t examples, tokens;  ///< tokens: read by the model
  double seconds;            ///< in the model's forward passes (without the reference's)
  TaskFigures figures;
  std::optional<TaskFigures> reference;
  std::optional<double> agreement;  ///< share of examples to which both give the same answer
};
/// Asks `model`, and `reference` if there is one. `context`: tokens that are read at most.
/// Throws Error{"vocabulary-mismatch"}, {"not-finite"} and what encode_request throws.
TaskQuality evaluate_task(const Task& task, std::span<const Example> examples, const Model& model,
                          const Model* reference, const Tokenizer& tokenizer, std::optional<int32_t> bos,
                          int64_t context);

}  // namespace bitwright
