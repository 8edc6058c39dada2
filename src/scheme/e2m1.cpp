#include <array>
#include <cmath>

#include "scheme/rows.hpp"

namespace bitwright {
namespace {

constexpr std::array<float, 8> kMagnitudes = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
constexpr uint32_t kSign = 8;

float decode(const ElementType& /*type*/, uint32_t code) {
  const float magnitude = kMagnitudes.at(code & (kSign - 1));
  return (code & kSign) != 0 ? -magnitude : magnitude;
}

/// Ties to the even mantissa, beyond 6 to 6. The sign is that of the value, so that what rounds to 0 from below is -0;
/// of -0 itself it is none, as compressed-tensors has it.
uint32_t nearest(const ElementType& /*type*/, float value) {
  const float magnitude = std::fabs(value);
  // Halfway points; those whose upper neighbour is even are met by the points themselves.
  const auto code =
      static_cast<uint32_t>((magnitude > 0.25f) + (magnitude >= 0.75f) + (magnitude > 1.25f) + (magnitude >= 1.75f) +
                            (magnitude > 2.5f) + (magnitude >= 3.5f) + (magnitude > 5.0f));
  return value < 0 ? code | kSign : code;
}

constexpr std::array kRows = {ElementType{.name = "float4_e2m1",
                                          .source = "OCP microscaling formats 1.0",
                                          .kind = ElementKind::floating,
                                          .bits = 4,
                                          .lowest = -6,
                                          .highest = 6,
                                          .full_scale = 6,
                                          .decode = decode,
                                          .nearest = nearest}};

}  // namespace

const std::span<const ElementType> e2m1_rows = kRows;

}  // namespace bitwright
