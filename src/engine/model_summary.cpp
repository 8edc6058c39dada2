#include "engine/model_summary.hpp"

#include <algorithm>
#include <filesystem>
#include <map>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "container/container.hpp"
#include "model/open_model.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

/// The files of a directory that say something of quantization.
bool is_a_containers(std::string_view file) {
  return std::ranges::any_of(all_containers(), [&](const Container* container) {
    return std::ranges::find(container->files, file) != container->files.end();
  });
}

ModelDocuments read_documents(const fs::path& directory) {
  constexpr uintmax_t kLargest = 64U << 20;  // the longest lists of layers are far below
  ModelDocuments documents;
  for (const auto& entry : fs::directory_iterator(directory)) {
    std::error_code broken_link;
    const std::string name = entry.path().filename().string();
    if (name.ends_with("config.json") || name == "quant_model_description.json" || is_a_containers(name))
      if (entry.is_regular_file(broken_link) && entry.file_size() <= kLargest)
        documents[name] = parse_json(read_text_file(entry.path()), entry.path().string());
  }
  return documents;
}

/// Its last part, of "." and "DIR/" too.
std::string name_of(const fs::path& path) {
  const fs::path whole = fs::absolute(path).lexically_normal();
  return (whole.has_filename() ? whole : whole.parent_path()).filename().string();
}

/// Files of weights that are not opened here still count.
uint64_t bytes_of_weights(const fs::path& path) {
  std::error_code broken_link;
  if (!fs::is_directory(path)) return fs::file_size(path, broken_link);
  uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(path)) {
    const std::string suffix = entry.path().extension().string();
    const bool is_weights = suffix == ".npz" || suffix == ".safetensors" || suffix == ".gguf" || suffix == ".bin";
    if (is_weights && entry.is_regular_file(broken_link)) bytes += entry.file_size();
  }
  return bytes;
}

void open_weights(const fs::path& path, ModelSummary& model) {
  try {
    model.checkpoint.emplace(open_model(path, Checkpoint::Foreign::list));
    model.stored = read_stored(model.checkpoint->stored_arrays(), model.checkpoint->facts());
  } catch (const Error& error) {
    if (!fs::exists(path)) throw;
    if (error.code() != "no-weights" || !fs::is_directory(path)) model.unread = error;
  }
}

/// Arrays that their container cannot make tensors of still have names. A GGUF file of an architecture that is not run
/// here describes itself all the same.
void read_header(const fs::path& path, ModelSummary& model) {
  if (model.checkpoint || !model.unread) return;
  try {
    if (fs::is_directory(path))
      model.stored = read_stored(open_model(path, Checkpoint::Foreign::list_all).stored_arrays());
    else
      model.stored = read_stored({path});
  } catch (const Error&) {
    return;  // what kept the model from being opened says more
  }
  if (!model.stored.model.empty()) model.unread.reset();
}

/// Of one code; of types that are not decoded their whole bits a weight.
double bits_of(const TensorEntry& entry) {
  return entry.undecoded != nullptr ? static_cast<int>(entry.bits_per_weight()) : entry.scheme.element->bits;
}

bool is_quantized(const TensorEntry& entry) { return entry.quantized() || entry.undecoded != nullptr; }

/// What becomes of the inputs of linear layers while the model runs.
std::string_view mode_of(const QuantizedLinear& linear) {
  if (!linear.input) return "weight-only";
  return linear.input->dynamic ? "dynamic activations" : "static activations";
}

/// What most quantized tensors share stands for the model.
struct Common {
  std::string scheme;
  const TensorEntry* example = nullptr;
};
Common common_scheme(const Checkpoint& checkpoint) {
  std::map<std::string, std::pair<size_t, const TensorEntry*>> schemes;
  for (const TensorEntry& entry : checkpoint.tensors()) {
    if (!is_quantized(entry)) continue;
    auto& [count, example] = schemes[type_of(entry)];
    ++count;
    example = &entry;
  }
  if (schemes.empty()) return {};
  const auto most = std::ranges::max_element(schemes, {}, [](const auto& item) { return item.second.first; });
  return {(schemes.size() == 1 ? "" : "mixed, mostly ") + most->first, most->second.second};
}

/// What the tensors themselves say, where the files beside them say less.
void add_stored(const Checkpoint& checkpoint, DetectedQuantization& found) {
  if (checkpoint.container() == nullptr) return;
  if (found.method.empty())
    found = {.method = std::string(checkpoint.container()->name), .evidence = "the tensors", .facts = found.facts};
  if (found.bits != 0 || !found.scheme.empty()) return;
  const Common common = common_scheme(checkpoint);
  if (common.example == nullptr) return;
  found.scheme = common.scheme;
  found.bits = bits_of(*common.example);
  if (const Scheme& scheme = common.example->scheme; common.example->undecoded == nullptr && scheme.scale)
    found.group_size = scheme.scale->grouping.size;
}

/// Of tensors that a container lists.
OrderedJson stored_quantization(const Checkpoint& model) {
  OrderedJson json = {{"quantized", false}};
  if (const Common common = common_scheme(model); common.example != nullptr) {
    const TensorEntry& example = *common.example;
    const Scheme& scheme = example.scheme;
    const Json algorithm = model.quantization_metadata().value("algorithm", Json());
    json = {{"quantized", true},
            {"method", algorithm.is_string() ? algorithm.get<std::string>() : std::string(model.container()->name)},
            {"container", model.container()->name},
            {"scheme", common.scheme},
            {"bits", static_cast<int>(bits_of(example))},
            {"mode", mode_of(example.linear)}};
    if (scheme.scale && scheme.scale->grouping.size != 0) json["group_size"] = scheme.scale->grouping.size;
    if (example.undecoded == nullptr)
      json["symmetric"] = scheme.offset_kind == OffsetKind::none || scheme.offset_kind == OffsetKind::shift;
  }
  OrderedJson affected = OrderedJson::array(), skipped = OrderedJson::array();
  for (const TensorEntry& entry : model.tensors())
    if (is_quantized(entry))
      affected.push_back(entry.name);
    else if (entry.shape.size() >= 2)
      skipped.push_back(entry.name);
  json["affected_layers"] = std::move(affected);
  json["skipped_layers"] = std::move(skipped);
  return json;
}

/// Of what is declared alone.
OrderedJson declared_quantization(const DetectedQuantization& found) {
  if (found.method.empty())
    return {{"quantized", false}, {"affected_layers", OrderedJson::array()}, {"skipped_layers", OrderedJson::array()}};
  OrderedJson json = {
      {"quantized", true},
      {"method", found.method},
      {"container", find_container(found.method) != nullptr ? OrderedJson(found.method) : OrderedJson()},
      {"scheme", found.scheme},
      {"bits", found.bits > 0 ? OrderedJson(found.bits) : OrderedJson()},
      {"mode", found.mode.empty() ? OrderedJson() : OrderedJson(found.mode)}};
  if (found.bits > 0 && found.bits == static_cast<int>(found.bits)) json["bits"] = static_cast<int>(found.bits);
  if (found.group_size > 0) json["group_size"] = found.group_size;
  json["symmetric"] = found.symmetric ? OrderedJson(*found.symmetric) : OrderedJson();
  json["evidence"] = found.evidence;
  json["affected_layers"] = found.affected;
  json["skipped_layers"] = found.skipped;
  return json;
}

}  // namespace

std::string type_of(const TensorEntry& entry) {
  if (entry.undecoded != nullptr) return std::string(entry.undecoded->name);
  return entry.quantized() ? describe(entry.scheme) : std::string(info(entry.dtype).name);
}

OrderedJson tensor_json(const TensorEntry& entry) {
  return {{"name", entry.name},
          {"shape", entry.shape},
          {"dtype", info(entry.dtype).name},
          {"scheme", is_quantized(entry) ? OrderedJson(type_of(entry)) : OrderedJson()},
          {"bytes", entry.stored_bytes},
          {"bits_per_weight", entry.bits_per_weight()}};
}

ModelSummary summarize_model(const std::string& name) {
  const fs::path path = name;
  ModelSummary model;
  open_weights(path, model);
  read_header(path, model);
  ModelDocuments documents;
  if (model.checkpoint && model.checkpoint->facts() != nullptr)
    documents["config.json"] = model.checkpoint->config();
  else if (fs::is_directory(path))
    documents = read_documents(path);
  else if (model.checkpoint)
    documents = read_documents(fs::absolute(path).parent_path());
  const bool says = !documents.empty() || !model.stored.model.empty();
  if (model.unread && !says) throw Error(*model.unread);
  if (!model.checkpoint && !says)
    throw Error({.code = "no-model",
                 .what = "cannot read model",
                 .where = name,
                 .why = "the directory has neither weights nor a config.json",
                 .fix = "give a Hugging Face model directory"});
  if (const auto config = documents.find("config.json"); config != documents.end()) model.config = config->second;
  model.weight_bytes = model.checkpoint ? model.checkpoint->weight_bytes() : bytes_of_weights(path);
  model.quantization = detect_model_quantization(documents, name_of(path));
  if (const DetectedQuantization& stored = model.stored.quantization;
      stored.method == "gguf" || (model.quantization.method.empty() && !stored.method.empty()))
    model.quantization = stored;
  if (model.checkpoint) add_stored(*model.checkpoint, model.quantization);
  apply_declared(model.quantization, model.stored.modules);
  model.facts = model.config.empty() ? model.stored.model : model_facts(model.config);
  model.facts.update(model.quantization.facts);
  return model;
}

DetectedQuantization detect_model_at(const fs::path& path) {
  ModelSummary model = summarize_model(path.string());
  model.quantization.facts = std::move(model.facts);
  return std::move(model.quantization);
}

OrderedJson quantization_json(const ModelSummary& model) {
  const bool listed =
      model.checkpoint && (model.checkpoint->container() != nullptr || model.quantization.method.empty());
  return listed ? stored_quantization(*model.checkpoint) : declared_quantization(model.quantization);
}

}  // namespace bitwright
