#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/error.hpp"
#include "engine/detect.hpp"
#include "engine/memory.hpp"

/// The small files of a model from anywhere: whatever they say, a plan is made of it.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const bitwright::Json document = bitwright::parse_json(text, "fuzz");
    for (const char* name : {"config.json", "hf_quant_config.json", "quantize_config.json"}) {
      const auto found = bitwright::detect_model_quantization({{name, document}}, "fuzz-awq");
      bitwright::PlanRequest request{.engine = "vllm"};
      request.checkpoint = found.method;
      request.model = bitwright::model_facts(document);
      request.model.update(found.facts);
      request.fields = {{"kvcache_dtype", "fp8"}};
      const auto plan = bitwright::plan_engine(request);
      bitwright::estimate_memory(request.model, 0, plan, {.batch = 4, .memory_bytes = 1e9});
    }
  } catch (const bitwright::Error&) {
  }
  return 0;
}
