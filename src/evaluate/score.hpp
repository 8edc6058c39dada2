#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "evaluate/evaluate.hpp"

namespace bitwright {

/// What one position gives, in nats.
struct Score {
  double nll;                ///< -log p(target); NaN where a logit is NaN or infinite
  double reference_nll = 0;  ///< likewise of the reference
  double divergence = 0;     ///< KL(reference || model); exactly 0 for equal logits
  bool same_top = false;     ///< the same most likely token, the lowest id on a tie
  bool greedy = false;       ///< the target is the most likely token, likewise
};
/// `reference`: as many logits, or none. Needs 0 <= target < logits.size().
Score score(std::span<const float> logits, std::span<const float> reference, int32_t target);

/// Throws Error{"vocabulary-mismatch"} where a token is none of the model's.
void check_tokens(std::span<const int32_t> tokens, const Model& model);

/// Of `scores` that have a reference, added up in their order. Not empty.
Divergence summarize(std::span<const Score> scores);

/// Inputs of one forward pass, and which of their positions count.
struct Window {
  size_t begin;          ///< the first token of the stream that it reads
  int64_t first_scored;  ///< its positions from here on
};
/// The full windows of a stream, at most protocol.max_windows. Position i of a window predicts token begin + i + 1;
/// with Bos::window the first input is BOS, the others follow one place later, and position i predicts token begin + i.
std::vector<Window> cut(size_t stream, const Protocol& protocol);

/// What the model reads in a window: `context` tokens.
std::vector<int32_t> inputs_of(const Window& window, std::span<const int32_t> tokens, const Protocol& protocol,
                               std::optional<int32_t> bos);
/// Is the protocol one that can be followed, and are the tokens the model's? Throws Error{"bad-protocol"}, {"no-bos"},
/// {"vocabulary-mismatch"}, {"text-too-short"}.
std::vector<Window> checked_windows(const Model& model, std::span<const int32_t> tokens, const Protocol& protocol,
                                    std::optional<int32_t> bos);

}  // namespace bitwright
