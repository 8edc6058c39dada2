#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "model/model.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {

/// How a text becomes windows of tokens; figures mean nothing without it.
struct Protocol {
  enum class Bos { document, window, none };
  int64_t context = 512;    ///< inputs a window; position i is scored on token i + 1 of the stream
  int64_t stride = 512;     ///< from a window's start to the next's; a window scores only what the one before did not
  Bos bos = Bos::none;      ///< document: before each document; window: the first input of each window
  std::string split{};      ///< text between documents, each stripped of white space; empty: one, as it is
  int64_t max_windows = 0;  ///< 0: all full windows
};

/// The text's token ids by the protocol: documents encoded one by one, BOS each where asked, joined. Empty documents
/// are left out. JSON Lines (the first line is an object with a string "text") give a document a line, split further
/// where the protocol says so. Throws Error{"bad-text"} naming a line that is different, Error{"no-bos"}.
std::vector<int32_t> token_stream(const Tokenizer& tokenizer, std::string_view text, const Protocol& protocol);

/// What the model lost against a reference: KL(reference || model) in nats a token.
struct Divergence {
  double reference_perplexity, kl_mean, kl_p99, kl_max, top1_agreement;
};

struct Quality {
  int64_t windows, tokens;  ///< scored
  double nll;               ///< mean, nats a token
  double perplexity;
  double seconds;  ///< in the model's forward passes (without the reference's)
  std::optional<Divergence> reference;
};

/// Perplexity of `model` on full windows of `tokens`, and in the same pass its divergence from `reference` (null:
/// none). Throws Error{"text-too-short"} when not one window is full, Error{"vocabulary-mismatch"} when the two models
/// differ in vocabulary, Error{"not-finite"} when logits are NaN or infinite.
Quality evaluate(const Model& model, const Model* reference, const std::vector<int32_t>& tokens,
                 const Protocol& protocol, std::optional<int32_t> bos);

/// {text_sha256, context, stride, bos, split, windows}
OrderedJson to_json(const Protocol& protocol, std::string_view text, int64_t windows);

/// A text that ships inside the program, for judging a model that was just quantized: short stories with
/// "<|endoftext|>" between them.
std::string_view bundled_text();

}  // namespace bitwright
