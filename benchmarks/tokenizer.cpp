#include "tokenizer/tokenizer.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>

#include "base/error.hpp"
#include "base/mapped_file.hpp"

/// tokenizer_bench TEXT TOKENIZER...   the text's ids, one thread: seconds to load, MB/s to encode and decode (best of
/// 3)
int main(int argc, char** argv) {
  // Of the processor, not of the clock on the wall: the machine may be shared.
  const auto seconds_since = [](std::clock_t start) {
    return static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  };
  try {
    if (argc < 3) return EXIT_FAILURE;
    const std::string text = bitwright::read_text_file(argv[1]);
    const double megabytes = static_cast<double>(text.size()) / 1e6;
    for (int i = 2; i < argc; ++i) {
      const auto start = std::clock();
      const bitwright::Tokenizer tokenizer(argv[i]);
      const double load = seconds_since(start);
      double encode = 1e9, decode = 1e9;
      std::vector<int32_t> ids;
      std::string back;
      for (int run = 0; run < 3; ++run) {
        const auto begin = std::clock();
        ids = tokenizer.encode(text);
        encode = std::min(encode, seconds_since(begin));
        const auto middle = std::clock();
        back = tokenizer.decode(ids, false);
        decode = std::min(decode, seconds_since(middle));
      }
      const auto* bytes = reinterpret_cast<const char*>(ids.data());
      fmt::print("{:60} load {:.3f} s, encode {:6.1f} MB/s, decode {:6.1f} MB/s, {} ids, {}, {}\n", argv[i], load,
                 megabytes / encode, megabytes / decode, ids.size(), back == text ? "comes back" : "changed",
                 bitwright::sha256(std::string_view(bytes, ids.size() * sizeof(int32_t))).substr(0, 12));
    }
  } catch (const bitwright::Error& error) {
    fmt::print(stderr, "{}\n", error.what());
    return EXIT_FAILURE;
  }
}
