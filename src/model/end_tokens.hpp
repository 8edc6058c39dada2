#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "base/json.hpp"

namespace bitwright {

/// The ids that end a text: eos_token_id, a number or a list, of generation_config.json in `directory`, or of `config`
/// (config.json) where that file does not say or `directory` is empty. None if neither does. Throws
/// Error{"bad-config"} on anything else.
std::vector<int32_t> end_tokens(const Json& config, const std::filesystem::path& directory);

}  // namespace bitwright
