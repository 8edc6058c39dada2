#include "algorithm/codebook_blocks.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "container/gguf_blocks.hpp"
#include "container/gguf_grids.hpp"
#include "kernels/codebook_search.hpp"
#include "kernels/encode.hpp"

namespace bitwright {
namespace {

constexpr size_t kMostGroup = 32, kMostVectors = 8;
constexpr size_t kElementsATask = size_t{1} << 13;
constexpr float kHalfMost = 65504, kScaleCodes = 16;
/// No type reaches it, and its square is a number.
constexpr float kMost = 1e7f;
constexpr uint8_t kSign = 8;

/// What the search needs to know of a scheme.
struct Plan {
  size_t group, groups;  ///< elements of a group, groups of a block
  float factor;          ///< a group's scale is (code + 1/2) * factor * the block's
  float first, step;     ///< the scales tried first, of the root mean square of a group
  std::vector<float> levels;
  std::vector<Codebook::Run> runs;
  std::vector<uint8_t> second;
  std::vector<std::array<uint8_t, 4>> half_codes;  ///< of the neighbours of a half
  Codebook book;
};

/// Not copied afterwards: the book points into it.
void make_plan(const Scheme& scheme, Plan& plan) {
  const std::string_view name = scheme.element->name;
  const GgufGrid& grid = gguf_grid(name);
  const auto neighbours = static_cast<size_t>(grid.neighbours), half = neighbours / 2;
  plan.group = static_cast<size_t>(scheme.scale->grouping.size);
  plan.groups = static_cast<size_t>(scheme.scale->scheme->scale->grouping.size);
  plan.factor = scheme.scale->scheme->factor;
  const uint32_t levels = grid.level_bits == 2 ? 3 : 8;
  for (uint32_t l = 0; l < levels; ++l) plan.levels.push_back(scheme.element->decode(*scheme.element, l));

  for (uint32_t h = 0, count = half == 2 ? levels * levels : levels * levels * levels * levels; h < count; ++h) {
    auto& codes = plan.half_codes.emplace_back();
    for (uint32_t j = 0, rest = h; j < half; ++j, rest /= levels) codes.at(j) = static_cast<uint8_t>(rest % levels);
  }
  std::vector<std::vector<uint8_t>> seconds(plan.half_codes.size());  // by first half
  for (const uint16_t entry : grid.entries) {
    size_t first = 0, second = 0;
    for (size_t j = half; j-- > 0;) {
      first = first * levels + grid.level(entry, static_cast<int>(j));
      second = second * levels + grid.level(entry, static_cast<int>(j + half));
    }
    seconds[first].push_back(static_cast<uint8_t>(second));
  }
  for (std::vector<uint8_t>& run : seconds)
    if (run.size() % 2 == 1) run.push_back(run.back());
  std::vector<size_t> order(seconds.size());
  std::iota(order.begin(), order.end(), size_t{0});
  // Runs of a length together: a processor foresees where they end.
  std::ranges::stable_sort(order, std::less(), [&](size_t first) { return seconds[first].size(); });
  for (const size_t first : order) {
    if (seconds[first].empty()) continue;
    const size_t begin = plan.second.size();
    plan.second.insert(plan.second.end(), seconds[first].begin(), seconds[first].end());
    plan.runs.push_back({.first = static_cast<uint16_t>(first),
                         .begin = static_cast<uint16_t>(begin),
                         .end = static_cast<uint16_t>(plan.second.size())});
  }
  const bool any = name == "iq2_s" || name == "iq3_s";
  plan.book = {.neighbours = neighbours,
               .signs = any ? Codebook::Signs::any : Codebook::Signs::even,
               .levels = plan.levels,
               .runs = plan.runs,
               .second = plan.second};
  plan.first = levels == 3 ? 0.75f : 0.95f;
  plan.step = levels == 3 ? 1.15f : 1.11f;
}

float to_half(float value) { return round_to(DType::f16, std::clamp(value, 0.0f, kHalfMost)); }
void put_half(float value, uint8_t* to) {
  from_f32(DType::f16, std::span(&value, 1), std::as_writable_bytes(std::span(to, 2)));
}

using LaneValues = std::array<float, kPanel>;

/// kPanel groups that lie one after the other.
class PanelSearch {
 public:
  PanelSearch(const Plan& plan, const CodebookSearch& loops) : plan_(plan), loops_(loops) {}

  /// values, weights: of group g from g * plan.group on; weights may be null. The groups from `used` on are 0.
  void load(const float* values, const float* weights, size_t used);
  void run();
  void store(const TensorBlocks& parts, size_t first_block) const;

 private:
  static constexpr size_t kTried = 2 * CodebookSearch::kAtOnce;

  MagnitudePanel panel() const { return {values_.data(), weights_.data(), plan_.group}; }
  float scale_of(float code, float unit) const { return (code + 0.5f) * plan_.factor * unit; }
  float code_of(float scale, float unit) const {
    return std::clamp(std::nearbyint(scale / (plan_.factor * unit) - 0.5f), 0.0f, kScaleCodes - 1);
  }
  void make_even(size_t eight);

  void estimate();
  void choose_unit(size_t first);
  void try_codes();
  void choose(const LaneValues& scales);
  LaneValues scales() const;
  void set_codes(size_t group);
  float turn_over(size_t begin);
  void improve_unit(size_t first);

  const Plan& plan_;
  const CodebookSearch& loops_;
  size_t used_ = 0;
  std::array<float, kMostGroup * kPanel> values_{}, weights_{};  ///< as a MagnitudePanel has them
  std::array<uint8_t, kMostGroup * kPanel> negative_{};          ///< the sign that a value has, a bit of a code
  LaneValues high_{};                                            ///< where the larger values are
  LaneValues ideal_{};                                           ///< scale of least error
  LaneValues unit_{}, code_{};
  std::array<uint8_t, kMostVectors * kPanel> first_{}, second_{}, turned_{};  ///< as ChosenHalves has them
  std::array<uint8_t, kMostGroup * kPanel> codes_{};
  LaneValues xe_{}, ee_{};
};

void PanelSearch::load(const float* values, const float* weights, size_t used) {
  used_ = used;
  LaneValues fourth{}, fifth{};
  for (size_t i = 0; i < plan_.group; ++i)
    for (size_t g = 0; g < kPanel; ++g) {
      const size_t at = i * kPanel + g, from = g * plan_.group + i;
      const float magnitude = std::min(std::fabs(values[from]), kMost);
      values_[at] = magnitude;
      negative_[at] = values[from] < 0 ? kSign : 0;
      weights_[at] = weights == nullptr ? 1.0f : weights[from];
      const float square = magnitude * magnitude, weighted = weights_[at] * square * square;
      fourth[g] += weighted;
      fifth[g] += weighted * magnitude;
    }
  for (size_t g = 0; g < kPanel; ++g) high_[g] = fourth[g] > 0 ? fifth[g] / fourth[g] : 0;
  if (plan_.book.signs == Codebook::Signs::even)
    for (size_t i = 0; i < plan_.group; i += 8) make_even(i * kPanel);
}

/// Of eight values with an odd number of signs the one that matters least becomes negative.
void PanelSearch::make_even(size_t eight) {
  for (size_t begin = eight; begin < eight + kPanel; ++begin) {
    unsigned negative = 0;
    size_t least = begin;
    float cost = std::numeric_limits<float>::infinity();
    for (size_t j = 0, at = begin; j < 8; ++j, at += kPanel) {
      const float is = weights_[at] * values_[at];
      negative ^= negative_[at];
      least = is < cost ? at : least;
      cost = std::min(cost, is);
    }
    if (negative == 0) continue;
    if (values_[least] == 0) {
      negative_[least] ^= kSign;  // 0 has the sign that is wanted
    } else {
      values_[least] = -values_[least];
    }
  }
}

/// The best of a few scales, then least squares for the codes that it gives.
void PanelSearch::estimate() {
  std::array<float, kTried * kPanel> scales{}, errors{};
  for (size_t g = 0; g < kPanel; ++g) {
    float scale = high_[g] * plan_.first / plan_.levels.back();
    for (size_t c = 0; c < kTried; ++c, scale *= plan_.step) scales[c * kPanel + g] = scale;
  }
  for (size_t c = 0; c < kTried; c += CodebookSearch::kAtOnce)
    loops_.errors(panel(), plan_.book, &scales[c * kPanel], &errors[c * kPanel]);
  for (size_t g = 0; g < kPanel; ++g) {
    size_t best = 0;
    for (size_t c = 1; c < kTried; ++c)
      if (errors[c * kPanel + g] < errors[best * kPanel + g]) best = c;
    ideal_[g] = scales[best * kPanel + g];
  }
  choose(ideal_);
  for (size_t g = 0; g < kPanel; ++g)
    if (ee_[g] > 0) ideal_[g] = xe_[g] / ee_[g];
}

void PanelSearch::choose_unit(size_t first) {
  constexpr int kUnits = 16;
  float most = 0;
  for (size_t g = first; g < first + plan_.groups; ++g) most = std::max(most, ideal_[g]);
  float best = std::numeric_limits<float>::infinity(), unit = 0;
  for (int k = 0; k < kUnits; ++k) {
    const float tried = to_half(most / (plan_.factor * (kScaleCodes + 0.5f - 0.25f * static_cast<float>(k))));
    if (tried == 0) continue;
    float error = 0;
    for (size_t g = first; g < first + plan_.groups; ++g) {
      const float off = scale_of(code_of(ideal_[g], tried), tried) - ideal_[g];
      error += ee_[g] * off * off;
    }
    if (error < best) {
      best = error;
      unit = tried;
    }
  }
  for (size_t g = first; g < first + plan_.groups; ++g) {
    unit_[g] = unit;
    code_[g] = unit == 0 ? 0 : code_of(ideal_[g], unit);
  }
}

LaneValues PanelSearch::scales() const {
  LaneValues scales{};
  for (size_t g = 0; g < kPanel; ++g) scales[g] = scale_of(code_[g], unit_[g]);
  return scales;
}

void PanelSearch::try_codes() {
  constexpr size_t kAround = CodebookSearch::kAtOnce;
  std::array<float, kAround * kPanel> scales{}, errors{}, codes{};
  for (size_t g = 0; g < kPanel; ++g)
    for (size_t c = 0; c < kAround; ++c) {
      codes[c * kPanel + g] = std::clamp(code_[g] + static_cast<float>(c) - 1, 0.0f, kScaleCodes - 1);
      scales[c * kPanel + g] = scale_of(codes[c * kPanel + g], unit_[g]);
    }
  loops_.errors(panel(), plan_.book, scales.data(), errors.data());
  for (size_t g = 0; g < kPanel; ++g) {
    size_t best = 1;
    for (size_t c = 0; c < kAround; ++c)
      if (errors[c * kPanel + g] < errors[best * kPanel + g]) best = c;
    code_[g] = codes[best * kPanel + g];
  }
}

void PanelSearch::choose(const LaneValues& scales) {
  loops_.choose(panel(), plan_.book, scales.data(), {first_.data(), second_.data(), turned_.data()});
  for (size_t g = 0; g < kPanel; ++g) set_codes(g);
}

void PanelSearch::set_codes(size_t group) {
  const size_t half = plan_.book.neighbours / 2;
  float xe = 0, ee = 0;
  for (size_t v = 0, at = group; v * 2 * half < plan_.group; ++v) {
    const size_t begin = at;
    for (const uint8_t number : {first_[v * kPanel + group], second_[v * kPanel + group]})
      for (size_t j = 0; j < half; ++j, at += kPanel) {
        const uint8_t code = plan_.half_codes[number][j];
        const float level = plan_.levels[code], we = weights_[at] * level;
        codes_[at] = code | negative_[at];
        xe += we * std::fabs(values_[at]);
        ee += we * level;
      }
    if (turned_[v * kPanel + group] != 0) xe -= 2 * turn_over(begin);
  }
  xe_[group] = xe;
  ee_[group] = ee;
}

/// Of the vector from `begin` on the sign that matters least: what it gives to the sum of w x e.
float PanelSearch::turn_over(size_t begin) {
  size_t least = begin;
  float cost = std::numeric_limits<float>::infinity();
  for (size_t j = 0, at = begin; j < plan_.book.neighbours; ++j, at += kPanel) {
    const float is = weights_[at] * plan_.levels[codes_[at] & ~kSign] * std::fabs(values_[at]);
    least = is < cost ? at : least;
    cost = std::min(cost, is);
  }
  codes_[least] ^= kSign;
  return cost;
}

/// Least squares with all codes as they are.
void PanelSearch::improve_unit(size_t first) {
  double xs = 0, ss = 0;
  for (size_t g = first; g < first + plan_.groups; ++g) {
    const double s = static_cast<double>(scale_of(code_[g], 1));
    xs += s * static_cast<double>(xe_[g]);
    ss += s * s * static_cast<double>(ee_[g]);
  }
  if (ss > 0) std::fill_n(&unit_[first], plan_.groups, to_half(static_cast<float>(xs / ss)));
}

void PanelSearch::run() {
  estimate();
  for (size_t first = 0; first < kPanel; first += plan_.groups) choose_unit(first);
  try_codes();
  choose(scales());
  for (size_t first = 0; first < kPanel; first += plan_.groups) improve_unit(first);
}

void PanelSearch::store(const TensorBlocks& parts, size_t first_block) const {
  for (size_t g = 0; g < used_; ++g) {
    const BlockParts to = parts.of(first_block + g / plan_.groups);
    const size_t at = g % plan_.groups;
    if (at == 0) put_half(unit_[g], to.scale_scale);
    if (unit_[g] == 0) continue;  // whatever the codes are: all 0, as ggml has them
    to.scale[at] = static_cast<uint8_t>(code_[g]);
    for (size_t i = 0; i < plan_.group; ++i) to.codes[at * plan_.group + i] = codes_[i * kPanel + g];
  }
}

/// As a search counts squared errors: 1 at most. What is of no importance is still near its values where that costs
/// nothing else.
std::vector<float> weights_of(std::span<const float> importance) {
  constexpr float kNone = 1e-20f;
  const float most = importance.empty() ? 0 : std::ranges::max(importance);
  if (!(most > 0)) return {};
  std::vector<float> weights(importance.size());
  std::ranges::transform(importance, weights.begin(), [&](float i) { return std::max(kNone, i / most); });
  return weights;
}

}  // namespace

bool is_codebook_scheme(const Scheme& scheme) {
  const std::string_view name = scheme.element->name;
  return (name.starts_with("iq2_") || name.starts_with("iq3_")) && find_block_codec(scheme) != nullptr;
}

QuantizedTensor search_codebooks(const Scheme& scheme, const Shape& shape, WeightView weight,
                                 std::span<const float> importance, const KernelLevel& level) {
  BW_ASSERT(is_codebook_scheme(scheme));
  check_finite(weight);
  Plan plan;
  make_plan(scheme, plan);
  const CodebookSearch& loops = codebook_search(level);
  QuantizedTensor t = block_tensor(scheme, shape);
  const size_t groups = t.codes.size() / plan.group, bytes = size_bytes(weight.dtype);
  const TensorBlocks parts(t, groups / plan.groups);
  const size_t columns = shape.empty() ? 0 : static_cast<size_t>(shape.back());
  const std::vector<float> column_weights = weights_of(importance);
  const size_t panels = (groups + kPanel - 1) / kPanel, a_panel = kPanel * plan.group;
  parallel_ranges(panels, kElementsATask / a_panel, [&](size_t begin, size_t end) {
    PanelSearch search(plan, loops);
    std::array<float, kMostGroup * kPanel> wide{}, weights{};
    for (size_t p = begin; p < end; ++p) {
      const size_t used = std::min(kPanel, groups - p * kPanel), first = p * a_panel, count = used * plan.group;
      to_f32(weight.dtype, weight.bytes.subspan(first * bytes, count * bytes), std::span(wide).first(count));
      std::fill(wide.begin() + static_cast<std::ptrdiff_t>(count), wide.end(), 0.0f);
      for (size_t i = 0; !column_weights.empty() && i < count; i += plan.group)  // a group lies within a row
        std::copy_n(&column_weights[(first + i) % columns], plan.group, &weights[i]);
      search.load(wide.data(), column_weights.empty() ? nullptr : weights.data(), used);
      search.run();
      search.store(parts, p * kPanel / plan.groups);
    }
  });
  return t;
}

}  // namespace bitwright
