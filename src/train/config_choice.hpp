#pragma once

#include <fmt/format.h>

#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.hpp"

namespace bitwright::train {

/// Throws Error{"bad-value"} (exit status 2). where: the configuration's type, "PtqConfig".
[[noreturn]] inline void bad_config(const char* where, const std::string& why, const std::string& fix = {}) {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = where,
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

/// The one of `known` that is given by its name. Throws as bad_config, listing them.
template <class Value, size_t count>
Value choose(const char* where, const char* key, const std::string& given,
             const std::array<std::pair<std::string_view, Value>, count>& known) {
  std::string names;
  for (const auto& [name, value] : known) {
    if (name == given) return value;
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  bad_config(where, fmt::format("{}: '{}' is not known; valid: {}", key, printable(given), names));
}

}  // namespace bitwright::train
