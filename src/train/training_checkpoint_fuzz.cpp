// training.json of a checkpoint.
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.hpp"
#include "recipe/config.hpp"
#include "train/run_directory.hpp"
#include "train/training_checkpoint.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace bitwright;
  try {
    const OrderedJson facts = parse_ordered_json({reinterpret_cast<const char*>(data), size}, "fuzz");
    train::check_training_facts(facts, "fuzz");
    const train::RunFacts read = train::read_run_facts(facts, "fuzz");
    BW_ASSERT(read.step >= 0 && read.windows >= 0 && read.tokens >= 0);
    for (const auto& [name, count] : read.optimizer_steps) BW_ASSERT(count >= 0);
  } catch (const Error&) {
  }
  return 0;
}
