#include "cli/protocol_options.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

namespace bitwright {

std::vector<Option> with_protocol_options(std::vector<Option> own) {
  std::vector<Option> shared = {{.name = "--context",
                                 .type = Option::Type::integer,
                                 .value_name = "N",
                                 .help = "tokens a window (default: 512 or the model's maximum)",
                                 .least = 1,
                                 .most = 1 << 24},
                                {.name = "--bos",
                                 .type = Option::Type::text,
                                 .value_name = "RULE",
                                 .help = "document, window or none (default: as the tokenizer)",
                                 .values = {"document", "window", "none"}},
                                {.name = "--split",
                                 .type = Option::Type::text,
                                 .value_name = "TEXT",
                                 .help = "what separates documents in the text"},
                                {.name = "--max-windows",
                                 .type = Option::Type::integer,
                                 .value_name = "N",
                                 .help = "stop after N windows",
                                 .least = 1,
                                 .most = 1 << 30}};
  std::ranges::move(shared, std::back_inserter(own));
  return own;
}

Protocol::Bos bos_rule(const Arguments& arguments, const Tokenizer& tokenizer) {
  const bool adds = tokenizer.adds_bos() && tokenizer.bos_id();
  const std::string rule = arguments.text("--bos").value_or(adds ? "document" : "none");
  if (rule != "none" && !tokenizer.bos_id())
    throw Error({.code = "no-bos",
                 .what = "cannot evaluate",
                 .why = "the tokenizer names no BOS token",
                 .fix = "use --bos none"});
  return rule == "document" ? Protocol::Bos::document : rule == "window" ? Protocol::Bos::window : Protocol::Bos::none;
}

int64_t context_for(const Arguments& arguments, int64_t usual, int64_t limit) {
  const int64_t context = arguments.integer("--context").value_or(std::min(usual, limit));
  if (context > limit)
    throw Error({.code = "bad-value",
                 .what = "bad command line",
                 .why = fmt::format("--context {} is more than the model's {}", context, limit),
                 .fix = fmt::format("use at most {}", limit),
                 .status = ExitStatus::usage});
  return context;
}

Protocol protocol_for(const Arguments& arguments, int64_t limit, const Tokenizer& tokenizer) {
  constexpr int64_t kContext = 512;
  Protocol p;
  p.context = context_for(arguments, kContext, limit);
  p.stride = arguments.integer("--stride").value_or(p.context);
  if (p.stride > p.context)
    throw Error({.code = "bad-value",
                 .what = "bad command line",
                 .why = fmt::format("--stride {} is more than the context {}", p.stride, p.context),
                 .fix = "tokens between windows would go unread",
                 .status = ExitStatus::usage});
  p.bos = bos_rule(arguments, tokenizer);
  p.split = arguments.text("--split").value_or("");
  p.max_windows = arguments.integer("--max-windows").value_or(0);
  return p;
}

}  // namespace bitwright
