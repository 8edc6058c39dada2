// Speed of the matrix products beside the limits of the machine, measured in the same run.
//   cmake --build --preset release --target matmul_bench && build/release/bin/matmul_bench [ROWS COLUMNS [THREADS]]
#include "kernels/matmul.hpp"

#include <fmt/format.h>
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <random>

#include "base/threads.hpp"

namespace bitwright {
namespace {

/// Median of nine runs, after one that warms up.
double seconds(const std::function<void()>& work) {
  work();
  std::vector<double> times;
  for (int i = 0; i < 9; ++i) {
    const auto start = std::chrono::steady_clock::now();
    work();
    times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + 4, times.end());
  return times[4];
}

volatile float g_sink;

__attribute__((target("avx512f"))) void fma_loop(size_t steps) {
  __m512 sums[12];
  for (size_t j = 0; j < 12; ++j) sums[j] = _mm512_set1_ps(static_cast<float>(j));  // unequal, or one would do
  __m512 x = _mm512_set1_ps(0.5f);
#pragma GCC unroll 1
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (size_t j = 0; j < 12; ++j) sums[j] = _mm512_fmadd_ps(x, x, sums[j]);
    asm volatile("" : "+v"(x));  // no step may be left out
  }
  float sum = 0;
  for (const __m512& s : sums) sum += s[0];
  g_sink = sum;
}

__attribute__((target("avx512f"))) void read_loop(const std::byte* data, size_t size) {
  __m512i sums[4] = {};
  for (size_t i = 0; i + 256 <= size; i += 256)
    for (size_t j = 0; j < 4; ++j) {
      _mm_prefetch(data + i + 64 * j + 4096, _MM_HINT_T0);
      sums[j] = _mm512_add_epi64(sums[j], _mm512_loadu_si512(data + i + 64 * j));
    }
  g_sink = static_cast<float>((sums[0] + sums[1] + sums[2] + sums[3])[0]);
}

struct Limits {
  double flops, bytes;  ///< a second
};

Limits measure_limits() {
  constexpr size_t kSteps = 4'000'000, kSize = size_t{1} << 30;
  const size_t threads = thread_count();
  const std::vector<std::byte> data(kSize, std::byte{1});
  const double compute = seconds([&] { parallel_for(threads, [](size_t) { fma_loop(kSteps); }); });
  const double read = seconds([&] {
    parallel_ranges(kSize, kSize / threads, [&](size_t begin, size_t end) { read_loop(&data[begin], end - begin); });
  });
  return {static_cast<double>(kSteps * 12 * 32 * threads) / compute, static_cast<double>(kSize) / read};
}

PackedMatrix random_matrix(const Scheme& scheme, size_t rows, size_t columns) {
  std::mt19937 random(1);
  std::vector<float> values(rows * columns);
  std::normal_distribution<float> normal(0, 0.02f);
  for (float& v : values) v = normal(random);
  return pack_matrix(std::make_shared<QuantizedTensor>(
      encode(scheme, {static_cast<int64_t>(rows), static_cast<int64_t>(columns)}, values)));
}

void measure(const char* name, const Scheme& scheme, size_t rows, size_t columns, const Limits& limits) {
  const PackedMatrix w = random_matrix(scheme, rows, columns);
  for (const KernelLevel& level : kernel_levels()) {
    if (!level.usable() || level.name == "scalar") continue;
    for (const size_t m : {1, 8, 256}) {
      const std::vector<float> x(m * columns, 0.5f);
      std::vector<float> y(m * rows);
      const double time = seconds([&] { multiply(x.data(), m, w, y.data(), level); });
      const double flops = 2 * static_cast<double>(m * rows * columns) / time;
      const double bytes = static_cast<double>(w.stored_bytes()) / time;
      fmt::print("{:<22} {:<7} M {:<4} {:8.3f} ms  {:6.2f} GB/s ({:3.0f} %)  {:7.1f} GFLOP/s ({:3.0f} %)\n", name,
                 level.name, m, 1e3 * time, bytes / 1e9, 100 * bytes / limits.bytes, flops / 1e9,
                 100 * flops / limits.flops);
    }
  }
}

Scheme grouped(const ElementType& element, int64_t size, OffsetKind offset = OffsetKind::none) {
  Scheme scheme = {.element = &element, .scale = parameter(Grouping::along(size), plain(DType::f16))};
  scheme.offset_kind = offset;
  if (offset == OffsetKind::zero_point) scheme.offset = parameter(Grouping::along(size), {.element = &element});
  return scheme;
}

}  // namespace
}  // namespace bitwright

int main(int argc, char** argv) {
  using namespace bitwright;
  const size_t rows = argc > 2 ? std::stoul(argv[1]) : 11008, columns = argc > 2 ? std::stoul(argv[2]) : 4096;
  if (argc > 3) set_thread_count(std::stoul(argv[3]));
  const Limits limits = measure_limits();
  fmt::print("{} x {}, {} threads; limits: {:.2f} GB/s, {:.1f} GFLOP/s\n", rows, columns, thread_count(),
             limits.bytes / 1e9, limits.flops / 1e9);
  measure("float32", plain(DType::f32), rows, columns, limits);
  measure("bfloat16", plain(DType::bf16), rows, columns, limits);
  measure("float16", plain(DType::f16), rows, columns, limits);
  measure("int8, channel", grouped(integer_element(8, true), 0), rows, columns, limits);
  measure("int4, group 64", grouped(integer_element(4, true), 64), rows, columns, limits);
  measure("uint4 + zero, group 64", grouped(integer_element(4, false), 64, OffsetKind::zero_point), rows, columns,
          limits);
  measure("nf4, group 64", grouped(*find_element("nf4"), 64), rows, columns, limits);
  measure("float8_e4m3, channel", grouped(float_element(DType::f8_e4m3), 0), rows, columns, limits);
}
