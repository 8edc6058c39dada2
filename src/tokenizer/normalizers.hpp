#pragma once

#include <optional>

#include "tokenizer/charsmap.hpp"
#include "tokenizer/pattern.hpp"
#include "tokenizer/pipeline.hpp"
#include "tokenizer/unicode.hpp"

namespace bitwright {

TextNormalizer to_normal_form(NormalForm form);
TextNormalizer to_lower_case();
TextNormalizer strip_space(bool left, bool right);
/// Leaves out marks; those with a base of their own remain unless the text is decomposed.
TextNormalizer strip_accents();
TextNormalizer replace_text(Pattern pattern, std::string content);
/// Puts `prefix` before a text that is not empty.
TextNormalizer prepend_text(std::string prefix);
TextNormalizer text_to_byte_alphabet();
/// Google's "nmt" rules: control characters go, odd white space becomes a space.
TextNormalizer nmt();

struct BertNormalization {
  bool clean_text = true, handle_chinese_chars = true, strip_accents = true, lowercase = true;
};
TextNormalizer bert(const BertNormalization& options);

/// A precompiled_charsmap the way Hugging Face applies it: whole grapheme clusters under 6 bytes, else characters, each
/// replaced by what its shortest known prefix stands for.
TextNormalizer precompiled(Charsmap map);

struct SentencePieceNormalization {
  std::optional<Charsmap> charsmap;  ///< the longest prefix known is replaced
  std::string charsmap_bytes{};      ///< as SentencePiece stores it
  bool add_dummy_prefix = true, remove_extra_whitespaces = true, escape_whitespaces = true;
  bool treat_whitespace_as_suffix = false;
  std::vector<std::string> user_defined;  ///< left as they are
};
/// SentencePiece's normalizer.cc.
TextNormalizer sentencepiece(SentencePieceNormalization options);

inline constexpr std::string_view kMetaspace = "\u2581";  ///< how SentencePiece writes a space

}  // namespace bitwright
