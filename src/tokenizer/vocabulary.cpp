#include "tokenizer/vocabulary.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <span>

#include "tokenizer/byte_level.hpp"
#include "tokenizer/unicode.hpp"

namespace bitwright {

Token& add_token(const std::string& file, TokenizerPipeline& out, int32_t id, std::string text, std::string_view name) {
  const auto at = static_cast<size_t>(id);
  if (at >= out.tokens.size()) out.tokens.resize(at + 1);
  if (out.tokens[at].known)
    bad_tokenizer(file, fmt::format("id {} of {} is that of another token too", id, shown_token(name)));
  out.tokens[at] = {.text = std::move(text), .known = true};
  return out.tokens[at];
}

TokenIds add_vocabulary(const JsonPart& part, TokenizerPipeline& out) {
  if (!part.json.is_object()) part.bad("not an object");
  TokenIds ids;
  ids.reserve(part.json.size());
  out.tokens.reserve(part.json.size());
  for (const auto& [text, value] : part.json.items()) {
    const int32_t id = part.id(value, text);
    add_token(part.file, out, id, text, text);
    ids.emplace(text, id);
  }
  return ids;
}

std::optional<std::pair<std::string_view, std::string_view>> split_merge(std::string_view line) {
  const size_t space = line.find(' ');
  if (space == line.npos || line.find(' ', space + 1) != line.npos) return std::nullopt;
  return std::pair(line.substr(0, space), line.substr(space + 1));
}

namespace {

/// Each pair must stand once.
void check_pairs(std::span<const Merge> read, const MergeList& merges, const std::string& where) {
  std::vector<std::pair<uint64_t, uint32_t>> pairs;
  pairs.reserve(read.size());
  for (const Merge& merge : read)
    pairs.emplace_back(static_cast<uint64_t>(merge.left) << 32 | static_cast<uint64_t>(merge.right), merge.rank);
  std::sort(pairs.begin(), pairs.end());
  for (size_t i = 1; i < pairs.size(); ++i) {
    if (pairs[i].first != pairs[i - 1].first) continue;
    const auto& [left, right] = merges[pairs[i].second];
    bad_tokenizer(where, fmt::format("merge {} of {} and {} appears twice", pairs[i].second, shown_token(left),
                                     shown_token(right)));
  }
}

}  // namespace

BpeRules bpe_rules(const TokenIds& ids, const MergeList& merges, const BpeSettings& settings,
                   const std::string& where) {
  BpeRules rules;
  rules.byte_pieces = settings.byte_pieces;
  rules.unknown = settings.unknown;
  rules.fuse_unknown = settings.fuse_unknown;
  rules.prefix = settings.prefix;
  rules.suffix = settings.suffix;
  const bool affixes = !settings.prefix.empty() || !settings.suffix.empty();
  if (affixes && settings.byte_pieces) unsupported_tokenizer(where, "an affix of byte-level tokens");
  if (affixes) rules.affixed = ids;
  if (settings.byte_fallback) rules.bytes = byte_token_ids(ids);
  for (const auto& [text, id] : ids) {
    if (text.empty()) continue;
    const Character first = first_character(text);
    if (first.length == text.size() && !settings.byte_pieces) rules.characters.emplace(first.code_point, id);
    const auto byte = settings.byte_pieces ? byte_of_character(first.code_point) : std::nullopt;
    if (first.length == text.size() && byte) rules.bytes[*byte] = id;
    if (!settings.ignore_merges) continue;
    if (const auto piece = settings.byte_pieces ? bytes_of_token(text) : text) rules.whole.emplace(*piece, id);
  }
  rules.merges.reserve(merges.size());
  rules.seams.reserve(merges.size());
  bool knows_seams = true;
  std::string merged;
  for (size_t i = 0; i < merges.size(); ++i) {
    const auto& [left, right] = merges[i];
    const auto id = [&](std::string_view text) {
      const auto it = ids.find(text);
      if (it == ids.end())
        bad_tokenizer(where, fmt::format("merge {}: {} is not in the vocabulary", i, shown_token(text)));
      return it->second;
    };
    const std::string_view rest = right.substr(right.starts_with(settings.prefix) ? settings.prefix.size() : 0);
    const int32_t a = id(left), b = id(right);
    merged.assign(left).append(rest);
    rules.merges.push_back({a, b, id(merged), static_cast<uint32_t>(i)});
    // Tokens that stand for something else than their text may be joined wherever they are.
    knows_seams &= !(settings.byte_fallback && (byte_of_token(left) || byte_of_token(right)));
    knows_seams &= a != settings.unknown && b != settings.unknown && !left.empty() && !right.empty();
    if (!knows_seams) continue;
    std::pair<char32_t, char32_t> seam = seam_of(left, right, false);
    if (settings.byte_pieces) {
      const auto before = byte_of_character(seam.first), after = byte_of_character(seam.second);
      knows_seams = before && after;
      if (knows_seams) seam = {*before, *after};
    }
    rules.seams.push_back(seam);
  }
  if (!knows_seams) rules.seams.clear();
  check_pairs(rules.merges, merges, where);
  return rules;
}

std::array<int32_t, 256> no_byte_ids() {
  std::array<int32_t, 256> ids;
  ids.fill(-1);
  return ids;
}

std::array<int32_t, 256> byte_token_ids(const TokenIds& ids) {
  std::array<int32_t, 256> found = no_byte_ids();
  for (size_t byte = 0; byte < found.size(); ++byte)
    if (const auto it = ids.find(byte_token(static_cast<unsigned char>(byte))); it != ids.end())
      found.at(byte) = it->second;
  return found;
}

std::optional<std::string> from_base64(std::string_view text) {
  static constexpr std::string_view kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  while (text.ends_with('=')) text.remove_suffix(1);
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  for (const char c : text) {
    const size_t digit = kDigits.find(c);
    if (digit == kDigits.npos) return std::nullopt;
    bits = bits << 6 | static_cast<uint32_t>(digit);
    count += 6;
    if (count < 8) continue;
    count -= 8;
    bytes += static_cast<char>(bits >> count & 0xff);
  }
  return text.size() % 4 == 1 ? std::nullopt : std::optional(std::move(bytes));
}

}  // namespace bitwright
