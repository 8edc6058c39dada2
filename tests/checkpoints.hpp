#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "base/json.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright::test {

using Tensors = std::map<std::string, QuantizedTensor>;

/// A checkpoint directory, in the native container where tensors are quantized.
void write_checkpoint(const std::filesystem::path& dir, const Json& config, const Tensors& tensors);

}  // namespace bitwright::test
