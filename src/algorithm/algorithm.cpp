#include "algorithm/algorithm.hpp"

#include <array>

namespace bitwright {

#define ALGORITHM(name) extern const Algorithm name##_algorithm;
#include "algorithm/algorithms.def"

std::span<const Algorithm* const> all_algorithms() {
#define ALGORITHM(name) &name##_algorithm,
  static const std::array all = {
#include "algorithm/algorithms.def"
  };
  return all;
}

const Algorithm* find_algorithm(std::string_view name) {
  for (const Algorithm* algorithm : all_algorithms())
    if (algorithm->name == name) return algorithm;
  return nullptr;
}

}  // namespace bitwright
