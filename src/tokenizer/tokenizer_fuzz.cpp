#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.hpp"
#include "tokenizer/tokenizer.hpp"

/// The input is tokenizer.json, tokenizer_config.json and a text, with a byte 0 between them.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  const auto next = [&] {
    const size_t end = rest.find('\0');
    const std::string_view part = rest.substr(0, end);
    rest.remove_prefix(end == rest.npos ? rest.size() : end + 1);
    return part;
  };
  const std::string_view json = next(), config = next(), text = rest;
  try {
    const auto tokenizer = bitwright::Tokenizer::from_json(json, config, "fuzz");
    for (const bool special : {false, true}) {
      const auto ids = tokenizer.encode(text, special);
      for (const int32_t id : ids)
        if (id < 0 || static_cast<size_t>(id) >= tokenizer.vocabulary_size()) std::abort();
      static_cast<void>(tokenizer.decode(ids, special));
    }
  } catch (const bitwright::Error&) {
  }
  return 0;
}
