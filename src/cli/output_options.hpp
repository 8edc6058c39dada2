#pragma once

#include <string>
#include <vector>

#include "cli/command.hpp"
#include "quantize/quantize.hpp"

namespace bitwright {

/// --output, --force, --resume, --max-shard-size, --max-memory, followed by a command's own.
std::vector<Option> with_output_options(std::vector<Option> own);
/// The containers that can be written.
std::vector<std::string> writable_formats();
OutputOptions output_options(const Arguments& arguments);

}  // namespace bitwright
