#pragma once

#include "tokenizer/pattern.hpp"
#include "tokenizer/pipeline.hpp"

namespace bitwright {

/// From GPT-2's alphabet to bytes; tokens with another character stay as they are.
TokenDecoder from_byte_alphabet();
TokenDecoder replace_in_tokens(Pattern pattern, std::string content);
TokenDecoder replace_in_tokens(std::string text, std::string content);
/// <0xE4> becomes that byte.
TokenDecoder byte_fallback();
/// All as one text, for what comes after.
TokenDecoder fuse();
/// Takes up to `start` times `content`, a character, from the beginning of each text and up to `stop` times from its
/// end.
TokenDecoder strip_tokens(std::string content, size_t start, size_t stop);
/// WordPiece's: a space between words, none before `prefix`; cleanup takes those before punctuation out.
TokenDecoder word_piece(std::string prefix, bool cleanup);
/// `suffix` ends a word: it becomes a space, the last one nothing.
TokenDecoder end_of_word(std::string suffix);
/// `replacement` becomes a space, but not at the very beginning where `prepends`.
TokenDecoder metaspace(std::string replacement, bool prepends);
/// Connectionist temporal classification: repeated tokens once, padding dropped.
TokenDecoder ctc(std::string pad, std::string delimiter, bool cleanup);
/// Spaces between all tokens: where a file names no decoder.
TokenDecoder join_with_spaces();

}  // namespace bitwright
