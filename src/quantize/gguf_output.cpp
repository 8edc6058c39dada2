#include "quantize/gguf_output.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "base/mapped_file.hpp"
#include "base/threads.hpp"
#include "container/gguf_file_types.hpp"
#include "container/gguf_types.hpp"
#include "evaluate/evaluate.hpp"
#include "model/end_tokens.hpp"
#include "model/model.hpp"
#include "quantize/model_files.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

constexpr const char* kNoVocabulary = "no_vocab";  // as llama.cpp calls it
constexpr uint32_t kQuantizationVersion = 2;       // ggml's GGML_QNT_VERSION
constexpr int32_t kByteToken = 6;                  // SentencePiece's number, GGUF's too
constexpr int64_t kMostCount = 1 << 20;            // of layers, heads and experts

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

/// Ids that end a text beside the first: of a turn the last, of a message one between (Llama 3.1's three).
void take_turn_ends(const std::vector<int32_t>& ends, size_t size, GgufVocabulary& out) {
  std::vector<int32_t> others;
  for (const int32_t id : ends)
    if (static_cast<size_t>(id) < size && id != out.eos) others.push_back(id);
  if (!others.empty()) out.eot = others.back();
  if (others.size() > 1) out.eom = others.front();
}

/// From the keys of a GGUF file.
TensorRole role_in_file(const Json& facts, const GgufModel& as) {
  const auto number = [&](const char* key, int64_t missing) {
    const Json value = facts.value(fmt::format("{}.{}", as.architecture, key), Json());
    return value.is_number_integer() && value >= 0 && value < kMostCount ? value.get<int64_t>() : missing;
  };
  const int64_t heads = number("attention.head_count", 1);
  return {.layers = number("block_count", 0),
          .experts = number("expert_count", 0),
          .queries_a_key = heads / std::max<int64_t>(number("attention.head_count_kv", heads), 1),
          .has_output = as.names.contains("output.weight")};
}

TensorRole role_of(const Checkpoint& model, const GgufModel& as) {
  if (model.facts() != nullptr) return role_in_file(*model.facts(), as);
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
    : model_(gguf_model(model)), role_(role_of(model, model_)) {
  is_gguf_ = model.facts() != nullptr;
  if (model.container() == nullptr || is_gguf_) arranged_.emplace(open_as_gguf(model, model_));
  for (const std::string& difference : model_.differences)
    warnings.push_back({"COMPUTED_OTHERWISE", fmt::format("llama.cpp computes it otherwise: {}", difference)});
  if (model.facts() != nullptr) return;  // its metadata has the vocabulary
  const std::filesystem::path directory = model_directory(model);
  name_ = std::filesystem::weakly_canonical(std::filesystem::absolute(directory)).filename().string();
  const auto embedding = std::ranges::find(model_.arrays, "token_embd.weight", &ArrayView::name);
  const bool has_rows = embedding != model_.arrays.end() && !embedding->shape.empty();
  const auto rows = static_cast<size_t>(has_rows ? embedding->shape[0] : 0);
  chat_template_ = chat_template_of(directory);
  if (!Tokenizer::exists_in(directory)) {
    vocabulary_.model = kNoVocabulary;
    warnings.push_back({"NO_TOKENIZER", "the model has no tokenizer, so the file has no vocabulary"});
    return;
  }
  std::array<std::vector<int32_t>, 2> ids;  // of the model's tokenizer and of the file's
  parallel_for(2, [&](size_t i) {
    if (i == 0) {
      ids[0] = Tokenizer(directory).encode(bundled_text());
      return;
    }
    vocabulary_ = gguf_vocabulary_of(directory, rows);
    take_id(model.config(), "bos_token_id", rows, vocabulary_.bos);
    take_id(model.config(), "eos_token_id", rows, vocabulary_.eos);
    take_turn_ends(end_tokens(model.config(), directory), rows, vocabulary_);
    ids[1] = Tokenizer::from_gguf(vocabulary_, directory.string()).encode(bundled_text());
  });
  const bool bytes = std::ranges::find(vocabulary_.types, kByteToken) != vocabulary_.types.end();
  if (vocabulary_.model == "llama" && !bytes)
    warnings.push_back({"NO_BYTE_TOKENS", "llama.cpp fails on texts with characters that the vocabulary lacks"});
  if (ids[0] != ids[1])
    warnings.push_back({"OTHER_TOKENS", "llama.cpp will cut some texts into other tokens than the model's tokenizer"});
}

GgufMetadata GgufOutput::metadata(std::span<const std::vector<ArraySpec>> arrays, std::string_view file_type,
                                  const Importance* importance) const {
  GgufMetadata out = model_.metadata;
  if (!name_.empty()) out.add("general.name", name_);
  if (!is_gguf_) out.add("general.type", "model");
  const GgufFileType* type = find_gguf_file_type(file_type);
  if (type == nullptr) type = type_of_most(arrays);
  if (type != nullptr) out.add("general.file_type", type->id);
  out.add("general.quantization_version", kQuantizationVersion);
  if (!is_gguf_) add_vocabulary(vocabulary_, out);
  if (!chat_template_.empty()) out.add("tokenizer.chat_template", chat_template_);
  if (importance != nullptr) importance->add_to(out);
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
