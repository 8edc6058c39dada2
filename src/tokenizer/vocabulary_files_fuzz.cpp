#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/error.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/tokenizer.hpp"

/// The first byte of the input chooses a reader, the rest is the file: a SentencePiece model, tiktoken's ranks, or
/// llama2.c's tokenizer.bin.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using Read = bitwright::TokenizerPipeline (*)(std::string_view, const std::string&);
  constexpr std::array<Read, 3> kReaders = {bitwright::read_sentencepiece, bitwright::read_tiktoken,
                                            bitwright::read_llama2c};
  if (size == 0) return 0;
  const std::string_view file(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    const bitwright::Tokenizer tokenizer(kReaders.at(data[0] % kReaders.size())(file, "fuzz"));
    for (const bool special : {false, true})
      static_cast<void>(tokenizer.decode(tokenizer.encode(" Hello  <s> w\xc3\xb6rld\xff\n", special), special));
  } catch (const bitwright::Error&) {
  }
  return 0;
}
