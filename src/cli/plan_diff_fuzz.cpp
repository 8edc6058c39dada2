#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.hpp"
#include "cli/plan_diff.hpp"

// Any JSON may come as the plan that was kept: it is compared or refused, nothing else.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const bitwright::OrderedJson document = bitwright::parse_ordered_json(text, "fuzz");
    const bitwright::OrderedJson empty = bitwright::OrderedJson::object();
    if (!bitwright::is_plan(document)) return 0;
    if (!bitwright::diff_plans(document, document).empty()) __builtin_trap();
    (void)bitwright::diff_plans(document, empty);
    (void)bitwright::diff_plans(empty, document);
  } catch (const bitwright::Error&) {
  }
  return 0;
}
