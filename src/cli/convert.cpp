#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "base/progress.hpp"
#include "base/size.hpp"
#include "cli/command.hpp"
#include "cli/output_options.hpp"
#include "model/open_model.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {
namespace {

std::vector<std::string> method_names() {
  const auto keys = config_keys();
  return std::ranges::find(keys, "quantization.method", &ConfigKey::path)->values;
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  ConvertOptions options = {.output = output_options(arguments)};
  options.request.container = find_container(*arguments.text("--format"));
  options.request.exact = arguments.flag("--exact");
  options.request.requantize = arguments.flag("--requantize");
  options.request.method = arguments.text("--method").value_or("");
  options.request.gguf_type = arguments.text("--gguf-type").value_or("");
  for (const auto* how : {&options.request.method, &options.request.gguf_type})
    if (!how->empty() && !options.request.requantize)
      throw Error({.code = "bad-value",
                   .what = "bad command line",
                   .why = "--method and --gguf-type say how weights are quantized anew",
                   .fix = "give --requantize too",
                   .status = ExitStatus::usage});
  if (const std::string& type = options.request.gguf_type; !type.empty()) {
    if (options.request.container->model_file.empty())
      throw Error({.code = "bad-value",
                   .what = "bad command line",
                   .why = fmt::format("--gguf-type {} and --format {} exclude each other", printable(type),
                                      options.request.container->name),
                   .status = ExitStatus::usage});
    named_choice(type, *options.request.container);  // it must be there
  }
  if (const auto scales = arguments.text("--scale-dtype")) options.request.scale_dtype = dtype_from_name(*scales);
  options.verify = !arguments.flag("--no-verify");
  options.dry_run = arguments.flag("--dry-run");
  const Checkpoint model = open_model(arguments.model);
  model.verify_digests();
  return convert(model, options, warnings);
}

void print(const OrderedJson& result) {
  std::map<std::string, size_t> counts;
  for (const OrderedJson& tensor : result["tensors"]) {
    const std::string verdict = tensor["verdict"];
    if (counts[verdict]++ == 0 && tensor.contains("reason"))
      fmt::print("{} is {}: {}\n", printable(tensor["name"].get<std::string>()), verdict,
                 tensor["reason"].get<std::string>());
  }
  std::vector<std::string> parts;
  for (const auto& [verdict, count] : counts) parts.push_back(fmt::format("{} {}", count, verdict));
  fmt::print("{} -> {}: {}\n", result["converted_from"].get<std::string>(), result["format"].get<std::string>(),
             fmt::join(parts, ", "));
  if (result["max_abs_difference"].is_number())
    fmt::print("largest difference of a weight: {:.3g}\n", result["max_abs_difference"].get<double>());
  if (!result.contains("output")) return;
  fmt::print("{}: {} -> {}\n", printable(result["output"].get<std::string>()),
             format_bytes(result["bytes_in"].get<uint64_t>()), format_bytes(result["bytes_out"].get<uint64_t>()));
}

}  // namespace

extern const Command convert_command;
const Command convert_command = {
    .name = "convert",
    .summary = "a quantized model to another container, without quantizing it again where its grid allows",
    .options = with_output_options({{.name = "--format",
                                     .type = Option::Type::text,
                                     .value_name = "F",
                                     .help = fmt::format("container: {}", fmt::join(writable_formats(), ", ")),
                                     .values = writable_formats(),
                                     .required = true},
                                    {.name = "--exact",
                                     .type = Option::Type::flag,
                                     .value_name = "",
                                     .help = "fail rather than change a value; scales may become float32 for it"},
                                    {.name = "--requantize",
                                     .type = Option::Type::flag,
                                     .value_name = "",
                                     .help = "quantize anew what has no place on the container's grid"},
                                    {.name = "--method",
                                     .type = Option::Type::text,
                                     .value_name = "M",
                                     .help = "for --requantize, as of quantize (default: as many bits as now)",
                                     .values = method_names()},
                                    {.name = "--gguf-type",
                                     .type = Option::Type::text,
                                     .value_name = "T",
                                     .help = "for --requantize into GGUF, as of quantize"},
                                    {.name = "--scale-dtype",
                                     .type = Option::Type::text,
                                     .value_name = "T",
                                     .help = "of integers' scales and offsets (default: the container's)",
                                     .values = {"float32", "float16", "bfloat16"}},
                                    {.name = "--dry-run",
                                     .type = Option::Type::flag,
                                     .value_name = "",
                                     .help = "say what each tensor would become, and write nothing"},
                                    {.name = "--no-verify",
                                     .type = Option::Type::flag,
                                     .value_name = "",
                                     .help = "do not compare what was written with the source"}}),
    .run = run,
    .print = print};

}  // namespace bitwright
