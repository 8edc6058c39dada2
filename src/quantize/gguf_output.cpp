#include "quantize/gguf_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "base/mapped_file.hpp"
#include "container/gguf_file_types.hpp"
#include "container/gguf_types.hpp"
#include "evaluate/evaluate.hpp"
#include "model/model.hpp"
#include "quantize/model_files.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

constexpr const char* kNoVocabulary = "no_vocab";  // as llama.cpp calls it
constexpr uint32_t kQuantizationVersion = 2;       // ggml's GGML_QNT_VERSION

std::string chat_template_of(const std::filesystem::path& directory) {
  if (std::filesystem::exists(directory / "chat_template.jinja"))
    return std::string(MappedFile(directory / "chat_template.jinja").text());
  const std::filesystem::path path = directory / "tokenizer_config.json";
  if (!std::filesystem::exists(path)) return {};
  const Json config = parse_json(MappedFile(path).text(), path.string());
  const Json found = config.is_object() ? config.value("chat_template", Json()) : Json();
  return found.is_string() ? found.get<std::string>() : "";
}

/// The first where there are several.
void take_id(const Json& config, const char* key, size_t size, std::optional<int32_t>& id) {
  const auto found = config.find(key);
  if (found == config.end() || id) return;
  const Json& first = found->is_array() && !found->empty() ? found->front() : *found;
  if (first.is_number_integer() && first >= 0 && first < size) id = first.get<int32_t>();
}

TensorRole role_of(const Checkpoint& model, const GgufModel& as) {
  const ModelConfig c = find_architecture(model.config())->configure(model.config(), model.path().string());
  return {.layers = c.layers,
          .experts = c.experts,
          .queries_a_key = c.heads / std::max<int64_t>(c.kv_heads, 1),
          .has_output = as.names.contains("output.weight")};
}

const GgufFileType* type_of_most(std::span<const std::vector<ArraySpec>> arrays) {
  std::map<std::string_view, int64_t> elements;
  for (const std::vector<ArraySpec>& tensor : arrays)
    for (const ArraySpec& array : tensor)
      if (const GgufType* type = gguf_type_of(array)) elements[type->block.name] += element_count(array.shape);
  const auto most = std::ranges::max_element(elements, {}, [](const auto& item) { return item.second; });
  if (most == elements.end()) return nullptr;
  const auto found = std::ranges::find(all_gguf_file_types(), most->first, &GgufFileType::type);
  return found == all_gguf_file_types().end() ? nullptr : &*found;
}

}  // namespace

GgufOutput::GgufOutput(const Checkpoint& model, std::vector<Warning>& warnings)
    : model_(gguf_model(model)), arranged_(open_as_gguf(model, model_)), role_(role_of(model, model_)) {
  for (const std::string& difference : model_.differences)
    warnings.push_back({"COMPUTED_OTHERWISE", fmt::format("llama.cpp computes it otherwise: {}", difference)});
  const std::filesystem::path directory = model_directory(model);
  name_ = std::filesystem::weakly_canonical(std::filesystem::absolute(directory)).filename().string();
  const TensorEntry* const embedding = arranged_.find("token_embd.weight");
  const auto rows = static_cast<size_t>(embedding == nullptr || embedding->shape.empty() ? 0 : embedding->shape[0]);
  chat_template_ = chat_template_of(directory);
  if (!Tokenizer::exists_in(directory)) {
    vocabulary_.model = kNoVocabulary;
    warnings.push_back({"NO_TOKENIZER", "the model has no tokenizer, so the file has no vocabulary"});
    return;
  }
  vocabulary_ = gguf_vocabulary_of(directory, rows);
  take_id(model.config(), "bos_token_id", rows, vocabulary_.bos);
  take_id(model.config(), "eos_token_id", rows, vocabulary_.eos);
  const Tokenizer own(directory), theirs = Tokenizer::from_gguf(vocabulary_, directory.string());
  if (own.encode(bundled_text()) != theirs.encode(bundled_text()))
    warnings.push_back({"OTHER_TOKENS", "llama.cpp will cut some texts into other tokens than the model's tokenizer"});
}

GgufMetadata GgufOutput::metadata(std::span<const std::vector<ArraySpec>> arrays, std::string_view file_type) const {
  GgufMetadata out = model_.metadata;
  if (!name_.empty()) out.add("general.name", name_);
  out.add("general.type", "model");
  const GgufFileType* type = find_gguf_file_type(file_type);
  if (type == nullptr) type = type_of_most(arrays);
  if (type != nullptr) out.add("general.file_type", type->id);
  out.add("general.quantization_version", kQuantizationVersion);
  add_vocabulary(vocabulary_, out);
  if (!chat_template_.empty()) out.add("tokenizer.chat_template", chat_template_);
  return out;
}

void warn_of_importance(std::span<const std::vector<ArraySpec>> arrays, std::vector<Warning>& warnings) {
  constexpr auto kNeedIt = std::to_array<std::string_view>({"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"});
  size_t tensors = 0;
  for (const std::vector<ArraySpec>& tensor : arrays)
    for (const ArraySpec& array : tensor) {
      const GgufType* const type = gguf_type_of(array);
      tensors += type != nullptr && std::ranges::find(kNeedIt, type->block.name) != kNeedIt.end() ? 1 : 0;
    }
  if (tensors > 0)
    warnings.push_back(
        {"NO_IMPORTANCE", fmt::format("{} tensors have types that llama.cpp writes only with an imatrix: "
                                      "here all columns count alike, which loses more",
                                      tensors)});
}

}  // namespace bitwright
