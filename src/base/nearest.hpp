#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// What to say of an unknown name: "did you mean 'group_size'?" if one of `known` is near, else "valid: a, b, c".
std::string suggest(std::string_view name, std::span<const std::string> known);

}  // namespace bitwright
