#include "train/head_loss.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/elementwise.hpp"
#include "kernels/row_gradients.hpp"
#include "train/ops.hpp"

namespace bitwright::train {
namespace {

constexpr int64_t kWords = 1024;  // so many are multiplied with at a time: with 512 rows it stays in a core's cache
constexpr int64_t kMostRows = 512;
constexpr int64_t kLogits = 1 << 24;  // at most, but for 32 rows of huge vocabularies

Matrix part(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Matrix result = m;
  const int64_t offset = (row * m.row_stride + column * m.column_stride) * (m.bf16 ? 2 : 4);
  result.data = static_cast<const char*>(m.data) + offset;
  result.rows = rows;
  result.columns = columns;
  return result;
}

/// Of one row: the loss; logits become its gradient times `weight`.
double row_loss(std::span<float> logits, int64_t target, float cap, float weight, bool gradient) {
  const KernelLevel& level = active_kernel_level();
  if (cap > 0) level.soft_cap(logits.data(), logits.size(), 1, cap);
  const std::vector<float> capped(cap > 0 && gradient ? logits.begin() : logits.end(), logits.end());
  const auto wanted = static_cast<size_t>(target);
  const double behind = double{largest_of(logits.data(), logits.size())} - double{logits[wanted]};
  const float reciprocal = level.softmax_terms(logits.data(), logits.size(), 1);
  if (gradient) {
    scale(logits, reciprocal * weight);
    logits[wanted] -= weight;
    if (cap > 0) soft_cap_gradient(capped.data(), logits.size(), cap, logits.data());
  }
  return behind - std::log(double{reciprocal});
}

}  // namespace

double HeadLoss::compute() const {
  const int64_t rows = hidden.rows, words = head.rows, inputs = hidden.columns;
  const int64_t counted = rows - std::count(targets, targets + rows, kIgnored);
  const auto weight = static_cast<float>(1 / static_cast<double>(std::max<int64_t>(counted, 1)));
  const int64_t at_once = std::min({std::max<int64_t>(kLogits / words, 32), kMostRows, rows});
  const bool gradient = dhidden != nullptr;
  std::vector<double> losses(static_cast<size_t>(rows));
  const std::unique_ptr<float[]> logits(new float[static_cast<size_t>(at_once * words)]);
  const std::unique_ptr<uint16_t[]> rounded(
      new uint16_t[static_cast<size_t>(gradient && hidden.bf16 ? at_once * words : 0)]);
  for (int64_t first = 0; first < rows; first += at_once) {
    const int64_t count = std::min(at_once, rows - first);
    for (int64_t word = 0; word < words; word += kWords) {
      const int64_t some = std::min(kWords, words - word);
      multiply(part(hidden, first, count, 0, inputs), part(head, word, some, 0, inputs).transposed(),
               logits.get() + word, words);
    }
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const std::span all(logits.get() + row * words, static_cast<size_t>(words));
        const int64_t target = targets[first + row];
        if (target != kIgnored)
          losses[static_cast<size_t>(first + row)] = row_loss(all, target, cap, weight, gradient);
        else
          std::ranges::fill(all, 0.0f);
        if (gradient && hidden.bf16) round_to_bf16(all.data(), all.size(), rounded.get() + row * words);
      }
    });
    if (!gradient) continue;
    const Matrix slopes = {
        hidden.bf16 ? static_cast<const void*>(rounded.get()) : logits.get(), hidden.bf16, count, words, words, 1};
    for (int64_t word = 0; word < words; word += kWords) {
      const int64_t some = std::min(kWords, words - word);
      const Matrix slope = part(slopes, 0, count, word, some);
      multiply(slope, part(head, word, some, 0, inputs), dhidden + first * inputs, inputs, word > 0);
      multiply(slope.transposed(), part(hidden, first, count, 0, inputs), dhead + word * inputs, inputs, first > 0);
    }
  }
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum * double{weight};
}

}  // namespace bitwright::train
