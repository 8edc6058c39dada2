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

/// Text to token ids and back, as `tokenizer.json` (Hugging Face tokenizers) states it.
/// Immutable; may be shared between threads.
class Tokenizer {
 public:
  /// Reads tokenizer.json and, where present, tokenizer_config.json of a model directory.
  /// Throws Error naming the file and the part that is missing, damaged or of a kind not supported.
  explicit Tokenizer(const std::filesystem::path& directory);
  /// The same from the two files' text (`config` empty: there is none); `directory` is named in errors.
  static Tokenizer from_json(std::string_view tokenizer, std::string_view config, const std::string& directory);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  /// Ids of `text` without any BOS or EOS. Added tokens written out in the text are recognised, those that are special
  /// (<|endoftext|>) only when `special` is true. Bytes that are not UTF-8 are encoded as the tokenizer's byte tokens,
  /// never refused; only a text of 2 GiB or more is. decode(encode(text), false) gives back `text`, with a space before
  /// it where the tokenizer adds one.
  std::vector<int32_t> encode(std::string_view text, bool special = true) const;
  /// The bytes of `ids`; special tokens are left out when `skip_special`. Ids out of range throw Error.
  std::string decode(std::span<const int32_t> ids, bool skip_special = true) const;

  size_t vocabulary_size() const;         ///< largest id + 1
  std::optional<int32_t> bos_id() const;  ///< from tokenizer_config.json's bos_token
  std::optional<int32_t> eos_id() const;
  bool adds_bos() const;  ///< tokenizer_config.json's add_bos_token

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitwright
