#pragma once

#include <fmt/format.h>

#include <cstring>
#include <numeric>
#include <string_view>
#include <vector>

#include "benchmarks/measure.hpp"

namespace bitwright {

/// What one core reads, writes and copies, in GB/s: the limits that figures are compared with.
struct MemoryRates {
  double read, write, copy;  ///< of a copy both directions count
};

inline double gigabytes_a_second(size_t bytes, double seconds) { return static_cast<double>(bytes) / seconds / 1e9; }

constexpr size_t kLimitBytes = size_t{128} << 20;  ///< much more than the caches of one core hold

/// Over two buffers of `bytes`, touched before; prints what it finds.
inline MemoryRates measure_memory(size_t bytes) {
  std::vector<uint64_t> from(bytes / sizeof(uint64_t), 1), to(from.size(), 2);
  uint64_t sum = 0;
  MemoryRates rates = {};
  rates.read =
      gigabytes_a_second(bytes, best_seconds([&] { sum += std::accumulate(from.begin(), from.end(), uint64_t{0}); }));
  rates.write = gigabytes_a_second(bytes, best_seconds([&] { std::iota(to.begin(), to.end(), sum); }));
  rates.copy = gigabytes_a_second(2 * bytes, best_seconds([&] { std::memcpy(to.data(), from.data(), bytes); }));
  fmt::print("one core, {} MiB: reads {:.1f}, writes {:.1f}, copies {:.1f} GB/s (of both directions; sum {})\n",
             bytes >> 20, rates.read, rates.write, rates.copy, sum + to.back());
  return rates;
}

}  // namespace bitwright
