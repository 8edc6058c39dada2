#include "evaluate/white_space.hpp"

#include <algorithm>
#include <array>

namespace bitwright {
namespace {

/// Unicode's class Zs and those whose direction is WS, B or S.
constexpr auto kWhiteSpace =
    std::to_array<std::string_view>({"\t",           "\n",           "\v",           "\f",           "\r",
                                     "\x1c",         "\x1d",         "\x1e",         "\x1f",         " ",
                                     "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\x80", "\xe2\x80\x81",
                                     "\xe2\x80\x82", "\xe2\x80\x83", "\xe2\x80\x84", "\xe2\x80\x85", "\xe2\x80\x86",
                                     "\xe2\x80\x87", "\xe2\x80\x88", "\xe2\x80\x89", "\xe2\x80\x8a", "\xe2\x80\xa8",
                                     "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80"});

}  // namespace

std::string_view right_stripped(std::string_view text) {
  for (;;) {
    const auto* end = std::ranges::find_if(kWhiteSpace, [&](std::string_view c) { return text.ends_with(c); });
    if (end == kWhiteSpace.end()) return text;
    text.remove_suffix(end->size());
  }
}

std::string_view stripped(std::string_view text) {
  for (;;) {
    const auto* begin = std::ranges::find_if(kWhiteSpace, [&](std::string_view c) { return text.starts_with(c); });
    if (begin == kWhiteSpace.end()) return right_stripped(text);
    text.remove_prefix(begin->size());
  }
}

}  // namespace bitwright
