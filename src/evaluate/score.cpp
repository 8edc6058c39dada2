#include "evaluate/score.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.hpp"

namespace bitwright {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

bool all_finite(std::span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000;
  bool finite = true;
  for (const float v : values) finite &= (std::bit_cast<uint32_t>(v) & kExponent) != kExponent;
  return finite;
}

size_t top(std::span<const float> logits) {
  return static_cast<size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

/// Logits seen from the largest, so that exp cannot overflow: log softmax = logit - largest - log_sum.
double nll(std::span<const float> logits, double largest, double log_sum, int32_t target) {
  return log_sum + (largest - logits[static_cast<size_t>(target)]);
}

double log_sum_of(std::span<const float> logits, double largest) {
  double sum = 0;
  for (const float v : logits) sum += std::exp(v - largest);
  return std::log(sum);
}

}  // namespace

Score score(std::span<const float> logits, std::span<const float> reference, int32_t target) {
  BW_ASSERT(target >= 0 && static_cast<size_t>(target) < logits.size());
  if (!all_finite(logits)) return {.nll = kNaN};
  const size_t best = top(logits);
  const double largest = logits[best], log_sum = log_sum_of(logits, largest);
  Score out = {.nll = nll(logits, largest, log_sum, target), .greedy = best == static_cast<size_t>(target)};
  if (reference.empty()) return out;

  BW_ASSERT(reference.size() == logits.size());
  out.reference_nll = kNaN;
  if (!all_finite(reference)) return out;
  const size_t reference_best = top(reference);
  const double reference_largest = reference[reference_best];
  double sum = 0, weighted = 0;  // of e^a and e^a (a - b), where a, b: logit - largest, of the reference and the model
  for (size_t i = 0; i < logits.size(); ++i) {
    const double a = reference[i] - reference_largest, b = logits[i] - largest, p = std::exp(a);
    sum += p;
    weighted += p * (a - b);
  }
  const double reference_log_sum = std::log(sum);
  out.reference_nll = nll(reference, reference_largest, reference_log_sum, target);
  out.divergence = std::max(0.0, weighted / sum + (log_sum - reference_log_sum));
  out.same_top = best == reference_best;
  return out;
}

void check_tokens(std::span<const int32_t> tokens, const Model& model) {
  const int64_t vocabulary = model.config().vocabulary;
  const auto other = std::ranges::find_if_not(tokens, [&](int32_t token) { return token >= 0 && token < vocabulary; });
  if (other != tokens.end())
    throw Error({.code = "vocabulary-mismatch",
                 .what = "cannot evaluate",
                 .why = fmt::format("the text has token {}, the model {} tokens", *other, vocabulary),
                 .fix = "use the tokenizer that belongs to the model"});
}

Divergence summarize(std::span<const Score> scores) {
  BW_ASSERT(!scores.empty());
  const auto count = static_cast<double>(scores.size());
  double reference_nll = 0, sum = 0, same = 0;
  std::vector<double> divergences;
  for (const Score& s : scores) {
    reference_nll += s.reference_nll;
    sum += s.divergence;
    same += s.same_top ? 1 : 0;
    divergences.push_back(s.divergence);
  }
  const size_t rank = (99 * scores.size() + 99) / 100;  // nearest rank: the smallest that 99 % do not exceed
  const auto p99 = divergences.begin() + static_cast<std::ptrdiff_t>(rank) - 1;
  std::nth_element(divergences.begin(), p99, divergences.end());
  return {.reference_perplexity = std::exp(reference_nll / count),
          .kl_mean = sum / count,
          .kl_p99 = *p99,
          .kl_max = *std::max_element(p99, divergences.end()),
          .top1_agreement = same / count};
}

std::vector<Window> cut(size_t stream, const Protocol& protocol) {
  const auto context = static_cast<size_t>(protocol.context), stride = static_cast<size_t>(protocol.stride);
  const size_t needed = protocol.bos == Protocol::Bos::window ? context : context + 1;
  std::vector<Window> windows;
  for (size_t begin = 0; begin <= stream && stream - begin >= needed; begin += stride) {
    if (protocol.max_windows > 0 && windows.size() == static_cast<size_t>(protocol.max_windows)) break;
    const int64_t seen = windows.empty() ? 0 : std::max<int64_t>(0, protocol.context - protocol.stride);
    windows.push_back({begin, seen});
  }
  return windows;
}

std::vector<int32_t> inputs_of(const Window& window, std::span<const int32_t> tokens, const Protocol& protocol,
                               std::optional<int32_t> bos) {
  const size_t before = protocol.bos == Protocol::Bos::window ? 1 : 0;
  std::vector<int32_t> inputs(static_cast<size_t>(protocol.context));
  if (before != 0) inputs.front() = *bos;
  for (size_t i = before; i < inputs.size(); ++i) inputs[i] = tokens[window.begin + i - before];
  return inputs;
}

std::vector<Window> checked_windows(const Model& model, std::span<const int32_t> tokens, const Protocol& protocol,
                                    std::optional<int32_t> bos) {
  const auto fail = [](const std::string& code, const std::string& why, const std::string& fix) {
    throw Error({.code = code, .what = "cannot evaluate", .why = why, .fix = fix});
  };
  if (protocol.context < 1 || protocol.stride < 1)
    fail("bad-protocol", fmt::format("context {} and stride {}", protocol.context, protocol.stride),
         "both are at least 1");
  if (protocol.bos == Protocol::Bos::window && !bos)
    fail("no-bos", "the tokenizer names no BOS token to begin windows with", "give another --bos");
  check_tokens(tokens, model);
  if (bos) check_tokens(std::span(&*bos, 1), model);
  std::vector<Window> windows = cut(tokens.size(), protocol);
  if (windows.empty())
    fail("text-too-short", fmt::format("{} tokens do not fill a window of {}", tokens.size(), protocol.context),
         "give a longer text or a smaller --context");
  return windows;
}

}  // namespace bitwright
