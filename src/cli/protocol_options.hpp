#pragma once

#include <vector>

#include "cli/command.hpp"
#include "evaluate/evaluate.hpp"

namespace bitwright {

/// The options of commands that run a model over a text, after its own: --context, --bos, --split, --max-windows.
std::vector<Option> with_protocol_options(std::vector<Option> own);

/// limit: tokens that the model can take. What is not given is as eval's page says. Throws Error where the options
/// contradict each other, the model or the tokenizer.
Protocol protocol_for(const Arguments& arguments, int64_t limit, const Tokenizer& tokenizer);
Protocol::Bos bos_rule(const Arguments& arguments, const Tokenizer& tokenizer);
int64_t context_for(const Arguments& arguments, int64_t usual, int64_t limit);

}  // namespace bitwright
