#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "bitwright/torch/training_config.hpp"
#include "evaluate/evaluate.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright::train {

/// Throws Error{"text-too-short"} for fewer than length + 1 tokens, {"vocabulary-mismatch"} for negative ones and those
/// beyond `vocabulary` (0: not checked).
void check_tokens(std::span<const int32_t> tokens, int64_t length, int64_t vocabulary);

/// A stream of tokens, cut into windows that come in a random order, without end. Which window is the i-th depends on
/// the seed and i alone, so a position is one number, and resuming, accumulation and any number of processes read the
/// same windows.
///
/// Epoch e shuffles all its windows; they begin at an offset drawn anew for each epoch, so that every token is learnt
/// from and texts are cut at other places each time. All epochs have as many windows. A batch that an epoch cannot fill
/// goes on with the next one's: no batch is ever short.
class TokenDataset {
 public:
  /// Windows of `length` inputs, whose targets are one token further. Throws as check_tokens().
  TokenDataset(std::span<const int32_t> tokens, int64_t length, uint64_t seed, int64_t vocabulary = 0);

  int64_t tokens() const { return size_; }
  int64_t length() const { return length_; }
  int64_t windows() const { return windows_; }  ///< of an epoch
  /// Windows `position` to position + count - 1 of the endless order: [count, length + 1] int64.
  torch::Tensor batch(int64_t position, int64_t count) const;
  /// SHA-256 of the tokens: is a text still the one that training began with?
  const std::string& digest() const { return digest_; }

 private:
  struct Epoch {
    int64_t number = -1, offset = 0;
    std::vector<uint32_t> order;
  };
  const Epoch& epoch(int64_t number) const;
  int64_t token(int64_t index) const;

  int64_t size_, length_, windows_;
  uint64_t seed_;
  std::vector<uint16_t> narrow_;  ///< where every token fits
  std::vector<uint32_t> wide_;
  std::string digest_;
  mutable Epoch epoch_;  ///< the one read last
};

/// How a configuration's texts become tokens: as `bitwright eval` does it with the same split and BOS.
Protocol protocol_of(const TrainingConfig& config, const Tokenizer& tokenizer, int64_t context);

/// Tokens to train on and to validate with. Where there is no text for validation, it is the end of the other; a part
/// too short for a single window counts as none.
struct TokenTexts {
  std::vector<int32_t> training, validation;
};
/// Reads config.data. Throws Error as token_stream() does, and Error{"missing-text"} (exit status 2).
TokenTexts read_texts(const TrainingConfig& config, const Tokenizer& tokenizer, const Protocol& protocol);

}  // namespace bitwright::train
