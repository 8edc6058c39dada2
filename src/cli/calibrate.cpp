#include "evaluate/calibrate.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <tuple>

#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "cli/command.hpp"
#include "cli/protocol_options.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"

namespace bitwright {
namespace {

using Names = std::multimap<MatrixName, GgufMatrix>;

/// An expert: where all of its layer are, and its number.
struct Expert {
  std::string stack;
  int64_t number;
  bool operator<(const Expert& other) const { return std::tie(stack, number) < std::tie(other.stack, other.number); }
};

/// "model.layers.0.mlp.experts.3.up_proj.weight", or matrix 3 of "model.layers.0.mlp.experts.gate_up_proj".
Expert expert_of(const MatrixName& matrix, int64_t number) {
  constexpr std::string_view kExperts = ".experts.";
  const size_t end = matrix.tensor.rfind(kExperts);
  const size_t length = end == std::string::npos ? matrix.tensor.size() : end + kExperts.size() - 1;
  return {matrix.tensor.substr(0, length), number};
}

/// How many tokens each saw.
std::map<Expert, int64_t> experts_of(const Calibration& calibration, const Names& names) {
  std::map<Expert, int64_t> seen;
  for (const auto& [matrix, place] : names) {
    if (place.count == 1) continue;
    const auto found = calibration.inputs.find(matrix);
    seen[expert_of(matrix, place.index)] = found == calibration.inputs.end() ? 0 : found->second.counts.front();
  }
  return seen;
}

void warn_of_unseen(const std::map<Expert, int64_t>& experts, std::vector<Warning>& warnings) {
  const auto unseen = std::ranges::find(experts, 0, [](const auto& item) { return item.second; });
  if (unseen == experts.end()) return;
  const auto count = std::ranges::count(experts, 0, [](const auto& item) { return item.second; });
  warnings.push_back(
      {"EXPERT_UNSEEN", fmt::format("{} of {} experts saw no token, '{}.{}' first: all their columns "
                                    "will count alike; give a longer text",
                                    count, experts.size(), printable(unseen->first.stack), unseen->first.number)});
}

OrderedJson run(const Arguments& arguments, std::vector<Warning>& warnings) {
  const std::filesystem::path output = *arguments.text("--output"), text_path = *arguments.text("--text");
  WholeFile file(output, arguments.flag("--force"));
  const MappedFile text(text_path);
  const Checkpoint checkpoint = open_model(arguments.model);
  checkpoint.verify_digests();
  const Names names = gguf_matrices(checkpoint);
  const Tokenizer tokenizer(tokenizer_path(checkpoint));
  const Model model(checkpoint);
  const Protocol protocol = protocol_for(arguments, model.config().context, tokenizer);
  const Calibration calibration =
      calibrate(model, token_stream(tokenizer, text.text(), protocol), protocol, tokenizer.bos_id());
  Imatrix imatrix = importance_of(calibration, names);
  imatrix.datasets = {text_path.string()};
  imatrix.chunks = static_cast<uint32_t>(calibration.windows);
  imatrix.chunk_size = static_cast<uint32_t>(protocol.context);
  write_imatrix(imatrix, file.staging(), imatrix_form(output));
  file.commit();

  const std::map<Expert, int64_t> experts = experts_of(calibration, names);
  warn_of_unseen(experts, warnings);
  OrderedJson result = {{"output", output.string()},
                        {"tokens", calibration.tokens},
                        {"linears", imatrix.entries.size()},
                        {"experts", OrderedJson::array()}};
  for (const auto& [expert, tokens] : experts)
    result["experts"].push_back({{"name", fmt::format("{}.{}", expert.stack, expert.number)}, {"tokens", tokens}});
  result["protocol"] = to_json(protocol, text.text(), calibration.windows);
  return result;
}

void print(const OrderedJson& result) {
  fmt::print("{}: inputs of {} matrices, {} tokens in {} windows\n", printable(result["output"].get<std::string>()),
             result["linears"].get<size_t>(), result["tokens"].get<int64_t>(),
             result["protocol"]["windows"].get<int64_t>());
}

}  // namespace

extern const Command calibrate_command;
const Command calibrate_command = {
    .name = "calibrate",
    .summary = "what goes into a model's matrices, for algorithms that weight errors by it",
    .options = with_protocol_options(
        {{.name = "--text",
          .type = Option::Type::text,
          .value_name = "FILE",
          .help = "plain text, or JSONL with a \"text\" a line",
          .required = true},
         {.name = "-o,--output",
          .type = Option::Type::text,
          .value_name = "FILE",
          .help = "where the statistics go: a GGUF file as llama-imatrix writes it, or its older form for NAME.dat",
          .required = true},
         {.name = "--force", .type = Option::Type::flag, .value_name = "", .help = "replace an existing file"}}),
    .run = run,
    .print = print};

}  // namespace bitwright
