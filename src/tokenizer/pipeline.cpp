#include "tokenizer/pipeline.hpp"

#include "base/error.hpp"

namespace bitwright {

void bad_tokenizer(const std::string& file, const std::string& why) {
  throw Error({.code = "bad-tokenizer",
               .what = "cannot read tokenizer",
               .where = file,
               .why = why,
               .fix = "the file is damaged, fetch it again"});
}

void unsupported_tokenizer(const std::string& file, const std::string& what) {
  throw Error({.code = "unsupported-tokenizer",
               .what = "cannot read tokenizer",
               .where = file,
               .why = what + " is not supported",
               .fix = "docs/tokenizers.md lists what is"});
}

std::string shown_token(std::string_view token) { return "'" + printable(token, 40) + "'"; }

}  // namespace bitwright
