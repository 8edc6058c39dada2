#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "evaluate/task.hpp"

namespace bitwright {
namespace {

/// {"text"}: the last word, with the space before it, is asked for.
Example read(const Json& line) {
  const auto text = line.find("text");
  if (text == line.end() || !text->is_string()) throw Error({.why = "it has no string \"text\""});
  const auto& passage = text->get_ref<const std::string&>();
  const size_t space = passage.rfind(' ');
  if (space == passage.npos || space + 1 == passage.size()) throw Error({.why = "its \"text\" does not end in a word"});
  return {.requests = {{.context = passage.substr(0, space), .continuation = passage.substr(space)}}};
}

int64_t pick(const Example&, std::span<const Reply> replies) { return replies[0].greedy ? 0 : -1; }

/// Of whole words, however many tokens they have.
double perplexity(std::span<const Example> examples, const std::vector<std::vector<Reply>>& replies) {
  double sum = 0;
  for (const std::vector<Reply>& reply : replies) sum += reply[0].log_likelihood;
  return std::exp(-sum / static_cast<double>(examples.size()));
}

}  // namespace

extern const Task lambada_task;
const Task lambada_task = {.name = "lambada",
                           .source = "lm-evaluation-harness, lambada_openai",
                           .read = read,
                           .pick = pick,
                           .second_name = "perplexity",
                           .second = perplexity};

}  // namespace bitwright
