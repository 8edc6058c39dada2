// Encoding nf4 and fp4 as bitsandbytes does, on one thread, beside ten times what bitsandbytes reaches: its torch
// kernel encodes 0.24 GB/s of f32 as nf4 (on two such cores; of 16-bit weights half the bytes). GB/s are bytes of the
// weight. The default size is one piece of `quantize`, which encodes larger tensors piece by piece.
//   cmake --build --preset release --target bitsandbytes_encode_bench &&
//     build/release/bin/bitsandbytes_encode_bench [ROWS COLUMNS]
#include <fmt/format.h>

#include <random>
#include <string>
#include <vector>

#include "base/threads.hpp"
#include "benchmarks/memory.hpp"
#include "container/bitsandbytes_rounding.hpp"

namespace bitwright {
namespace {

constexpr double kPeer = 0.24;        ///< GB/s of f32
constexpr double kGoal = 10 * kPeer;  ///< GB/s of the weight's bytes

Scheme scheme(const char* element, int64_t block, bool nested) {
  Scheme scale = plain(DType::f32);
  if (nested) {
    scale = {.element = find_element("dynamic8"), .scale = parameter(Grouping::flat(256), plain(DType::f32))};
    scale.offset_kind = OffsetKind::bias;
    scale.offset = parameter(Grouping::tensor(), plain(DType::f32));
  }
  return {.element = find_element(element), .scale = parameter(Grouping::flat(block), scale)};
}

void run(int64_t rows, int64_t columns) {
  const auto count = static_cast<size_t>(rows * columns);
  const double limit = measure_memory(kLimitBytes).read;
  std::vector<float> values(count);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.02f);
  for (float& value : values) value = normal(random);
  fmt::print("weight bytes read, best of several runs; the goal is {:.1f} GB/s\n", kGoal);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    std::vector<std::byte> bytes(count * size_bytes(dtype));
    from_f32(dtype, values, bytes);
    for (const char* element : {"nf4", "fp4"})
      for (const int64_t block : {32, 64, 256, 4096})
        for (const bool nested : {false, true}) {
          const Scheme s = scheme(element, block, nested);
          const double seconds = best_seconds([&] { encode_bitsandbytes4(s, {rows, columns}, {dtype, bytes}); }, 5);
          const double rate = gigabytes_a_second(bytes.size(), seconds);
          fmt::print(
              "{} {:<8} blocks of {:<4} {:<6} {:6.3f} ns a weight {:6.2f} GB/s, {:3.0f} % of reading{}, "
              "{:4.1f} times bitsandbytes' weights a second\n",
              element, info(dtype).name, block, nested ? "nested" : "", 1e9 * seconds / static_cast<double>(count),
              rate, 100 * rate / limit, rate < kGoal ? " (short)" : "        ",
              gigabytes_a_second(count * sizeof(float), seconds) / kPeer);
        }
  }
}

}  // namespace
}  // namespace bitwright

int main(int argc, char** argv) {
  bitwright::set_thread_count(1);
  bitwright::run(argc > 2 ? std::stol(argv[1]) : 256, argc > 2 ? std::stol(argv[2]) : 4096);
}
