#include <cstddef>
#include <cstdint>
#include <span>

#include "base/error.hpp"
#include "checkpoint/safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    uint64_t sum = 0;
    for (const bitwright::StoredArray& array :
         bitwright::parse_safetensors(std::as_bytes(std::span(data, size)), "fuzz"))
      for (const std::byte b : array.data) sum += std::to_integer<uint64_t>(b);
    static volatile uint64_t sink;
    sink = sum;
  } catch (const bitwright::Error&) {
  }
  return 0;
}
