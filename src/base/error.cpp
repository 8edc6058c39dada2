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

Error::Error(const ErrorReport& report) : std::runtime_error(one_line(report)), report_(report) {}

Error Error::at(const std::string& where) const {
  ErrorReport report = report_;
  if (report.where.empty()) report.where = where;
  return Error(report);
}

std::string printable(std::string_view text, size_t most) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool inside_character = (byte & 0xc0) == 0x80;
    if (out.size() >= most && !inside_character) return out + "...";
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
