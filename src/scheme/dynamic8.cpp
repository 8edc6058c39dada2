#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.hpp"
#include "scheme/rows.hpp"

namespace bitwright {
namespace {

/// `count` numbers from 0.1 to 1, rounded as torch.linspace rounds: counted from the nearer end.
std::vector<float> linspace(size_t count) {
  const float step = (1.0f - 0.1f) / static_cast<float>(count - 1);
  std::vector<float> out;
  for (size_t i = 0; i < count; ++i)
    out.push_back(i < count / 2 ? 0.1f + step * static_cast<float>(i)
                                : 1.0f - step * static_cast<float>(count - i - 1));
  return out;
}

/// The signed dynamic map of Dettmers (8-bit approximations for parallelism in deep learning, 2016): for each decade
/// 10^-6 … 10^0 twice as many evenly spaced magnitudes as in the one below, then 0 and 1.
std::array<float, 256> make_values() {
  std::vector<float> values = {0.0f, 1.0f};
  for (int decade = 0; decade < 7; ++decade) {
    const std::vector<float> bounds = linspace((size_t{1} << decade) + 1);
    const auto power = static_cast<float>(std::pow(10.0, decade - 6));
    for (size_t i = 0; i + 1 < bounds.size(); ++i) {
      const float mean = (bounds[i] + bounds[i + 1]) / 2.0f;
      values.push_back(power * mean);
      values.push_back(-(power * mean));
    }
  }
  std::sort(values.begin(), values.end());
  std::array<float, 256> out = {};
  BW_ASSERT(values.size() == out.size());
  std::copy(values.begin(), values.end(), out.begin());
  return out;
}

const std::array<float, 256>& values() {
  static const std::array<float, 256> table = make_values();
  return table;
}

float decode(const ElementType&, uint32_t code) { return values().at(code); }

uint32_t nearest(const ElementType&, float value) {
  static const SortedTable table(values());
  return table.nearest(value);
}

constexpr std::array<ElementType, 1> kRows = {
    {{.name = "dynamic8",
      .source = "bitsandbytes 0.50 functional.py, create_dynamic_map(signed=True)",
      .kind = ElementKind::table,
      .bits = 8,
      .lowest = -1,  // -0.99297: full_scale maps the largest to 1
      .highest = 1,
      .full_scale = 1,
      .decode = decode,
      .nearest = nearest}}};

}  // namespace

const std::span<const ElementType> dynamic8_rows = kRows;

}  // namespace bitwright
