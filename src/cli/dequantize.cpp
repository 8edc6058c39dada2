#include <fmt/format.h>

#include "base/progress.hpp"
#include "cli/command.hpp"
#include "cli/output_options.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"
#include "quantize/quantize.hpp"

namespace bitwright {
namespace {

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  const Checkpoint model = open_model(arguments.model);
  model.verify_digests();
  if (model.facts() != nullptr && !std::filesystem::exists(model_directory(model) / "tokenizer.json"))
    warnings.push_back(no_tokenizer_written());
  return dequantize(model, output_options(arguments), *dtype_from_name(arguments.text("--dtype").value_or("float32")));
}

void print(const OrderedJson& result) {
  fmt::print("{}: {}, {}\n", printable(result["output"].get<std::string>()), result["dtype"].get<std::string>(),
             format_bytes(result["bytes"].get<uint64_t>()));
}

}  // namespace

extern const Command dequantize_command;
const Command dequantize_command = {.name = "dequantize",
                                    .summary = "back to plain floats, no trace of quantization",
                                    .options = with_output_options({{.name = "--dtype",
                                                                     .type = Option::Type::text,
                                                                     .value_name = "T",
                                                                     .help = "float32 (default), float16 or bfloat16",
                                                                     .values = {"float32", "float16", "bfloat16"}}}),
                                    .run = run,
                                    .print = print};

}  // namespace bitwright
