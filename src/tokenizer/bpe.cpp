#include "tokenizer/bpe.hpp"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <queue>

#include "base/error.hpp"
#include "tokenizer/unicode.hpp"

namespace bitwright {
namespace {

constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

uint64_t pair_of(int32_t left, int32_t right) {
  return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
}
uint64_t pair_of(char32_t left, char32_t right) { return uint64_t{left} << 32 | right; }

Character unit(std::string_view text, bool bytes) {
  return bytes ? Character{static_cast<unsigned char>(text[0]), 1} : first_character(text);
}

size_t last_unit(std::string_view text, bool bytes) {
  if (bytes) return text.size() - 1;
  size_t at = 0;
  for (size_t next = 0; next < text.size(); next += first_character(text.substr(next)).length) at = next;
  return at;
}

}  // namespace

Bpe::PairTable::PairTable(size_t most) : slots_(std::bit_ceil(2 * most + 1), Slot{0, kNone}) {}

size_t Bpe::PairTable::slot(uint64_t pair) const {
  const size_t mask = slots_.size() - 1;
  size_t at = (pair * 0x9e3779b97f4a7c15u >> 32) & mask;  // 2^64 / golden ratio; the upper half depends on all bits
  while (slots_[at].value != kNone && slots_[at].pair != pair) at = (at + 1) & mask;
  return at;
}

void Bpe::PairTable::add(uint64_t pair, uint32_t value) {
  Slot& s = slots_[slot(pair)];
  if (s.value == kNone) s = {pair, value};
}

Bpe::Bpe(BpeRules rules) : rules_(std::move(rules)), pairs_(rules_.merges.size()), seams_(rules_.seams.size()) {
  for (uint32_t i = 0; i < rules_.merges.size(); ++i)
    pairs_.add(pair_of(rules_.merges[i].left, rules_.merges[i].right), i);
  for (const auto& [left, right] : rules_.seams) seams_.add(pair_of(left, right), 0);
  for (const auto& [c, id] : rules_.characters)
    if (id >= rules_.first_hidden) hidden_.emplace(id, c);
}

/// Bytes at the beginning of `piece` that no merge joins with what follows: the rest can be encoded by itself.
size_t Bpe::part_length(std::string_view piece) const {
  const bool knows_seams =
      rules_.seams.size() == rules_.merges.size() && rules_.prefix.empty() && rules_.suffix.empty();
  if (!knows_seams || piece.size() <= PieceCache::kLongest) return piece.size();
  Character c = unit(piece, rules_.byte_pieces);
  for (size_t at = c.length; at < piece.size();) {
    const Character next = unit(piece.substr(at), rules_.byte_pieces);
    if (seams_.find(pair_of(c.code_point, next.code_point)) == kNone) return at;
    c = next;
    at += c.length;
  }
  return piece.size();
}

void Bpe::encode(std::string_view piece, PieceCache& cache, std::vector<int32_t>& ids) const {
  if (!rules_.whole.empty()) {
    if (const auto it = rules_.whole.find(piece); it != rules_.whole.end()) {
      ids.push_back(it->second);
      return;
    }
  }
  const size_t begin = ids.size();
  for (size_t length = 0; !piece.empty(); piece.remove_prefix(length)) {
    length = part_length(piece);
    const std::string_view part = piece.substr(0, length);
    const auto work = [&] { encode_part(part, ids); };
    if (length > PieceCache::kLongest) {
      work();
    } else {
      cache.encode(part, ids, work);
    }
  }
  if (!rules_.fuse_unknown || !rules_.unknown) return;  // parts were cut between unknown characters
  const auto end = std::unique(ids.begin() + static_cast<std::ptrdiff_t>(begin), ids.end(),
                               [&](int32_t a, int32_t b) { return a == b && a == *rules_.unknown; });
  ids.erase(end, ids.end());
}

void Bpe::add_unknown(char32_t code_point, std::string_view bytes, std::vector<int32_t>& ids) const {
  const auto stray = stray_byte(code_point);
  const char stray_char = static_cast<char>(stray.value_or(0));
  if (stray) bytes = std::string_view(&stray_char, 1);
  const auto id = [&](char byte) { return rules_.bytes[static_cast<unsigned char>(byte)]; };
  if (std::ranges::all_of(bytes, [&](char byte) { return id(byte) >= 0; })) {
    for (const char byte : bytes) ids.push_back(id(byte));
  } else if (rules_.unknown) {
    const bool fused = rules_.fuse_unknown && !ids.empty() && ids.back() == *rules_.unknown;
    if (!fused) ids.push_back(*rules_.unknown);
  }
}

/// What the symbols of `part` are before any merge.
std::vector<int32_t> Bpe::initial(std::string_view part) const {
  std::vector<int32_t> ids;
  ids.reserve(part.size());
  for (size_t at = 0; at < part.size();) {
    const Character c = unit(part.substr(at), rules_.byte_pieces);
    const std::string_view bytes = part.substr(at, c.length);
    at += c.length;
    int32_t id = -1;
    if (rules_.byte_pieces) {
      id = rules_.bytes[c.code_point];
    } else if (!rules_.affixed.empty()) {
      std::string text(bytes);
      if (at > c.length) text.insert(0, rules_.prefix);
      if (at == part.size()) text += rules_.suffix;
      if (const auto it = rules_.affixed.find(text); it != rules_.affixed.end()) id = it->second;
    } else if (const auto it = rules_.characters.find(c.code_point); it != rules_.characters.end()) {
      id = it->second;
    }
    if (id >= 0) {
      ids.push_back(id);
    } else {
      add_unknown(rules_.byte_pieces ? U'\0' : c.code_point, rules_.byte_pieces ? std::string_view("x") : bytes, ids);
    }
  }
  return ids;
}

void Bpe::merge(std::vector<Symbol>& symbols) const {
  // Rank, then place of the left part in one number: the smallest is the next merge.
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue;
  const auto merge_at = [&](uint32_t left) -> const Merge* {
    const uint32_t right = symbols[left].after;
    if (symbols[left].id < 0 || right == kNone) return nullptr;
    const uint32_t found = pairs_.find(pair_of(symbols[left].id, symbols[right].id));
    return found == kNone ? nullptr : &rules_.merges[found];
  };
  const auto consider = [&](uint32_t left) {
    if (const Merge* m = merge_at(left)) queue.push(uint64_t{m->rank} << 32 | left);
  };
  for (uint32_t i = 0; i < symbols.size(); ++i) consider(i);
  while (!queue.empty()) {
    const auto rank = static_cast<uint32_t>(queue.top() >> 32), left = static_cast<uint32_t>(queue.top());
    queue.pop();
    const Merge* m = merge_at(left);
    if (m == nullptr || m->rank != rank) continue;  // one of the two has been merged otherwise since
    const uint32_t right = symbols[left].after;
    symbols[left] = {m->merged, symbols[left].before, symbols[right].after};
    symbols[right].id = -1;
    if (symbols[left].after != kNone) symbols[symbols[left].after].before = left;
    if (symbols[left].before != kNone) consider(symbols[left].before);
    consider(left);
  }
}

void Bpe::encode_part(std::string_view part, std::vector<int32_t>& ids) const {
  const std::vector<int32_t> units = initial(part);
  if (units.empty()) return;
  const auto size = static_cast<uint32_t>(units.size());
  std::vector<Symbol> symbols(size);
  for (uint32_t i = 0; i < size; ++i) symbols[i] = {units[i], i - 1, i + 1 < size ? i + 1 : kNone};
  merge(symbols);
  for (uint32_t i = 0; i != kNone; i = symbols[i].after) {
    const int32_t id = symbols[i].id;
    if (id < rules_.first_hidden) {
      ids.push_back(id);
      continue;
    }
    const char32_t c = hidden_.at(id);
    std::string bytes;
    append_character(bytes, c);
    add_unknown(c, bytes, ids);
  }
}

std::pair<char32_t, char32_t> seam_of(std::string_view left, std::string_view right, bool bytes) {
  if (left.empty() || right.empty()) return {0, 0};
  return {unit(left.substr(last_unit(left, bytes)), bytes).code_point, unit(right, bytes).code_point};
}

void add_merges_of_ranks(const std::vector<RankedToken>& tokens, int32_t vocabulary_size, BpeRules& rules) {
  const bool bytes = rules.byte_pieces;
  std::unordered_map<std::string_view, int32_t> ids;
  ids.reserve(2 * tokens.size());
  for (const RankedToken& token : tokens) ids.emplace(token.text, token.id);
  rules.first_hidden = vocabulary_size;
  int32_t next_hidden = vocabulary_size;
  const auto id_of = [&](std::string_view text, size_t units) {
    const auto it = ids.find(text);
    if (it != ids.end()) return it->second;
    if (units > 1 || bytes) return -1;
    const auto [character, is_new] = rules.characters.try_emplace(unit(text, bytes).code_point, next_hidden);
    if (is_new) ++next_hidden;
    return character->second;
  };
  for (const RankedToken& token : tokens) {
    std::vector<size_t> ends;  // of its units
    for (size_t at = 0; at < token.text.size();) ends.push_back(at += unit(token.text.substr(at), bytes).length);
    if (ends.size() == 1 && !bytes) rules.characters[unit(token.text, bytes).code_point] = token.id;
    if (ends.size() == 1 && bytes) rules.bytes[static_cast<unsigned char>(token.text[0])] = token.id;
  }
  for (const RankedToken& token : tokens) {
    size_t count = 0;
    for (size_t at = 0; at < token.text.size(); ++count) at += unit(token.text.substr(at), bytes).length;
    size_t at = 0;
    for (size_t i = 1; i < count; ++i) {
      at += unit(token.text.substr(at), bytes).length;
      const std::string_view left = token.text.substr(0, at), right = token.text.substr(at);
      const int32_t left_id = id_of(left, i);
      if (left_id < 0) continue;
      const int32_t right_id = id_of(right, count - i);
      if (right_id < 0) continue;
      rules.merges.push_back({left_id, right_id, token.id, token.rank});
      rules.seams.push_back(seam_of(left, right, bytes));
    }
  }
}

}  // namespace bitwright
