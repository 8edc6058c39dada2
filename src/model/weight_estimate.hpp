#pragma once

#include <cstdint>
#include <span>

#include "base/json.hpp"
#include "container/container.hpp"

namespace bitwright {

/// What Model::weight_bytes() will be for a model of these tensors, before one is read. A plain tensor's scheme is that
/// of its numbers; of integers it has no element. config: config.json, from which it is known where tensors belong.
uint64_t estimated_weight_bytes(const Json& config, std::span<const StoredTensor> tensors);

}  // namespace bitwright
