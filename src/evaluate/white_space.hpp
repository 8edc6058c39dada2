#pragma once

#include <string_view>

namespace bitwright {

/// `text` without the white space at its end or ends: Unicode's, in UTF-8, as Python's str.strip() takes it.
std::string_view right_stripped(std::string_view text);
std::string_view stripped(std::string_view text);

}  // namespace bitwright
