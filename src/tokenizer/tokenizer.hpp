#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

struct GgufVocabulary;
struct TokenizerPipeline;

/// Text to token ids and back. Immutable; may be shared between threads.
class Tokenizer {
 public:
  /// Reads the tokenizer of a model directory, or the file `path`: tokenizer.json, vocab.json with merges.txt, a
  /// SentencePiece model, tiktoken's ranks, llama2.c's tokenizer.bin; of several in a directory the first in this
  /// order (formats.def). tokenizer_config.json beside it is heeded.
  /// Throws Error naming the file and the part that is missing, damaged or of a kind not supported.
  explicit Tokenizer(const std::filesystem::path& path);
  /// tokenizer.json and tokenizer_config.json from their text (`config` empty: there is none); `directory` is named in
  /// errors.
  static Tokenizer from_json(std::string_view tokenizer, std::string_view config, const std::string& directory);
  /// `file` is named in errors.
  static Tokenizer from_gguf(const GgufVocabulary& vocabulary, const std::string& file);
  explicit Tokenizer(TokenizerPipeline pipeline);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  /// Does `directory` hold a file that the constructor would read?
  static bool exists_in(const std::filesystem::path& directory);

  /// Ids of `text` without any BOS or EOS. Added tokens written out in the text are recognised, those that are special
  /// (<|endoftext|>) only when `special` is true. Bytes that are not UTF-8 are never refused: they become byte tokens,
  /// where there are none the unknown token; only a text of 2 GiB or more is. decode(encode(text), false) gives back
  /// `text` where the tokenizer has byte tokens and no normalizer, but for a space before it.
  std::vector<int32_t> encode(std::string_view text, bool special = true) const;
  /// The bytes of `ids`; special tokens are left out when `skip_special`. Ids out of range throw Error. Not a
  /// concatenation: many tokenizers drop the first space.
  std::string decode(std::span<const int32_t> ids, bool skip_special = true) const;

  size_t vocabulary_size() const;  ///< largest id + 1
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  bool adds_bos() const;  ///< does the model expect bos_id() before a text?

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitwright
