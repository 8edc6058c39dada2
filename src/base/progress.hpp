#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace bitwright {

/// How much the program says on stderr: -q gives errors only, -v adds details.
enum class Verbosity { quiet, normal, verbose };
void set_verbosity(Verbosity verbosity);
Verbosity verbosity();

/// A line on stderr that is redrawn: label, share done, remaining time. Nothing is shown where stderr is no terminal
/// or the program is quiet. Not thread-safe.
class Progress {
 public:
  Progress(std::string label, uint64_t total);
  ~Progress();  ///< clears the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void advance(uint64_t amount);

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_;
  uint64_t total_, done_ = 0;
  bool shown_;
  Clock::time_point start_ = Clock::now(), drawn_ = start_;
};

/// Seconds left after `done` of `total` took `elapsed_seconds`, at the same pace.
double remaining_seconds(uint64_t done, uint64_t total, double elapsed_seconds);
std::string format_duration(double seconds);  ///< "1h02m", "3m10s", "12s"
std::string format_bytes(uint64_t bytes);     ///< "8.40 MB"

}  // namespace bitwright
