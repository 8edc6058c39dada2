#include <fmt/format.h>

#include "base/mapped_file.hpp"
#include "cli/command.hpp"
#include "cli/protocol_options.hpp"
#include "evaluate/evaluate.hpp"
#include "evaluate/task.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"

namespace bitwright {
namespace {

/// What is compared, and the reference if one was named.
struct Models {
  explicit Models(const Arguments& arguments) : opened(arguments.model) {
    opened.checkpoint.verify_digests();
    tokenizer.emplace(tokenizer_path(opened.checkpoint));
    model.emplace(opened.checkpoint, opened.adapter_or_null());
    if (const auto path = arguments.text("--reference")) {
      opened_reference.emplace(*path);
      opened_reference->checkpoint.verify_digests();
      reference.emplace(opened_reference->checkpoint, opened_reference->adapter_or_null());
    }
  }
  int64_t context() const {
    const int64_t own = model->config().context;
    return reference ? std::min(own, reference->config().context) : own;
  }
  const Model* reference_or_null() const { return reference ? &*reference : nullptr; }

  RunnableModel opened;
  std::optional<RunnableModel> opened_reference;
  std::optional<Tokenizer> tokenizer;
  std::optional<Model> model, reference;
};

double per_second(int64_t tokens, double seconds) { return seconds > 0 ? static_cast<double>(tokens) / seconds : 0; }

/// Options that belong to the other kind of evaluation would be ignored unseen.
void refuse_options(const Arguments& arguments, std::initializer_list<const char*> options, const std::string& why) {
  for (const char* option : options)
    if (arguments.values.contains(option))
      throw Error({.code = "bad-value",
                   .what = "bad command line",
                   .why = fmt::format("{} {}", option, why),
                   .fix = fmt::format("leave {} out", option),
                   .status = ExitStatus::usage});
}

OrderedJson run_task(const Arguments& arguments, const Task& task) {
  refuse_options(arguments, {"--stride", "--split", "--max-windows"}, "is for perplexity, not for --task");
  if (arguments.text("--bos") == "window")
    refuse_options(arguments, {"--bos"}, "window is for perplexity, not for --task");
  const MappedFile text(*arguments.text("--text"));
  const std::vector<Example> examples = read_examples(task, text.text(), arguments.integer("--limit").value_or(0));
  const Models models(arguments);
  const int64_t context = context_for(arguments, models.context(), models.context());
  const Protocol::Bos bos = bos_rule(arguments, *models.tokenizer);
  const auto first = bos == Protocol::Bos::none ? std::nullopt : models.tokenizer->bos_id();
  const TaskQuality q =
      evaluate_task(task, examples, *models.model, models.reference_or_null(), *models.tokenizer, first, context);
  const auto figures = [&](const TaskFigures& f) {
    return OrderedJson{{"accuracy", f.accuracy}, {"stderr", f.standard_error}, {task.second_name, f.second}};
  };
  OrderedJson result = {{"task", task.name}, {"examples", q.examples}};
  result.update(figures(q.figures));
  result["tokens_per_second"] = per_second(q.tokens, q.seconds);
  if (q.reference) {
    result["reference"] = figures(*q.reference);
    result["reference"]["agreement"] = *q.agreement;
  }
  result["protocol"] = {{"text_sha256", sha256(text.text())},
                        {"source", task.source},
                        {"context", context},
                        {"bos", first ? "document" : "none"}};
  return result;
}

OrderedJson run_perplexity(const Arguments& arguments) {
  refuse_options(arguments, {"--limit"}, "is for --task");
  const MappedFile text(*arguments.text("--text"));
  const Models models(arguments);
  const Tokenizer& tokenizer = *models.tokenizer;
  const Protocol protocol = protocol_for(arguments, models.context(), tokenizer);
  const std::vector<int32_t> tokens = token_stream(tokenizer, text.text(), protocol);
  const Quality q = evaluate(*models.model, models.reference_or_null(), tokens, protocol, tokenizer.bos_id());
  OrderedJson result = {{"tokens", q.tokens},
                        {"nll", q.nll},
                        {"perplexity", q.perplexity},
                        {"tokens_per_second", per_second(q.tokens, q.seconds)}};
  if (q.reference)
    result["reference"] = {{"perplexity", q.reference->reference_perplexity},
                           {"kl_mean", q.reference->kl_mean},
                           {"kl_p99", q.reference->kl_p99},
                           {"kl_max", q.reference->kl_max},
                           {"top1_agreement", q.reference->top1_agreement}};
  result["protocol"] = to_json(protocol, text.text(), q.windows);
  return result;
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>&) {
  const auto task = arguments.text("--task");
  return task ? run_task(arguments, *find_task(*task)) : run_perplexity(arguments);
}

void print_task(const OrderedJson& result) {
  const std::string second(find_task(result["task"].get<std::string>())->second_name);
  const auto figures = [&](const OrderedJson& f) {
    return fmt::format("accuracy {:.4f} ± {:.4f}, {} {:.5g}", f["accuracy"].get<double>(), f["stderr"].get<double>(),
                       second, f[second].get<double>());
  };
  fmt::print("{}: {} on {} examples; {:.0f} tokens/s\n", result["task"].get<std::string>(), figures(result),
             result["examples"].get<int64_t>(), result["tokens_per_second"].get<double>());
  if (result.contains("reference"))
    fmt::print("reference: {}; the same answer to {:.2f} %\n", figures(result["reference"]),
               100 * result["reference"]["agreement"].get<double>());
}

void print(const OrderedJson& result) {
  if (result.contains("task")) return print_task(result);
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

std::vector<std::string> task_names() {
  std::vector<std::string> names;
  for (const Task* task : all_tasks()) names.emplace_back(task->name);
  return names;
}

}  // namespace

extern const Command eval_command;
const Command eval_command = {
    .name = "eval",
    .summary = "perplexity, divergence from a reference, accuracy in tasks",
    .options = with_protocol_options({{.name = "--text",
                                       .type = Option::Type::text,
                                       .value_name = "FILE",
                                       .help = "plain text, or JSONL with a \"text\" a line",
                                       .required = true},
                                      {.name = "--task",
                                       .type = Option::Type::text,
                                       .value_name = "NAME",
                                       .help = "right answers to the questions in a JSONL text",
                                       .values = task_names()},
                                      {.name = "--limit",
                                       .type = Option::Type::integer,
                                       .value_name = "N",
                                       .help = "only the first N questions",
                                       .least = 1,
                                       .most = 1 << 30},
                                      {.name = "--reference",
                                       .type = Option::Type::text,
                                       .value_name = "MODEL",
                                       .help = "compare with this model: KL divergence, top-1 agreement"},
                                      {.name = "--stride",
                                       .type = Option::Type::integer,
                                       .value_name = "N",
                                       .help = "from window to window (default: the context)",
                                       .least = 1,
                                       .most = 1 << 24}}),
    .run = run,
    .print = print};

}  // namespace bitwright
