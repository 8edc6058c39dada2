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

// The logits of kBlock rows and kWords words stay in a core's cache while they become exponentials.
constexpr int64_t kWords = 512;
constexpr int64_t kBlock = 512;
constexpr int64_t kKept = 1 << 26;  // bytes of exponentials, but for one block of huge vocabularies
/// How far above a row's reference a logit may be before the reference moves: sums of e^30 are far from infinity, and
/// what they are divided by from numbers that the processor takes for 0.
constexpr float kHighest = 30;

Matrix rows_of(const Matrix& m, int64_t first, int64_t count) {
  Matrix result = m;
  result.data = static_cast<const char*>(m.data) + first * m.row_stride * (m.bf16 ? 2 : 4);
  result.rows = count;
  return result;
}

/// What softmax needs of a row's words in one chunk; the row's sum follows from all of its pieces.
struct Piece {
  float largest, sum;  ///< sum of e^(logit - largest)
};

/// Some rows. Of each the terms e^(logit - reference), the reference a number of the row's own. With their sum S the
/// gradient of the logits is weight / S * (terms - S at the target). The factor is not of the words, so it goes to the
/// rows of dhidden, which is summed while the terms are still in the cache, and to what dhead is the product of the
/// terms with. The target's own term is kept apart: what is left of it may be far less than its rounding.
class Rows {
 public:
  Rows(const HeadLoss& loss, int64_t most)
      : loss_(loss),
        bf16_(loss.hidden.bf16),
        gradient_(loss.dhidden != nullptr),
        keeps_(loss.dhead != nullptr),
        words_(loss.head.rows),
        chunks_((words_ + kWords - 1) / kWords),
        logits_(new float[static_cast<size_t>(std::min(most, kBlock) * std::min(kWords, words_))]),
        terms_(new char[static_cast<size_t>(gradient_ ? most * (keeps_ ? words_ : kWords) * bytes() : 0)]),
        scaled_(new char[static_cast<size_t>(keeps_ ? most * loss.hidden.columns * bytes() : 0)]),
        decoded_(new char[static_cast<size_t>(loss.words ? kWords * loss.hidden.columns * bytes() : 0)]),
        pieces_(static_cast<size_t>(most * chunks_)),
        rows_(static_cast<size_t>(most)) {}

  /// losses: of rows [first, first + count). Their gradients, each times `weight`, are written or added.
  void compute(int64_t first, int64_t count, float weight, double* losses) {
    first_ = first;
    count_ = count;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) exponentials(chunk);
    in_rows(0, count, [&](int64_t row) { losses[row] = join(row, weight); });
    for (int64_t chunk = 0; chunk < chunks_ && keeps_; ++chunk) head_gradient(chunk);
  }

 private:
  struct Row {
    float reference, wanted;  ///< wanted: the target's logit
  };

  Row& at(int64_t row) { return rows_[static_cast<size_t>(row)]; }
  Piece& piece(int64_t row, int64_t chunk) { return pieces_[static_cast<size_t>(row * chunks_ + chunk)]; }
  int64_t target(int64_t row) const { return loss_.targets[first_ + row]; }
  int64_t words_of(int64_t chunk) const { return std::min(kWords, words_ - chunk * kWords); }
  int64_t bytes() const { return bf16_ ? 2 : 4; }
  size_t inputs() const { return static_cast<size_t>(loss_.hidden.columns); }
  char* scaled(int64_t row) const { return scaled_.get() + row * loss_.hidden.columns * bytes(); }
  float* dhidden(int64_t row) const { return loss_.dhidden + (first_ + row) * loss_.hidden.columns; }
  /// The terms of a row's words in a chunk. Chunks follow each other, each [row][word] without gaps; where the head
  /// does not learn, the next one takes this one's place.
  char* terms(int64_t row, int64_t chunk) const {
    return terms_.get() + ((keeps_ ? chunk * kWords * count_ : 0) + row * words_of(chunk)) * bytes();
  }
  /// Some words of the head: where they are decoded, into `space`.
  Matrix head(int64_t first, int64_t count, char* space) const {
    if (!loss_.words) return rows_of(loss_.head, first, count);
    loss_.words(first, count, space);
    Matrix result = loss_.head;
    result.data = space;
    result.rows = count;
    return result;
  }

  template <class Use>
  void in_rows(int64_t first, int64_t count, Use use) {
    at::parallel_for(first, first + count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) use(row);
    });
  }

  void exponentials(int64_t chunk) {
    const int64_t some = words_of(chunk);
    const Matrix head = this->head(chunk * kWords, some, decoded_.get());
    for (int64_t block = 0; block < count_; block += kBlock) {
      const int64_t rows = std::min(kBlock, count_ - block);
      multiply(rows_of(loss_.hidden, first_ + block, rows), head.transposed(), logits_.get(), some);
      in_rows(block, rows, [&](int64_t row) {
        exponentials(row, chunk, {logits_.get() + (row - block) * some, static_cast<size_t>(some)});
      });
      if (gradient_)
        multiply(matrix(terms(block, chunk), rows, some), head, dhidden(block), loss_.hidden.columns, chunk > 0);
    }
  }

  void exponentials(int64_t row, int64_t chunk, std::span<float> logits) {
    const KernelLevel& level = active_kernel_level();
    if (loss_.cap > 0) level.soft_cap(logits.data(), logits.size(), 1, loss_.cap);
    const int64_t wanted = target(row) - chunk * kWords;
    if (wanted >= 0 && wanted < words_of(chunk)) at(row).wanted = logits[static_cast<size_t>(wanted)];
    const float largest = largest_of(logits.data(), logits.size());
    if (chunk == 0)
      at(row).reference = largest;
    else if (largest > at(row).reference + kHighest)
      move_reference(row, chunk, largest);
    float capped[kWords];
    if (loss_.cap > 0 && gradient_) std::ranges::copy(logits, capped);
    piece(row, chunk) = {.largest = largest, .sum = 1 / level.softmax_terms(logits.data(), logits.size(), 1)};
    if (!gradient_) return;
    if (loss_.cap > 0) soft_cap_gradient(capped, logits.size(), loss_.cap, logits.data());
    const float factor = exponential(largest - at(row).reference);
    if (wanted >= 0 && wanted < words_of(chunk)) logits[static_cast<size_t>(wanted)] = 0;
    if (bf16_)
      return round_to_bf16(logits.data(), logits.size(), reinterpret_cast<uint16_t*>(terms(row, chunk)), factor);
    scale(logits, factor);
    std::ranges::copy(logits, reinterpret_cast<float*>(terms(row, chunk)));
  }

  /// The terms of the chunks before `chunk`, and what was summed of them, become those of the new reference.
  void move_reference(int64_t row, int64_t chunk, float reference) {
    const float factor = exponential(at(row).reference - reference);
    at(row).reference = reference;
    if (!gradient_) return;
    scale({dhidden(row), inputs()}, factor);
    for (int64_t before = 0; before < chunk && keeps_; ++before)
      scale_operand(terms(row, before), static_cast<size_t>(words_of(before)), factor, terms(row, before));
  }

  /// out[i] = x[i] * factor; both of the type of `hidden`.
  void scale_operand(const void* x, size_t count, float factor, void* out) const {
    if (bf16_) {
      const auto* const from = static_cast<const uint16_t*>(x);
      auto* const to = static_cast<uint16_t*>(out);
      for (size_t i = 0; i < count; ++i) to[i] = f32_to_bf16(bf16_to_f32(from[i]) * factor);
    } else {
      for (size_t i = 0; i < count; ++i) static_cast<float*>(out)[i] = static_cast<const float*>(x)[i] * factor;
    }
  }

  /// The row's loss, and the rest of its gradients but for the product that dhead is.
  double join(int64_t row, float weight) {
    const Row& r = at(row);
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk)
      sum += double{piece(row, chunk).sum} * double{exponential(piece(row, chunk).largest - r.reference)};
    const int64_t word = target(row);
    const bool counts = word != kIgnored;
    if (gradient_) {
      if (counts) add_target(row, word, sum);
      const float factor = counts ? static_cast<float>(double{weight} / sum) : 0;
      scale({dhidden(row), inputs()}, factor);
      if (keeps_) scale_operand(rows_of(loss_.hidden, first_ + row, 1).data, inputs(), factor, scaled(row));
    }
    return counts ? double{r.reference} - double{r.wanted} + std::log(sum) : 0;
  }

  /// The gradient at the target, term - S, which was 0 until now.
  void add_target(int64_t row, int64_t word, double sum) {
    const Row& r = at(row);
    const double ratio = loss_.cap > 0 ? double{r.wanted} / double{loss_.cap} : 0;
    const auto slope = static_cast<float>((double{exponential(r.wanted - r.reference)} - sum) * (1 - ratio * ratio));
    if (keeps_) {
      char* const place = terms(row, word / kWords) + word % kWords * bytes();
      if (bf16_)
        *reinterpret_cast<uint16_t*>(place) = f32_to_bf16(slope);
      else
        *reinterpret_cast<float*>(place) = slope;
    }
    std::vector<char> space(loss_.words ? inputs() * static_cast<size_t>(bytes()) : 0);
    const void* const head = this->head(word, 1, space.data()).data;
    for (size_t i = 0; i < inputs(); ++i)
      dhidden(row)[i] +=
          slope * (bf16_ ? bf16_to_f32(static_cast<const uint16_t*>(head)[i]) : static_cast<const float*>(head)[i]);
  }

  void head_gradient(int64_t chunk) {
    const int64_t some = words_of(chunk), columns = loss_.hidden.columns;
    for (int64_t block = 0; block < count_; block += kBlock) {
      const int64_t rows = std::min(kBlock, count_ - block);
      multiply(matrix(terms(block, chunk), rows, some).transposed(), matrix(scaled(block), rows, columns),
               loss_.dhead + chunk * kWords * columns, columns, first_ + block > 0);
    }
  }

  Matrix matrix(const char* data, int64_t rows, int64_t columns) const {
    return {.data = data, .bf16 = bf16_, .rows = rows, .columns = columns, .row_stride = columns, .column_stride = 1};
  }

  const HeadLoss& loss_;
  const bool bf16_, gradient_, keeps_;  ///< keeps_: all terms, until the head's gradient is made of them
  const int64_t words_, chunks_;
  std::unique_ptr<float[]> logits_;
  std::unique_ptr<char[]> terms_, scaled_, decoded_;  // in the type of `hidden`
  std::vector<Piece> pieces_;                         // [row][chunk]
  std::vector<Row> rows_;
  int64_t first_ = 0, count_ = 0;
};

}  // namespace

double HeadLoss::compute() const {
  const int64_t rows = hidden.rows;
  const int64_t counted = rows - std::count(targets, targets + rows, kIgnored);
  const auto weight = static_cast<float>(1 / static_cast<double>(std::max<int64_t>(counted, 1)));
  const int64_t fitting = std::max<int64_t>(kKept / (head.rows * (hidden.bf16 ? 2 : 4)), 32);
  const int64_t at_once = std::min(fitting < kBlock ? fitting : fitting / kBlock * kBlock, rows);
  std::vector<double> losses(static_cast<size_t>(rows));
  Rows some(*this, at_once);
  for (int64_t first = 0; first < rows; first += at_once)
    some.compute(first, std::min(at_once, rows - first), weight, losses.data() + first);
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum * double{weight};
}

}  // namespace bitwright::train
