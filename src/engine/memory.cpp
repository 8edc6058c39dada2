#include "engine/memory.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "engine/condition.hpp"
#include "engine/parameters.hpp"

namespace bitwright {
namespace {

double count(const Json& model, std::string_view name, double otherwise = 0) {
  const Json* value = look_up(model, name);
  return value != nullptr && value->is_number() ? value->get<double>() : otherwise;
}

/// What the plan sets, for the tables and rules of an engine's `memory`: [args|config_file|api|resolved].NAME.
Json said_by(const EnginePlan& plan) {
  Json said = {
      {"config_file", plan.config_file}, {"api", plan.api}, {"resolved", plan.resolved}, {"args", Json::object()}};
  for (const Argument& argument : plan.args) {
    Json value = argument.value;
    if (value.is_string() && value.get_ref<const std::string&>().starts_with('{'))  // a user's, as it was typed
      if (Json object = Json::parse(value.get_ref<const std::string&>(), nullptr, false); object.is_object())
        value = std::move(object);
    said["args"][std::string(without_dashes(argument.flag))] = std::move(value);
  }
  return said;
}

/// What an engine's table says of the first of `from` that the plan sets.
const Json* table_entry(const EnginePlan& plan, const Json& memory, const char* from, const char* table) {
  const Json *paths = look_up(memory, from), said = said_by(plan);
  if (paths == nullptr) return nullptr;
  for (const Json& path : *paths)
    if (const Json* value = look_up(said, path.get_ref<const std::string&>()); value != nullptr)
      if (const Json* entry = look_up(memory[table], value_text(*value))) return entry;
  return nullptr;
}

const Json* memory_of(const EnginePlan& plan, const Facts& facts) {
  return look_up(facts.get("engines", plan.engine), "memory");
}

/// Bits that the engine gives weights while loading; 0: as they are stored.
struct BitsAtLoad {
  double linear = 0, experts = 0;
};
BitsAtLoad bits_at_load(const EnginePlan& plan, const Facts& facts) {
  if (const Json* flag = look_up(plan.api, "load_in_4bit"); flag != nullptr && *flag == true) return {4.5, 4.5};
  if (const Json* flag = look_up(plan.api, "load_in_8bit"); flag != nullptr && *flag == true) return {8, 8};
  const Json* memory = memory_of(plan, facts);
  if (memory == nullptr) return {};
  const auto bits = [&](const char* from, const char* table) {
    const Json* entry = table_entry(plan, *memory, from, table);
    return entry == nullptr ? 0.0 : entry->get<double>();
  };
  const double linear = bits("weights_from", "weight_bits");
  return {linear, memory->contains("experts_from") ? bits("experts_from", "expert_bits") : linear};
}

/// The first row of memory.NAME that holds, as a number; `otherwise` without such a row.
double rule_value(const Json* memory, const char* name, const Json& said, double otherwise) {
  const Json* rows = memory == nullptr ? nullptr : look_up(*memory, name);
  if (rows == nullptr) return otherwise;
  for (const Json& row : *rows) {
    if (row.contains("when") && !holds(row["when"], said)) continue;
    const Json value = fill(row["is"], said);
    if (value.is_number()) return value.get<double>();
    if (!value.is_string()) continue;
    const Json number = Json::parse(value.get_ref<const std::string&>(), nullptr, false);  // as on a command line
    if (number.is_number() && std::isfinite(number.get<double>())) return number.get<double>();
  }
  return otherwise;
}

double latent_attention_parameters(const Json& model) {
  const double hidden = count(model, "hidden_size"), heads = count(model, "heads"),
               latent = count(model, "kv_lora_rank");
  const double rope = count(model, "qk_rope_head_dim"),
               nope = count(model, "qk_nope_head_dim", count(model, "head_dim"));
  const double value = count(model, "v_head_dim", nope), rank = count(model, "q_lora_rank");
  const double query = rank > 0 ? hidden * rank + rank * heads * (nope + rope) : hidden * heads * (nope + rope);
  const double index_heads = count(model, "index_heads"), index = count(model, "index_head_dim");
  const double indexer = index_heads * index * rank + hidden * (index + index_heads);
  return query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden + indexer;
}

/// Heads and sizes of one layer's keys and values.
struct Heads {
  double kv, key, value;
};
Heads heads_of(const Json& model, bool sliding) {
  const double kv = count(model, "kv_heads", count(model, "heads")), head = count(model, "head_dim");
  const double value = count(model, "v_head_dim", head);
  if (sliding) return {count(model, "sliding_kv_heads", kv), head, value};
  return {count(model, "full_kv_heads", kv), count(model, "full_head_dim", head), count(model, "full_head_dim", value)};
}

double full_attention_parameters(const Json& model, bool sliding) {
  const double hidden = count(model, "hidden_size"), heads = count(model, "heads");
  const Heads h = heads_of(model, sliding);
  const double gate = look_up(model, "output_gate") != nullptr ? 2 : 1;  // computed beside the queries
  return hidden * (gate * heads * h.key + h.kv * (h.key + h.value) + heads * h.value);
}

/// Gated DeltaNet: queries, keys, values and gate, two numbers a head, a short convolution, the way out.
double linear_attention_parameters(const Json& model) {
  const double hidden = count(model, "hidden_size"),
               keys = count(model, "linear_key_heads") * count(model, "linear_key_dim");
  const double value_heads = count(model, "linear_value_heads"),
               values = value_heads * count(model, "linear_value_dim");
  if (values == 0) return full_attention_parameters(model, false);
  return hidden * (2 * keys + 2 * values + 2 * value_heads) + (2 * keys + values) * count(model, "linear_kernel") +
         values * hidden;
}

double all_attention_parameters(const Json& model) {
  const double layers = count(model, "layers");
  if (count(model, "kv_lora_rank") > 0) return layers * latent_attention_parameters(model);
  const double linear = std::min(layers, count(model, "linear_layers"));
  const double sliding = std::min(layers - linear, count(model, "sliding_layers"));
  return linear * linear_attention_parameters(model) + sliding * full_attention_parameters(model, true) +
         (layers - linear - sliding) * full_attention_parameters(model, false);
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

/// One table of the vocabulary: the embeddings, or the head.
double table_parameters(const Json& model) { return count(model, "vocabulary") * count(model, "hidden_size"); }
double tables(const Json& model) { return look_up(model, "tied") != nullptr ? 1 : 2; }

/// Sizes of a mixture's experts, as config.json has them.
double expert_parameters(const Json& model) {
  const double layers = count(model, "layers"), experts = count(model, "experts");
  if (experts <= 1) return 0;
  const double inner = count(model, "moe_intermediate_size", count(model, "intermediate_size"));
  const double matrices = look_up(model, "ungated") != nullptr ? 2 : 3;
  return (layers - std::min(layers, count(model, "dense_layers"))) * matrices * count(model, "hidden_size") * experts *
         inner;
}

/// What is kept beside a group's codes: 8 bits in the microscaling formats and NVFP4, scale and bias in MLX's affine
/// one, else a 16-bit scale.
double bits_of_group(const Json& model) {
  for (const char* name : {"scheme", "quant_algo", "mode"})
    if (const Json* fact = look_up(model, name); fact != nullptr && fact->is_string())
      for (const auto& [format, bits] : {std::pair{"MXFP", 8}, {"mxfp", 8}, {"NVFP4", 8}, {"nvfp4", 8}, {"affine", 32}})
        if (fact->get_ref<const std::string&>().find(format) != std::string::npos) return bits;
  return 16;
}

/// Of a checkpoint without files: what it declares for its linear layers; embeddings and head are 16 bits, but MLX's.
double declared_bytes(const Json& model) {
  const double declared = count(model, "bits"), group = count(model, "group_size"), all = parameters_of(model);
  const double bits = declared > 0 ? declared + (group > 0 ? bits_of_group(model) / group : 0) : 16;
  const double kept = look_up(model, "mode") != nullptr ? 0 : std::min(all, tables(model) * table_parameters(model));
  return 2 * kept + (all - kept) * bits / 8;
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

double kv_cache_elements(const Json& model, int64_t tokens, int64_t parts, bool windows) {
  const double layers = count(model, "layers"), length = static_cast<double>(tokens);
  const double linear = std::min(layers, count(model, "linear_layers"));
  const double sliding = std::min(layers - linear, count(model, "sliding_layers"));
  const double window = count(model, "sliding_window"), latent = count(model, "kv_lora_rank");
  const double kept = windows && window > 0 ? std::min(window, length) : length;
  const auto width = [&](bool slides) {
    if (latent > 0) return latent + count(model, "qk_rope_head_dim");
    const Heads h = heads_of(model, slides);
    return std::ceil(h.kv / static_cast<double>(std::max<int64_t>(1, parts))) * (h.key + h.value);
  };
  return (layers - linear - sliding) * width(false) * length + sliding * width(true) * kept;
}

double linear_state_bytes(const Json& model) {
  const double keys = count(model, "linear_key_heads") * count(model, "linear_key_dim");
  const double value_heads = count(model, "linear_value_heads"), value = count(model, "linear_value_dim");
  const double matrix = value_heads * value * count(model, "linear_key_dim");
  const double convolution = (2 * keys + value_heads * value) * std::max(0.0, count(model, "linear_kernel") - 1);
  constexpr double kMatrix = 4, kConvolution = 2;  // bytes: the state is kept in 32 bits
  return count(model, "linear_layers") * (matrix * kMatrix + convolution * kConvolution);
}

double parameters_of(const Json& model) {
  const double hidden = count(model, "hidden_size"), layers = count(model, "layers");
  const double vocabulary = count(model, "vocabulary"), inner = count(model, "intermediate_size");
  const double expert = count(model, "moe_intermediate_size", inner), experts = count(model, "experts");
  if (hidden == 0 || layers == 0 || vocabulary == 0 || expert == 0) return 0;
  const double matrices = look_up(model, "ungated") != nullptr ? 2 : 3;
  const double dense = experts <= 1 || look_up(model, "dense_beside_experts") != nullptr
                           ? layers
                           : std::min(layers, count(model, "dense_layers"));
  const double sparse_layers = experts > 1 ? layers - std::min(layers, count(model, "dense_layers")) : 0;
  const double shared = count(model, "shared_intermediate_size", count(model, "shared_experts") * expert);
  const double sparse = expert_parameters(model) + sparse_layers * (matrices * hidden * shared + hidden * experts);
  const double embeddings = tables(model) * table_parameters(model);
  const double positions = look_up(model, "learned_positions") != nullptr ? count(model, "context") * hidden : 0;
  return embeddings + positions + all_attention_parameters(model) + dense * matrices * hidden * inner + sparse;
}

std::vector<SizedMethod> weigh_methods(const Json& model, double stored_bytes, const EnginePlan& plan,
                                       const Deployment& deployment) {
  constexpr std::array<std::pair<std::string_view, double>, 5> kMethods = {
      {{"none", 16}, {"int8", 8}, {"int4", 4.5}, {"int3", 3.5}, {"int2", 2.5}}};  // groups of 64, scale and zero point
  const Json* dtype = look_up(model, "dtype");
  const double width = dtype != nullptr && *dtype == "float32" ? 4 : 2;
  const double parameters = stored_bytes > 0 ? stored_bytes / width : parameters_of(model);
  const double kept = std::min(parameters, tables(model) * table_parameters(model));
  std::vector<SizedMethod> options;
  for (const auto& [method, bits] : kMethods)
    options.push_back(
        {method, bits, estimate_memory(model, 2 * kept + (parameters - kept) * bits / 8, plan, deployment)});
  return options;
}

namespace {

/// Of one device: what is stored, as engine and user change it at load, shared by all.
double weights_on_device(const Json& model, double stored_bytes, const EnginePlan& plan, const Deployment& deployment,
                         const Facts& facts) {
  double bytes = stored_bytes > 0 ? stored_bytes : declared_bytes(model);
  // embeddings and head stay as they are, 16 bits
  const double table = 2 * table_parameters(model), ends = tables(model) * table;
  if (count(model, "bits") == 0 && bytes > ends) {
    const auto [linear, experts] = bits_at_load(plan, facts);
    const double of_experts = std::min(2 * expert_parameters(model), bytes - ends);
    const auto loaded = [](double stored, double bits) { return bits > 0 ? stored * bits / 16 : stored; };
    bytes = ends + loaded(bytes - ends - of_experts, linear) + loaded(of_experts, experts);
  }
  // the stage with the most layers; at least one of the first and the last holds a table of the vocabulary besides
  const auto stages = static_cast<double>(std::max<int64_t>(1, deployment.pipeline_parallel));
  const double layers = std::max(1.0, count(model, "layers", stages));
  if (stages > 1 && bytes > ends) bytes = (bytes - ends) * std::ceil(layers / stages) / layers + table;
  return bytes / static_cast<double>(std::max<int64_t>(1, deployment.tensor_parallel));
}

/// What the engine does with the device's memory, by its facts.
struct Budget {
  double usable, kv_share, reserved, prefill_tokens, logit_rows, overhead, activation_bytes;
};
Budget budget_of(const Json* memory, Json said, const Deployment& deployment, const MemoryEstimate& estimate) {
  constexpr double kGib = 1024.0 * 1024 * 1024;
  said["tensor_parallel"] = deployment.tensor_parallel;
  said["context"] = estimate.context;
  said["tokens"] = estimate.context * deployment.batch;
  said["batch"] = deployment.batch;
  if (deployment.memory_bytes > 0) said["memory_gib"] = deployment.memory_bytes / kGib;
  Budget budget{};
  budget.usable = std::clamp(rule_value(memory, "usable", said, 1), 0.0, 1.0);
  budget.kv_share = std::clamp(rule_value(memory, "kv_share", said, 1), 0.0, 1.0);
  budget.reserved = kGib * rule_value(memory, "reserved_gib", said, 0);
  budget.prefill_tokens = std::max(1.0, rule_value(memory, "prefill_tokens", said, 2048));
  budget.logit_rows = std::max(1.0, rule_value(memory, "logit_rows", said, static_cast<double>(deployment.batch)));
  budget.overhead = kGib * (memory == nullptr ? 0 : memory->value("overhead_gib", 0.0));
  budget.activation_bytes = memory == nullptr ? 2 : memory->value("activation_bytes", 2.0);
  return budget;
}

/// One chunk of prefill: hidden states and what stands between a feed-forward's matrices; logits in 32 bits.
double activations_on_device(const Json& model, const Budget& budget, double parts) {
  const double hidden = count(model, "hidden_size"), chosen = count(model, "experts_per_token");
  double inner = 2 * count(model, "intermediate_size", 4 * hidden) / parts;
  if (count(model, "experts") > 1 && chosen > 0)
    inner = std::max(inner, chosen * (3 * count(model, "moe_intermediate_size", 0) / parts + hidden));
  return budget.activation_bytes * budget.prefill_tokens * (4 * hidden + inner) +
         4 * count(model, "vocabulary") * budget.logit_rows;
}

}  // namespace

MemoryEstimate estimate_memory(const Json& model, double stored_bytes, const EnginePlan& plan,
                               const Deployment& deployment, const Facts& facts) {
  MemoryEstimate estimate;
  constexpr int64_t kContext = 8192;
  const auto limit = static_cast<int64_t>(count(model, "context", kContext));
  estimate.context = deployment.context > 0 ? deployment.context : std::min(limit, kContext);
  const Json* memory = memory_of(plan, facts);
  const Budget budget = budget_of(memory, said_by(plan), deployment, estimate);
  const auto stages = static_cast<double>(std::max<int64_t>(1, deployment.pipeline_parallel));
  const double layers = std::max(1.0, count(model, "layers", stages));
  const double of_layers = std::ceil(layers / stages) / layers;
  const double bytes = kv_element_bytes(plan, static_cast<int64_t>(count(model, "head_dim")), facts);
  // where values are kept in steps of tokens and of a head's numbers
  const auto step_of = [&](const char* name) {
    return std::clamp<int64_t>(memory == nullptr ? 1 : memory->value(name, int64_t{1}), 1, 1 << 20);
  };
  const int64_t step = step_of("kv_step");
  const double padding = padding_of(count(model, "head_dim"), static_cast<double>(step_of("value_step")));
  const double element = bytes * padding;
  const bool windows = memory == nullptr || memory->value("windows", true);
  const double index =
      count(model, "index_head_dim");  // a key of 8 bits and its scale, for the search of sparse attention
  const double state =
      linear_state_bytes(model) / static_cast<double>(std::max<int64_t>(1, deployment.tensor_parallel));
  const auto cache = [&](int64_t context, int64_t batch) {
    const double indexer = index > 0 ? static_cast<double>(context) * layers * (index + 4) : 0;
    const int64_t room = (context + step - 1) / step * step;
    const double tokens = kv_cache_elements(model, room, deployment.tensor_parallel, windows) * element;
    return static_cast<double>(batch) * (tokens + indexer + state) * of_layers;
  };
  estimate.weights_bytes = weights_on_device(model, stored_bytes, plan, deployment, facts);
  estimate.kv_cache_bytes = cache(estimate.context, deployment.batch);
  estimate.kv_bytes_per_token = (cache(step, 1) - state * of_layers) / static_cast<double>(step);
  estimate.state_bytes = static_cast<double>(deployment.batch) * state * of_layers;
  estimate.activation_bytes =
      activations_on_device(model, budget, static_cast<double>(std::max<int64_t>(1, deployment.tensor_parallel)));
  estimate.overhead_bytes = budget.overhead;
  estimate.total_bytes =
      estimate.weights_bytes + estimate.activation_bytes + estimate.overhead_bytes + estimate.kv_cache_bytes;
  if (deployment.memory_bytes <= 0) return estimate;
  estimate.usable_bytes = deployment.memory_bytes * budget.usable;
  const double other = std::max(budget.reserved, estimate.activation_bytes + estimate.overhead_bytes);
  estimate.kv_room_bytes = (estimate.usable_bytes - estimate.weights_bytes - other) * budget.kv_share;
  const auto fits = [&](int64_t context, int64_t batch) { return cache(context, batch) <= estimate.kv_room_bytes; };
  estimate.fits = fits(estimate.context, deployment.batch);
  estimate.most_context = largest(limit, [&](int64_t n) { return fits(n, deployment.batch); });
  estimate.most_batch = largest(1 << 20, [&](int64_t n) { return fits(estimate.context, n); });
  return estimate;
}

}  // namespace bitwright
