#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenizer/bpe.hpp"
#include "tokenizer/json_part.hpp"
#include "tokenizer/pipeline.hpp"

/// What the readers of several formats share.
namespace bitwright {

/// The token of a new `id`; `name` is for messages.
Token& add_token(const std::string& file, TokenizerPipeline& out, int32_t id, std::string text, std::string_view name);

/// Reads {"text": id, …} into out.tokens.
TokenIds add_vocabulary(const JsonPart& part, TokenizerPipeline& out);

using MergeList = std::vector<std::pair<std::string_view, std::string_view>>;

/// The two texts of "a b".
std::optional<std::pair<std::string_view, std::string_view>> split_merge(std::string_view line);

struct BpeSettings {
  bool byte_pieces = false;  ///< texts are in GPT-2's alphabet
  bool byte_fallback = false;
  bool ignore_merges = false;
  std::optional<int32_t> unknown{};
  bool fuse_unknown = false;
  std::string prefix{}, suffix{};
};
/// Merges in their order over a vocabulary. `where` is named in errors: a merge that repeats, or whose parts or result
/// are no tokens.
BpeRules bpe_rules(const TokenIds& ids, const MergeList& merges, const BpeSettings& settings, const std::string& where);

/// Ids of <0x00> to <0xFF>, -1 where there is none.
std::array<int32_t, 256> byte_token_ids(const TokenIds& ids);
std::array<int32_t, 256> no_byte_ids();

std::optional<std::string> from_base64(std::string_view text);

}  // namespace bitwright
