#pragma once

#include <cstddef>
#include <string_view>

namespace bitwright {

/// Bytes of the UTF-8 character that `text` begins with; 0 where it begins with none (Unicode 15, table 3-7).
size_t utf8_character(std::string_view text);

/// Is `text` UTF-8 from beginning to end, so that it may stand in a JSON document?
bool is_utf8(std::string_view text);

}  // namespace bitwright
