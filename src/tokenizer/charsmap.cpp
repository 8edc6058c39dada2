#include "tokenizer/charsmap.hpp"

#include <cstring>

namespace bitwright {
namespace {

// A unit of Darts-clone: bits 0-7 the label, 8 whether a value follows, 9 the scale and 10-30 the digits of the offset
// to the children; a value has bit 31 set and the rest for itself.
uint32_t label(uint32_t unit) { return unit & 0x800000ffu; }
bool has_value(uint32_t unit) { return (unit >> 8 & 1) != 0; }
uint32_t offset(uint32_t unit) { return unit >> 10 << ((unit & 0x200u) >> 6); }
uint32_t value(uint32_t unit) { return unit & 0x7fffffffu; }

}  // namespace

std::optional<Charsmap> Charsmap::read(std::string_view blob) {
  uint32_t size = 0;
  if (blob.size() < sizeof size) return std::nullopt;
  std::memcpy(&size, blob.data(), sizeof size);
  blob.remove_prefix(sizeof size);
  if (size > blob.size() || size % sizeof(uint32_t) != 0) return std::nullopt;
  Charsmap map;
  map.units_.resize(size / sizeof(uint32_t));
  if (size > 0) std::memcpy(map.units_.data(), blob.data(), size);
  map.replacements_ = blob.substr(size);
  if (!map.replacements_.empty() && map.replacements_.back() != '\0') return std::nullopt;
  return map;
}

Charsmap::Found Charsmap::find(std::string_view text, bool stop_at_first) const {
  Found best = {0, ""};
  if (units_.empty()) return best;
  size_t at = offset(units_[0]);
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    at ^= byte;
    if (at >= units_.size() || label(units_[at]) != byte) break;
    const uint32_t unit = units_[at];
    at ^= offset(unit);
    if (!has_value(unit)) continue;
    if (at >= units_.size() || value(units_[at]) >= replacements_.size()) break;
    best = {i + 1, replacements_.data() + value(units_[at])};  // its end is checked: the last byte is 0
    if (stop_at_first) break;
  }
  return best;
}

}  // namespace bitwright
