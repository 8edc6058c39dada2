#include "quantize/model_files.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <vector>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "base/threads.hpp"
#include "container/container.hpp"
#include "engine/loads.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

/// Belongs to a model by its name, wherever it lies.
bool is_known_file(const std::string& name) {
  constexpr std::array<std::string_view, 11> kNames = {"tokenizer.json",
                                                       "tokenizer_config.json",
                                                       "generation_config.json",
                                                       "special_tokens_map.json",
                                                       "added_tokens.json",
                                                       "vocab.json",
                                                       "merges.txt",
                                                       "vocab.txt",
                                                       "tokenizer.model",
                                                       "tokenizer.bin",
                                                       "chat_template.jinja"};
  return std::ranges::find(kNames, name) != kNames.end();
}

/// In a model's own directory every configuration and vocabulary belongs to it, but for what is written anew.
bool is_side_file(const fs::path& path) {
  constexpr std::array<std::string_view, 5> kKinds = {".json", ".model", ".jinja", ".tiktoken", ".vocab"};
  const std::string name = path.filename().string();
  bool rewritten = name == "config.json" || name == "quantization_metadata.json" || name.ends_with(".index.json");
  for (const Container* container : all_containers())
    rewritten = rewritten || std::ranges::find(container->files, name) != container->files.end();
  return std::ranges::find(kKinds, path.extension().string()) != kKinds.end() && !rewritten;
}

/// Absolute, links resolved as far as the path exists, no slash at the end.
fs::path resolved(const fs::path& path) {
  const fs::path canonical = fs::weakly_canonical(fs::absolute(path));
  return canonical.has_filename() ? canonical : canonical.parent_path();
}

bool is_inside(const fs::path& inner, const fs::path& outer) {
  const auto [end, unused] = std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end());
  return end == outer.end();
}

}  // namespace

fs::path model_directory(const Checkpoint& model) {
  if (fs::is_directory(model.path())) return model.path();
  return model.path().has_parent_path() ? model.path().parent_path() : fs::path(".");
}

fs::path tokenizer_path(const Checkpoint& model) {
  const bool own = model.facts() != nullptr && model.facts()->contains("tokenizer.ggml.tokens");
  return own ? model.path() : model_directory(model);
}

OrderedJson read_config(const Checkpoint& model) {
  if (model.facts() != nullptr) return OrderedJson(model.config());  // the file speaks for itself
  const fs::path path = model_directory(model) / "config.json";
  return fs::exists(path) ? parse_ordered_json(read_text_file(path), path.string()) : OrderedJson::object();
}

void copy_side_files(const Checkpoint& model, const fs::path& to) {
  copy_side_files(model_directory(model), fs::is_directory(model.path()), to);
}

void copy_side_files(const fs::path& directory, bool own, const fs::path& to) {
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
    std::error_code broken_link;
    if (entry.is_regular_file(broken_link) &&
        (is_known_file(entry.path().filename().string()) || (own && is_side_file(entry.path()))))
      files.push_back(entry.path());
  }
  for (const fs::path& file : files) write_text_file(to / file.filename(), MappedFile(file).text());
}

Warning no_tokenizer_written() {
  return {"NO_TOKENIZER",
          "the output has no tokenizer: the file's vocabulary is not written as tokenizer.json; copy the original "
          "model's beside it"};
}

OrderedJson digests_of(const std::filesystem::path& directory) {
  std::map<std::string, OrderedJson> sorted;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    bool rewritten = name == "config.json" || name == "quantization_metadata.json" || name == "README.md";
    for (const Container* container : all_containers())
      rewritten = rewritten || std::ranges::find(container->files, name) != container->files.end();
    if (!name.starts_with(".") && !rewritten) sorted[name] = OrderedJson::object();
  }
  std::vector<std::pair<const std::string, OrderedJson>*> files;
  for (auto& item : sorted) files.push_back(&item);
  parallel_for(files.size(), [&](size_t i) {
    const MappedFile file(directory / files[i]->first);
    files[i]->second = {{"bytes", file.bytes().size()}, {"sha256", file.digest()}};
  });
  return sorted;
}

OrderedJson engines_json(const std::map<std::string, OrderedJson>& files) {
  ModelDocuments documents;
  for (const auto& [name, json] : files) documents[name] = json;
  OrderedJson engines = OrderedJson::array();
  for (const Loads& answer : engines_that_load(documents)) {
    engines.push_back({{"name", answer.engine}, {"loads", answer.yes}});
    if (!answer.reason.empty()) engines.back()["reason"] = answer.reason;
  }
  return engines;
}

void drop_quantization(OrderedJson& config) {
  config.erase("quantization_config");
  config.erase("quantization");  // MLX
}

void check_apart(const Checkpoint& model, const fs::path& output) {
  if (output.empty()) return;  // OutputDirectory says so
  const fs::path target = resolved(output), source = resolved(model.path());
  if (is_inside(source, target) || (fs::is_directory(source) && is_inside(target, source)))
    throw Error({.code = "output-is-input",
                 .what = "cannot write output",
                 .where = output.string(),
                 .why = fmt::format("it is, holds or lies in the model {}", model.path().string()),
                 .fix = "choose a directory beside it",
                 .status = ExitStatus::usage});
}

}  // namespace bitwright
