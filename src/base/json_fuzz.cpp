#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.hpp"
#include "base/json.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const std::string written = bitwright::parse_json(text, "fuzz").dump();
    // What was read can be written, and is read as the same. Both kinds take the same texts.
    BW_ASSERT(bitwright::parse_json(written, "written").dump() == written);
    BW_ASSERT(bitwright::parse_ordered_json(text, "fuzz").dump().size() == written.size());
  } catch (const bitwright::Error& error) {
    BW_ASSERT(error.code() == "bad-json" && error.report().where == "fuzz");
  }
  return 0;
}
