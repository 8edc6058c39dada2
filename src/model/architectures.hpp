#pragma once

#include "model/model.hpp"

namespace bitwright::architectures {

// Each row is defined in the file of its name (gemma3_with_images in gemma3.cpp).
#define ARCHITECTURE(name) extern const Architecture name;
#include "model/architectures.def"

}  // namespace bitwright::architectures
