#pragma once

#include <filesystem>
#include <span>
#include <vector>

#include "base/json.hpp"
#include "base/output.hpp"
#include "kernels/decode.hpp"

namespace bitwright {

/// How far an output is on stable storage, so that an interrupted run can go on. One JSON object a line, appended and
/// synced; a torn last line is ignored. The first says what the output depends on, each later one
/// {"done": pieces from the start, "errors": [[error, norm], …] of those since the line before}. Not thread-safe.
/// docs/decisions/0005-journal.md
class Journal {
 public:
  /// Begins one in an empty file, or reads what an earlier run wrote. `header`: members that must be what they were.
  /// Throws Error{"cannot-resume"} naming the member that is not.
  Journal(const std::filesystem::path& path, const OrderedJson& header);
  /// Of pieces that are done; those of quantized tensors have errors.
  std::span<const SquaredError> done() const { return done_; }
  /// `errors` of the pieces after done(), whose data is on stable storage already.
  void record(std::span<const SquaredError> errors);

 private:
  void append(const OrderedJson& line);
  OutputFile file_;
  std::vector<SquaredError> done_;
};

}  // namespace bitwright
