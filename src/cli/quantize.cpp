#include "quantize/quantize.hpp"

#include <fmt/format.h>

#include "base/progress.hpp"
#include "cli/command.hpp"
#include "cli/output_options.hpp"
#include "model/open_model.hpp"
#include "quantize/model_card.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

/// The containers that can be written.
std::vector<std::string> writable_formats() {
  std::vector<std::string> names;
  for (const Container* container : all_containers())
    if (container->write_metadata != nullptr) names.emplace_back(container->name);
  return names;
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  const QuantizationRequest request = read_request(arguments.config);
  for (const std::string& key : plan_only_keys(arguments.config))
    warnings.push_back({"IGNORED_KEY", fmt::format("{} does not change what is written", key)});
  const QuantizeOptions options = {.output = output_options(arguments),
                                   .verify = !arguments.flag("--no-verify"),
                                   .max_kl = arguments.number("--max-kl"),
                                   .max_perplexity_increase_percent = arguments.number("--max-perplexity-increase"),
                                   .container = find_container(arguments.text("--format").value_or("native"))};
  if (!options.verify && (options.max_kl || options.max_perplexity_increase_percent))
    throw Error({.code = "bad-value",
                 .what = "bad command line",
                 .why = "a limit on the loss and --no-verify exclude each other",
                 .fix = "give one of them",
                 .status = ExitStatus::usage});
  return quantize(open_model(arguments.model), request, options, warnings);
}

void print(const OrderedJson& result) {
  const OrderedJson& v = result["verification"];
  fmt::print("{}: {}, {} layers\n", printable(result["output"].get<std::string>()), result["scheme"].get<std::string>(),
             result["layers"].size());
  fmt::print("{} -> {}, {:.3f} bits per weight, {:.1f} s\n", format_bytes(result["bytes_in"].get<uint64_t>()),
             format_bytes(result["bytes_out"].get<uint64_t>()), result["bits_per_weight"].get<double>(),
             result["seconds"].get<double>());
  if (v.contains("perplexity")) {
    const double perplexity = v["perplexity"], reference = v["reference_perplexity"];
    fmt::print("perplexity {:.4f} -> {:.4f}, mean KL {:.6f}, same top token {:.2f} %\n{}\n", reference, perplexity,
               v["kl_mean"].get<double>(), 100 * v["top1_agreement"].get<double>(),
               quality_sentence(perplexity / reference, v["kl_mean"]));
  } else {
    fmt::print("not judged: {}\n", v["reason"].get<std::string>());
  }
}

}  // namespace

extern const Command quantize_command;
const Command quantize_command = {.name = "quantize",
                                  .summary = "post-training quantization",
                                  .takes_config = true,
                                  .options = with_output_options({{.name = "--format",
                                                                   .type = Option::Type::text,
                                                                   .value_name = "F",
                                                                   .help = "container (default: native)",
                                                                   .values = writable_formats()},
                                                                  {.name = "--no-verify",
                                                                   .type = Option::Type::flag,
                                                                   .value_name = "",
                                                                   .help = "do not read the output back and judge it"},
                                                                  {.name = "--max-kl",
                                                                   .type = Option::Type::number,
                                                                   .value_name = "X",
                                                                   .help = "fail if the mean KL divergence is larger",
                                                                   .least = 0,
                                                                   .most = 1e6},
                                                                  {.name = "--max-perplexity-increase",
                                                                   .type = Option::Type::number,
                                                                   .value_name = "PERCENT",
                                                                   .help = "fail if perplexity rises by more",
                                                                   .least = 0,
                                                                   .most = 1e9}}),
                                  .run = run,
                                  .print = print};

}  // namespace bitwright
