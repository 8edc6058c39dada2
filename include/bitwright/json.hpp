#pragma once

#include <nlohmann/json_fwd.hpp>

namespace bitwright {

using Json = nlohmann::json;                 ///< for reading: members sorted, look-ups fast in large objects
using OrderedJson = nlohmann::ordered_json;  ///< for writing: members in the order they were added

}  // namespace bitwright
