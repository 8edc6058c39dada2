#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.hpp"
#include "bitwright/torch/training_config.hpp"
#include "recipe/config.hpp"

/// A configuration that is accepted is printed as one that reads back the same.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace bitwright;
  try {
    const OrderedJson yaml = parse_config_value({reinterpret_cast<const char*>(data), size}, "fuzz");
    const TrainingConfig config = TrainingConfig::from_json(yaml);
    BW_ASSERT(TrainingConfig::from_json(config.to_json()).hash() == config.hash());
    BW_ASSERT(incompatible_key(config, config).empty());
  } catch (const Error&) {
  }
  return 0;
}
