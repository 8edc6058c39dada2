#pragma once

#include <string>
#include <string_view>

#include "bitwright/error.hpp"

namespace bitwright {

/// Something the user should know although the work goes on. The code is stable.
struct Warning {
  std::string code;
  std::string message;
};

/// Names and values come from files that may be hostile: control characters become \xNN, long text is cut (between
/// characters of UTF-8).
std::string printable(std::string_view text, size_t most = 200);

[[noreturn]] void assertion_failed(const char* condition, const char* file, int line);

}  // namespace bitwright

/// Holds in every build type: a broken invariant must not turn into wrong bytes.
#define BW_ASSERT(condition) \
  ((condition) ? static_cast<void>(0) : ::bitwright::assertion_failed(#condition, __FILE__, __LINE__))
