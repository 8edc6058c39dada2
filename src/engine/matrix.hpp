#pragma once

#include <span>
#include <string>
#include <string_view>

#include "engine/plan.hpp"

namespace bitwright {

/// A Markdown table: for each value of the four fields what each engine is told, or the code with which it refuses; for
/// a 16-bit model with experts on `hardware`.
std::string precision_matrix(std::string_view hardware = "h100", const Facts& facts = Facts::standard());

/// A Markdown table made of the facts. The documents hold each between "<!-- table NAME -->" and "<!-- /table -->";
/// scripts/docs_tables.sh writes it there, a test compares.
struct FactsTable {
  std::string_view name;
  std::string (*markdown)(const Facts& facts);
};
std::span<const FactsTable> facts_tables();

}  // namespace bitwright
