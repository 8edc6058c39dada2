#pragma once

#include <torch/torch.h>

#include <optional>

#include "base/dtype.hpp"

namespace bitwright::train {

/// The type that a file has for a tensor's numbers, and the other way round; nothing where there is none.
std::optional<DType> stored_dtype(torch::ScalarType type);
std::optional<torch::ScalarType> tensor_type(DType dtype);

}  // namespace bitwright::train
