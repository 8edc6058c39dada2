// Speed of quantizing and reading back, a thread and a level at a time, beside a copy of the same bytes.
//   cmake --build --preset release --target encode_bench && build/release/bin/encode_bench [ROWS COLUMNS [THREADS]]
#include "kernels/encode.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>

#include "base/bits.hpp"
#include "base/threads.hpp"
#include "benchmarks/measure.hpp"
#include "kernels/decode.hpp"

namespace bitwright {
namespace {

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Time {
  double wall, processor;
};

/// Medians of seven runs, after one that warms up.
Time measure(const std::function<void()>& work) {
  work();
  std::vector<double> wall, processor;
  for (int i = 0; i < 7; ++i) {
    const double from = wall_seconds(), used = processor_seconds();
    work();
    wall.push_back(wall_seconds() - from);
    processor.push_back(processor_seconds() - used);
  }
  std::ranges::sort(wall);
  std::ranges::sort(processor);
  return {wall[3], processor[3]};
}

void report(std::string_view what, std::string_view level, size_t weights, const Time& t) {
  const auto n = static_cast<double>(weights);
  fmt::print("{:<28} {:<7} {:6.3f} ns a weight and thread  {:7.2f} GB/s of bf16\n", what, level, 1e9 * t.processor / n,
             2 * n / t.wall / 1e9);
}

Scheme integer(int bits, bool symmetric, const Grouping& grouping) {
  Scheme scheme = {.element = &integer_element(bits, symmetric), .scale = parameter(grouping, plain(DType::f16))};
  if (symmetric) return scheme;
  scheme.offset_kind = OffsetKind::zero_point;
  scheme.offset = parameter(grouping, {.element = scheme.element});
  return scheme;
}

struct Job {
  const char* name;
  Scheme scheme;
  RangeRule rule;
};

void run(int64_t rows, int64_t columns) {
  const Shape shape = {rows, columns};
  const auto count = static_cast<size_t>(rows * columns);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  std::vector<std::byte> bytes(2 * count), copy(2 * count);
  from_f32(DType::bf16, values, bytes);
  const WeightView weight = {DType::bf16, bytes};
  report("memcpy of the bf16 bytes", "", count, measure([&] { std::memcpy(copy.data(), bytes.data(), bytes.size()); }));
  const Job jobs[] = {
      {"int8 channel", integer(8, true, Grouping::channel()), RangeRule::minmax},
      {"int4 group 64, minmax", integer(4, false, Grouping::along(64)), RangeRule::minmax},
      {"int4 group 64, mse", integer(4, false, Grouping::along(64)), RangeRule::mse},
      {"int4 symmetric group 64, mse", integer(4, true, Grouping::along(64)), RangeRule::mse},
      {"int2 group 64, mse", integer(2, false, Grouping::along(64)), RangeRule::mse},
      {"nf4 blocks of 64",
       {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))},
       RangeRule::minmax},
  };
  for (const KernelLevel& level : kernel_levels()) {
    if (!level.usable()) continue;
    for (const Job& job : jobs) {
      if (level.name == "scalar" && job.rule == RangeRule::mse && count > (1u << 22)) continue;  // takes too long
      report(job.name, level.name, count, measure([&] { encode(job.scheme, shape, weight, job.rule, level); }));
      const QuantizedTensor t = encode(job.scheme, shape, weight, RangeRule::minmax);
      report("  decode and error", level.name, count, measure([&] { relative_error(weight, t, level); }));
      if (!encodes_in_pieces(job.scheme, shape, DType::bf16)) continue;
      const GroupEncoder encoder(job.scheme, shape, job.rule, level);
      const auto groups = static_cast<size_t>(encoder.runs().groups);
      std::vector<std::byte> codes(count), scales(4 * groups), zeros(groups);
      report(std::string("  into given arrays"), level.name, count, measure([&] {
               const auto in_task = static_cast<size_t>(std::max<int64_t>(65536 / encoder.runs().size, 1));
               const size_t scale_bytes = size_bytes(*dtype_of(*job.scheme.scale->scheme->element));
               parallel_ranges(groups, in_task, [&](size_t begin, size_t end) {
                 const auto b = static_cast<int64_t>(begin), e = static_cast<int64_t>(end);
                 const auto from = static_cast<size_t>(encoder.runs().start(b));
                 const auto to = static_cast<size_t>(encoder.runs().end_of(e - 1));
                 encoder.encode(b, e, {DType::bf16, std::span(bytes).subspan(2 * from, 2 * (to - from))},
                                {&codes[from], &scales[begin * scale_bytes], &zeros[begin]});
               });
             }));
    }
  }
  for (const int bits : {1, 2, 3, 4}) {
    std::vector<std::byte> codes(count);
    for (std::byte& code : codes) code = static_cast<std::byte>(random() % (1u << bits));
    std::vector<std::byte> packed;
    report(fmt::format("pack {} bits", bits), "", count, measure([&] { packed = pack_bits(codes, bits); }));
    report(fmt::format("unpack {} bits", bits), "", count, measure([&] { codes = unpack_bits(packed, bits, count); }));
  }
}

}  // namespace
}  // namespace bitwright

int main(int argc, char** argv) {
  const bool sized = argc > 2;
  if (argc > 3) bitwright::set_thread_count(std::stoul(argv[3]));
  bitwright::run(sized ? std::stol(argv[1]) : 4096, sized ? std::stol(argv[2]) : 4096);
}
