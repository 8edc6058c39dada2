#pragma once

#include <string>
#include <vector>

#include "engine/detect.hpp"
#include "engine/facts.hpp"
#include "engine/plan.hpp"

namespace bitwright {

/// Does this mean that the engine does not load the checkpoint? Some take what they do not know for a plain model, and
/// only warn.
bool refuses(const Diagnostic& said);

/// Does an engine load a checkpoint, and why not? By its facts.
struct Loads {
  std::string engine;
  bool yes;
  std::string reason{};  ///< what speaks against it; of a yes what must be known (a plugin to install), or nothing
};

/// The answer of one engine on one device, as `request` names them, for a checkpoint that these documents describe.
Loads answer_of(PlanRequest request, const ModelDocuments& documents, const Facts& facts = Facts::standard());

/// Every engine's answer, on unknown hardware.
std::vector<Loads> engines_that_load(const ModelDocuments& documents, const Facts& facts = Facts::standard());

}  // namespace bitwright
