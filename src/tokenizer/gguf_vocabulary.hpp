#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace bitwright {

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
  std::optional<int32_t> bos{}, eos{}, unknown{}, cls{};
  std::optional<bool> add_bos{}, add_space_prefix{}, remove_extra_whitespaces{};
};

/// Throws Error where a key is missing or of another type. `file` is named in errors.
GgufVocabulary gguf_vocabulary(const GgufContents& contents, const std::string& file);

}  // namespace bitwright
