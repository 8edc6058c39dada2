#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/threads.hpp"
#include "cli/command.hpp"
#include "model/end_tokens.hpp"
#include "model/model.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

constexpr int64_t kDefaultTokens = 128;

std::vector<int32_t> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt) {
  std::vector<int32_t> tokens;
  if (tokenizer.adds_bos() && tokenizer.bos_id()) tokens.push_back(*tokenizer.bos_id());
  const std::vector<int32_t> encoded = tokenizer.encode(prompt);
  tokens.insert(tokens.end(), encoded.begin(), encoded.end());
  if (tokens.empty())
    throw Error({.code = "empty-prompt",
                 .what = "cannot generate",
                 .why = "the prompt gives no token",
                 .fix = "give a --prompt",
                 .status = ExitStatus::usage});
  return tokens;
}

Sampling sampling_from(const Arguments& arguments) {
  return {.temperature = static_cast<float>(arguments.number("--temperature").value_or(0)),
          .top_k = static_cast<int>(arguments.integer("--top-k").value_or(0)),
          .top_p = static_cast<float>(arguments.number("--top-p").value_or(1)),
          .seed = static_cast<uint64_t>(arguments.integer("--seed").value_or(0))};
}

/// Shows what `tokens` add to the text of which `shown` bytes are out already: decoding is no concatenation, so all of
/// it is decoded each time, which costs little beside the model.
void show(const Tokenizer& tokenizer, const std::vector<int32_t>& tokens, size_t& shown) {
  const std::string text = tokenizer.decode(tokens);
  if (text.size() > shown) std::fwrite(text.data() + shown, 1, text.size() - shown, stdout);
  std::fflush(stdout);
  shown = std::max(shown, text.size());
}

/// Tokenizers may have added tokens that the model has no embedding for.
void check_vocabulary(const std::vector<int32_t>& tokens, int64_t vocabulary) {
  for (const int32_t token : tokens)
    if (token < 0 || token >= vocabulary)
      throw Error({.code = "vocabulary-mismatch",
                   .what = "cannot generate",
                   .why = fmt::format("the prompt has token {}, the model {} tokens", token, vocabulary),
                   .fix = "use the tokenizer that belongs to the model"});
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  const RunnableModel opened(arguments.model);
  const Checkpoint& checkpoint = opened.checkpoint;
  checkpoint.verify_digests();
  const Tokenizer tokenizer(tokenizer_path(checkpoint));
  const Model model(checkpoint, opened.adapter_or_null());
  // Beside a file that speaks for itself generation_config.json is another model's.
  const auto directory = checkpoint.facts() == nullptr ? model_directory(checkpoint) : std::filesystem::path();
  const std::vector<int32_t> ends = end_tokens(checkpoint.config(), directory);
  std::vector<int32_t> tokens = prompt_tokens(tokenizer, *arguments.text("--prompt"));
  const auto prompt = static_cast<int64_t>(tokens.size());
  int64_t wanted = arguments.integer("--tokens").value_or(kDefaultTokens);
  const int64_t room = model.config().context - prompt;
  if (room < 1)
    throw Error(
        {.code = "context-full",
         .what = "cannot generate",
         .why = fmt::format("the prompt has {} tokens, the model's context is {}", prompt, model.config().context),
         .fix = "shorten the prompt"});
  if (wanted > room) {
    warnings.push_back({"CONTEXT_LIMIT", fmt::format("only {} of {} tokens fit the model's context of {}", room, wanted,
                                                     model.config().context)});
    wanted = room;
  }
  KvCache cache(model.config(), prompt + wanted);
  Sampler sampler(sampling_from(arguments));
  check_vocabulary(tokens, model.config().vocabulary);
  size_t shown = 0;
  if (!arguments.json) show(tokenizer, tokens, shown);
  std::vector<int32_t> step = tokens;
  for (int64_t i = 0; i < wanted; ++i) {
    throw_if_interrupted();
    const std::vector<float> logits = model.forward(step, cache, Model::Logits::last);
    if (!std::ranges::all_of(logits, [](float value) { return std::isfinite(value); }))
      throw Error({.code = "not-finite",
                   .what = "cannot generate",
                   .where = arguments.model,
                   .why = "the model's logits are NaN or infinite",
                   .fix = "its weights are damaged, fetch them again"});
    // Vocabularies are padded: ids that the tokenizer does not know are never drawn.
    const size_t known = std::min(logits.size(), tokenizer.vocabulary_size());
    const int32_t next = sampler.next(std::span(logits).first(known));
    if (next == tokenizer.eos_id() || std::ranges::find(ends, next) != ends.end()) break;
    tokens.push_back(next);
    step = {next};
    if (!arguments.json) show(tokenizer, tokens, shown);
  }
  return {{"text", tokenizer.decode(tokens)}, {"tokens", tokens}};
}

void print(const OrderedJson&) { fmt::print("\n"); }  // the text was printed as it came

}  // namespace

extern const Command generate_command;
const Command generate_command = {.name = "generate",
                                  .summary = "continue a text",
                                  .options = {{.name = "-p,--prompt",
                                               .type = Option::Type::text,
                                               .value_name = "TEXT",
                                               .help = "the text to continue",
                                               .required = true},
                                              {.name = "-n,--tokens",
                                               .type = Option::Type::integer,
                                               .value_name = "N",
                                               .help = "tokens to add (default: 128, up to the end of the text)",
                                               .least = 1,
                                               .most = 1 << 24},
                                              {.name = "--temperature",
                                               .type = Option::Type::number,
                                               .value_name = "T",
                                               .help = "0 (default): always the most likely token",
                                               .least = 0,
                                               .most = 100},
                                              {.name = "--top-k",
                                               .type = Option::Type::integer,
                                               .value_name = "K",
                                               .help = "draw from the K most likely (default: 0, all)",
                                               .least = 0,
                                               .most = 1 << 24},
                                              {.name = "--top-p",
                                               .type = Option::Type::number,
                                               .value_name = "P",
                                               .help = "draw from the most likely that hold P of the probability",
                                               .least = 0,
                                               .most = 1},
                                              {.name = "--seed",
                                               .type = Option::Type::integer,
                                               .value_name = "S",
                                               .help = "the same seed gives the same text (default: 0)",
                                               .least = 0,
                                               .most = 9e15}},
                                  .run = run,
                                  .print = print};

}  // namespace bitwright
