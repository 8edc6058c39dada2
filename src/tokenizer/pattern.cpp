#include "tokenizer/pattern.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "tokenizer/unicode.hpp"

namespace bitwright {
namespace {

constexpr uint32_t kMatchLimit = 10'000'000;  // steps of one search, and two more for each byte of the text

[[noreturn]] void unsupported(std::string_view expression, const std::string& why) {
  throw Error({.code = "unsupported-tokenizer",
               .what = "cannot read tokenizer",
               .why = fmt::format("the expression '{}' is not supported: {}", printable(expression), why),
               .fix = "use a model with another tokenizer"});
}

/// A class of characters that Oniguruma and PCRE2 do not agree on: in brackets, and negated in brackets if it can be.
struct Escape {
  char letter;
  std::string_view members, negated;
};
constexpr std::array<Escape, 6> kEscapes = {{{'s', R"(\p{White_Space})", R"(\P{White_Space})"},
                                             {'S', R"(\P{White_Space})", R"(\p{White_Space})"},
                                             {'w', R"(\p{L}\p{M}\p{Nd}\p{Pc})", ""},
                                             {'W', "", R"(\p{L}\p{M}\p{Nd}\p{Pc})"},
                                             {'h', "0-9a-fA-F", ""},
                                             {'H', "", "0-9a-fA-F"}}};

/// The expression in PCRE2's terms.
std::string translated(std::string_view expression) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < expression.size(); ++i) {
    const char c = expression[i], next = i + 1 < expression.size() ? expression[i + 1] : '\0';
    if (c == '\\' && next != '\0') {
      ++i;
      const Escape* found = nullptr;
      for (const Escape& escape : kEscapes)
        if (escape.letter == next) found = &escape;
      if (found == nullptr) {
        out += {c, next};
      } else if (in_class) {
        if (found->members.empty()) unsupported(expression, fmt::format("\\{} in brackets", next));
        out += found->members;
      } else {
        out += found->members.empty() ? fmt::format("[^{}]", found->negated) : fmt::format("[{}]", found->members);
      }
    } else if (!in_class) {
      in_class = c == '[';
      out += c;
      if (in_class && next == '^') out += expression[++i];
    } else {
      if (c == '[' && next != ':') unsupported(expression, "brackets in brackets");
      if (c == '&' && next == '&') unsupported(expression, "&& in brackets");
      if (c == '[') {  // [:alpha:]
        const size_t end = expression.find(":]", i);
        if (end == expression.npos) unsupported(expression, "brackets in brackets");
        out += expression.substr(i, end + 2 - i);
        i = end + 1;
        continue;
      }
      in_class = c != ']';
      out += c;
    }
  }
  return out;
}

}  // namespace

struct Pattern::Impl {
  struct Free {
    void operator()(pcre2_code* p) const { pcre2_code_free(p); }
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
    void operator()(pcre2_match_context* p) const { pcre2_match_context_free(p); }
  };

  Impl(std::string_view expression, uint32_t options) {
    int error = 0;
    size_t offset = 0;
    code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(), options, &error,
                             &offset, nullptr));
    if (code == nullptr) {
      std::array<PCRE2_UCHAR, 128> message = {};
      pcre2_get_error_message(error, message.data(), message.size());
      unsupported(expression, fmt::format("{} at byte {}", reinterpret_cast<const char*>(message.data()), offset));
    }
    pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);  // where it cannot, matching interprets, with equal results
  }

  std::unique_ptr<pcre2_code, Free> code;
};

Pattern::Pattern(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Pattern::Pattern(std::string_view expression)
    : impl_(std::make_unique<Impl>(translated(expression), PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE)) {}
Pattern Pattern::literal(std::string_view text) {
  return Pattern(std::make_unique<Impl>(text, PCRE2_UTF | PCRE2_LITERAL));
}
Pattern::~Pattern() = default;
Pattern::Pattern(Pattern&&) noexcept = default;

std::vector<Pattern::Match> Pattern::matches(std::string_view text) const {
  const std::unique_ptr<pcre2_match_data, Impl::Free> data(pcre2_match_data_create(1, nullptr));
  const std::unique_ptr<pcre2_match_context, Impl::Free> context(pcre2_match_context_create(nullptr));
  BW_ASSERT(data != nullptr && context != nullptr);
  const uint64_t limit = std::min<uint64_t>(kMatchLimit + 2 * uint64_t{text.size()}, UINT32_MAX);
  pcre2_set_match_limit(context.get(), static_cast<uint32_t>(limit));
  const size_t* const bounds = pcre2_get_ovector_pointer(data.get());
  const auto search = [&](size_t at, uint32_t options) {
    // Escaped bytes are three bytes as any character, though UTF-8 proper lacks them: no check.
    return pcre2_match(impl_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                       PCRE2_NO_UTF_CHECK | options, data.get(), context.get());
  };
  std::vector<Match> found;
  size_t last_end = text.size() + 1;  // of the match before: none
  for (size_t at = 0; at <= text.size();) {
    int result = search(at, 0);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = search(at, PCRE2_NO_JIT);
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result < 0)
      throw Error({.code = "pattern-too-slow",
                   .what = "cannot encode text",
                   .why = fmt::format("the tokenizer's expression needs too many steps (PCRE2 error {})", result),
                   .fix = "use a model with another tokenizer"});
    const Match match = {bounds[0], bounds[1]};
    if (match.begin >= match.end && match.begin == last_end) {  // an empty one right behind another
      at = match.begin < text.size() ? match.begin + first_character(text.substr(match.begin)).length : text.size() + 1;
      last_end = text.size() + 1;
      continue;
    }
    BW_ASSERT(match.begin >= at || match.end >= at);
    found.push_back({match.begin, match.end});
    last_end = at = match.end;
  }
  return found;
}

}  // namespace bitwright
