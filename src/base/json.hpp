#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace bitwright {

using Json = nlohmann::json;                 ///< for reading: members sorted, look-ups fast in large objects
using OrderedJson = nlohmann::ordered_json;  ///< for writing: members in the order they were added

/// Strict RFC 8259 text: no comments, no duplicate members, at most 128 levels deep.
/// Throws Error{code "bad-json"} naming `where` and the line.
Json parse_json(std::string_view text, const std::string& where);
OrderedJson parse_ordered_json(std::string_view text, const std::string& where);

}  // namespace bitwright
