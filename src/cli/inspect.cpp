#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/progress.hpp"
#include "cli/command.hpp"
#include "engine/memory.hpp"
#include "engine/model_summary.hpp"
#include "model/lora_adapter.hpp"

namespace bitwright {
namespace {

/// What the model is called and how large it is; null: not known without its weights.
OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  std::optional<LoraAdapter> adapter;
  if (LoraAdapter::is_at(arguments.model)) adapter.emplace(arguments.model);
  const ModelSummary model = summarize_model(adapter ? adapter->base().string() : arguments.model);
  if (model.unread) throw Error(*model.unread);
  if (!model.quantization.hint.empty() && model.checkpoint == std::nullopt)
    warnings.push_back(
        {"NAME_HINT", fmt::format("the name suggests '{}', but no file says so", model.quantization.hint)});
  uint64_t elements = 0, bytes = 0;
  OrderedJson tensors = OrderedJson::array();
  if (model.checkpoint)
    for (const TensorEntry& entry : model.checkpoint->tensors()) {
      elements += static_cast<uint64_t>(element_count(entry.shape));
      bytes += entry.stored_bytes;
      tensors.push_back(tensor_json(entry));
    }
  // Arrays of an unknown container are no weights one by one: then, as without weights, config.json's sizes count.
  const bool weighs =
      model.checkpoint && (model.checkpoint->container() != nullptr || model.quantization.method.empty());
  if (!weighs) elements = static_cast<uint64_t>(std::llround(parameters_of(model.facts)));
  const bool known = weighs || elements > 0;
  OrderedJson result = {{"format", model.checkpoint ? OrderedJson(model.checkpoint->format()) : OrderedJson()},
                        {"architecture", OrderedJson(model.facts.value("arch", Json()))},
                        {"parameters", known ? OrderedJson(elements) : OrderedJson()},
                        {"bytes", model.weight_bytes > 0 ? OrderedJson(model.weight_bytes) : OrderedJson()},
                        {"bits_per_weight", OrderedJson()},
                        {"quantization", quantization_json(model)}};
  if (adapter)
    result["adapter"] = {{"base", adapter->base().string()},
                         {"r", adapter->config().r},
                         {"lora_alpha", adapter->config().lora_alpha},
                         {"matrices", adapter->layers().size()},
                         {"parameters", adapter->parameters()}};
  if (known && model.checkpoint)
    result["bits_per_weight"] = elements == 0 ? 0 : 8.0 * static_cast<double>(bytes) / static_cast<double>(elements);
  if (arguments.flag("--tensors") || arguments.json) result["tensors"] = std::move(tensors);
  return result;
}

std::string joined(const OrderedJson& names) {
  constexpr size_t kShown = 4;
  std::string text;
  for (size_t i = 0; i < std::min(names.size(), kShown); ++i)
    text += (i == 0 ? "" : ", ") + printable(names[i].get<std::string>());
  if (names.size() > kShown) text += fmt::format(", … ({} in all)", names.size());
  return text;
}

std::string text_or(const OrderedJson& value, const char* otherwise) {
  return value.is_null() ? otherwise : value.is_string() ? printable(value.get<std::string>()) : value.dump();
}

void print(const OrderedJson& result) {
  const OrderedJson& q = result["quantization"];
  fmt::print("format          {}\n", text_or(result["format"], "no weights"));
  if (!result["architecture"].is_null())
    fmt::print("architecture    {}\n", printable(result["architecture"].get<std::string>()));
  fmt::print("parameters      {}\n", text_or(result["parameters"], "unknown"));
  if (!result["bytes"].is_null())
    fmt::print("size            {} ({} bytes)\n", format_bytes(result["bytes"].get<uint64_t>()),
               result["bytes"].get<uint64_t>());
  if (!result["bits_per_weight"].is_null())
    fmt::print("bits per weight {:.3f}\n", result["bits_per_weight"].get<double>());
  if (q["quantized"].get<bool>()) {
    const std::string what = q["scheme"].get<std::string>();
    fmt::print("quantized       {}-bit, {}, {} ({})\n", text_or(q["bits"], "?"), text_or(q["mode"], "unknown mode"),
               printable(what.empty() ? q["method"].get<std::string>() : what),
               q["container"].is_null() ? printable(q["method"].get<std::string>())
                                        : q["container"].get<std::string>() + " container");
    fmt::print("affected        {}\n", joined(q["affected_layers"]));
    fmt::print("skipped         {}\n", joined(q["skipped_layers"]));
  } else {
    fmt::print("quantized       no\n");
  }
  if (result.contains("adapter")) {
    const OrderedJson& adapter = result["adapter"];
    fmt::print("adapter         LoRA, r {}, alpha {}, on {} matrices, {} parameters; the above is its base, {}\n",
               adapter["r"].get<int64_t>(), adapter["lora_alpha"].get<double>(), adapter["matrices"].get<size_t>(),
               adapter["parameters"].get<uint64_t>(), printable(adapter["base"].get<std::string>()));
  }
  if (!result.contains("tensors")) return;
  for (const OrderedJson& t : result["tensors"])
    fmt::print("{:<56} {:<16} {:>10} {:>7.3f}  {}\n", printable(t["name"].get<std::string>()), t["shape"].dump(),
               t["bytes"].get<uint64_t>(), t["bits_per_weight"].get<double>(),
               t["scheme"].is_null() ? t["dtype"].get<std::string>() : t["scheme"].get<std::string>());
}

}  // namespace

extern const Command inspect_command;
const Command inspect_command = {
    .name = "inspect",
    .summary = "what a model is and how it is quantized",
    .options = {{.name = "--tensors", .type = Option::Type::flag, .value_name = "", .help = "list every tensor"}},
    .run = run,
    .print = print};

}  // namespace bitwright
