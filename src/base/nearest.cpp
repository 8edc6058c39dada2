#include "base/nearest.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

namespace bitwright {
namespace {

/// Levenshtein's distance.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

std::string suggest(std::string_view name, std::span<const std::string> known) {
  constexpr size_t kLongest = 64;  // a distance to a longer word says nothing and costs time
  const auto nearest = std::ranges::min_element(
      known, {}, [&](const std::string& candidate) { return edit_distance(name.substr(0, kLongest), candidate); });
  if (nearest != known.end() && edit_distance(name.substr(0, kLongest), *nearest) <= 1 + nearest->size() / 3)
    return fmt::format("did you mean '{}'?", *nearest);
  return fmt::format("valid: {}", fmt::join(known, ", "));
}

}  // namespace bitwright
