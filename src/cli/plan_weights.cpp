#include "cli/plan_weights.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>

#include "engine/loads.hpp"
#include "engine/memory.hpp"
#include "model/weight_estimate.hpp"
#include "quantize/output_layout.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

/// Quantized weights: which methods there are, and what can hold them, the likelier first.
const Json& weight_facts() { return Facts::standard().get("weights", "quantized"); }

const Json* row_named(const Json& rows, std::string_view name) {
  const auto row = std::ranges::find_if(rows, [&](const Json& one) { return one["name"] == name; });
  return row == rows.end() ? nullptr : &*row;
}

/// How engines' facts call what is quantized so.
std::string checkpoint_of(const Json& holder) { return holder.value("checkpoint", holder["name"].get<std::string>()); }

/// A method whose weights are not made here yet: its format, and the method that is otherwise like it.
struct ForeignMethod {
  std::string scheme, stand_in;
  double bits;  ///< of a weight with its share of the scales
};
std::optional<ForeignMethod> foreign_method(const std::string& name) {
  const Json* row = row_named(weight_facts()["methods"], name);
  if (row == nullptr || !row->contains("like")) return std::nullopt;
  return ForeignMethod{.scheme = (*row)["scheme"], .stand_in = (*row)["like"], .bits = (*row)["bits"]};
}

/// Does the engine load what is quantized so? Asked of its facts, as for a checkpoint that exists.
bool loads(const PlanRequest& asked, const Json& holder, const std::string& method) {
  PlanRequest request{.engine = asked.engine, .version = asked.version, .hardware = asked.hardware};
  request.checkpoint = checkpoint_of(holder);
  request.model = asked.model;
  if (const Json* row = row_named(weight_facts()["methods"], method); row != nullptr && row->contains("model"))
    request.model.update((*row)["model"]);
  return std::ranges::none_of(plan_engine(request).diagnostics, refuses);
}

/// Those whose checkpoints the engine loads, its own first.
std::vector<const Json*> loaded_by(const PlanRequest& asked, const std::string& method) {
  std::vector<const Json*> loaded;
  const Json& engine = Facts::standard().get("engines", asked.engine)["name"];
  for (const Json& holder : weight_facts()["containers"])
    if (loads(asked, holder, method)) loaded.insert(holder["name"] == engine ? loaded.begin() : loaded.end(), &holder);
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
OrderedJson tensor_row(const TensorEntry& entry, uint64_t bytes) {
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
    const std::optional<ForeignMethod> foreign = foreign_method(method_);
    if (!model_.checkpoint) return without_weights(foreign, format);
    const bool made = !foreign;
    const QuantizationRequest request = read_recipe(made ? method_ : foreign->stand_in);
    const Container* container = made ? choose(request, format) : nullptr;
    if (container == nullptr) say_not_written(name_container(format));
    if (container != nullptr) {
      plan_.container = container->name;
      plan_.command = quantize_command(path_, config_, container->name);
    }
    const OutputLayout layout =
        lay_out(*model_.checkpoint, request, container != nullptr ? *container : native(), OutputOptions::kUsualShard);
    plan_.file_bytes = static_cast<double>(layout.shards.bytes());
    add_tensors(layout, foreign);
    if (made) add_modules(layout.recipe);
    warnings_.insert(warnings_.end(), layout.recipe.warnings.begin(), layout.recipe.warnings.end());
    return std::move(plan_);
  }

 private:
  static const Container& native() { return *find_container("native"); }

  bool is_decoded() const {
    return std::ranges::none_of(model_.checkpoint->tensors(),
                                [](const TensorEntry& entry) { return entry.undecoded != nullptr; }) &&
           (model_.checkpoint->container() != nullptr || model_.quantization.method.empty());
  }

  QuantizationRequest read_recipe(const std::string& method) const {
    OrderedJson config = config_;
    if (!method.empty()) set_config_value(config, "quantization.method", method);
    if (config.contains("quantization")) config["quantization"].erase("weight_only");
    return read_request(config);
  }

  /// The container that is asked for, or the first of those that the engine loads and that can be written; null: none.
  const Container* choose(const QuantizationRequest& request, const std::string& format) const {
    if (!format.empty()) return find_container(format);
    for (const Json* holder : loaded_by(request_, method_)) {
      const Container* container = find_container((*holder)["name"].get_ref<const std::string&>());
      if (container != nullptr && container->write_metadata != nullptr && holds_all(request, *container))
        return container;
    }
    return nullptr;
  }

  bool holds_all(const QuantizationRequest& request, const Container& container) const {
    const Recipe recipe = resolve(request, facts_of(*model_.checkpoint));
    for (size_t i = 0; i < recipe.tensors.size(); ++i)
      if (const auto& scheme = recipe.tensors[i].scheme)
        if (container.fit(*scheme, model_.checkpoint->tensors()[i].shape).verdict == Verdict::impossible) return false;
    return true;
  }

  /// The name of what the engine would load, whoever writes it.
  std::string name_container(const std::string& format) const {
    if (!format.empty()) return format;
    const std::string& own = request_.intent.backend_method;
    if (row_named(weight_facts()["containers"], own) != nullptr) return own;
    const Json method = method_.empty() ? "none" : method_;
    for (const Json* holder : loaded_by(request_, method_))
      if (std::ranges::find((*holder)["methods"], method) != (*holder)["methods"].end()) return (*holder)["name"];
    return {};
  }

  void say_not_written(const std::string& container) {
    if (!container.empty()) plan_.container = container;
    warnings_.push_back(
        {"CONTAINER_NOT_WRITTEN",
         container.empty()
             ? fmt::format("{} loads no checkpoint that holds {}; sizes are those of the codes and scales",
                           request_.engine, method_.empty() ? "this" : method_)
             : fmt::format("{} as {} is not written here yet; sizes are those of the codes and scales",
                           method_.empty() ? "this" : method_, container)});
  }

  void add_tensors(const OutputLayout& layout, const std::optional<ForeignMethod>& foreign) {
    std::map<std::string, size_t> schemes, algorithms;
    std::vector<StoredTensor> loaded = stored_tensors(*model_.checkpoint);
    for (size_t i = 0; i < layout.recipe.tensors.size(); ++i) {
      const TensorPlan& tensor = layout.recipe.tensors[i];
      const TensorEntry& entry = model_.checkpoint->tensors()[i];
      double bytes = 0;
      for (const ArraySpec& array : layout.arrays[i]) bytes += static_cast<double>(array.bytes());
      if (foreign && tensor.scheme) {
        const double other = static_cast<double>(element_count(entry.shape)) * foreign->bits / 8;
        plan_.file_bytes += other - bytes;
        bytes = other;
      }
      OrderedJson row = tensor_row(entry, static_cast<uint64_t>(bytes));
      if (tensor.scheme) {
        const std::string scheme = foreign ? foreign->scheme : describe(*tensor.scheme);
        row["scheme"] = scheme;
        row["algorithm"] = tensor.algorithm->name;
        ++schemes[scheme];
        ++algorithms[std::string(tensor.algorithm->name)];
        loaded[i].scheme = *tensor.scheme;
      } else {
        row["reason"] = tensor.reason;
      }
      plan_.tensors.push_back(std::move(row));
    }
    plan_.scheme = common(schemes);
    plan_.algorithm = common(algorithms);
    plan_.loaded_bytes =
        native_ && !foreign ? static_cast<double>(estimated_weight_bytes(model_.config, loaded)) : plan_.file_bytes;
  }

  /// What an engine will find: it may refuse layers that each by itself are right.
  void add_modules(const Recipe& recipe) {
    if (plan_.container.is_string())
      if (const Json* holder = row_named(weight_facts()["containers"], plan_.container.get_ref<const std::string&>()))
        plan_.checkpoint = checkpoint_of(*holder);
    if (!plan_.checkpoint.empty()) plan_.modules = planned_modules(recipe, facts_of(*model_.checkpoint));
  }

  /// Only sizes are known: linear weights at the method's bits, embeddings and head at 16.
  WeightsPlan without_weights(const std::optional<ForeignMethod>& foreign, const std::string& format) {
    const QuantizationRequest request = read_recipe(foreign ? foreign->stand_in : method_);
    constexpr int64_t kColumns = 4096;
    const std::array<TensorFacts, 1> linear = {{{.name = "layers.0.linear.weight", .shape = {kColumns, kColumns}}}};
    const TensorPlan tensor = resolve(request, linear).tensors.front();
    if (const std::string name = name_container(format); !name.empty()) plan_.container = name;
    if (!tensor.scheme) return std::move(plan_);
    double bits = 0;
    for (const ArraySpec& array :
         native().layout({.name = tensor.name, .shape = linear[0].shape, .scheme = *tensor.scheme}))
      bits += 8.0 * static_cast<double>(array.bytes()) / (kColumns * kColumns);
    if (foreign) bits = foreign->bits;
    plan_.scheme = foreign ? foreign->scheme : describe(*tensor.scheme);
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
  bool native_ = false;
  WeightsPlan plan_;
};

/// Does the request say what weights should be?
bool asks_for_weights(const OrderedJson& config, const Intent& intent) {
  if (intent.method != "none" && intent.method != "auto") return true;
  const OrderedJson* rules = find_config(config, "quantization.layer_configs");
  return (rules != nullptr && !rules->empty()) || find_config(config, "quantization.scheme.bits") != nullptr ||
         find_config(config, "quantization.scheme.quant_type") != nullptr;
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
  if (!asks_for_weights(config, request.intent)) return weights.as_stored("method none");
  if (format.empty() && is_met_at_load(request.intent, plan))
    return weights.as_stored("quantized by the engine while it loads");
  return weights.to_be_quantized(format);
}

}  // namespace bitwright
