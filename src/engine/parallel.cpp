#include "engine/parallel.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "engine/condition.hpp"
#include "engine/parameters.hpp"

namespace bitwright {
namespace {

/// The kinds of parallelism, in the order in which they are tried.
struct Kind {
  std::string_view name;    ///< for every engine: "tensor_parallel"
  std::string_view member;  ///< of the engine's `parallel`
  int64_t Parallelism::*degree;
};
constexpr std::array<Kind, 3> kKinds = {{{"tensor_parallel", "tensor", &Parallelism::tensor},
                                         {"pipeline_parallel", "pipeline", &Parallelism::pipeline},
                                         {"expert_parallel", "expert", &Parallelism::expert}}};

const Json* own_flag(const Json& engine, const Kind& kind) {
  const Json* parallel = look_up(engine, "parallel");
  return parallel == nullptr ? nullptr : look_up(*parallel, kind.member);
}
/// The engine's expert parallelism is a switch: all devices share the experts.
bool is_switch(const Json& engine) {
  const Json* parallel = look_up(engine, "parallel");
  return parallel != nullptr && parallel->value("expert_is_switch", false);
}

int64_t degree_of(const Json& value) {
  constexpr size_t kDigits = 6;
  const std::string text = value_text(value);
  const bool number = !text.empty() && text.size() <= kDigits && text.find_first_not_of("0123456789") == text.npos;
  return number ? std::max<int64_t>(1, std::stoll(text)) : 1;
}

int64_t model_fact(const PlanRequest& request, std::string_view name) {
  const Json* value = look_up(request.model, name);
  return value != nullptr && value->is_number_integer() ? value->get<int64_t>() : 0;
}

Diagnostic refused(std::string what, std::vector<std::string> instead) {
  return {.code = "PARALLEL_SPLIT", .message = std::move(what), .instead = std::move(instead)};
}

/// Which of the user's parameters is meant by a kind: its neutral name, or the engine's flag or an alias of it.
bool is_of(const Json& engine, std::string_view entry, const Kind& kind, const std::string& parameter) {
  if (plain_flag(parameter) == plain_flag(kind.name)) return true;
  const Json* flag = own_flag(engine, kind);
  const Json* row = flag == nullptr ? nullptr : find_flag(engine, parameter, entry);
  return row != nullptr && (*row)["flag"] == *flag;
}

/// What of a plan parallelism could have caused, so that another degree would not have it.
bool is_of_parallelism(const Diagnostic& diagnostic) {
  constexpr std::array<std::string_view, 5> kCodes = {"PARALLEL_SPLIT", "GROUP_CUT", "TILE_SIZE", "DESC_ACT",
                                                      "TOO_FEW_DEVICES"};
  return diagnostic.severity == Severity::error && std::ranges::find(kCodes, diagnostic.code) != kCodes.end();
}

class Search {
 public:
  Search(PlanRequest request, const Deployed& deployed, const Facts& known)
      : request_(std::move(request)),
        deployed_(deployed),
        known_(known),
        engine_(known.get("engines", request_.engine)) {}

  /// The user's numbers, the engine's flags for neutral names, and which kinds are to be derived.
  void read_parameters();
  /// The first parallelism that fits and works; the request as it is if none is asked for.
  PlanRequest run(std::vector<Diagnostic>& said);

 private:
  PlanRequest with(const Parallelism& chosen) const;
  bool works(const PlanRequest& request) const;
  bool fits(const PlanRequest& request) const;
  int64_t most_devices() const { return deployed_.devices > 0 ? deployed_.devices : 64; }
  [[noreturn]] void fail(const Kind& kind, std::string why, std::string fix) const;

  PlanRequest request_;
  const Deployed& deployed_;
  const Facts& known_;
  const Json& engine_;
  Parallelism given_;
  std::array<bool, 3> derive_{};
};

void Search::fail(const Kind& kind, std::string why, std::string fix) const {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = fmt::format("parameters.{}", kind.name),
               .why = std::move(why),
               .fix = std::move(fix),
               .status = ExitStatus::usage});
}

void Search::read_parameters() {
  std::vector<std::pair<std::string, Json>> kept;
  const Json* entry = look_up(request_.model, "entry");
  const std::string program = entry != nullptr ? value_text(*entry) : engine_["entry"].get<std::string>();
  for (auto& parameter : request_.parameters) {
    const std::string& name = parameter.first;
    Json& value = parameter.second;
    const auto kind = std::ranges::find_if(kKinds, [&](const Kind& k) { return is_of(engine_, program, k, name); });
    if (kind == kKinds.end()) {
      kept.emplace_back(name, std::move(value));
      continue;
    }
    const bool neutral = plain_flag(name) == plain_flag(kind->name);
    const Json* flag = own_flag(engine_, *kind);
    if (flag == nullptr) fail(*kind, fmt::format("{} has no flag for it", request_.engine), "leave it out");
    if (value == "auto") {
      derive_[static_cast<size_t>(kind - kKinds.begin())] = true;
      continue;
    }
    given_.*(kind->degree) = value == true && is_switch(engine_) ? most_devices() : degree_of(value);
    const bool as_switch = neutral && kind->member == "expert" && is_switch(engine_);
    if (as_switch && degree_of(value) == 1 && value != true) continue;
    kept.emplace_back(neutral ? flag->get<std::string>() : name, as_switch ? Json(true) : std::move(value));
  }
  request_.parameters = std::move(kept);
}

/// The request with what is derived added; what is given or 1 needs no argument.
PlanRequest Search::with(const Parallelism& chosen) const {
  PlanRequest request = request_;
  for (size_t i = 0; i < kKinds.size(); ++i) {
    const int64_t degree = chosen.*(kKinds[i].degree);
    if (!derive_[i] || degree <= 1) continue;
    const bool as_switch = kKinds[i].member == "expert" && is_switch(engine_);
    request.derived.push_back({.flag = own_flag(engine_, kKinds[i])->get<std::string>(),
                               .value = as_switch ? Json(true) : Json(std::to_string(degree)),
                               .rule = fmt::format("{} auto: the fewest devices on which it fits", kKinds[i].name)});
  }
  return request;
}

bool Search::works(const PlanRequest& request) const {
  EnginePlan plan = plan_engine(request, known_);
  for (Diagnostic& d : check_parallel(request, plan, deployed_.devices, known_))
    plan.diagnostics.push_back(std::move(d));
  if (std::ranges::any_of(plan.diagnostics, is_of_parallelism)) return false;
  const auto layers = lint_modules(deployed_.modules, request, plan, known_);
  return std::ranges::none_of(layers, is_of_parallelism);
}

bool Search::fits(const PlanRequest& request) const {
  const EnginePlan plan = plan_engine(request, known_);
  const Parallelism parallel = parallelism_of(plan, known_);
  Deployment deployment = deployed_.deployment;
  deployment.tensor_parallel = parallel.tensor;
  deployment.pipeline_parallel = parallel.pipeline;
  return estimate_memory(request.model, deployed_.weight_bytes, plan, deployment, known_).fits.value_or(false);
}

PlanRequest Search::run(std::vector<Diagnostic>& said) {
  const auto [derive_tensor, derive_pipeline, derive_expert] = derive_;
  if (!derive_tensor && !derive_pipeline && !derive_expert) return request_;
  if (deployed_.deployment.memory_bytes <= 0)
    fail(kKinds[derive_tensor     ? 0
                : derive_pipeline ? 1
                                  : 2],
         "the memory of a device is unknown", "give --hardware or --memory");
  const int64_t most = most_devices(), layers = std::max<int64_t>(1, model_fact(request_, "layers"));
  const int64_t tensors = derive_tensor ? most : given_.tensor;
  const int64_t pipelines = derive_pipeline ? std::min(most, layers) : given_.pipeline;
  const bool experts = derive_expert && model_fact(request_, "experts") > 1;
  const int64_t first_tensor = derive_tensor ? 1 : given_.tensor,
                first_pipeline = derive_pipeline ? 1 : given_.pipeline;
  for (int64_t pipeline = first_pipeline; pipeline <= pipelines; ++pipeline)
    for (int64_t tensor = first_tensor; tensor <= tensors && tensor * pipeline <= most; ++tensor) {
      for (const int64_t expert : {int64_t{1}, tensor}) {
        if (expert > 1 && !experts) continue;
        PlanRequest trial = with({.tensor = tensor, .pipeline = pipeline, .expert = expert});
        if (fits(trial) && works(trial)) return trial;
      }
    }
  said.push_back({.code = "DOES_NOT_FIT",
                  .message = fmt::format("it does not fit {} such devices, however they share it", most),
                  .instead = {"more devices (--devices) or larger ones", "fewer or shorter sequences",
                              "weights or a KV cache of fewer bits"}});
  return request_;
}

}  // namespace

Parallelism parallelism_of(const EnginePlan& plan, const Facts& facts) {
  const Json& engine = facts.get("engines", plan.engine);
  Parallelism found;
  for (const Kind& kind : kKinds) {
    const Json* flag = own_flag(engine, kind);
    if (flag == nullptr) continue;
    for (const Argument& argument : plan.args)
      if (argument.flag == *flag) found.*(kind.degree) = degree_of(argument.value);
  }
  if (is_switch(engine) && std::ranges::any_of(plan.args, [&](const Argument& a) {
        return a.flag == *own_flag(engine, kKinds[2]) && a.value != false && a.value != "false";
      }))
    found.expert = found.tensor;
  return found;
}

std::vector<Diagnostic> check_parallel(const PlanRequest& request, const EnginePlan& plan, int64_t devices,
                                       const Facts& facts) {
  const Parallelism p = parallelism_of(plan, facts);
  std::vector<Diagnostic> said;
  const int64_t kv = model_fact(request, "kv_heads"), experts = model_fact(request, "experts");
  const int64_t layers = model_fact(request, "layers");
  const bool latent = model_fact(request, "kv_lora_rank") > 0;
  if (kv > 0 && !latent && kv % p.tensor != 0 && p.tensor % kv != 0)
    said.push_back(refused(fmt::format("{} heads of keys and values cannot be shared by {} devices", kv, p.tensor),
                           {"a divisor or a multiple of the heads"}));
  const bool sparse = experts > 1;
  const int64_t inner = model_fact(request, sparse ? "moe_intermediate_size" : "intermediate_size");
  if (inner > 0 && inner % p.tensor != 0 && (!sparse || p.expert <= 1))
    said.push_back(refused(fmt::format("feed-forwards of {} cannot be shared by {} devices", inner, p.tensor),
                           {"a smaller degree of tensor parallelism"}));
  if (p.expert > 1 && sparse && experts % p.expert != 0)
    said.push_back(refused(fmt::format("{} experts cannot be shared by {} devices", experts, p.expert),
                           {"a degree that divides the experts"}));
  if (p.expert > p.tensor)
    said.push_back(refused(fmt::format("experts on {} devices, of which only {} share a layer", p.expert, p.tensor),
                           {"an expert parallelism that divides the tensor parallelism"}));
  if (layers > 0 && p.pipeline > layers)
    said.push_back(refused(fmt::format("{} layers cannot be shared by a pipeline of {}", layers, p.pipeline),
                           {"a shorter pipeline"}));
  if (devices > 0 && p.devices() > devices)
    said.push_back(
        {.code = "TOO_FEW_DEVICES",
         .message = fmt::format("{} x {} devices are asked for, there are {}", p.tensor, p.pipeline, devices),
         .instead = {fmt::format("at most {} in all", devices)}});
  return said;
}

PlanRequest derive_parallel(PlanRequest request, const Deployed& deployed, std::vector<Diagnostic>& said,
                            const Facts& facts) {
  Search search(std::move(request), deployed, facts);
  search.read_parameters();
  return search.run(said);
}

}  // namespace bitwright
