#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.hpp"
#include "recipe/config.hpp"
#include "recipe/recipe.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    auto config = bitwright::parse_config_value({reinterpret_cast<const char*>(data), size}, "fuzz");
    if (!config.is_object()) return 0;
    bitwright::check_config(config, "fuzz");
    const std::vector<bitwright::TensorFacts> facts = {
        {.name = "model.layers.0.mlp.down_proj.weight", .shape = {8, 96}}};
    bitwright::resolve(bitwright::read_request(config), facts);
  } catch (const bitwright::Error&) {
  }
  return 0;
}
