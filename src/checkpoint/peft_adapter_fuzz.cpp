#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/error.hpp"
#include "checkpoint/peft_adapter.hpp"
#include "checkpoint/safetensors.hpp"

/// adapter_config.json, a zero byte, adapter_model.safetensors.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const uint8_t* const end = data + size;
  const uint8_t* const zero = std::find(data, end, uint8_t{0});
  uint64_t sum = 0;  // every byte is read, so that one outside the file is seen
  try {
    const std::string_view json(reinterpret_cast<const char*>(data), static_cast<size_t>(zero - data));
    const bitwright::PeftLora lora = bitwright::parse_peft_lora(json, "fuzz");
    sum += static_cast<uint64_t>(lora.r) + lora.exclude_modules.size();
  } catch (const bitwright::Error&) {
  }
  if (zero == end) return 0;
  try {
    const std::span<const std::byte> weights = std::as_bytes(std::span(zero + 1, end));
    std::vector<std::string_view> keys;
    const auto arrays = bitwright::parse_safetensors(weights, "fuzz");
    for (const bitwright::StoredArray& array : arrays) {
      keys.push_back(array.name);
      for (const std::byte b : array.data) sum += std::to_integer<uint64_t>(b);
    }
    for (const std::string& path : bitwright::peft_layers(keys)) sum += bitwright::peft_key(path, "lora_B").size();
  } catch (const bitwright::Error&) {
  }
  return sum == UINT64_MAX ? 1 : 0;
}
