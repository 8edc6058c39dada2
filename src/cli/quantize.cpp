#include "quantize/quantize.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "base/progress.hpp"
#include "cli/command.hpp"
#include "cli/output_options.hpp"
#include "model/open_model.hpp"
#include "quantize/model_card.hpp"
#include "quantize/model_files.hpp"
#include "recipe/config.hpp"

namespace bitwright {
namespace {

std::string format_help() {
  return fmt::format("containers: {}; of several OUT gets a directory each (default: native)",
                     fmt::join(writable_formats(), ", "));
}

/// "A,B": each once, in the order given.
std::vector<const Container*> formats_of(const Arguments& arguments, const QuantizationRequest& request) {
  const bool names_gguf = request.settings.gguf_type.has_value();
  const std::string text = arguments.text("--format").value_or(names_gguf ? "gguf" : "native");
  std::vector<const Container*> formats;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    const std::string name = text.substr(begin, comma - begin);
    const std::vector<std::string> known = writable_formats();
    if (std::ranges::find(known, name) == known.end())
      throw Error(
          {.code = "bad-value",
           .what = "bad command line",
           .why = fmt::format("--format: '{}' is not known; valid: {}", printable(name), fmt::join(known, ", ")),
           .status = ExitStatus::usage});
    const Container* const format = find_container(name);
    if (std::ranges::find(formats, format) == formats.end()) formats.push_back(format);
    begin = comma + 1;
  }
  const bool any_gguf = std::ranges::find(formats, find_container("gguf")) != formats.end();
  if (names_gguf && !any_gguf)
    throw Error(
        {.code = "bad-value",
         .what = "bad command line",
         .why = fmt::format("--gguf-type {} and --format {} exclude each other", *request.settings.gguf_type, text),
         .fix = "add gguf to --format",
         .status = ExitStatus::usage});
  return formats;
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  const QuantizationRequest request = read_request(arguments.config);
  const std::vector<const Container*> formats = formats_of(arguments, request);
  QuantizeOptions options = {.output = output_options(arguments),
                             .verify = !arguments.flag("--no-verify"),
                             .max_kl = arguments.number("--max-kl"),
                             .max_perplexity_increase_percent = arguments.number("--max-perplexity-increase"),
                             .container = formats.front(),
                             .stats = arguments.text("--stats").value_or("")};
  for (const std::string& key : plan_only_keys(arguments.config))
    warnings.push_back({"IGNORED_KEY", fmt::format("{} does not change what is written", key)});
  if (!options.verify && (options.max_kl || options.max_perplexity_increase_percent))
    throw Error({.code = "bad-value",
                 .what = "bad command line",
                 .why = "a limit on the loss and --no-verify exclude each other",
                 .fix = "give one of them",
                 .status = ExitStatus::usage});
  const Checkpoint source = open_model(arguments.model);
  if (formats.size() == 1) return quantize(source, request, options, warnings);
  const std::filesystem::path directory = options.output.output;
  check_apart(source, directory);
  OrderedJson results = OrderedJson::array();
  std::filesystem::create_directories(directory);
  try {
    for (const Container* format : formats) {
      options.container = format;
      options.output.output = directory / format->name;
      results.push_back(quantize(source, request, options, warnings));
    }
  } catch (...) {
    std::error_code not_empty;
    std::filesystem::remove(directory, not_empty);
    throw;
  }
  return {{"output", directory.string()}, {"outputs", std::move(results)}};
}

void print(const OrderedJson& result) {
  if (result.contains("outputs")) {
    for (const OrderedJson& each : result["outputs"]) print(each);
    return;
  }
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
  std::vector<std::string> engines;
  for (const OrderedJson& engine : result["engines"])
    if (engine["loads"].get<bool>()) engines.push_back(engine["name"].get<std::string>());
  fmt::print("loaded by {}\n", fmt::join(engines, ", "));
}

}  // namespace

extern const Command quantize_command;
const Command quantize_command = {
    .name = "quantize",
    .summary = "post-training quantization",
    .takes_config = true,
    .options = with_output_options(
        {{.name = "--format", .type = Option::Type::text, .value_name = "A,B", .help = format_help()},
         {.name = "--imatrix,--stats",
          .type = Option::Type::text,
          .value_name = "FILE",
          .help = "calibration statistics, as `calibrate` or llama-imatrix writes them"},
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
