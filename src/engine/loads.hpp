#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "engine/detect.hpp"
#include "engine/facts.hpp"

namespace bitwright {

/// Does an engine load a checkpoint, and why not? By its facts, on unknown hardware.
struct Loads {
  std::string engine;
  bool yes;
  std::string reason{};  ///< what speaks against it; of a yes what must be known (a plugin to install), or nothing
};

/// Every engine's answer for a checkpoint that these documents describe.
std::vector<Loads> engines_that_load(const ModelDocuments& documents, const Facts& facts = Facts::standard());

/// The same for any checkpoint of a method ("gptq", "compressed-tensors"), as far as the method alone tells.
std::vector<Loads> engines_that_load(std::string_view method, const Facts& facts = Facts::standard());

}  // namespace bitwright
