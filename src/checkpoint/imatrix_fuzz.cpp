#include <cstddef>
#include <cstdint>
#include <span>

#include "base/error.hpp"
#include "checkpoint/imatrix.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  double sum = 0;
  try {
    const bitwright::Imatrix imatrix = bitwright::parse_imatrix(std::as_bytes(std::span(data, size)), "fuzz");
    for (const auto& [name, entry] : imatrix.entries)
      for (const float v : bitwright::mean_squares(entry, 0, entry.sums.size())) sum += static_cast<double>(v);
  } catch (const bitwright::Error&) {
  }
  return sum < 0 ? 1 : 0;
}
