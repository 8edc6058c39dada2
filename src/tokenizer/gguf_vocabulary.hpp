#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace bitwright {

class GgufMetadata;
struct GgufContents;

/// GGUF's keys tokenizer.ggml.*: what a file says of its vocabulary.
struct GgufVocabulary {
  std::string model;                ///< "llama", "gpt2", "bert", "t5"
  std::string pre{};                ///< the split of "gpt2"; empty: not said
  std::vector<std::string> tokens;  ///< by id; "gpt2": in GPT-2's alphabet
  std::vector<float> scores{};      ///< empty, or one for each token
  std::vector<int32_t> types{};     ///< empty, or one for each token, as PieceType
  std::vector<std::string> merges{};
  std::string precompiled_charsmap{};
  std::optional<int32_t> bos{}, eos{}, eot{}, eom{}, unknown{}, cls{};  ///< eot, eom: of a turn, of a message
  std::optional<bool> add_bos{}, add_space_prefix{}, remove_extra_whitespaces{};
};

/// Throws Error where a key is missing or of another type. `file` is named in errors.
GgufVocabulary gguf_vocabulary(const GgufContents& contents, const std::string& file);
/// The name by which llama.cpp knows a byte-level BPE that cuts text by these expressions; nothing: it has none.
std::optional<std::string> gguf_pre_tokenization(std::span<const std::string> splits, bool ignore_merges);

/// The vocabulary of a model directory (or one file of it) in GGUF's words, filled up with unused tokens to `size`, the
/// rows of the model's embedding. Throws Error{"unsupported-tokenizer"} for kinds that GGUF has no words for.
GgufVocabulary gguf_vocabulary_of(const std::filesystem::path& path, size_t size);
void add_vocabulary(const GgufVocabulary& vocabulary, GgufMetadata& out);

}  // namespace bitwright
