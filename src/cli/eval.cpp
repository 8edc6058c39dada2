#include <fmt/format.h>

#include "base/mapped_file.hpp"
#include "cli/command.hpp"
#include "evaluate/evaluate.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"

namespace bitwright {
namespace {

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

Protocol protocol_for(const Arguments& arguments, int64_t limit, const Tokenizer& tokenizer) {
  constexpr int64_t kContext = 512;
  Protocol p;
  p.context = arguments.integer("--context").value_or(std::min(kContext, limit));
  if (p.context > limit)
    throw Error({.code = "bad-value",
                 .what = "bad command line",
                 .why = fmt::format("--context {} is more than the model's {}", p.context, limit),
                 .fix = fmt::format("use at most {}", limit),
                 .status = ExitStatus::usage});
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

OrderedJson run(const Arguments& arguments, std::vector<Warning>&) {
  const MappedFile text(*arguments.text("--text"));
  const Checkpoint checkpoint = open_model(arguments.model);
  checkpoint.verify_digests();
  const Tokenizer tokenizer(tokenizer_path(checkpoint));
  const Model model(checkpoint);
  std::optional<Checkpoint> reference_checkpoint;
  std::optional<Model> reference;
  if (const auto path = arguments.text("--reference")) {
    reference_checkpoint.emplace(open_model(*path));
    reference_checkpoint->verify_digests();
    reference.emplace(*reference_checkpoint);
  }
  const int64_t limit =
      std::min(model.config().context, reference ? reference->config().context : model.config().context);
  const Protocol protocol = protocol_for(arguments, limit, tokenizer);
  const std::vector<int32_t> tokens = token_stream(tokenizer, text.text(), protocol);
  const Quality q = evaluate(model, reference ? &*reference : nullptr, tokens, protocol, tokenizer.bos_id());
  OrderedJson result = {{"tokens", q.tokens},
                        {"nll", q.nll},
                        {"perplexity", q.perplexity},
                        {"tokens_per_second", q.seconds > 0 ? static_cast<double>(q.tokens) / q.seconds : 0}};
  if (q.reference)
    result["reference"] = {{"perplexity", q.reference->reference_perplexity},
                           {"kl_mean", q.reference->kl_mean},
                           {"kl_p99", q.reference->kl_p99},
                           {"kl_max", q.reference->kl_max},
                           {"top1_agreement", q.reference->top1_agreement}};
  result["protocol"] = to_json(protocol, text.text(), q.windows);
  return result;
}

void print(const OrderedJson& result) {
  fmt::print("perplexity {:.5f} (nll {:.6f}) on {} tokens, {} windows of {}; {:.0f} tokens/s\n",
             result["perplexity"].get<double>(), result["nll"].get<double>(), result["tokens"].get<int64_t>(),
             result["protocol"]["windows"].get<int64_t>(), result["protocol"]["context"].get<int64_t>(),
             result["tokens_per_second"].get<double>());
  if (!result.contains("reference")) return;
  const OrderedJson& r = result["reference"];
  fmt::print("reference {:.5f}; KL mean {:.6f}, p99 {:.6f}, max {:.6f}; same top token {:.2f} %\n",
             r["perplexity"].get<double>(), r["kl_mean"].get<double>(), r["kl_p99"].get<double>(),
             r["kl_max"].get<double>(), 100 * r["top1_agreement"].get<double>());
}

}  // namespace

extern const Command eval_command;
const Command eval_command = {.name = "eval",
                              .summary = "perplexity, and divergence from a reference",
                              .options = {{.name = "--text",
                                           .type = Option::Type::text,
                                           .value_name = "FILE",
                                           .help = "plain text, or JSONL with a \"text\" a line",
                                           .required = true},
                                          {.name = "--reference",
                                           .type = Option::Type::text,
                                           .value_name = "MODEL",
                                           .help = "compare with this model: KL divergence, top-1 agreement"},
                                          {.name = "--context",
                                           .type = Option::Type::integer,
                                           .value_name = "N",
                                           .help = "tokens a window (default: 512 or the model's maximum)",
                                           .least = 1,
                                           .most = 1 << 24},
                                          {.name = "--stride",
                                           .type = Option::Type::integer,
                                           .value_name = "N",
                                           .help = "from window to window (default: the context)",
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
                                           .most = 1 << 30}},
                              .run = run,
                              .print = print};

}  // namespace bitwright
