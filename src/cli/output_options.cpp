#include "cli/output_options.hpp"

#include <algorithm>
#include <iterator>

namespace bitwright {

std::vector<Option> with_output_options(std::vector<Option> own) {
  std::vector<Option> options = {
      {.name = "-o,--output",
       .type = Option::Type::text,
       .value_name = "DIR",
       .help = "where the model goes",
       .required = true},
      {.name = "--force",
       .type = Option::Type::flag,
       .value_name = "",
       .help = "replace an existing output, start an unfinished one again"},
      {.name = "--resume", .type = Option::Type::flag, .value_name = "", .help = "go on with an interrupted run"},
      {.name = "--max-shard-size",
       .type = Option::Type::size,
       .value_name = "SIZE",
       .help = "data in one file (default: 5GB; for GGUF all)"},
      {.name = "--max-memory",
       .type = Option::Type::size,
       .value_name = "SIZE",
       .help = "keep within this much memory, or say at once what it would take"}};
  std::ranges::move(own, std::back_inserter(options));
  return options;
}

std::vector<std::string> writable_formats() {
  std::vector<std::string> names;
  for (const Container* container : all_containers())
    if (container->write_metadata != nullptr) names.emplace_back(container->name);
  return names;
}

OutputOptions output_options(const Arguments& arguments) {
  const bool force = arguments.flag("--force");
  return {.output = *arguments.text("--output"),
          .existing = arguments.flag("--resume") ? (force ? Existing::resume_replace : Existing::resume)
                                                 : (force ? Existing::replace : Existing::refuse),
          .max_shard_bytes = arguments.size("--max-shard-size"),
          .max_memory = arguments.size("--max-memory")};
}

}  // namespace bitwright
