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

void check(const Model& model, const Model* reference, const std::vector<int32_t>& tokens, const Protocol& protocol,
           std::optional<int32_t> bos) {
  if (protocol.context < 1 || protocol.stride < 1)
    fail("bad-protocol", fmt::format("context {} and stride {}", protocol.context, protocol.stride),
         "both are at least 1");
  if (protocol.bos == Protocol::Bos::window && !bos)
    fail("no-bos", "the tokenizer names no BOS token to begin windows with", "give another --bos");
  const int64_t vocabulary = model.config().vocabulary;
  if (reference != nullptr && reference->config().vocabulary != vocabulary)
    fail("vocabulary-mismatch",
         fmt::format("the model has {} tokens, the reference {}", vocabulary, reference->config().vocabulary),
         "compare models of one family");
  const auto fits = [&](int32_t token) { return token >= 0 && token < vocabulary; };
  const auto other = std::find_if_not(tokens.begin(), tokens.end(), fits);
  if (other != tokens.end() || !fits(bos.value_or(0)))
    fail("vocabulary-mismatch",
         fmt::format("the text has token {}, the model {} tokens", other != tokens.end() ? *other : *bos, vocabulary),
         "use the tokenizer that belongs to the model");
}

struct Positions {
  std::vector<int32_t> inputs;
  const int32_t* targets;  ///< as many
};

Positions positions(const Window& window, const std::vector<int32_t>& tokens, const Protocol& protocol,
                    std::optional<int32_t> bos) {
  const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(window.begin);
  Positions out = {{}, tokens.data() + window.begin};
  if (protocol.bos == Protocol::Bos::window) {
    out.inputs.push_back(*bos);
    out.inputs.insert(out.inputs.end(), first, first + protocol.context - 1);
  } else {
    out.inputs.assign(first, first + protocol.context);
    ++out.targets;
  }
  return out;
}

std::vector<float> logits_of(const Model& model, const std::vector<int32_t>& inputs, KvCache& cache) {
  cache.clear();
  return model.forward(inputs, cache);
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
  check(model, reference, tokens, protocol, bos);
  const std::vector<Window> windows = cut(tokens.size(), protocol);
  if (windows.empty())
    fail("text-too-short", fmt::format("{} tokens do not fill a window of {}", tokens.size(), protocol.context),
         "give a longer text or a smaller --context");

  KvCache cache(model.config(), protocol.context);
  std::optional<KvCache> reference_cache;
  if (reference != nullptr) reference_cache.emplace(reference->config(), protocol.context);
  const auto vocabulary = static_cast<size_t>(model.config().vocabulary);
  std::vector<Score> scores;
  double seconds = 0;
  Progress progress("evaluating", windows.size());
  for (size_t w = 0; w < windows.size(); ++w) {
    throw_if_interrupted();
    const Positions text = positions(windows[w], tokens, protocol, bos);
    const auto start = std::chrono::steady_clock::now();
    const std::vector<float> logits = logits_of(model, text.inputs, cache);
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::vector<float> reference_logits;
    if (reference != nullptr) reference_logits = logits_of(*reference, text.inputs, *reference_cache);

    const auto first = static_cast<size_t>(windows[w].first_scored), done = scores.size();
    scores.resize(done + text.inputs.size() - first);
    parallel_for(text.inputs.size() - first, [&](size_t i) {
      const auto row = [&](const std::vector<float>& all) {
        return all.empty() ? std::span<const float>() : std::span(all).subspan((first + i) * vocabulary, vocabulary);
      };
      scores[done + i] = score(row(logits), row(reference_logits), text.targets[first + i]);
    });
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
