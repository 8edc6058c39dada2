#include "tokenizer/scored_vocabulary.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "tokenizer/byte_level.hpp"
#include "tokenizer/decoders.hpp"
#include "tokenizer/unigram.hpp"
#include "tokenizer/vocabulary.hpp"

namespace bitwright {
namespace {

/// Bytes by id, the one unknown token.
struct Special {
  std::array<int32_t, 256> bytes = no_byte_ids();
  std::optional<int32_t> unknown;
};

Special special_pieces(const ScoredVocabulary& vocabulary) {
  Special out;
  out.unknown = vocabulary.unknown;
  for (size_t id = 0; id < vocabulary.pieces.size(); ++id) {
    const ScoredPiece& piece = vocabulary.pieces[id];
    if (piece.type == PieceType::unknown && !out.unknown) out.unknown = static_cast<int32_t>(id);
    const auto byte = piece.type == PieceType::byte ? byte_of_token(piece.text) : std::nullopt;
    if (byte) out.bytes.at(*byte) = static_cast<int32_t>(id);
  }
  return out;
}

std::unique_ptr<PieceModel> bpe_of(const ScoredVocabulary& vocabulary, const Special& special) {
  std::vector<float> scores;
  for (const ScoredPiece& piece : vocabulary.pieces)
    if (piece.type == PieceType::normal) scores.push_back(piece.score);
  std::sort(scores.begin(), scores.end(), std::greater<>());
  scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
  std::vector<RankedToken> ranked;
  for (size_t id = 0; id < vocabulary.pieces.size(); ++id) {
    const ScoredPiece& piece = vocabulary.pieces[id];
    if (piece.type != PieceType::normal) continue;
    const auto rank = std::lower_bound(scores.begin(), scores.end(), piece.score, std::greater<>()) - scores.begin();
    ranked.push_back({piece.text, static_cast<int32_t>(id), static_cast<uint32_t>(rank)});
  }
  BpeRules rules;
  rules.unknown = special.unknown;
  rules.fuse_unknown = true;
  add_merges_of_ranks(ranked, static_cast<int32_t>(vocabulary.pieces.size()), rules);
  rules.bytes = special.bytes;
  return std::make_unique<Bpe>(std::move(rules));
}

std::unique_ptr<PieceModel> unigram_of(const ScoredVocabulary& vocabulary, const Special& special) {
  UnigramRules rules = {.pieces = {},
                        .single_precision = vocabulary.single_precision,
                        .unknown = special.unknown,
                        .bytes = special.bytes};
  double best = std::numeric_limits<float>::min();  // as SentencePiece begins: scores are logarithms, none is above it
  for (const ScoredPiece& piece : vocabulary.pieces) {
    if (piece.type != PieceType::normal) continue;
    const bool first = rules.pieces.empty();
    const auto id = static_cast<int32_t>(&piece - vocabulary.pieces.data());
    rules.worst_score = first ? piece.score : std::min<double>(rules.worst_score, piece.score);
    best = std::max<double>(best, piece.score);
    rules.pieces.push_back({piece.text, piece.score, id});
  }
  for (const ScoredPiece& piece : vocabulary.pieces) {
    if (piece.type != PieceType::user_defined || vocabulary.user_defined_verbatim) continue;
    const double score = static_cast<double>(piece.text.size()) * best - 0.1;  // unigram_model.cc, EncodeOptimized
    rules.pieces.push_back({piece.text, score, static_cast<int32_t>(&piece - vocabulary.pieces.data())});
  }
  return std::make_unique<Unigram>(std::move(rules));
}

}  // namespace

TokenizerPipeline pipeline_of(ScoredVocabulary vocabulary, const std::string& file) {
  if (vocabulary.pieces.empty() || vocabulary.pieces.size() > kMaxVocabulary)
    bad_tokenizer(file, fmt::format("it has {} pieces", vocabulary.pieces.size()));
  TokenizerPipeline out;
  for (size_t i = 0; i < vocabulary.pieces.size(); ++i) {
    const ScoredPiece& piece = vocabulary.pieces[i];
    const auto id = static_cast<int32_t>(i);
    if (piece.text.empty()) bad_tokenizer(file, fmt::format("piece {} is empty", i));
    if (!std::isfinite(piece.score)) bad_tokenizer(file, fmt::format("the score of piece {} is not finite", i));
    if (piece.type == PieceType::byte && !byte_of_token(piece.text))
      bad_tokenizer(file, fmt::format("{} is no byte", shown_token(piece.text)));
    const bool special = piece.type == PieceType::control || piece.type == PieceType::unknown;
    add_token(file, out, id, piece.text, piece.text).special = special;
    const bool user_defined = piece.type == PieceType::user_defined;
    const bool in_normalized = user_defined && !vocabulary.user_defined_verbatim;
    const bool in_model = in_normalized && vocabulary.unigram;  // where it competes with the others
    if (special || (user_defined && !in_model))
      out.added.push_back({.id = id, .text = piece.text, .special = special, .normalized = in_normalized});
    if (in_normalized) vocabulary.normalization.user_defined.push_back(piece.text);
  }
  const Special special = special_pieces(vocabulary);
  out.model = vocabulary.unigram ? unigram_of(vocabulary, special) : bpe_of(vocabulary, special);
  const SentencePieceNormalization& n = vocabulary.normalization;
  if (n.escape_whitespaces) out.decoders.push_back(replace_in_tokens(std::string(kMetaspace), " "));
  out.decoders.push_back(byte_fallback());
  out.decoders.push_back(fuse());
  if (n.add_dummy_prefix)
    out.decoders.push_back(
        strip_tokens(" ", n.treat_whitespace_as_suffix ? 0 : 1, n.treat_whitespace_as_suffix ? 1 : 0));
  out.normalizers.push_back(sentencepiece(std::move(vocabulary.normalization)));
  const auto token = [&](std::optional<int32_t> id) {
    return id && *id >= 0 && static_cast<size_t>(*id) < out.tokens.size() ? id : std::nullopt;
  };
  out.bos = token(vocabulary.bos);
  out.eos = token(vocabulary.eos);
  out.adds_bos = vocabulary.adds_bos && out.bos;
  return out;
}

}  // namespace bitwright
