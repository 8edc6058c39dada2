#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

struct Token {
  std::string bytes;   ///< what it stands for
  bool known = false;  ///< false: no token has this id
  bool special = false;
  bool whole_piece = false;  ///< a piece of text that equals it is this token, whatever the merges would make of it
};

struct Merge {
  int32_t left, right, merged;
};

/// Text that is a token wherever it stands, before the text is cut into pieces.
struct AddedToken {
  int32_t id;
  std::string text;
  bool special;
  bool normalized;  ///< looked for in what is left after those that are not
};

/// What tokenizer.json and tokenizer_config.json of a byte-level BPE say, checked: every id stands in `tokens`, every
/// byte has a token, and a merge makes the bytes of its parts, so that decoding gives back what was encoded.
struct TokenizerFile {
  std::vector<Token> tokens;  ///< by id
  std::array<int32_t, 256> byte_ids;
  std::vector<Merge> merges;  ///< the first to be applied first; each pair once
  std::vector<AddedToken> added;
  bool adds_prefix_space;
  std::optional<int32_t> bos, eos;
  bool adds_bos;
};

/// `config` is empty where there is no tokenizer_config.json. Truncation, padding and the post-processor are a caller's
/// affair and not read. Throws Error{"bad-json"}, {"bad-tokenizer"} or {"unsupported-tokenizer"} naming a file of
/// `directory` and the part.
TokenizerFile read_tokenizer_file(std::string_view tokenizer, std::string_view config, const std::string& directory);

}  // namespace bitwright
