#pragma once

#include <optional>

#include "tokenizer/charsmap.hpp"
#include "tokenizer/pattern.hpp"
#include "tokenizer/pipeline.hpp"
#include "tokenizer/unicode.hpp"

namespace bitwright {

Normalizer to_normal_form(NormalForm form);
Normalizer to_lower_case();
Normalizer strip_space(bool left, bool right);
/// Leaves out marks; those with a base of their own remain unless the text is decomposed.
Normalizer strip_accents();
Normalizer replace_text(Pattern pattern, std::string content);
/// Puts `prefix` before a text that is not empty.
Normalizer prepend_text(std::string prefix);
Normalizer text_to_byte_alphabet();
/// Google's "nmt" rules: control characters go, odd white space becomes a space.
Normalizer nmt();

struct BertNormalization {
  bool clean_text = true, handle_chinese_chars = true, strip_accents = true, lowercase = true;
};
Normalizer bert(const BertNormalization& options);

/// A precompiled_charsmap the way Hugging Face applies it: whole grapheme clusters under 6 bytes, else characters, each
/// replaced by what its shortest known prefix stands for.
Normalizer precompiled(Charsmap map);

struct SentencePieceNormalization {
  std::optional<Charsmap> charsmap;  ///< the longest prefix known is replaced
  bool add_dummy_prefix = true, remove_extra_whitespaces = true, escape_whitespaces = true;
  bool treat_whitespace_as_suffix = false;
  std::vector<std::string> user_defined;  ///< left as they are
};
/// SentencePiece's normalizer.cc.
Normalizer sentencepiece(SentencePieceNormalization options);

inline constexpr std::string_view kMetaspace = "\u2581";  ///< how SentencePiece writes a space

}  // namespace bitwright
