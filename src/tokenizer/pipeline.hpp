#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/model.hpp"
#include "tokenizer/pre_tokenizers.hpp"

namespace bitwright {

constexpr size_t kMaxVocabulary = size_t{1} << 22;  ///< 16 times the largest in use; bounds what a hostile id allocates

/// Changes escaped text (unicode.hpp) before it is cut into pieces.
using TextNormalizer = std::function<std::string(std::string_view text)>;
/// Changes the texts of tokens, which are bytes, before they are joined.
using TokenDecoder = std::function<void(std::vector<std::string>& texts)>;

struct Token {
  std::string text{};  ///< what the decoders get
  bool known = false;  ///< false: no token has this id
  bool special = false;
};

/// Text that is a token wherever it stands, before the text is cut into pieces.
struct AddedToken {
  int32_t id;
  std::string text;
  bool special = false;
  bool normalized = false;   ///< looked for in normalized text, in what is left after those that are not
  bool single_word = false;  ///< only where no word character stands beside it
  bool lstrip = false;       ///< takes the white space before it too
  bool rstrip = false;
};

/// What every file of a tokenizer is read into. Encoding: added tokens, normalizers, normalized added tokens,
/// pre-tokenizers, model. Decoding: decoders, and the texts joined.
struct TokenizerPipeline {
  std::vector<Token> tokens;  ///< by id
  std::vector<AddedToken> added;
  std::vector<TextNormalizer> normalizers;
  std::vector<PreTokenizer> pre_tokenizers;
  bool byte_pieces = false;  ///< the model gets bytes, where it otherwise gets escaped text
  std::unique_ptr<PieceModel> model;
  std::vector<TokenDecoder> decoders;
  std::optional<int32_t> bos, eos;
  bool adds_bos = false;
};

/// A piece of a file that is damaged, and one that is sound but of a kind not read.
[[noreturn]] void bad_tokenizer(const std::string& file, const std::string& why);
[[noreturn]] void unsupported_tokenizer(const std::string& file, const std::string& what);
/// For messages: in quotation marks, cut and printable.
std::string shown_token(std::string_view token);

}  // namespace bitwright
