#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string_view>

#include "tokenizer/pipeline.hpp"

namespace bitwright {

/// One kind of file that tokenizers come in.
struct TokenizerFormat {
  std::string_view name;
  std::string_view source;  ///< the specification followed
  /// The file of this kind in a model directory.
  std::optional<std::filesystem::path> (*find)(const std::filesystem::path& directory);
  /// Does a file look like this kind? From its first bytes.
  bool (*recognises)(std::string_view bytes);
  /// Throws Error{"bad-tokenizer"} or {"unsupported-tokenizer"}; so may a setting beside the file.
  TokenizerPipeline (*read)(const std::filesystem::path& file);
};

#define TOKENIZER_FORMAT(name) extern const TokenizerFormat name##_tokenizer;
#include "tokenizer/formats.def"

/// In the order of trust: where a directory has several, the first counts.
std::span<const TokenizerFormat* const> tokenizer_formats();

/// `directory`/`name` if it exists.
std::optional<std::filesystem::path> file_in(const std::filesystem::path& directory, std::string_view name);

/// What tokenizer_config.json beside `file` says of BOS and EOS, over what the file itself said; nothing where there is
/// none. bos_token and eos_token must be tokens.
void apply_tokenizer_config(const std::filesystem::path& file, TokenizerPipeline& pipeline);
void apply_tokenizer_config(std::string_view config, const std::string& config_file, TokenizerPipeline& pipeline);

/// The readers themselves, of the files' text, for tests and fuzzing. `file` is named in errors.
TokenizerPipeline read_tokenizer_json(std::string_view text, const std::string& file);
TokenizerPipeline read_sentencepiece(std::string_view bytes, const std::string& file);
TokenizerPipeline read_tiktoken(std::string_view text, const std::string& file);
TokenizerPipeline read_llama2c(std::string_view bytes, const std::string& file);

}  // namespace bitwright
