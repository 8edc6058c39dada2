#pragma once

#include "base/json.hpp"

namespace bitwright {

/// Adds what follows from a model's sizes, whichever file they came from: head_dim, moe, mla.
void add_derived_facts(Json& facts);

}  // namespace bitwright
