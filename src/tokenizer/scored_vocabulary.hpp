#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tokenizer/normalizers.hpp"
#include "tokenizer/pipeline.hpp"

namespace bitwright {

/// What a piece is for, with SentencePiece's numbers (sentencepiece_model.proto), which GGUF has taken over.
enum class PieceType { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

struct ScoredPiece {
  std::string text;  ///< with U+2581 for spaces
  float score = 0;
  PieceType type = PieceType::normal;
};

/// A vocabulary as SentencePiece has it; the number of a piece is its id.
struct ScoredVocabulary {
  std::vector<ScoredPiece> pieces;
  bool unigram =
      false;  ///< else byte-pair encoding: two neighbours that are a piece together are joined, best score first
  bool single_precision = false;  ///< UnigramRules'
  SentencePieceNormalization normalization;
  std::optional<int32_t> unknown{};    ///< absent: the first piece of that type
  bool user_defined_verbatim = false;  ///< the user's own pieces stand in plain text; else in normalized text
  std::optional<int32_t> bos, eos;
  bool adds_bos = false;
};

/// What a SentencePiece model, and llama2.c's tokenizer.bin, say. file: named in errors, as below.
ScoredVocabulary sentencepiece_vocabulary(std::string_view bytes, const std::string& file);
ScoredVocabulary llama2c_vocabulary(std::string_view bytes, const std::string& file);
TokenizerPipeline pipeline_of(ScoredVocabulary vocabulary, const std::string& file);

}  // namespace bitwright
