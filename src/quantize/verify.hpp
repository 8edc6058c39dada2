#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "evaluate/evaluate.hpp"
#include "quantize/journal.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {

/// What became of one quantized tensor.
struct LayerResult {
  std::string name;
  Scheme scheme;
  std::string algorithm;
  double relative_error;  ///< |w - decoded| / |w|, Euclidean; 0 for an all-zero tensor
  uint64_t bytes;
};

/// What was written is not what was meant: Error{"verification-failed"}.
[[noreturn]] void verification_failed(const std::string& where, const std::string& why);

/// Reads every tensor of `written` back, by the pieces it was written in: kept ones must equal `source` byte for byte,
/// quantized ones must decode to values with the errors in `layers`. Pieces in work take up to `piece_memory` bytes.
/// Throws Error{"verification-failed"} on any difference or non-finite value.
void verify_tensors(const Checkpoint& source, const Checkpoint& written, const std::vector<LayerResult>& layers,
                    uint64_t piece_memory);
/// What one piece takes of memory while it is quantized or verified.
uint64_t quantized_piece_memory(int64_t elements, DType dtype);

struct Judgement {
  Quality quality;
  Protocol protocol;
};
/// Why a model cannot be judged, as far as it is known without its weights; empty: nothing speaks against it. A damaged
/// tokenizer or configuration is an Error now, before hours of work instead of after.
std::string why_not_judged(const Checkpoint& source);
/// Perplexity and divergence of `written` against `source` on the bundled text, where why_not_judged() is empty;
/// nothing where the model cannot be run, or would take more than `most_memory` bytes, `reason` saying why.
std::optional<Judgement> judge(const Checkpoint& source, const Checkpoint& written, uint64_t most_memory,
                               std::string& reason);

}  // namespace bitwright
