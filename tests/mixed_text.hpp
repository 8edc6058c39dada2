#pragma once

#include <array>
#include <random>
#include <string>
#include <string_view>

namespace bitwright::test {

/// One megabyte of the same text each time: English words, code, Chinese, Arabic, emoji and other awkward characters,
/// runs of white space, and what looks like special tokens. Left out are U+FEFF and U+0085, which JavaScript's \s and
/// Unicode's White_Space do not agree on, so that npm's @huggingface/tokenizers can be asked too.
inline std::string mixed_text() {
  constexpr size_t kSize = 1'000'000;
  constexpr std::array<std::string_view, 40> kWords = {"the",
                                                       "of",
                                                       "and",
                                                       "Hello",
                                                       "world",
                                                       "don't",
                                                       "WE'LL",
                                                       "it's",
                                                       "Once",
                                                       "upon",
                                                       "time",
                                                       "little",
                                                       "quantization",
                                                       "1234567",
                                                       "3.14159",
                                                       "2024-11-21",
                                                       "naïve",
                                                       "café",
                                                       "résumé",
                                                       "Straße",
                                                       "e\u0301",
                                                       "A\u030a",
                                                       "ﬁ",
                                                       "①",
                                                       "½",
                                                       "Ⅷ",
                                                       "int",
                                                       "return",
                                                       "std::vector<int>",
                                                       "x[i]",
                                                       "!=",
                                                       "->",
                                                       "/* … */",
                                                       "\"quoted\"",
                                                       "#include",
                                                       "{",
                                                       "}",
                                                       ");",
                                                       "==",
                                                       "https://example.org/?q=1&r=%20"};
  constexpr std::array<std::string_view, 24> kOthers = {"😀",       "👩‍👩‍👧‍👦",
                                                        "🇩🇪",      "👍🏽",
                                                        "❤️",  "🏳️‍🌈",
                                                        "1️⃣", "™",
                                                        "\u200b",  "\u200d",
                                                        "\u00a0",  "\u3000",
                                                        "\u2028",  "\u180e",
                                                        "\x1c",    "\x7f",
                                                        "\u2581",  "नमस्ते",
                                                        "ไทย",     "עברית",
                                                        "𝕳",       "𐍈",
                                                        "がﾞ",     "각"};
  constexpr std::array<std::string_view, 14> kSpaces = {
      " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "        ", " \n", "\n  ", "<s>", "</s>", "<unk>", "<|endoftext|>"};
  constexpr std::u32string_view kChinese =
      U"的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多"
      U"定行学法所民得经，。！？";
  constexpr std::u32string_view kArabic = U"ابتثجحخدذرزسشصضطظعغفقكلمنهويءآأؤإئىة\u064b\u064e\u0651   ";
  std::mt19937 random(2024);
  const auto below = [&](size_t n) { return random() % n; };
  const auto add = [](std::string& text, char32_t c) {
    if (c < 0x80) return void(text += static_cast<char>(c));
    if (c >= 0x800) {
      text += static_cast<char>(0xe0 | c >> 12);
      text += static_cast<char>(0x80 | (c >> 6 & 0x3f));
    } else {
      text += static_cast<char>(0xc0 | c >> 6);
    }
    text += static_cast<char>(0x80 | (c & 0x3f));
  };
  std::string text;
  while (text.size() < kSize) {
    switch (below(5)) {
      case 0:
      case 1:
        for (size_t n = below(30); n > 0; --n) text.append(kWords.at(below(kWords.size()))).append(" ");
        break;
      case 2:
        for (size_t n = below(60); n > 0; --n) add(text, kChinese[below(kChinese.size())]);
        break;
      case 3:
        for (size_t n = below(60); n > 0; --n) add(text, kArabic[below(kArabic.size())]);
        break;
      default:
        for (size_t n = below(6); n > 0; --n)
          text.append(kOthers.at(below(kOthers.size()))).append(kSpaces.at(below(kSpaces.size())));
    }
  }
  return text;
}

}  // namespace bitwright::test
