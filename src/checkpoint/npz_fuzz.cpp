#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>

#include "base/error.hpp"
#include "checkpoint/weight_file.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  uint64_t sum = 0;  // every byte is read, so that one outside the file is seen
  for (const bitwright::WeightFormat* format : bitwright::all_weight_formats()) {
    if (format->name != "npz") continue;
    try {
      const bitwright::WeightContents contents = format->parse(std::as_bytes(std::span(data, size)), "fuzz");
      for (const bitwright::StoredArray& array : contents.arrays)
        for (const std::byte b : array.data) sum += std::to_integer<uint64_t>(b);
    } catch (const bitwright::Error&) {
    }
  }
  return sum == UINT64_MAX ? 1 : 0;
}
