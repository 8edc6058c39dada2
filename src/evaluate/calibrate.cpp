#include "evaluate/calibrate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.hpp"
#include "base/progress.hpp"
#include "base/threads.hpp"
#include "evaluate/score.hpp"

namespace bitwright {
namespace {

/// Sums of one input, which several matrices may share.
struct Sums {
  std::vector<MatrixName> matrices;
  std::vector<double> squares;  ///< in double, for thousands of windows are added up
  int64_t rows = 0;
};

class Collector {
 public:
  void add(std::span<const MatrixName* const> matrices, std::span<const float> x, size_t tokens) {
    Sums& sums = sums_[*matrices.front()];
    const size_t columns = x.size() / tokens;
    if (sums.squares.empty()) {
      for (const MatrixName* matrix : matrices) sums.matrices.push_back(*matrix);
      sums.squares.resize(columns);
    }
    sums.rows += static_cast<int64_t>(tokens);
    constexpr size_t kColumnsATask = 256;
    parallel_ranges(columns, kColumnsATask, [&](size_t begin, size_t end) {
      for (size_t t = 0; t < tokens; ++t)
        for (size_t j = begin; j < end; ++j) {
          const double v = x[t * columns + j];
          sums.squares[j] += v * v;
        }
    });
  }

  std::map<MatrixName, InputSquares> result() const {
    std::map<MatrixName, InputSquares> out;
    for (const auto& [first, sums] : sums_) {
      InputSquares squares = {.sums = {}, .counts = {sums.rows}};
      for (const double v : sums.squares) {
        squares.sums.push_back(static_cast<float>(v));
        if (!std::isfinite(squares.sums.back())) not_finite(first);
      }
      for (const MatrixName& matrix : sums.matrices) out[matrix] = squares;
    }
    return out;
  }

 private:
  [[noreturn]] static void not_finite(const MatrixName& matrix) {
    throw Error({.code = "not-finite",
                 .what = "cannot calibrate",
                 .where = fmt::format("tensor '{}'", printable(matrix.tensor)),
                 .why = "its inputs are NaN or infinite",
                 .fix = "the model's weights are damaged, or its numbers too large for their type"});
  }

  std::map<MatrixName, Sums> sums_;
};

}  // namespace

Calibration calibrate(const Model& model, const std::vector<int32_t>& tokens, const Protocol& protocol,
                      std::optional<int32_t> bos) {
  const std::vector<Window> windows = checked_windows(model, tokens, protocol, bos);
  Collector collector;
  const InputObserver observer = [&](std::span<const MatrixName* const> matrices, std::span<const float> x,
                                     size_t rows) { collector.add(matrices, x, rows); };
  KvCache cache(model.config(), protocol.context);
  Progress progress("calibrating", windows.size());
  for (const Window& window : windows) {
    throw_if_interrupted();
    cache.clear();
    model.forward(inputs_of(window, tokens, protocol, bos), cache, Model::Logits::last, &observer);
    progress.advance(1);
  }
  const auto count = static_cast<int64_t>(windows.size());
  return {.windows = count, .tokens = count * protocol.context, .inputs = collector.result()};
}

Imatrix importance_of(const Calibration& calibration, const std::multimap<MatrixName, GgufMatrix>& names) {
  Imatrix out;
  for (const auto& [matrix, squares] : calibration.inputs) {
    const auto [begin, end] = names.equal_range(matrix);
    BW_ASSERT(begin != end);
    for (auto it = begin; it != end; ++it) {
      const GgufMatrix& place = it->second;
      InputSquares& stack = out.entries[place.tensor];
      const size_t columns = squares.sums.size();
      stack.counts.resize(static_cast<size_t>(place.count));
      stack.sums.resize(static_cast<size_t>(place.count) * columns);
      stack.counts[static_cast<size_t>(place.index)] = squares.counts.front();
      std::ranges::copy(squares.sums, stack.sums.begin() + static_cast<std::ptrdiff_t>(place.index * columns));
    }
  }
  return out;
}

}  // namespace bitwright
