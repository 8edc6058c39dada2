#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// `text` in lines of at most 110 columns, broken at blanks; the first line begins at `indent`, where the others are
/// moved to.
std::string wrapped(std::string_view text, size_t indent);

/// Rows as columns, two blanks apart, each as wide as its widest cell; every line begins with `indent` blanks and ends
/// with a line break. The last column is wrapped.
std::string columns(const std::vector<std::vector<std::string>>& rows, size_t indent = 0);

enum class Colour { green, yellow, red };
/// `text` in a colour where stdout is a terminal and NO_COLOR is not set, else as it is.
std::string coloured(std::string_view text, Colour colour);

/// "1.20 GiB", "4.20 MB": three digits that matter, in the unit that the size is of.
std::string size_text(double bytes);

}  // namespace bitwright
