#pragma once

#include <string>
#include <string_view>

#include "bitwright/json.hpp"

namespace bitwright {

/// Strict RFC 8259 text: no comments, no duplicate members, at most 128 levels deep.
/// Throws Error{code "bad-json"} naming `where` and the line.
Json parse_json(std::string_view text, const std::string& where);
OrderedJson parse_ordered_json(std::string_view text, const std::string& where);

}  // namespace bitwright
