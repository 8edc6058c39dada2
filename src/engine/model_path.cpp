#include <algorithm>
#include <filesystem>

#include "base/error.hpp"
#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "engine/detect.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void no_model(const fs::path& path, const std::string& why) {
  throw Error({.code = "no-model", .what = "cannot read model", .where = path.string(), .why = why});
}

/// The documents beside the weights; none of them is large.
ModelDocuments read_documents(const fs::path& directory) {
  constexpr uintmax_t kLargest = 64U << 20;
  ModelDocuments documents;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    const bool says = name.ends_with("config.json") || name == "quant_model_description.json";
    if (says && entry.is_regular_file() && entry.file_size() <= kLargest)
      documents[name] = parse_json(read_text_file(entry.path()), entry.path().string());
  }
  return documents;
}

bool is_gguf(const fs::path& path) { return MappedFile(path).text().starts_with("GGUF"); }

/// The directory's GGUF file where nothing else says what it holds.
fs::path find_gguf(const fs::path& directory) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(directory))
    if (entry.path().extension() == ".gguf" && entry.is_regular_file()) files.push_back(entry.path());
  return files.empty() ? fs::path() : *std::ranges::min_element(files);
}

}  // namespace

DetectedQuantization detect_model_at(const fs::path& model) {
  if (!fs::exists(model)) no_model(model, "there is no such file or directory");
  const bool whole = fs::is_directory(model);
  const fs::path directory = whole ? model : model.parent_path().empty() ? fs::path(".") : model.parent_path();
  const ModelDocuments documents = read_documents(directory);
  const fs::path gguf = !whole ? model : documents.empty() ? find_gguf(model) : fs::path();
  if (!gguf.empty() && is_gguf(gguf))
    return {.method = "gguf", .evidence = gguf.filename().string() + ": its first bytes"};
  const auto config = documents.find("config.json");
  if (whole && documents.empty()) no_model(model, "the directory has no config.json and no .gguf file");
  DetectedQuantization found = detect_model_quantization(documents, fs::absolute(model).filename().string());
  Json facts = config == documents.end() ? Json::object() : model_facts(config->second);
  facts.update(found.facts);
  found.facts = std::move(facts);
  return found;
}

}  // namespace bitwright
