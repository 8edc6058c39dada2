#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string_view>

#include "base/error.hpp"
#include "engine/detect.hpp"
#include "engine/memory.hpp"
#include "engine/parallel.hpp"
#include "engine/stored.hpp"

namespace {

using bitwright::Json;

/// Arrays as a weight file may list them: {"name": ["I32", [512, 14336], "bytes"]}. A file's reader has checked sizes.
std::vector<bitwright::StoredArray> arrays_of(const Json& listed) {
  std::vector<bitwright::StoredArray> arrays;
  if (!listed.is_object()) return arrays;
  using enum bitwright::DType;
  static const std::map<std::string, bitwright::DType> kTypes = {{"F32", f32},    {"F16", f16}, {"BF16", bf16},
                                                                 {"F8", f8_e4m3}, {"I64", i64}, {"I32", i32},
                                                                 {"I8", i8},      {"U8", u8},   {"U32", u32}};
  for (const auto& [name, array] : listed.items()) {
    if (!array.is_array() || array.size() < 2 || !array[0].is_string() || !array[1].is_array()) continue;
    const auto type = kTypes.find(array[0].get<std::string>());
    if (type == kTypes.end() || array[1].size() > 4) continue;
    bitwright::StoredArray stored = {name, type->second, {}, {}};
    for (const Json& size : array[1])
      stored.shape.push_back(size.is_number_unsigned() ? static_cast<int64_t>(size.get<uint64_t>() % 32768) : 0);
    if (array.size() > 2 && array[2].is_string())
      stored.data = std::as_bytes(std::span(array[2].get_ref<const std::string&>()));
    arrays.push_back(std::move(stored));
  }
  return arrays;
}

void lint_arrays(const Json& document, const bitwright::PlanRequest& request) {
  const auto found = document.find("arrays");
  if (found == document.end()) return;
  const auto metadata = document.find("metadata");
  const bool gguf = metadata != document.end() && metadata->is_object();
  const auto arrays = arrays_of(*found);
  auto stored = bitwright::read_stored(arrays, gguf ? &*metadata : nullptr);
  bitwright::apply_declared(stored.quantization, stored.modules);
  bitwright::PlanRequest asked = request;
  asked.model.update(stored.model);
  asked.checkpoint = stored.quantization.method;
  asked.parameters = {{"tensor_parallel", "auto"}};
  std::vector<bitwright::Diagnostic> said;
  const bitwright::Deployed deployed = {.modules = stored.modules, .deployment = {.memory_bytes = 1e10}, .devices = 8};
  asked = bitwright::derive_parallel(std::move(asked), deployed, said);
  const auto plan = bitwright::plan_engine(asked);
  bitwright::check_parallel(asked, plan, 8);
  for (const auto& diagnostic : bitwright::lint_modules(stored.modules, asked, plan))
    if (diagnostic.code.empty() || diagnostic.message.empty()) __builtin_trap();
}

}  // namespace

/// The small files of a model from anywhere, and what its weight files list: whatever they say, a plan is made of it.
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
      if (document.is_object()) lint_arrays(document, request);
    }
  } catch (const bitwright::Error&) {
  }
  return 0;
}
