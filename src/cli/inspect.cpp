#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "base/progress.hpp"
#include "checkpoint/checkpoint.hpp"
#include "checkpoint/weight_file.hpp"
#include "cli/command.hpp"
#include "container/container.hpp"

namespace bitwright {
namespace {

/// What most quantized tensors share stands for the model; the others are in `tensors`.
OrderedJson quantization_of(const Checkpoint& model) {
  OrderedJson affected = OrderedJson::array(), skipped = OrderedJson::array();
  std::map<std::string, std::pair<size_t, const TensorEntry*>> schemes;
  for (const TensorEntry& entry : model.tensors()) {
    if (entry.quantized()) {
      affected.push_back(entry.name);
      auto& [count, example] = schemes[describe(entry.scheme)];
      ++count;
      example = &entry;
    } else if (entry.shape.size() >= 2) {
      skipped.push_back(entry.name);
    }
  }
  OrderedJson json = {{"quantized", !schemes.empty()}};
  if (!schemes.empty()) {
    const auto most = std::ranges::max_element(schemes, {}, [](const auto& item) { return item.second.first; });
    const Scheme& scheme = most->second.second->scheme;
    const Json algorithm = model.quantization_metadata().value("algorithm", Json());
    json["method"] = algorithm.is_string() ? algorithm.get<std::string>() : std::string(model.container()->name);
    json["container"] = model.container()->name;
    json["scheme"] = (schemes.size() == 1 ? "" : "mixed, mostly ") + most->first;
    json["bits"] = scheme.element->bits;
    json["mode"] = "weight-only";
    if (scheme.scale && scheme.scale->grouping.size != 0) json["group_size"] = scheme.scale->grouping.size;
    json["symmetric"] = scheme.offset_kind == OffsetKind::none || scheme.offset_kind == OffsetKind::shift;
  }
  json["affected_layers"] = std::move(affected);
  json["skipped_layers"] = std::move(skipped);
  return json;
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>&) {
  const Checkpoint model(arguments.model);
  uint64_t elements = 0, bytes = 0;
  OrderedJson tensors = OrderedJson::array();
  for (const TensorEntry& entry : model.tensors()) {
    elements += static_cast<uint64_t>(element_count(entry.shape));
    bytes += entry.stored_bytes;
    tensors.push_back({{"name", entry.name},
                       {"shape", entry.shape},
                       {"dtype", info(entry.dtype).name},
                       {"scheme", entry.quantized() ? OrderedJson(describe(entry.scheme)) : OrderedJson()},
                       {"bytes", entry.stored_bytes},
                       {"bits_per_weight", entry.bits_per_weight()}});
  }
  const Json& config = model.config();
  const auto architectures = config.find("architectures");
  const bool named = architectures != config.end() && architectures->is_array() && !architectures->empty() &&
                     architectures->front().is_string();
  OrderedJson result = {
      {"format", model.format().name},
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
