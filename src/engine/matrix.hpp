#pragma once

#include <string>

#include "engine/plan.hpp"

namespace bitwright {

/// A Markdown table: for each value of the four fields what each engine is told, or the code with which it refuses; for
/// a 16-bit model with experts on `hardware`. docs/precision-fields.md holds it, and a test compares the two.
std::string precision_matrix(std::string_view hardware = "h100", const Facts& facts = Facts::standard());

}  // namespace bitwright
