#pragma once

#include <vector>

#include "cli/command.hpp"
#include "quantize/quantize.hpp"

namespace bitwright {

/// --output, --force, --resume, --max-shard-size, --max-memory, followed by a command's own.
std::vector<Option> with_output_options(std::vector<Option> own);
OutputOptions output_options(const Arguments& arguments);

}  // namespace bitwright
