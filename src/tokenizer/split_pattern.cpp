#include "tokenizer/split_pattern.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "base/error.hpp"

namespace bitwright {

struct SplitPattern::Impl {
  struct Free {
    void operator()(pcre2_code* p) const { pcre2_code_free(p); }
    void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
  };
  std::unique_ptr<pcre2_code, Free> code;
};

SplitPattern::SplitPattern(std::string_view pattern) : impl_(std::make_unique<Impl>()) {
  int error = 0;
  size_t error_offset = 0;
  impl_->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP,
                                  &error, &error_offset, nullptr));
  BW_ASSERT(impl_->code != nullptr);
  pcre2_jit_compile(impl_->code.get(), PCRE2_JIT_COMPLETE);  // where it cannot, matching interprets, with equal results
}
SplitPattern::~SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;

std::vector<std::string_view> SplitPattern::split(std::string_view text) const {
  const std::unique_ptr<pcre2_match_data, Impl::Free> match(
      pcre2_match_data_create_from_pattern(impl_->code.get(), nullptr));
  BW_ASSERT(match != nullptr);
  const size_t* const bounds = pcre2_get_ovector_pointer(match.get());
  std::vector<std::string_view> pieces;
  for (size_t at = 0; at < text.size(); at = bounds[1]) {
    const int result = pcre2_match(impl_->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                                   PCRE2_NO_UTF_CHECK, match.get(), nullptr);
    if (result == PCRE2_ERROR_NOMATCH) {
      pieces.push_back(text.substr(at));
      break;
    }
    BW_ASSERT(result > 0 && bounds[1] > bounds[0]);
    if (bounds[0] > at) pieces.push_back(text.substr(at, bounds[0] - at));
    pieces.push_back(text.substr(bounds[0], bounds[1] - bounds[0]));
  }
  return pieces;
}

}  // namespace bitwright
