#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/error.hpp"
#include "base/json.hpp"
#include "engine/plan.hpp"

/// An engine that somebody else describes: refused with what is wrong, or planned for; never a crash.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bitwright::Facts embedded;
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const bitwright::Json engine = bitwright::parse_json(text, "fuzz");
    bitwright::Facts facts = embedded;
    facts.add("engines/fuzz.json", text);
    for (const char* checkpoint : {"", "gptq"}) {
      bitwright::PlanRequest request{.engine = "fuzz engine"};
      request.hardware = {{"vendor", "nvidia"}, {"sm", 90}};
      request.checkpoint = checkpoint;
      request.model = {{"moe", true}};
      request.fields = {{"gemm_dtype", "fp8"}, {"kvcache_dtype", "fp8"}, {"moe_dtype", "fp8"}};
      request.intent.method = "int4";
      request.parameters = {{"quantization", "fp8"}, {"config.part", "x"}};
      static_cast<void>(bitwright::plan_json(bitwright::plan_engine(request, facts), "MODEL", facts));
    }
  } catch (const bitwright::Error&) {
  }
  return 0;
}
