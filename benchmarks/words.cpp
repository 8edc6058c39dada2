// Speed of packing and unpacking GPTQ's and AWQ's layouts on one thread, beside reading memory.
//   cmake --build --preset release --target words_bench && build/release/bin/words_bench [ROWS COLUMNS]
#include "container/words.hpp"

#include <fmt/format.h>

#include <cstring>
#include <random>
#include <string>

#include "base/threads.hpp"
#include "benchmarks/measure.hpp"

namespace bitwright {
namespace {

/// Bytes read; where codes are written, or read, there is one byte a weight beside them.
void report(const std::string& what, size_t weights, size_t packed_bytes, double time, double read_rate) {
  const double total = static_cast<double>(weights + packed_bytes) / time / 1e9;
  fmt::print("{:<28} {:6.3f} ns a weight  {:6.2f} GB/s of codes  {:6.2f} GB/s in and out ({:3.0f} % of reading)\n",
             what, 1e9 * time / static_cast<double>(weights), static_cast<double>(weights) / time / 1e9, total,
             100 * total / read_rate);
}

void run(size_t rows, size_t columns) {
  const size_t count = rows * columns;
  std::vector<std::byte> codes(count), words;
  std::mt19937 random(1);
  for (std::byte& code : codes) code = static_cast<std::byte>(random());
  uint64_t sum = 0;
  const double reading = best_seconds([&] {
    uint64_t word = 0;
    for (size_t i = 0; i + sizeof word <= count; i += sizeof word) {
      std::memcpy(&word, &codes[i], sizeof word);
      sum += word;
    }
  });
  const double rate = static_cast<double>(count) / reading / 1e9;
  fmt::print("reading {:.2f} GB/s (sum {:x})\n", rate, sum);
  std::vector<std::byte> copy(count);
  const double copying = best_seconds([&] { std::memcpy(copy.data(), codes.data(), count); });
  report("memcpy of the codes", count, count, copying, rate);
  const auto both = [&](const std::string& name, size_t bytes, const auto& pack, const auto& unpack) {
    report("pack " + name, count, bytes, best_seconds([&] { words = pack(); }), rate);
    report("unpack " + name, count, bytes, best_seconds([&] { copy = unpack(); }), rate);
  };
  for (const int bits : {8, 4, 3, 2}) {
    std::vector<std::byte> narrow = codes;
    for (std::byte& code : narrow) code &= static_cast<std::byte>((1u << bits) - 1);
    both(
        fmt::format("gptq {} bits", bits), count / 8 * static_cast<size_t>(bits),
        [&] { return pack_transposed(kDensePacking, bits, narrow, rows, columns); },
        [&] { return unpack_transposed(kDensePacking, bits, words, rows, columns); });
    if (bits == 4)
      both(
          "awq", count / 2, [&] { return pack_interleaved(kAwqOrder, narrow, 1, rows, columns); },
          [&] { return unpack_interleaved(kAwqOrder, words, 1, rows, columns); });
  }
}

}  // namespace
}  // namespace bitwright

int main(int argc, char** argv) {
  bitwright::set_thread_count(1);
  bitwright::run(argc > 2 ? std::stoul(argv[1]) : 4096, argc > 2 ? std::stoul(argv[2]) : 4096);
}
