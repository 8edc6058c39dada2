#pragma once

#include "tokenizer/pattern.hpp"
#include "tokenizer/pipeline.hpp"

namespace bitwright {

/// From GPT-2's alphabet to bytes; tokens with another character stay as they are.
Decoder from_byte_alphabet();
Decoder replace_in_tokens(Pattern pattern, std::string content);
Decoder replace_in_tokens(std::string text, std::string content);
/// <0xE4> becomes that byte.
Decoder byte_fallback();
/// All as one text, for what comes after.
Decoder fuse();
/// Takes up to `start` times `content`, a character, from the beginning of each text and up to `stop` times from its end.
Decoder strip_tokens(std::string content, size_t start, size_t stop);
/// WordPiece's: a space between words, none before `prefix`; cleanup takes those before punctuation out.
Decoder word_piece(std::string prefix, bool cleanup);
/// `suffix` ends a word: it becomes a space, the last one nothing.
Decoder end_of_word(std::string suffix);
/// `replacement` becomes a space, but not at the very beginning where `prepends`.
Decoder metaspace(std::string replacement, bool prepends);
/// Connectionist temporal classification: repeated tokens once, padding dropped.
Decoder ctc(std::string pad, std::string delimiter, bool cleanup);
/// Spaces between all tokens: where a file names no decoder.
Decoder join_with_spaces();

}  // namespace bitwright
