#include "quantize/model_card.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/progress.hpp"

namespace bitwright {
namespace {

std::string quality_section(const OrderedJson& verification) {
  if (!verification.contains("perplexity"))
    return fmt::format("Not judged: {}.\n", verification.value("reason", "verification was switched off"));
  const double perplexity = verification["perplexity"], reference = verification["reference_perplexity"];
  const double kl = verification["kl_mean"], agreement = verification["top1_agreement"];
  const OrderedJson& protocol = verification["protocol"];
  return fmt::format(
      "{}\n\n"
      "| | original | quantized |\n|---|---|---|\n"
      "| perplexity | {:.4f} | {:.4f} ({:+.2f} %) |\n"
      "| KL divergence, mean (nats a token) | 0 | {:.6f} |\n"
      "| same most likely token | | {:.2f} % |\n\n"
      "Measured on {} tokens of short English stories that ship with the program: {} windows of {} tokens.\n",
      quality_sentence(perplexity / reference, kl), reference, perplexity, 100 * (perplexity / reference - 1), kl,
      100 * agreement, verification["tokens"].get<int64_t>(), protocol["windows"].get<int64_t>(),
      protocol["context"].get<int64_t>());
}

std::string cell(const OrderedJson& tensor, const char* key) {
  const OrderedJson value = tensor.value(key, OrderedJson());
  if (value.is_number()) return fmt::format("{:.3g}", value.get<double>());
  return value.is_string() ? printable(value.get<std::string>()) : "";
}

std::string conversion_card(const OrderedJson& record) {
  const OrderedJson& conversion = record["conversion"];
  const OrderedJson& most = conversion["max_abs_difference"];
  std::string card = fmt::format(
      "# Converted model\n\n"
      "From {} to {}: {}{}; {} (before: {}).\n"
      "Made by bitwright {}; `bitwright dequantize` turns it back into plain floats.\n\n"
      "## Tensors\n\n| tensor | was | is | type | verdict | largest difference |\n|---|---|---|---|---|---|\n",
      conversion["converted_from"].get<std::string>(), conversion["format"].get<std::string>(),
      conversion["verdict"].get<std::string>(),
      most.is_number() && most > 0 ? fmt::format(", no value moved by more than {:.3g}", most.get<double>()) : "",
      format_bytes(record["bytes_out"].get<uint64_t>()), format_bytes(record["bytes_in"].get<uint64_t>()),
      record["tool"]["version"].get<std::string>());
  for (const OrderedJson& tensor : conversion["tensors"])
    card += fmt::format("| {} | {} | {} | {} | {} | {} |\n", cell(tensor, "name"), cell(tensor, "from"),
                        cell(tensor, "scheme"), cell(tensor, "type"), cell(tensor, "verdict"),
                        cell(tensor, "max_abs_difference"));
  return card;
}

}  // namespace

std::string quality_sentence(double ratio, double kl_mean) {
  const double percent = 100 * (ratio - 1);
  const char* verdict = percent < 0.2 && kl_mean < 0.001 ? "Practically equal to the original"
                        : percent < 1 && kl_mean < 0.015 ? "Close to the original"
                        : percent < 10 && kl_mean < 0.15 ? "Visibly worse than the original"
                                                         : "Much worse than the original";
  return fmt::format("**{}:** perplexity {:+.2f} %, mean KL divergence {:.4f}.", verdict, percent, kl_mean);
}

std::string model_card(const OrderedJson& record) {
  if (record.contains("conversion")) return conversion_card(record);
  std::string card = fmt::format(
      "# Quantized model\n\n"
      "{} with algorithm {}; {} of {} tensors, {:.3f} bits per weight over the whole model, {} (original: {}).\n"
      "Made by bitwright {}; `bitwright dequantize` turns it back into plain floats.\n\n## Quality\n\n",
      record["scheme"].get<std::string>(), record["algorithm"].get<std::string>(), record["layers"].size(),
      record["tensor_count"].get<size_t>(), record["bits_per_weight"].get<double>(),
      format_bytes(record["bytes_out"].get<uint64_t>()), format_bytes(record["bytes_in"].get<uint64_t>()),
      record["tool"]["version"].get<std::string>());
  card += quality_section(record["verification"]);
  card += "\n## Layers\n\n| tensor | scheme | bits per weight | relative error |\n|---|---|---|---|\n";
  for (const OrderedJson& layer : record["layers"])
    card += fmt::format("| {} | {} | {:.3f} | {:.5f} |\n", printable(layer["name"].get<std::string>()),
                        layer["scheme"].get<std::string>(), layer["bits_per_weight"].get<double>(),
                        layer["relative_error"].get<double>());
  return card;
}

}  // namespace bitwright
