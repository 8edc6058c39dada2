#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "base/progress.hpp"
#include "checkpoint/checkpoint.hpp"
#include "cli/command.hpp"
#include "container/container.hpp"
#include "model/open_model.hpp"

namespace bitwright {
namespace {

/// In words: its scheme, or the name of a type that is not decoded.
std::string type_of(const TensorEntry& entry) {
  if (entry.undecoded != nullptr) return std::string(entry.undecoded->name);
  return entry.quantized() ? describe(entry.scheme) : std::string(info(entry.dtype).name);
}

/// Of one code; of types that are not decoded their whole bits a weight.
int bits_of(const TensorEntry& entry) {
  return entry.undecoded != nullptr ? static_cast<int>(entry.bits_per_weight()) : entry.scheme.element->bits;
}

/// What becomes of the inputs of linear layers while the model runs.
std::string_view mode_of(const QuantizedLinear& linear) {
  if (!linear.input) return "weight-only";
  return linear.input->dynamic ? "dynamic activations" : "static activations";
}

/// What most quantized tensors share stands for the model; the others are in `tensors`.
OrderedJson quantization_of(const Checkpoint& model) {
  OrderedJson affected = OrderedJson::array(), skipped = OrderedJson::array();
  std::map<std::string, std::pair<size_t, const TensorEntry*>> schemes;
  for (const TensorEntry& entry : model.tensors()) {
    if (entry.quantized() || entry.undecoded != nullptr) {
      affected.push_back(entry.name);
      auto& [count, example] = schemes[type_of(entry)];
      ++count;
      example = &entry;
    } else if (entry.shape.size() >= 2) {
      skipped.push_back(entry.name);
    }
  }
  OrderedJson json = {{"quantized", !schemes.empty()}};
  if (!schemes.empty()) {
    const auto most = std::ranges::max_element(schemes, {}, [](const auto& item) { return item.second.first; });
    const TensorEntry& example = *most->second.second;
    const Scheme& scheme = example.scheme;
    const Json algorithm = model.quantization_metadata().value("algorithm", Json());
    json["method"] = algorithm.is_string() ? algorithm.get<std::string>() : std::string(model.container()->name);
    json["container"] = model.container()->name;
    json["scheme"] = (schemes.size() == 1 ? "" : "mixed, mostly ") + most->first;
    json["bits"] = bits_of(example);
    json["mode"] = mode_of(example.linear);
    if (scheme.scale && scheme.scale->grouping.size != 0) json["group_size"] = scheme.scale->grouping.size;
    if (example.undecoded == nullptr)
      json["symmetric"] = scheme.offset_kind == OffsetKind::none || scheme.offset_kind == OffsetKind::shift;
  }
  json["affected_layers"] = std::move(affected);
  json["skipped_layers"] = std::move(skipped);
  return json;
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>&) {
  const Checkpoint model = open_model(arguments.model);
  uint64_t elements = 0, bytes = 0;
  OrderedJson tensors = OrderedJson::array();
  for (const TensorEntry& entry : model.tensors()) {
    elements += static_cast<uint64_t>(element_count(entry.shape));
    bytes += entry.stored_bytes;
    tensors.push_back(
        {{"name", entry.name},
         {"shape", entry.shape},
         {"dtype", info(entry.dtype).name},
         {"scheme", entry.quantized() || entry.undecoded != nullptr ? OrderedJson(type_of(entry)) : OrderedJson()},
         {"bytes", entry.stored_bytes},
         {"bits_per_weight", entry.bits_per_weight()}});
  }
  const Json& config = model.config();
  const auto architectures = config.find("architectures");
  const bool named = architectures != config.end() && architectures->is_array() && !architectures->empty() &&
                     architectures->front().is_string();
  OrderedJson result = {
      {"format", model.format()},
      {"architecture", named ? OrderedJson(architectures->front().get<std::string>()) : OrderedJson()},
      {"parameters", elements},
      {"bytes", model.weight_bytes()},
      {"bits_per_weight", elements == 0 ? 0 : 8.0 * static_cast<double>(bytes) / static_cast<double>(elements)},
      {"quantization", quantization_of(model)}};
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

void print(const OrderedJson& result) {
  const OrderedJson& q = result["quantization"];
  fmt::print("format          {}\n", result["format"].get<std::string>());
  if (!result["architecture"].is_null())
    fmt::print("architecture    {}\n", printable(result["architecture"].get<std::string>()));
  fmt::print("parameters      {}\n", result["parameters"].get<uint64_t>());
  fmt::print("size            {} ({} bytes)\n", format_bytes(result["bytes"].get<uint64_t>()),
             result["bytes"].get<uint64_t>());
  fmt::print("bits per weight {:.3f}\n", result["bits_per_weight"].get<double>());
  if (q["quantized"].get<bool>()) {
    fmt::print("quantized       {}-bit, {}, {} ({} container)\n", q["bits"].get<int>(), q["mode"].get<std::string>(),
               q["scheme"].get<std::string>(), q["container"].get<std::string>());
    fmt::print("affected        {}\n", joined(q["affected_layers"]));
    fmt::print("skipped         {}\n", joined(q["skipped_layers"]));
  } else {
    fmt::print("quantized       no\n");
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
