// What the codes of GGUF's types stand for, where no other row says it. Neighbours of the IQ types are an entry of a
// codebook together (container/gguf_grids.hpp): the row's name says which, a code says the value of one of them.
#include <algorithm>
#include <array>
#include <cmath>

#include "scheme/rows.hpp"

namespace bitwright {
namespace {

constexpr std::string_view kSource = "ggml (d99724f), src/ggml-common.h and src/ggml-quants.c";
constexpr uint32_t kSign = 8;

/// Of each table, by code.
using Values = std::array<float, 16>;

/// Magnitudes by the three lower bits, the highest bit the sign.
constexpr Values with_signs(const std::array<float, 8>& magnitudes) {
  Values values{};
  for (size_t i = 0; i < magnitudes.size(); ++i) {
    values.at(i) = magnitudes.at(i);
    values.at(i | kSign) = -magnitudes.at(i);
  }
  return values;
}

constexpr Values kIq4 = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr Values kIq2 = with_signs({8, 25, 43, 60, 77, 95, 112, 129});  // codebooks have the first three
constexpr Values kIq3xxs = with_signs({4, 12, 20, 28, 36, 44, 52, 62});
constexpr Values kIq3s = with_signs({1, 3, 5, 7, 9, 11, 13, 15});
/// -1, 0 or 1 (others are in no codebook), an eighth more or, with the highest bit, less.
constexpr Values kIq1 = [] {
  Values values{};
  for (size_t i = 0; i < kSign; ++i) {
    values.at(i) = static_cast<float>(i) - 1 + 0.125f;
    values.at(i | kSign) = static_cast<float>(i) - 1 - 0.125f;
  }
  return values;
}();
constexpr std::array<float, 4> kTernary = {-1, 0, 1, 2};  // the last in no file
constexpr std::array<float, 2> kSigns = {-1, 1};

template <const auto& values>
constexpr ElementType table(std::string_view name) {
  ElementType row = table_row<values>(name, kSource);
  row.lowest = *std::min_element(values.begin(), values.end());
  row.highest = *std::max_element(values.begin(), values.end());
  row.full_scale = std::max(row.highest, -row.lowest);
  return row;
}

/// A float8_e4m3 whose sign is not looked at and whose largest code is 0.
float decode_ue4m3(const ElementType& /*type*/, uint32_t code) {
  if (code == 0x7f) return 0;
  const auto exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
  return exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                       : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
}

uint32_t nearest_ue4m3(const ElementType& type, float value) {
  uint32_t best = 0;
  for (uint32_t code = 1; code < 0x7f; ++code)
    if (std::fabs(decode_ue4m3(type, code) - value) < std::fabs(decode_ue4m3(type, best) - value)) best = code;
  return best;
}

constexpr ElementType kUe4m3 = {.name = "ue4m3",
                                .source = kSource,
                                .kind = ElementKind::table,
                                .bits = 8,
                                .lowest = 0,
                                .highest = 480,
                                .full_scale = 448,
                                .decode = decode_ue4m3,
                                .nearest = nearest_ue4m3};

constexpr auto kRows =
    std::to_array<ElementType>({table<kIq4>("iq4"), table<kIq2>("iq2_xxs"), table<kIq2>("iq2_xs"), table<kIq2>("iq2_s"),
                                table<kIq3xxs>("iq3_xxs"), table<kIq3s>("iq3_s"), table<kIq1>("iq1_s"),
                                table<kIq1>("iq1_m"), table<kTernary>("ternary"), table<kSigns>("sign"), kUe4m3});

}  // namespace

const std::span<const ElementType> ggml_rows = kRows;

}  // namespace bitwright
