#include "cli/page.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

namespace bitwright {
namespace {

/// Characters, not bytes: how far `text` moves the cursor, wide characters aside.
size_t width_of(std::string_view text) {
  return static_cast<size_t>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; }));
}

}  // namespace

std::string wrapped(std::string_view text, size_t indent) {
  constexpr size_t kWidth = 110;
  std::string lines;
  size_t column = indent;
  bool first = true;
  while (!text.empty()) {
    const size_t blank = std::min(text.find(' '), text.size());
    const std::string_view word = text.substr(0, blank);
    text.remove_prefix(std::min(blank + 1, text.size()));
    if (word.empty()) continue;
    if (!first && column + 1 + width_of(word) > kWidth) {
      lines += "\n" + std::string(indent, ' ');
      column = indent;
    } else if (!first) {
      lines += ' ';
      ++column;
    }
    lines += word;
    column += width_of(word);
    first = false;
  }
  return lines;
}

std::string columns(const std::vector<std::vector<std::string>>& rows, size_t indent) {
  std::vector<size_t> widths;
  for (const auto& row : rows)
    for (size_t i = 0; i + 1 < row.size(); ++i) {
      if (widths.size() <= i) widths.resize(i + 1);
      widths[i] = std::max(widths[i], width_of(row[i]));
    }
  std::string text;
  for (const auto& row : rows) {
    std::string line(indent, ' ');
    for (size_t i = 0; i < row.size(); ++i) {
      if (i + 1 == row.size()) {
        line += wrapped(row[i], width_of(line));
      } else {
        line += row[i] + std::string(widths[i] - width_of(row[i]) + 2, ' ');
      }
    }
    while (line.ends_with(' ')) line.pop_back();
    text += line + "\n";
  }
  return text;
}

std::string coloured(std::string_view text, Colour colour) {
  static const bool terminal = ::isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  if (!terminal) return std::string(text);
  const int code = colour == Colour::green ? 32 : colour == Colour::yellow ? 33 : 31;
  return fmt::format("\x1b[{}m{}\x1b[0m", code, text);
}

std::string size_text(double bytes) {
  constexpr double kGiB = 1073741824.0, kMB = 1e6;
  return bytes >= kGiB / 10 ? fmt::format("{:.2f} GiB", bytes / kGiB) : fmt::format("{:.2f} MB", bytes / kMB);
}

}  // namespace bitwright
