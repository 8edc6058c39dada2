#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>  // facts of the model
#include <optional>
#include <string_view>
#include <vector>

#include "base/json.hpp"
#include "engine/plan.hpp"

namespace bitwright {

/// What is asked of a deployment.
struct Deployment {
  int64_t context = 0;            ///< tokens of one sequence; 0: the model's own limit, at most 8192
  int64_t batch = 1;              ///< sequences at once
  int64_t tensor_parallel = 1;    ///< devices that share every layer
  int64_t pipeline_parallel = 1;  ///< groups of devices that have some layers each
  double memory_bytes = 0;        ///< of one device; 0: unknown
};

/// What it will take, on one device.
struct MemoryEstimate {
  double weights_bytes = 0, kv_cache_bytes = 0, activation_bytes = 0, overhead_bytes = 0, total_bytes = 0;
  double kv_bytes_per_token = 0;  ///< of one sequence, where no window ends it
  double state_bytes = 0;         ///< of layers of linear attention, for all sequences; within kv_cache_bytes
  double usable_bytes = 0;        ///< of the device's memory, what the engine takes as it is configured
  double kv_room_bytes = 0;       ///< what it leaves to the KV cache; negative: not even the weights fit
  int64_t context = 0;
  std::optional<bool> fits{};                           ///< absent: the memory is unknown
  std::optional<int64_t> most_context{}, most_batch{};  ///< that fit, everything else as asked
};

/// Bytes that one element of the plan's KV cache takes, its scales included: the engine's own table (`memory.kv_bytes`:
/// bytes of an element, bytes of the scale that a token's head has); 2 where it says nothing.
double kv_element_bytes(const EnginePlan& plan, int64_t head_dim, const Facts& facts = Facts::standard());

/// KV-cache elements that `tokens` take over all layers: 2 x layers x kv_heads x head_dim, or the latent vector of MLA;
/// layers with a window count up to it, layers of linear attention not at all. 0 if the facts do not say. `parts`:
/// devices of tensor parallelism; heads are cut over them and repeated where there are fewer, a latent vector is whole
/// on each. `windows`: false where the engine keeps what a window has left.
double kv_cache_elements(const Json& model, int64_t tokens, int64_t parts = 1, bool windows = true);

/// Bytes of the recurrent state of linear attention: one a sequence, however long it is.
double linear_state_bytes(const Json& model);

/// Parameters of a decoder with these sizes (config.json), or 0 if the facts do not say; used where no tensor is there.
double parameters_of(const Json& model);

/// What an engine does with memory are facts: its `memory` member. `stored_bytes`: of the weights on disk, 0 if there
/// are none; `plan` says how engine and user change them at load and which KV cache is used.
MemoryEstimate estimate_memory(const Json& model, double stored_bytes, const EnginePlan& plan,
                               const Deployment& deployment, const Facts& facts = Facts::standard());

/// One way to make the weights smaller, with what it takes.
struct SizedMethod {
  std::string_view method;  ///< as in quantization.method; "none": 16 bits
  double bits;              ///< of a linear weight, scales included
  MemoryEstimate estimate;
};
/// The methods from 16 bits down, each with its estimate at this deployment; the first that fits is the one to take.
std::vector<SizedMethod> weigh_methods(const Json& model, double stored_bytes, const EnginePlan& plan,
                                       const Deployment& deployment);

}  // namespace bitwright
