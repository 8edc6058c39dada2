#include "train/observer.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/error.hpp"

namespace bitwright::train {
namespace {

/// Bins of the histogram: bin i holds values in [(i - half) * width, (i - half + 1) * width). Widths are powers of two
/// and bins begin at whole multiples, so that two of them make one of the next width, and the order of batches does
/// not matter.
constexpr int64_t kBins = 8192;

/// What is kept: of percentiles followed by the bins.
enum Number : int64_t { kFrozen, kUpdates, kLow, kHigh, kWidth, kNumbers };

[[noreturn]] void bad(std::string_view key, double value, std::string_view limits) {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = std::string(key),
               .why = fmt::format("{} is not {}", value, limits),
               .status = ExitStatus::usage});
}

/// Two bins become one, round the middle.
void widen(double* bins) {
  std::vector<double> merged(kBins, 0);
  for (int64_t i = 0; i < kBins; ++i) merged[static_cast<size_t>((i + kBins / 2) / 2)] += bins[i];
  std::ranges::copy(merged, bins);
}

}  // namespace

void check(const ObserverSettings& settings) {
  if (!(settings.averaging > 0 && settings.averaging <= 1)) bad("averaging", settings.averaging, "in (0, 1]");
  if (!(settings.percentile > 50 && settings.percentile <= 100)) bad("percentile", settings.percentile, "in (50, 100]");
}

Observer::Observer(const ObserverSettings& settings) : settings_(settings) {
  check(settings);
  const bool has_bins = settings.estimate == RangeEstimate::percentile;
  state_ = torch::zeros({kNumbers + (has_bins ? kBins : 0)}, torch::kFloat64);
}

double* Observer::numbers() const {
  TORCH_CHECK(state_.scalar_type() == torch::kFloat64 && state_.is_contiguous(),
              "an observer's state stays doubles: convert the model's parameters, not its buffers");
  return state_.data_ptr<double>();
}

void Observer::update(const torch::Tensor& values) {
  const std::lock_guard lock(mutex_);
  double* const n = numbers();
  if (n[kFrozen] != 0 || values.numel() == 0) return;
  const torch::NoGradGuard no_gradient;
  const torch::Tensor wide = values.detach().to(torch::kFloat).contiguous();
  const double low = wide.min().item<double>(), high = wide.max().item<double>();
  if (!std::isfinite(low) || !std::isfinite(high))
    throw Error({.code = "not-finite",
                 .what = "cannot observe activations",
                 .why = fmt::format("they reach from {} to {}", low, high),
                 .fix = "the model has diverged or its weights are damaged"});
  const bool first = n[kUpdates] == 0;
  const double share = settings_.estimate == RangeEstimate::moving_average ? settings_.averaging : 1;
  const auto kept = [&](double so_far, double now, bool is_low) {
    if (first) return now;
    if (settings_.estimate != RangeEstimate::moving_average)
      return is_low ? std::min(so_far, now) : std::max(so_far, now);
    return static_cast<double>(static_cast<float>(so_far + share * (now - so_far)));
  };
  n[kLow] = kept(n[kLow], low, true);
  n[kHigh] = kept(n[kHigh], high, false);
  n[kUpdates] += 1;
  if (settings_.estimate == RangeEstimate::percentile)
    update_histogram(wide.data_ptr<float>(), wide.numel(), std::max(std::fabs(low), std::fabs(high)));
}

void Observer::update_histogram(const float* values, int64_t count, double largest) {
  double* const n = numbers();
  double* const bins = n + kNumbers;
  constexpr double kHalf = kBins / 2;
  // The least power of two whose bins hold `largest`.
  double needed = 0x1p-126;
  if (largest > 0) needed = std::max(needed, std::ldexp(1.0, std::ilogb(largest / kHalf) + 1));
  if (n[kWidth] == 0) n[kWidth] = needed;
  for (; n[kWidth] < needed; n[kWidth] *= 2) widen(bins);
  const double inverse = 1 / n[kWidth];
  for (int64_t i = 0; i < count; ++i)
    bins[static_cast<int64_t>(std::floor(static_cast<double>(values[i]) * inverse) + kHalf)] += 1;
}

bool Observer::has_data() const {
  const std::lock_guard lock(mutex_);
  return numbers()[kUpdates] > 0;
}

Range Observer::range() const {
  const std::lock_guard lock(mutex_);
  const double* const n = numbers();
  if (n[kUpdates] == 0)
    throw Error({.code = "no-data",
                 .what = "activation range is unknown",
                 .why = "nothing was observed yet",
                 .fix = "run batches through the model in training mode, or calibrate it, first"});
  if (settings_.estimate == RangeEstimate::percentile) return percentile_range();
  return {static_cast<float>(n[kLow]), static_cast<float>(n[kHigh])};
}

/// The bins' edges, so that at most the share that is left out lies beyond; never beyond the extremes.
Range Observer::percentile_range() const {
  const double* const n = numbers();
  const double* const bins = n + kNumbers;
  double total = 0;
  for (int64_t i = 0; i < kBins; ++i) total += bins[i];
  const double beyond = total * (1 - settings_.percentile / 100) / 2;
  int64_t low = 0, high = kBins - 1;
  for (double sum = bins[low]; sum <= beyond && low < high; sum += bins[low]) ++low;
  for (double sum = bins[high]; sum <= beyond && high > low; sum += bins[high]) --high;
  const auto edge = [&](int64_t bin) { return static_cast<double>(bin - kBins / 2) * n[kWidth]; };
  return {static_cast<float>(std::max(edge(low), n[kLow])), static_cast<float>(std::min(edge(high + 1), n[kHigh]))};
}

void Observer::freeze(bool frozen) {
  const std::lock_guard lock(mutex_);
  numbers()[kFrozen] = frozen ? 1 : 0;
}

bool Observer::is_frozen() const {
  const std::lock_guard lock(mutex_);
  return numbers()[kFrozen] != 0;
}

}  // namespace bitwright::train
