#pragma once

#include <algorithm>
#include <ctime>
#include <functional>
#include <limits>

namespace bitwright {

/// Processor time of this process, all threads: other work on the machine counts little.
inline double processor_seconds() {
  timespec now = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// Processor seconds of the best of `runs`, after one that warms up: other work on the machine only ever adds.
inline double best_seconds(const std::function<void()>& work, int runs = 9) {
  work();
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < runs; ++i) {
    const double from = processor_seconds();
    work();
    best = std::min(best, processor_seconds() - from);
  }
  return best;
}

}  // namespace bitwright
