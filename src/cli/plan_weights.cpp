#include "cli/plan_weights.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>

#include "checkpoint/gguf.hpp"
#include "engine/loads.hpp"
#include "engine/memory.hpp"
#include "model/weight_estimate.hpp"
#include "quantize/gguf_output.hpp"
#include "quantize/output_layout.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

/// Does the engine load what is quantized so? Asked of its facts, as for a checkpoint that exists.
bool loads(const PlanRequest& asked, const Container& container) {
  PlanRequest request{.engine = asked.engine, .version = asked.version, .hardware = asked.hardware};
  request.checkpoint = method_of(container);
  return std::ranges::none_of(plan_engine(request).diagnostics, refuses);
}

/// The containers that the engine loads, its own first, then the likelier.
std::vector<const Container*> loaded_by(const PlanRequest& asked) {
  const Facts& facts = Facts::standard();
  const Json& engine = facts.get("engines", asked.engine)["name"];
  std::vector<const Container*> loaded;
  for (const Json& name : facts.get("weights", "quantized")["containers"]) {
    const Container* container = find_container(name.get_ref<const std::string&>());
    if (container != nullptr && loads(asked, *container))
      loaded.insert(name == engine ? loaded.begin() : loaded.end(), container);
  }
  return loaded;
}

/// What most tensors share stands for all.
OrderedJson common(const std::map<std::string, size_t>& counts) {
  if (counts.empty()) return nullptr;
  const auto most = std::ranges::max_element(counts, {}, [](const auto& item) { return item.second; });
  return counts.size() == 1 ? most->first : "mixed, mostly " + most->first;
}

std::vector<StoredTensor> stored_tensors(const Checkpoint& checkpoint) {
  std::vector<StoredTensor> tensors;
  for (const TensorEntry& entry : checkpoint.tensors())
    tensors.push_back({.name = entry.name, .shape = entry.shape, .scheme = entry.scheme, .value_dtype = entry.dtype});
  return tensors;
}

/// A plan's row for a tensor that stays as it is. Member by member: from a list of pairs it takes three times as long,
/// and models of experts have ninety thousand tensors.
template <class Tensor>  // a TensorEntry, or TensorFacts
OrderedJson tensor_row(const Tensor& entry, uint64_t bytes) {
  constexpr size_t kMembers = 6;  // with the reason
  OrderedJson row = OrderedJson::object();
  row.get_ref<OrderedJson::object_t&>().reserve(kMembers);
  row["name"] = entry.name;
  row["shape"] = entry.shape;
  row["scheme"] = nullptr;
  row["algorithm"] = nullptr;
  row["bytes"] = bytes;
  return row;
}

/// One value as `--set` and the options take it.
std::string typed(const OrderedJson& value) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return value.dump();
  std::string list;
  for (const OrderedJson& item : value) list += (list.empty() ? "" : ",") + item.get<std::string>();
  return list;
}

/// "bitwright quantize MODEL -o OUT --method int4 ...": all of the configuration that changes what is written.
std::string quantize_command(const std::string& path, const OrderedJson& config, std::string_view container) {
  std::string command = fmt::format("bitwright quantize {} -o {}", shell_word(path), kOutput);
  for (const ConfigKey& key : config_keys()) {
    const OrderedJson* value = key.path.starts_with("quantization.") ? find_config(config, key.path) : nullptr;
    if (value == nullptr || key.plan_only) continue;
    if (key.type == ConfigKey::Type::rules)
      for (const auto& [pattern, settings] : value->items())
        for (const auto& [name, setting] : settings.items())
          command +=
              fmt::format(" --set {}", shell_word(fmt::format("{}.{}.{}={}", key.path, pattern, name, typed(setting))));
    else
      command += fmt::format(" {} {}", option_of(key), shell_word(typed(*value)));
  }
  return container == "native" ? command : fmt::format("{} --format {}", command, container);
}

class Weights {
 public:
  Weights(const std::string& path, const ModelSummary& model, const OrderedJson& config, const PlanRequest& request,
          std::vector<Warning>& warnings)
      : path_(path),
        model_(model),
        config_(config),
        request_(request),
        warnings_(warnings),
        method_(request.intent.method) {
    native_ = Facts::standard().get("engines", request.engine)["name"] == "native";
    if (method_ == "none" || method_ == "auto") method_.clear();
  }

  WeightsPlan as_stored(const std::string& reason) {
    plan_.file_bytes = plan_.loaded_bytes = static_cast<double>(model_.weight_bytes);
    const OrderedJson quantization = quantization_json(model_);
    if (quantization["quantized"].get<bool>()) {
      plan_.scheme = quantization["scheme"];
      plan_.container = quantization["container"].is_null() ? quantization["method"] : quantization["container"];
      plan_.algorithm = quantization["method"];
    }
    if (!model_.checkpoint) return std::move(plan_);
    plan_.tensors.get_ref<OrderedJson::array_t&>().reserve(model_.checkpoint->tensors().size());
    for (const TensorEntry& entry : model_.checkpoint->tensors()) {
      OrderedJson row = tensor_row(entry, entry.stored_bytes);
      if (entry.quantized() || entry.undecoded != nullptr) row["scheme"] = type_of(entry);
      row["reason"] = reason;
      plan_.tensors.push_back(std::move(row));
    }
    if (native_ && is_decoded())
      plan_.loaded_bytes =
          static_cast<double>(estimated_weight_bytes(model_.config, stored_tensors(*model_.checkpoint)));
    return std::move(plan_);
  }

  /// As `quantize` will make them.
  WeightsPlan to_be_quantized(const std::string& format) {
    tensors_ = model_.checkpoint ? facts_of(*model_.checkpoint) : std::vector{kLinear};
    const QuantizationRequest request = read_recipe();
    std::optional<Made> made = choose(request, format);
    if (!made && refused_) {
      say_refused();
      made = std::move(refused_);
    } else if (!made) {
      say_not_written(name_container(format));
      made = stand_in(request);
    } else {
      plan_.container = made->container->name;
      if (model_.checkpoint) plan_.command = quantize_command(path_, config_, made->container->name);
    }
    if (!model_.checkpoint) return without_weights(*made);
    plan_.file_bytes = static_cast<double>(made->layout.shards.bytes());
    add_tensors(*made);
    if (plan_.container == made->container->name) add_modules(*made);
    warnings_.insert(warnings_.end(), made->layout.recipe.warnings.begin(), made->layout.recipe.warnings.end());
    return std::move(plan_);
  }

 private:
  /// What stands for all linear layers where only sizes are known.
  static constexpr int64_t kColumns = 4096;
  static inline const TensorFacts kLinear = {.name = "model.layers.0.mlp.up_proj.weight",
                                             .shape = {kColumns, kColumns}};

  /// A container, and what would be written in it.
  struct Made {
    const Container* container;
    std::vector<TensorFacts> tensors;  ///< of the model, or under the names of the one file that it becomes
    OutputLayout layout;
    ModelDocuments documents{};
  };

  bool is_decoded() const {
    return std::ranges::none_of(model_.checkpoint->tensors(),
                                [](const TensorEntry& entry) { return entry.undecoded != nullptr; }) &&
           (model_.checkpoint->container() != nullptr || model_.quantization.method.empty());
  }

  QuantizationRequest read_recipe() const {
    OrderedJson config = config_;
    if (!method_.empty()) set_config_value(config, "quantization.method", method_);
    return read_request(config);
  }

  /// One file that is the whole model.
  Made make_file(const QuantizationRequest& request, const Container& container) const {
    std::vector<Warning> of_quantize;
    const GgufOutput gguf(*model_.checkpoint, of_quantize);
    const ForeignNames names = gguf.names();
    std::vector<TensorFacts> tensors = facts_of(gguf.arranged());
    OutputLayout layout = lay_out(tensors, request, container, OutputOptions::kUsualShard, &names);
    layout.shards =
        plan_gguf(layout.arrays, gguf.metadata(layout.arrays, layout.recipe.settings.value("gguf_type", "")));
    return {.container = &container, .tensors = std::move(tensors), .layout = std::move(layout)};
  }

  Made make(const QuantizationRequest& request, const Container& container) const {
    const bool is_file = !container.model_file.empty() && model_.checkpoint;
    Made made = is_file ? make_file(request, container)
                        : Made{.container = &container,
                               .tensors = tensors_,
                               .layout = lay_out(tensors_, request, container, OutputOptions::kUsualShard)};
    for (auto& [name, document] :
         metadata_of(made.tensors, made.layout.recipe, container, OrderedJson(model_.config), OrderedJson::object()))
      made.documents[name] = Json(document);
    return made;
  }

  /// None where the container is not written or does not hold what is asked for.
  std::optional<Made> try_to_make(const QuantizationRequest& request, const Container& container) const {
    if (container.write_metadata == nullptr) return std::nullopt;
    try {
      Made made = make(request, container);
      const auto& tensors = made.layout.recipe.tensors;
      if (std::ranges::any_of(tensors, [](const TensorPlan& plan) { return plan.scheme.has_value(); })) return made;
    } catch (const Error&) {  // another container may hold it
    }
    return std::nullopt;
  }

  /// In the container that is asked for, or the first of those that the engine loads; none: no such is written, or
  /// (refused_) the engine takes the container, but not such weights in it.
  std::optional<Made> choose(const QuantizationRequest& request, const std::string& format) {
    if (!format.empty()) return make(request, *find_container(format));
    if (request.settings.gguf_type) return make(request, *find_container("gguf"));
    const PlanRequest engine{.engine = request_.engine, .version = request_.version, .hardware = request_.hardware};
    const Container* const own = find_container(request_.intent.backend_method);
    for (const Container* container : own != nullptr ? std::vector{own} : loaded_by(request_)) {
      std::optional<Made> made = try_to_make(request, *container);
      if (!made) continue;
      const Loads answer = answer_of(engine, made->documents);
      if (answer.yes) return made;
      if (refused_) continue;
      refused_ = std::move(made);
      refusal_ = answer.reason;
    }
    return std::nullopt;
  }

  /// What is quantized likewise, for sizes. Throws what speaks against it everywhere.
  Made stand_in(const QuantizationRequest& request) const {
    for (const Container* container : all_containers())
      if (std::optional<Made> made = try_to_make(request, *container)) return *std::move(made);
    return make(request, *all_containers().front());
  }

  /// The name of what the engine would load, if that is not written.
  std::string name_container(const std::string& format) const {
    if (!format.empty()) return format;
    if (find_container(request_.intent.backend_method) != nullptr) return request_.intent.backend_method;
    for (const Container* container : loaded_by(request_))
      if (container->write_metadata == nullptr) return std::string(container->name);
    return {};
  }

  void say_refused() {
    plan_.container = refused_->container->name;
    warnings_.push_back({"CONTAINER_REFUSED", fmt::format("{} does not load what would be written as {}: {}",
                                                          request_.engine, refused_->container->name, refusal_)});
  }

  void say_not_written(const std::string& container) {
    if (!container.empty()) plan_.container = container;
    const std::string what = method_.empty() ? "this" : method_;
    warnings_.push_back(
        {"CONTAINER_NOT_WRITTEN",
         container.empty()
             ? fmt::format("{} loads no checkpoint that holds {}; sizes are those of the codes and scales",
                           request_.engine, what)
             : fmt::format("{} as {} is not written here; sizes are those of the codes and scales", what, container)});
  }

  void add_tensors(const Made& made) {
    const OutputLayout& layout = made.layout;
    std::map<std::string, size_t> schemes, algorithms;
    std::vector<StoredTensor> loaded;
    for (size_t i = 0; i < layout.recipe.tensors.size(); ++i) {
      const TensorPlan& tensor = layout.recipe.tensors[i];
      const TensorFacts& facts = made.tensors[i];
      double bytes = 0;
      for (const ArraySpec& array : layout.arrays[i]) bytes += static_cast<double>(array.bytes());
      OrderedJson row = tensor_row(facts, static_cast<uint64_t>(bytes));
      loaded.push_back({.name = facts.name,
                        .shape = facts.shape,
                        .scheme = tensor.scheme ? *tensor.scheme : plain(facts.dtype),
                        .value_dtype = facts.dtype});
      if (tensor.scheme) {
        const std::string scheme = describe(*tensor.scheme);
        row["scheme"] = scheme;
        row["algorithm"] = tensor.algorithm->name;
        ++schemes[scheme];
        ++algorithms[std::string(tensor.algorithm->name)];
      } else {
        row["reason"] = tensor.reason;
      }
      plan_.tensors.push_back(std::move(row));
    }
    plan_.scheme = common(schemes);
    plan_.algorithm = common(algorithms);
    plan_.loaded_bytes = native_ && made.container->model_file.empty()
                             ? static_cast<double>(estimated_weight_bytes(model_.config, loaded))
                             : plan_.file_bytes;
  }

  /// What an engine will find: it may refuse layers that each by itself are right.
  void add_modules(const Made& made) {
    plan_.checkpoint = detect_model_quantization(made.documents).method;
    if (!plan_.checkpoint.empty()) plan_.modules = planned_modules(made.layout.recipe, made.tensors);
  }

  /// Only sizes are known: linear weights at the method's bits, embeddings and head at 16.
  WeightsPlan without_weights(const Made& made) {
    const TensorPlan& tensor = made.layout.recipe.tensors.front();
    if (!tensor.scheme) return std::move(plan_);
    double bits = 0;
    for (const ArraySpec& array : made.layout.arrays.front())
      bits += 8.0 * static_cast<double>(array.bytes()) / (kColumns * kColumns);
    plan_.scheme = describe(*tensor.scheme);
    plan_.algorithm = tensor.algorithm->name;
    const auto count = [&](const char* name) { return static_cast<double>(model_.facts.value(name, int64_t{0})); };
    const double parameters = parameters_of(model_.facts);
    const double tables =
        std::min(parameters, (model_.facts.contains("tied") ? 1 : 2) * count("vocabulary") * count("hidden_size"));
    plan_.file_bytes = plan_.loaded_bytes = 2 * tables + (parameters - tables) * bits / 8;
    return std::move(plan_);
  }

  const std::string& path_;
  const ModelSummary& model_;
  const OrderedJson& config_;
  const PlanRequest& request_;
  std::vector<Warning>& warnings_;
  std::string method_;
  std::vector<TensorFacts> tensors_;
  std::optional<Made> refused_;  ///< the likeliest that the engine does not take, and why
  std::string refusal_;
  bool native_ = false;
  WeightsPlan plan_;
};

/// Does the request say what weights should be? A container may have a usual scheme of its own.
bool asks_for_weights(const OrderedJson& config, const Intent& intent, const std::string& format) {
  if (!format.empty() && !find_container(format)->choices.empty()) return true;
  if (intent.method != "none" && intent.method != "auto") return true;
  const OrderedJson* rules = find_config(config, "quantization.layer_configs");
  return (rules != nullptr && !rules->empty()) || find_config(config, "quantization.scheme.bits") != nullptr ||
         find_config(config, "quantization.scheme.quant_type") != nullptr ||
         find_config(config, "quantization.gguf_type") != nullptr;
}

/// Does the engine itself make of the weights what is asked, while it loads them?
bool is_met_at_load(const Intent& intent, const EnginePlan& plan) {
  const bool asks = (intent.method != "none" && intent.method != "auto") || !intent.backend_method.empty();
  return asks && plan.outcome != "error" &&
         std::ranges::find(plan.diagnostics, "QUANTIZE_FIRST", &Diagnostic::code) == plan.diagnostics.end();
}

}  // namespace

WeightsPlan plan_weights(const std::string& path, const ModelSummary& model, const OrderedJson& config,
                         const PlanRequest& request, const EnginePlan& plan, const std::string& format,
                         std::vector<Warning>& warnings) {
  Weights weights(path, model, config, request, warnings);
  if (!model.quantization.method.empty()) return weights.as_stored("quantized already");
  if (!asks_for_weights(config, request.intent, format)) return weights.as_stored("method none");
  if (format.empty() && is_met_at_load(request.intent, plan))
    return weights.as_stored("quantized by the engine while it loads");
  return weights.to_be_quantized(format);
}

}  // namespace bitwright
