#include "engine/memory.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "engine/condition.hpp"

namespace bitwright {
namespace {

double count(const Json& model, std::string_view name, double otherwise = 0) {
  const Json* value = look_up(model, name);
  return value != nullptr && value->is_number() ? value->get<double>() : otherwise;
}

/// The KV cache's type: what the plan resolves, whatever the engine calls its flag.
std::string kv_type(const EnginePlan& plan) {
  if (const Json* type = look_up(plan.resolved, "kv_cache_dtype"); type != nullptr && type->is_string())
    return type->get<std::string>();
  constexpr std::array kFlags = {"--kv-cache-dtype", "--kv_cache_dtype", "--cache-type-k", "--quant-policy",
                                 "--kv-bits"};
  for (const Argument& argument : plan.args)
    if (std::ranges::find(kFlags, argument.flag) != kFlags.end()) return value_text(argument.value);
  if (const Json* type = look_up(plan.config_file, "kv_cache_config.dtype"); type != nullptr) return value_text(*type);
  if (const Json* bits = look_up(plan.api, "cache_config.nbits"); bits != nullptr) return value_text(*bits);
  return "auto";
}

/// Bits that the engine gives linear weights while loading; 0: as they are stored.
double bits_at_load(const EnginePlan& plan) {
  std::string method;
  constexpr std::array kFlags = {"--quantization", "--quantize", "--model-format"};
  for (const Argument& argument : plan.args)
    if (std::ranges::find(kFlags, argument.flag) != kFlags.end()) method = value_text(argument.value);
  if (const Json* name = look_up(plan.api, "class"); name != nullptr) {
    if (look_up(plan.api, "load_in_4bit") != nullptr) return 4.5;
    if (look_up(plan.api, "load_in_8bit") != nullptr || name->get<std::string>().find("FP8") != std::string::npos)
      return 8;
  }
  if (method.find("nf4") != std::string::npos || method.find("fp4") != std::string::npos || method == "bitsandbytes" ||
      method == "bnb-4bit")
    return 4.5;  // a scale for 32 or 64 of them
  if (method.find('8') != std::string::npos || method == "eetq") return 8;
  return 0;
}

double attention_parameters(const Json& model) {
  const double hidden = count(model, "hidden_size"), heads = count(model, "heads"), head = count(model, "head_dim");
  const double latent = count(model, "kv_lora_rank");
  if (latent == 0) return hidden * head * (2 * heads + 2 * count(model, "kv_heads", heads));
  const double rope = count(model, "qk_rope_head_dim"), nope = count(model, "qk_nope_head_dim", head);
  const double value = count(model, "v_head_dim", nope), rank = count(model, "q_lora_rank");
  const double query = rank > 0 ? hidden * rank + rank * heads * (nope + rope) : hidden * heads * (nope + rope);
  return query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden;
}

/// The largest n for which `fits(n)`, below `most`; 0 if not even 1 does. `fits` must hold up to some n only.
template <class Fits>
int64_t largest(int64_t most, Fits fits) {
  int64_t low = 0, high = most;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (fits(middle))
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace

double kv_element_bytes(std::string_view type, int64_t head_dim) {
  const double scale = head_dim > 0 ? 4.0 / static_cast<double>(head_dim) : 0;  // float32, one for each token and head
  struct Row {
    std::string_view name;
    double bytes;
    bool scaled;
  };
  constexpr std::array<Row, 30> kRows = {{{"auto", 2, false},
                                          {"float32", 4, false},
                                          {"f32", 4, false},
                                          {"fp8", 1, false},
                                          {"fp8_e4m3", 1, false},
                                          {"fp8_e4m3fn", 1, false},
                                          {"fp8_e5m2", 1, false},
                                          {"fp8_ds_mla", 1, false},
                                          {"16", 1, false},  // LMDeploy's policies
                                          {"17", 1, false},
                                          {"fp8_per_token_head", 1, true},
                                          {"int8_per_token_head", 1, true},
                                          {"int4_per_token_head", 0.5, true},
                                          {"8", 1, true},
                                          {"int8", 1, true},
                                          {"4", 0.5, true},
                                          {"int4", 0.5, true},
                                          {"2", 0.25, true},
                                          {"mxfp8", 33.0 / 32, false},
                                          {"nvfp4", 0.5625, false},
                                          {"nvfp4_4over6", 0.5625, false},
                                          {"fp4_mx_block16", 0.5625, false},
                                          {"turboquant_k8v4", 0.75, true},
                                          {"turboquant_4bit_nc", 0.5, true},
                                          {"q8_0", 34.0 / 32, false},
                                          {"q5_1", 24.0 / 32, false},
                                          {"q5_0", 22.0 / 32, false},
                                          {"q4_1", 20.0 / 32, false},
                                          {"q4_0", 18.0 / 32, false},
                                          {"iq4_nl", 18.0 / 32, false}}};
  const auto* row = std::ranges::find(kRows, type, &Row::name);
  return row == kRows.end() ? 2 : row->bytes + (row->scaled ? scale : 0);
}

double kv_cache_elements(const Json& model, int64_t tokens) {
  const double layers = count(model, "layers"), length = static_cast<double>(tokens);
  const double latent = count(model, "kv_lora_rank");
  const double heads = count(model, "kv_heads", count(model, "heads"));
  const double width = latent > 0 ? latent + count(model, "qk_rope_head_dim") : 2 * heads * count(model, "head_dim");
  const double sliding = count(model, "sliding_layers"), linear = count(model, "linear_layers");
  const double window = count(model, "sliding_window");
  const double full = std::max(0.0, layers - sliding - linear);
  return width * (full * length + sliding * (window > 0 ? std::min(window, length) : length));
}

double parameters_of(const Json& model) {
  const double hidden = count(model, "hidden_size"), layers = count(model, "layers");
  const double vocabulary = count(model, "vocabulary"), inner = count(model, "intermediate_size");
  const double expert = count(model, "moe_intermediate_size", inner), experts = count(model, "experts");
  if (hidden == 0 || layers == 0 || vocabulary == 0 || expert == 0) return 0;
  const double dense = experts > 1 ? std::min(layers, count(model, "dense_layers")) : layers;
  const double sparse = (layers - dense) * (experts + count(model, "shared_experts")) * 3 * hidden * expert;
  const double embeddings = (look_up(model, "tied") != nullptr ? 1 : 2) * vocabulary * hidden;
  return embeddings + layers * attention_parameters(model) + dense * 3 * hidden * inner + sparse;
}

std::vector<SizedMethod> weigh_methods(const Json& model, double stored_bytes, const EnginePlan& plan,
                                       const Deployment& deployment) {
  constexpr std::array<std::pair<std::string_view, double>, 5> kMethods = {
      {{"none", 16}, {"int8", 8}, {"int4", 4.5}, {"int3", 3.5}, {"int2", 2.5}}};  // groups of 64, scale and zero point
  const Json* dtype = look_up(model, "dtype");
  const double width = dtype != nullptr && *dtype == "float32" ? 4 : 2;
  const double parameters = stored_bytes > 0 ? stored_bytes / width : parameters_of(model);
  const double kept = std::min(parameters, 2 * count(model, "vocabulary") * count(model, "hidden_size"));
  std::vector<SizedMethod> options;
  for (const auto& [method, bits] : kMethods)
    options.push_back(
        {method, bits, estimate_memory(model, 2 * kept + (parameters - kept) * bits / 8, plan, deployment)});
  return options;
}

MemoryEstimate estimate_memory(const Json& model, double stored_bytes, const EnginePlan& plan,
                               const Deployment& deployment) {
  MemoryEstimate estimate;
  const auto parts = static_cast<double>(std::max<int64_t>(1, deployment.tensor_parallel));
  const auto head = static_cast<int64_t>(count(model, "head_dim"));
  const double hidden = count(model, "hidden_size");
  // without files: what the checkpoint declares, a 16-bit scale for each group, else 16 bits
  const double declared = count(model, "bits"), group = count(model, "group_size");
  const double bits = declared > 0 ? declared + (group > 0 ? 16 / group : 0) : 16;
  estimate.weights_bytes = stored_bytes > 0 ? stored_bytes : parameters_of(model) * bits / 8;
  if (const double at_load = bits_at_load(plan); at_load > 0 && declared == 0) {
    const double kept = 2 * 2 * count(model, "vocabulary") * hidden;  // embeddings and head stay as they are, 16 bits
    if (estimate.weights_bytes > kept) estimate.weights_bytes = kept + (estimate.weights_bytes - kept) * at_load / 16;
  }
  estimate.weights_bytes /= parts;
  constexpr int64_t kContext = 8192;
  const auto limit = static_cast<int64_t>(count(model, "context", kContext));
  estimate.context = deployment.context > 0 ? deployment.context : std::min(limit, kContext);
  const double element = kv_element_bytes(kv_type(plan), head);
  // heads are cut over the devices, a latent vector is not
  const double kv_parts = count(model, "kv_lora_rank") > 0
                              ? 1
                              : std::min(parts, std::max(1.0, count(model, "kv_heads", count(model, "heads", parts))));
  const auto cache = [&](int64_t context, int64_t batch) {
    return static_cast<double>(batch) * kv_cache_elements(model, context) * element / kv_parts;
  };
  estimate.kv_cache_bytes = cache(estimate.context, deployment.batch);
  estimate.kv_bytes_per_token = kv_cache_elements(model, 1) * element / kv_parts;
  // one chunk of prefill: hidden states, the feed-forward's inner ones and the logits of the last token, 16 bits
  constexpr double kChunk = 2048;
  estimate.activation_bytes = 2 * kChunk * (4 * hidden + 2 * count(model, "intermediate_size", 4 * hidden) / parts) +
                              4 * count(model, "vocabulary") * static_cast<double>(deployment.batch);
  const Json& memory = Facts::standard().get("engines", plan.engine);
  estimate.overhead_bytes =
      memory.contains("memory") ? memory["memory"].value("overhead_gib", 0.0) * 1024 * 1024 * 1024 : 0;
  const double fixed = estimate.weights_bytes + estimate.activation_bytes + estimate.overhead_bytes;
  estimate.total_bytes = fixed + estimate.kv_cache_bytes;
  if (deployment.memory_bytes > 0) {
    estimate.fits = estimate.total_bytes <= deployment.memory_bytes;
    const double left = deployment.memory_bytes - fixed;
    estimate.most_context = largest(limit, [&](int64_t n) { return cache(n, deployment.batch) <= left; });
    estimate.most_batch = largest(1 << 20, [&](int64_t n) { return cache(estimate.context, n) <= left; });
  }
  return estimate;
}

}  // namespace bitwright
