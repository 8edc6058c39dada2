#include "train/head_loss.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <span>
#include <vector>

#include "base/dtype.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/exponential.hpp"
#include "kernels/row_gradients.hpp"
#include "train/ops.hpp"

namespace bitwright::train {
namespace {

// A chunk of the logits, kMostRows rows of kWords words, and its gradient stay in a core's cache.
constexpr int64_t kWords = 1024;
constexpr int64_t kMostRows = 512;
constexpr int64_t kLogits = 1 << 24;  // kept at most, but for 32 rows of huge vocabularies

Matrix rows_of(const Matrix& m, int64_t first, int64_t count) {
  Matrix result = m;
  result.data = static_cast<const char*>(m.data) + first * m.row_stride * (m.bf16 ? 2 : 4);
  result.rows = count;
  return result;
}

/// What softmax needs of a row's words in one chunk; a row's largest and sum follow from all of its pieces.
struct Piece {
  float largest, sum;
};

/// Some rows' logits, chunk by chunk: [chunk][row][word], each chunk without gaps.
class Rows {
 public:
  Rows(const HeadLoss& loss, int64_t most)
      : loss_(loss),
        words_(loss.head.rows),
        chunks_((words_ + kWords - 1) / kWords),
        keeps_(loss.dhidden != nullptr && !loss.words),
        terms_(new float[static_cast<size_t>(most * (keeps_ ? words_ : kWords))]),
        capped_(new float[static_cast<size_t>(
            loss.cap > 0 && loss.dhidden != nullptr ? most * (keeps_ ? words_ : kWords) : 0)]),
        decoded_(new float[static_cast<size_t>(
            loss.words ? (loss.hidden.bf16 ? kWords / 2 : kWords) * loss.hidden.columns : 0)]),
        rounded_(new uint16_t[static_cast<size_t>(loss.hidden.bf16 ? most * kWords : 0)]),
        pieces_(static_cast<size_t>(most * chunks_)),
        wanted_(static_cast<size_t>(most)) {}

  /// losses: of rows [first, first + count). Their gradients, each times `weight`, are written or added.
  void compute(int64_t first, int64_t count, float weight, double* losses) {
    const Matrix hidden = rows_of(loss_.hidden, first, count);
    const int64_t* const targets = loss_.targets + first;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) exponentials(hidden, targets, chunk, false);
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) losses[row] = join(row, targets[row], weight);
    });
    if (loss_.dhidden == nullptr) return;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      if (!keeps_) exponentials(hidden, targets, chunk, true);
      gradients(hidden, targets, chunk, weight, first);
    }
  }

 private:
  int64_t words_of(int64_t chunk) const { return std::min(kWords, words_ - chunk * kWords); }
  int64_t place(int64_t chunk, int64_t rows) const { return keeps_ ? chunk * kWords * rows : 0; }
  Piece& piece(int64_t row, int64_t chunk) { return pieces_[static_cast<size_t>(row * chunks_ + chunk)]; }

  /// The chunk's part of the head; where it is decoded, valid until the next one's is.
  Matrix head(int64_t chunk) {
    const int64_t first = chunk * kWords, some = words_of(chunk);
    if (!loss_.words) return rows_of(loss_.head, first, some);
    if (chunk != decoded_chunk_) loss_.words(first, some, decoded_.get());
    decoded_chunk_ = chunk;
    Matrix result = loss_.head;
    result.data = decoded_.get();
    result.rows = some;
    return result;
  }

  /// logits - the piece's largest, and e to that. again: all pieces are joined.
  void exponentials(const Matrix& hidden, const int64_t* targets, int64_t chunk, bool again) {
    const int64_t some = words_of(chunk), at = place(chunk, hidden.rows);
    const KernelLevel& level = active_kernel_level();
    multiply(hidden, head(chunk).transposed(), terms_.get() + at, some);
    at::parallel_for(0, hidden.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const std::span logits(terms_.get() + at + row * some, static_cast<size_t>(some));
        if (loss_.cap > 0) level.soft_cap(logits.data(), logits.size(), 1, loss_.cap);
        if (loss_.cap > 0 && loss_.dhidden != nullptr) std::ranges::copy(logits, capped_.get() + at + row * some);
        const int64_t target = targets[row] - chunk * kWords;
        if (target >= 0 && target < some) wanted_[static_cast<size_t>(row)] = logits[static_cast<size_t>(target)];
        const float largest = largest_of(logits.data(), logits.size());
        const float sum = 1 / level.softmax_terms(logits.data(), logits.size(), 1);
        if (!again) piece(row, chunk) = {.largest = largest, .sum = sum};
      }
    });
  }

  /// The row's loss; each piece's `sum` becomes the factor that makes its exponentials weighted probabilities.
  double join(int64_t row, int64_t target, float weight) {
    const std::span all(&piece(row, 0), static_cast<size_t>(chunks_));
    const float largest = std::ranges::max_element(all, {}, &Piece::largest)->largest;
    double sum = 0;
    for (const Piece& p : all) sum += double{p.sum} * double{exponential(p.largest - largest)};
    for (Piece& p : all)
      p.sum =
          target == kIgnored ? 0 : static_cast<float>(double{exponential(p.largest - largest)} * double{weight} / sum);
    if (target == kIgnored) return 0;
    return double{largest} - double{wanted_[static_cast<size_t>(row)]} + std::log(sum);
  }

  void gradients(const Matrix& hidden, const int64_t* targets, int64_t chunk, float weight, int64_t first) {
    const int64_t some = words_of(chunk), word = chunk * kWords, at = place(chunk, hidden.rows);
    const int64_t inputs = hidden.columns;
    at::parallel_for(0, hidden.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const std::span d(terms_.get() + at + row * some, static_cast<size_t>(some));
        uint16_t* const rounded = rounded_.get() + (hidden.bf16 ? row * some : 0);
        const float factor = piece(row, chunk).sum;
        const int64_t target = targets[row] - word;
        const bool here = target >= 0 && target < some;
        if (hidden.bf16 && loss_.cap == 0) {  // in one pass
          round_to_bf16(d.data(), d.size(), rounded, factor);
          if (here) rounded[target] = f32_to_bf16(d[static_cast<size_t>(target)] * factor - weight);
          continue;
        }
        scale(d, factor);
        if (here) d[static_cast<size_t>(target)] -= weight;
        if (loss_.cap > 0) soft_cap_gradient(capped_.get() + at + row * some, d.size(), loss_.cap, d.data());
        if (hidden.bf16) round_to_bf16(d.data(), d.size(), rounded);
      }
    });
    const Matrix slope = {.data = hidden.bf16 ? static_cast<const void*>(rounded_.get()) : terms_.get() + at,
                          .bf16 = hidden.bf16,
                          .rows = hidden.rows,
                          .columns = some,
                          .row_stride = some,
                          .column_stride = 1};
    multiply(slope, head(chunk), loss_.dhidden + first * inputs, inputs, chunk > 0);
    if (loss_.dhead != nullptr) multiply(slope.transposed(), hidden, loss_.dhead + word * inputs, inputs, first > 0);
  }

  const HeadLoss& loss_;
  int64_t words_, chunks_;
  bool keeps_;  ///< all chunks' terms, from the loss to the gradient
  std::unique_ptr<float[]> terms_, capped_;
  std::unique_ptr<float[]> decoded_;  // words of the head, in the type of what they are multiplied with
  int64_t decoded_chunk_ = -1;
  std::unique_ptr<uint16_t[]> rounded_;
  std::vector<Piece> pieces_;  // [row][chunk]
  std::vector<float> wanted_;  // the target's logit
};

}  // namespace

double HeadLoss::compute() const {
  const int64_t rows = hidden.rows;
  const int64_t counted = rows - std::count(targets, targets + rows, kIgnored);
  const auto weight = static_cast<float>(1 / static_cast<double>(std::max<int64_t>(counted, 1)));
  const int64_t at_once = std::min({std::max<int64_t>(kLogits / head.rows, 32), kMostRows, rows});
  std::vector<double> losses(static_cast<size_t>(rows));
  Rows some(*this, at_once);
  for (int64_t first = 0; first < rows; first += at_once)
    some.compute(first, std::min(at_once, rows - first), weight, losses.data() + first);
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum * double{weight};
}

}  // namespace bitwright::train
