#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/error.hpp"
#include "kernels/exponential.hpp"
#include "model/model.hpp"

namespace bitwright {
namespace {

/// splitmix64 (S. Vigna, https://prng.di.unimi.it/splitmix64.c).
uint64_t next_random(uint64_t& state) {
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

void refuse(const char* name, double value, const char* needed) {
  throw Error({.code = "bad-sampling",
               .what = "cannot sample",
               .where = name,
               .why = fmt::format("{} is not {}", value, needed),
               .status = ExitStatus::usage});
}

}  // namespace

Sampler::Sampler(const Sampling& settings) : settings_(settings), state_(settings.seed) {
  if (!(settings.temperature >= 0) || std::isinf(settings.temperature))
    refuse("temperature", double{settings.temperature}, "a number from 0 on");
  if (settings.top_k < 0) refuse("top_k", settings.top_k, "a number from 0 on");
  if (!(settings.top_p > 0 && settings.top_p <= 1)) refuse("top_p", double{settings.top_p}, "above 0 and at most 1");
}

int32_t Sampler::next(std::span<const float> logits) {
  BW_ASSERT(!logits.empty());
  const auto value = [&](int32_t id) {  // NaN counts as impossible: it has no place in an order
    const float logit = logits[static_cast<size_t>(id)];
    return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
  };
  const auto likelier = [&](int32_t a, int32_t b) { return value(a) > value(b) || (value(a) == value(b) && a < b); };
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  if (settings_.temperature == 0) return *std::min_element(ids.begin(), ids.end(), likelier);

  const size_t kept = settings_.top_k == 0 ? ids.size() : std::min(ids.size(), static_cast<size_t>(settings_.top_k));
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(kept), ids.end(), likelier);
  ids.resize(kept);
  std::vector<double> weights(kept);
  double total = 0;
  for (size_t i = 0; i < kept; ++i)
    total += weights[i] = double{exponential((value(ids[i]) - value(ids[0])) / settings_.temperature)};
  // The likeliest that together reach top_p of it.
  double reached = 0;
  size_t count = 0;
  while (count < kept && (count == 0 || reached < double{settings_.top_p} * total)) reached += weights[count++];

  double left = static_cast<double>(next_random(state_) >> 11) * 0x1p-53 * reached;
  for (size_t i = 0; i + 1 < count; ++i)
    if ((left -= weights[i]) < 0) return ids[i];
  return ids[count - 1];
}

}  // namespace bitwright
