#include "evaluate/evaluate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/progress.hpp"
#include "base/threads.hpp"
#include "evaluate/score.hpp"

namespace bitwright {
namespace {

[[noreturn]] void fail(const std::string& code, const std::string& why, const std::string& fix) {
  throw Error({.code = code, .what = "cannot evaluate", .why = why, .fix = fix});
}

struct Positions {
  std::vector<int32_t> inputs;
  const int32_t* targets;  ///< as many
};

Positions positions(const Window& window, const std::vector<int32_t>& tokens, const Protocol& protocol,
                    std::optional<int32_t> bos) {
  const int32_t* const first = tokens.data() + window.begin;
  return {inputs_of(window, tokens, protocol, bos), protocol.bos == Protocol::Bos::window ? first : first + 1};
}

/// So many that the logits take 2 MiB, or as many as it takes to use the model's matrices well.
size_t positions_at_once(int64_t vocabulary) {
  constexpr size_t kLogits = size_t{1} << 19, kLeast = 64;
  return std::max(kLeast, kLogits / static_cast<size_t>(vocabulary));
}

struct Caches {
  KvCache model;
  std::optional<KvCache> reference;
};

/// Appends the scores of the window's positions from `first` on; returns the seconds that the model took. Logits are
/// made for a part of the positions at a time, and for none before `first`.
double score_window(const Model& model, const Model* reference, const Positions& text, size_t first, Caches& caches,
                    std::vector<Score>& scores) {
  const auto vocabulary = static_cast<size_t>(model.config().vocabulary);
  const size_t most = positions_at_once(model.config().vocabulary);
  double seconds = 0;
  caches.model.clear();
  if (reference != nullptr) caches.reference->clear();
  for (size_t begin = 0, end = 0; begin < text.inputs.size(); begin = end) {
    end = begin < first ? first : std::min(text.inputs.size(), begin + most);
    const std::span inputs = std::span(text.inputs).subspan(begin, end - begin);
    const auto which = begin < first ? Model::Logits::last : Model::Logits::all;
    const auto start = std::chrono::steady_clock::now();
    const std::vector<float> logits = model.forward(inputs, caches.model, which);
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::vector<float> reference_logits;
    if (reference != nullptr) reference_logits = reference->forward(inputs, *caches.reference, which);
    if (begin < first) continue;

    const size_t done = scores.size();
    scores.resize(done + inputs.size());
    parallel_for(inputs.size(), [&](size_t i) {
      const auto row = [&](const std::vector<float>& all) {
        return all.empty() ? std::span<const float>() : std::span(all).subspan(i * vocabulary, vocabulary);
      };
      scores[done + i] = score(row(logits), row(reference_logits), text.targets[begin + i]);
    });
  }
  return seconds;
}

void check_finite(const Score& score, size_t window, int64_t position) {
  if (!std::isnan(score.nll) && !std::isnan(score.reference_nll)) return;
  fail("not-finite",
       fmt::format("logits of the {} at position {} of window {} are NaN or infinite",
                   std::isnan(score.nll) ? "model" : "reference", position, window),
       "its weights are damaged, or its numbers too large for their type");
}

}  // namespace

Quality evaluate(const Model& model, const Model* reference, const std::vector<int32_t>& tokens,
                 const Protocol& protocol, std::optional<int32_t> bos) {
  const int64_t vocabulary = model.config().vocabulary;
  if (reference != nullptr && reference->config().vocabulary != vocabulary)
    fail("vocabulary-mismatch",
         fmt::format("the model has {} tokens, the reference {}", vocabulary, reference->config().vocabulary),
         "compare models of one family");
  const std::vector<Window> windows = checked_windows(model, tokens, protocol, bos);
  Caches caches = {.model = KvCache(model.config(), protocol.context), .reference = std::nullopt};
  if (reference != nullptr) caches.reference.emplace(reference->config(), protocol.context);
  std::vector<Score> scores;
  double seconds = 0;
  Progress progress("evaluating", windows.size());
  for (size_t w = 0; w < windows.size(); ++w) {
    throw_if_interrupted();
    const Positions text = positions(windows[w], tokens, protocol, bos);
    const size_t done = scores.size();
    seconds += score_window(model, reference, text, static_cast<size_t>(windows[w].first_scored), caches, scores);
    for (size_t i = done; i < scores.size(); ++i)
      check_finite(scores[i], w, windows[w].first_scored + static_cast<int64_t>(i - done));
    progress.advance(1);
  }

  double sum = 0;
  for (const Score& s : scores) sum += s.nll;
  const double mean = sum / static_cast<double>(scores.size());
  Quality quality = {.windows = static_cast<int64_t>(windows.size()),
                     .tokens = static_cast<int64_t>(scores.size()),
                     .nll = mean,
                     .perplexity = std::exp(mean),
                     .seconds = seconds,
                     .reference = std::nullopt};
  if (reference != nullptr) quality.reference = summarize(scores);
  return quality;
}

OrderedJson to_json(const Protocol& protocol, std::string_view text, int64_t windows) {
  constexpr const char* kBos[] = {"document", "window", "none"};
  return {{"text_sha256", sha256(text)}, {"context", protocol.context},
          {"stride", protocol.stride},   {"bos", kBos[static_cast<size_t>(protocol.bos)]},
          {"split", protocol.split},     {"windows", windows}};
}

}  // namespace bitwright
