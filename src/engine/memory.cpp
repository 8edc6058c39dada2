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

/// What an engine's table says of the first of `from` that the plan sets: [args|config_file|api|resolved].NAME.
const Json* table_entry(const EnginePlan& plan, const Json& memory, const char* from, const char* table) {
  Json said = {
      {"config_file", plan.config_file}, {"api", plan.api}, {"resolved", plan.resolved}, {"args", Json::object()}};
  for (const Argument& argument : plan.args)
    said["args"][argument.flag.substr(std::min(argument.flag.find_first_not_of('-'), argument.flag.size()))] =
        argument.value;
  for (const Json& path : memory[from])
    if (const Json* value = look_up(said, path.get_ref<const std::string&>()); value != nullptr)
      if (const Json* entry = look_up(memory[table], value_text(*value)); entry != nullptr) return entry;
  return nullptr;
}

const Json* memory_of(const EnginePlan& plan, const Facts& facts) {
  return look_up(facts.get("engines", plan.engine), "memory");
}

/// Bits that the engine gives linear weights while loading; 0: as they are stored.
double bits_at_load(const EnginePlan& plan) {
  if (const Json* flag = look_up(plan.api, "load_in_4bit"); flag != nullptr && *flag == true) return 4.5;
  if (const Json* flag = look_up(plan.api, "load_in_8bit"); flag != nullptr && *flag == true) return 8;
  const Json* memory = memory_of(plan, Facts::standard());
  const Json* bits = memory == nullptr ? nullptr : table_entry(plan, *memory, "weights_from", "weight_bits");
  return bits == nullptr ? 0 : bits->get<double>();
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

/// Keys and values of a head over their numbers, where values take room for a multiple of `step`.
double padding_of(double head, double step) {
  return head > 0 ? (head + std::ceil(head / step) * step) / (2 * head) : 1;
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

double kv_element_bytes(const EnginePlan& plan, int64_t head_dim, const Facts& facts) {
  const Json* memory = memory_of(plan, facts);
  const Json* entry = memory == nullptr ? nullptr : table_entry(plan, *memory, "kv_from", "kv_bytes");
  if (entry == nullptr && memory != nullptr) entry = look_up((*memory)["kv_bytes"], "auto");
  if (entry == nullptr) return 2;
  const double scale = head_dim > 0 ? (*entry)[1].get<double>() / static_cast<double>(head_dim) : 0;
  return (*entry)[0].get<double>() + scale;
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
  // heads are cut over the devices, a latent vector is not
  const double kv_parts = count(model, "kv_lora_rank") > 0
                              ? 1
                              : std::min(parts, std::max(1.0, count(model, "kv_heads", count(model, "heads", parts))));
  const Json* memory = memory_of(plan, Facts::standard());
  const Json nothing = Json::object();
  const Json& facts = memory != nullptr ? *memory : nothing;
  Json cached = model;
  if (!facts.value("kv_windows", true)) cached.erase("sliding_window");  // kept for the whole context all the same
  const int64_t step = std::clamp<int64_t>(facts.value("kv_step", int64_t{1}), 1, 1 << 20);
  const auto values = static_cast<double>(std::clamp<int64_t>(facts.value("value_step", int64_t{1}), 1, 1 << 20));
  const double element = kv_element_bytes(plan, head) * padding_of(static_cast<double>(head), values);
  const auto cache = [&](int64_t context, int64_t batch) {
    const int64_t room = (context + step - 1) / step * step;
    return static_cast<double>(batch) * kv_cache_elements(cached, room) * element / kv_parts;
  };
  estimate.kv_cache_bytes = cache(estimate.context, deployment.batch);
  estimate.kv_bytes_per_token = kv_cache_elements(model, 1) * element / kv_parts;
  // one chunk of prefill: hidden states, the feed-forward's inner ones and the logits of the last token, 16 bits
  const double chunk = facts.value("chunk_tokens", 2048.0), width = facts.value("activation_bytes", 2.0);
  estimate.activation_bytes = width * chunk * (4 * hidden + 2 * count(model, "intermediate_size", 4 * hidden) / parts) +
                              4 * count(model, "vocabulary") * static_cast<double>(deployment.batch);
  estimate.overhead_bytes = facts.value("overhead_gib", 0.0) * 1024 * 1024 * 1024;
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
