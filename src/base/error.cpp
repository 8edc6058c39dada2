#include "base/error.hpp"

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>

namespace bitwright {
namespace {

std::string one_line(const ErrorReport& report) {
  std::string line = report.what;
  for (const std::string* part : {&report.where, &report.why}) {
    if (part->empty()) continue;
    if (!line.empty()) line += ": ";
    line += *part;
  }
  if (!report.fix.empty()) line += "; " + report.fix;
  return printable(line, 2000);
}

}  // namespace

Error::Error(const ErrorReport& report)
    : std::runtime_error(one_line(report)), code_(report.code), status_(report.status) {}

std::string printable(std::string_view text, size_t most) {
  std::string out;
  for (const char c : text) {
    if (out.size() >= most) return out + "...";
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out;
}

void assertion_failed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "bitwright: internal error: %s:%d: %s\n", file, line, condition);
  std::abort();
}

}  // namespace bitwright
