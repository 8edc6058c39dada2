#include "train/training_checkpoint.hpp"

#include <algorithm>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "checkpoint/safetensors.hpp"
#include "checkpoint/weight_file.hpp"
#include "quantize/model_files.hpp"
#include "train/tensor_types.hpp"

namespace bitwright::train {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFacts = "training.json";
constexpr const char* kModel = "model.safetensors";
constexpr const char* kQuantization = "quantization_metadata.json";
constexpr const char* kOptimizer = "trainer.safetensors";
constexpr std::string_view kFormat = "bitwright-training";

DType type_in_file(const std::string& name, torch::ScalarType type) {
  if (const std::optional<DType> dtype = stored_dtype(type)) return *dtype;
  throw Error({.code = "cannot-save",
               .what = "cannot write checkpoint",
               .where = name,
               .why = fmt::format("tensors of type {} are not known", torch::toString(type))});
}

torch::Tensor copied(const StoredArray& array, const std::string& where) {
  const std::optional<torch::ScalarType> type = tensor_type(array.dtype);
  if (!type)
    throw Error({.code = "checkpoint-damaged",
                 .what = "cannot read checkpoint",
                 .where = where,
                 .why = fmt::format("tensor '{}' is of type {}", printable(array.name), info(array.dtype).name)});
  torch::Tensor tensor = torch::empty(array.shape, *type);
  std::copy(array.data.begin(), array.data.end(), static_cast<std::byte*>(tensor.data_ptr()));
  return tensor;
}

[[noreturn]] void damaged(const fs::path& where, const std::string& why) {
  throw Error({.code = "checkpoint-damaged",
               .what = "cannot read checkpoint",
               .where = where.string(),
               .why = why,
               .fix = "remove the checkpoint and go on from the one before it"});
}

/// Each file is what was written. Of facts that check_training_facts() has passed.
void check_files(const fs::path& directory, const OrderedJson& facts) {
  for (const auto& [name, digest] : facts["files"].items()) {
    const fs::path path = directory / name;
    if (!fs::is_regular_file(path)) damaged(path, "the file is missing");
    if (MappedFile(path).digest() != digest["sha256"].get_ref<const std::string&>())
      damaged(path, "its SHA-256 is not the one that was written");
  }
}

/// What was quantized, if anything was: of a version that this program knows.
void check_quantization(const fs::path& path) {
  if (!fs::exists(path)) return;
  const OrderedJson metadata = parse_ordered_json(read_text_file(path), path.string());
  const OrderedJson version = metadata.is_object() ? metadata.value("format_version", OrderedJson()) : OrderedJson();
  if (!version.is_string()) damaged(path, "it has no format_version");
  const auto& text = version.get_ref<const std::string&>();
  if (!text.starts_with("1."))
    throw Error({.code = "newer-checkpoint",
                 .what = "cannot read checkpoint",
                 .where = path.string(),
                 .why = fmt::format("it has format {}, this program knows 1", printable(text)),
                 .fix = "use the version of bitwright that wrote it, or a newer one"});
}

}  // namespace

void write_tensors(const fs::path& path, const NamedTensors& tensors) {
  std::vector<ArraySpec> specs;
  for (const auto& [name, tensor] : tensors)
    specs.push_back({.name = name, .dtype = type_in_file(name, tensor.scalar_type()), .shape = tensor.sizes().vec()});
  SafetensorsWriter writer(path, std::move(specs));
  for (const auto& [name, tensor] : tensors) {
    const torch::Tensor plain = tensor.detach().to(torch::kCPU).contiguous();
    writer.add({static_cast<const std::byte*>(plain.data_ptr()), plain.nbytes()});
  }
  writer.finish();
}

NamedTensors read_tensors(const fs::path& path) {
  const MappedFile file(path);
  NamedTensors tensors;
  for (const StoredArray& array : parse_safetensors(file.bytes(), path.string()))
    tensors[array.name] = copied(array, path.string());
  return tensors;
}

void write_training_state(const fs::path& directory, const TrainingState& state,
                          const std::function<void(const fs::path& directory)>& add_files) {
  fs::create_directories(directory.parent_path());
  OutputDirectory output(directory, Existing::refuse);
  write_tensors(output.staging() / kModel, state.model);
  write_tensors(output.staging() / kOptimizer, state.optimizer);
  if (add_files) add_files(output.staging());
  OrderedJson facts = {{"format", kFormat}, {"format_version", kTrainingFormat}};
  facts.update(state.facts);
  facts["files"] = digests_of(output.staging());
  if (const fs::path quantization = output.staging() / kQuantization; fs::exists(quantization))
    facts["files"][kQuantization] = {{"bytes", fs::file_size(quantization)},
                                     {"sha256", MappedFile(quantization).digest()}};
  write_text_file(output.staging() / kFacts, facts.dump(1) + "\n");
  output.commit();
}

void check_training_facts(const OrderedJson& facts, const fs::path& path) {
  if (!facts.is_object() || facts.value("format", OrderedJson()) != kFormat)
    damaged(path, "it is no checkpoint of a training");
  const OrderedJson version = facts.value("format_version", OrderedJson());
  if (!version.is_number_integer() || version.get<int64_t>() < 1) damaged(path, "its format_version is no number");
  if (version.get<int64_t>() > kTrainingFormat)
    throw Error({.code = "newer-checkpoint",
                 .what = "cannot read checkpoint",
                 .where = path.string(),
                 .why = fmt::format("it has format {}, this program knows formats up to {}", version.get<int64_t>(),
                                    kTrainingFormat),
                 .fix = "use the version of bitwright that wrote it, or a newer one"});
  const auto files = facts.find("files");
  if (files == facts.end() || !files->is_object() || !files->contains(kModel) || !files->contains(kOptimizer))
    damaged(path, "it does not say what files belong to it");
  for (const auto& [name, digest] : files->items()) {
    if (fs::path(name).filename() != name) damaged(path, fmt::format("'{}' is no file beside it", printable(name)));
    const auto sha = digest.is_object() ? digest.find("sha256") : digest.end();
    if (sha == digest.end() || !sha->is_string())
      damaged(path, fmt::format("the SHA-256 of '{}' is missing", printable(name)));
  }
}

TrainingState read_training_state(const fs::path& directory) {
  const fs::path path = directory / kFacts;
  if (!fs::is_regular_file(path))
    throw Error({.code = "no-checkpoint",
                 .what = "cannot read checkpoint",
                 .where = directory.string(),
                 .why = fmt::format("there is no {} in it", kFacts)});
  TrainingState state;
  state.facts = parse_ordered_json(read_text_file(path), path.string());
  check_training_facts(state.facts, path);
  check_files(directory, state.facts);
  check_quantization(directory / kQuantization);
  state.model = read_tensors(directory / kModel);
  state.optimizer = read_tensors(directory / kOptimizer);
  return state;
}

void copy_tensors(const NamedTensors& from, const NamedTensors& to, const fs::path& where) {
  const auto fail = [&](const std::string& why) {
    throw Error({.code = "incompatible-checkpoint",
                 .what = "cannot go on from checkpoint",
                 .where = where.string(),
                 .why = why,
                 .fix = "give the configuration that it was made with"});
  };
  const auto kind = [](const torch::Tensor& t) {
    return fmt::format("{} {}", torch::toString(t.scalar_type()), to_string(t.sizes().vec()));
  };
  for (const auto& [name, tensor] : to) {
    const auto stored = from.find(name);
    if (stored == from.end()) fail(fmt::format("it has no tensor '{}'", name));
    if (stored->second.sizes() != tensor.sizes() || stored->second.scalar_type() != tensor.scalar_type())
      fail(fmt::format("tensor '{}' is {} there, {} here", name, kind(stored->second), kind(tensor)));
  }
  for (const auto& [name, tensor] : from)
    if (!to.contains(name)) fail(fmt::format("its tensor '{}' is not of this model", printable(name)));
  const torch::NoGradGuard no_gradients;
  for (const auto& [name, tensor] : to) torch::Tensor(tensor).copy_(from.at(name));
}

fs::path checkpoint_path(const fs::path& output, int64_t step) {
  return output / "checkpoints" / fmt::format("step-{:08}", step);
}

namespace {

/// What a user keeps beside them under a name of its own is none, and is never removed.
bool is_checkpoint_name(std::string_view name) {
  constexpr std::string_view kPrefix = "step-";
  return name.starts_with(kPrefix) && name.size() > kPrefix.size() &&
         name.find_first_not_of("0123456789", kPrefix.size()) == std::string_view::npos;
}

}  // namespace

std::vector<fs::path> list_checkpoints(const fs::path& output) {
  std::vector<fs::path> found;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(output / "checkpoints", none))
    if (is_checkpoint_name(entry.path().filename().string()) && entry.is_directory()) found.push_back(entry.path());
  std::ranges::sort(found, {}, [](const fs::path& path) {  // by length first: numbers may outgrow their zeros
    return std::pair(path.filename().string().size(), path.filename().string());
  });
  return found;
}

void rotate_checkpoints(const fs::path& output, int64_t keep) {
  std::vector<fs::path> found = list_checkpoints(output);
  for (size_t i = 0; i + static_cast<size_t>(keep) < found.size(); ++i) {
    const fs::path doomed = found[i].parent_path() / (".removed-" + found[i].filename().string());
    fs::remove_all(doomed);
    fs::rename(found[i], doomed);
    fs::remove_all(doomed);
  }
}

}  // namespace bitwright::train
