#include "checkpoint/checkpoint.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>
#include <utility>

#include "base/error.hpp"
#include "checkpoint/weight_file.hpp"
#include "container/container.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

constexpr const char* kMetadata = "quantization_metadata.json";
constexpr std::string_view kFetchAgain = "the download is incomplete or damaged, fetch it again";

[[noreturn]] void fail(const std::string& code, const fs::path& where, const std::string& why,
                       std::string_view fix = kFetchAgain) {
  throw Error(
      {.code = code, .what = "cannot read model", .where = where.string(), .why = why, .fix = std::string(fix)});
}

Json read_json_object(const fs::path& path) {
  Json json = parse_json(read_text_file(path), path.string());
  if (!json.is_object()) fail("bad-json", path, "it is no JSON object");
  return json;
}

/// A shard's name comes from a file: it must stay inside the model's directory.
void check_plain_name(const fs::path& index, const std::string& name) {
  if (name.empty() || name == "." || name == ".." || name.find_first_of("/\\") != std::string::npos ||
      name.find('\0') != std::string::npos)
    fail("bad-shard-name", index, fmt::format("shard '{}' is no plain file name", printable(name)),
         "do not trust this model");
}

std::map<std::string, std::string> read_weight_map(const fs::path& index) {
  const Json json = read_json_object(index);
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object() || map->empty()) fail("bad-index", index, "it has no 'weight_map'");
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string()) fail("bad-index", index, fmt::format("tensor '{}' has no shard name", printable(tensor)));
    check_plain_name(index, shard.get_ref<const std::string&>());
    shards[tensor] = shard.get<std::string>();
  }
  return shards;
}

/// "model-00002-of-00005.safetensors": its stem, what follows the number, and how many there are.
struct SeriesName {
  std::string stem, tail;
  int total = 0;
};
std::optional<SeriesName> series_name(const std::string& name) {
  const size_t of = name.find("-of-");
  int total = 0;
  if (of == std::string::npos || of < 5 || std::sscanf(name.c_str() + of + 4, "%5d", &total) != 1 || total <= 0)
    return std::nullopt;
  return SeriesName{.stem = name.substr(0, of - 5), .tail = name.substr(of), .total = total};
}

/// Of a series without an index, all must be there.
std::vector<fs::path> files_of_series(const fs::path& directory, const SeriesName& series) {
  std::vector<fs::path> files;
  for (int i = 1; i <= series.total; ++i) {
    const std::string name = fmt::format("{}{:05}{}", series.stem, i, series.tail);
    if (!fs::exists(directory / name)) fail("missing-shard", directory, fmt::format("shard '{}' is missing", name));
    files.push_back(directory / name);
  }
  return files;
}

/// The index of a model in shards: "model.safetensors.index.json".
fs::path index_of(const fs::path& directory, const WeightFormat& format) {
  return directory / fmt::format("{}.index.json", format.usual_name);
}

std::vector<fs::path> files_of_index(const fs::path& directory, const fs::path& index) {
  std::set<std::string> names;
  for (const auto& [tensor, shard] : read_weight_map(index)) names.insert(shard);
  std::vector<fs::path> files;
  for (const std::string& name : names) {
    if (!fs::exists(directory / name))
      fail("missing-shard", directory, fmt::format("shard '{}' is missing", printable(name)));
    files.push_back(directory / name);
  }
  return files;
}

/// Without an index or a file of the usual name: a series of the usual name, else the only series or file there is.
std::vector<fs::path> files_with_suffix(const fs::path& directory, const WeightFormat& format) {
  const std::string usual_stem = fs::path(format.usual_name).stem().string() + "-";
  std::vector<fs::path> files;
  std::map<std::string, SeriesName> series;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory)) {
    if (!format.may_be(entry.path()) || entry.is_directory()) continue;
    files.push_back(entry.path());
    if (auto name = series_name(entry.path().filename().string())) series[name->stem + name->tail] = *name;
  }
  for (const auto& [key, one] : series)
    if (one.stem == usual_stem) return files_of_series(directory, one);
  if (series.size() == 1) return files_of_series(directory, series.begin()->second);
  if (files.size() > 1)
    fail("no-index", directory,
         fmt::format("{} {} files, none named {} and no index", files.size(), format.suffix, format.usual_name),
         "name the one you mean");
  return files;
}

struct WeightFiles {
  std::vector<fs::path> files;
  fs::path index{};  ///< empty: there is none
};

/// Those of the preferred format that the directory has.
WeightFiles find_weight_files(const fs::path& directory) {
  for (const WeightFormat* format : all_weight_formats()) {
    const fs::path index = index_of(directory, *format), only = directory / format->usual_name;
    if (fs::exists(only)) return {.files = {only}};  // before an index, as the transformers library does
    if (fs::exists(index)) return {.files = files_of_index(directory, index), .index = index};
    if (std::vector<fs::path> files = files_with_suffix(directory, *format); !files.empty())
      return {.files = std::move(files)};
  }
  fail("no-weights", directory, "it holds no file of weights", "give a Hugging Face model directory");
}

/// Indices come from the file; the decoder takes them as they are.
void check_group_index(const QuantizedTensor& tensor, const std::string& name) {
  if (!tensor.scheme.scale || tensor.scheme.scale->grouping.kind != Grouping::Kind::index) return;
  try {
    GroupMap(tensor.scheme.scale->grouping, tensor.shape, tensor.group_index);
  } catch (const Error& error) {
    throw error.at(fmt::format("tensor '{}'", printable(name)));
  }
}

}  // namespace

double TensorEntry::bits_per_weight() const {
  const int64_t count = element_count(shape);
  return count == 0 ? 0 : 8.0 * static_cast<double>(stored_bytes) / static_cast<double>(count);
}

struct Checkpoint::Impl {
  fs::path path, directory, index;
  Json config = Json::object(), metadata = Json::object();
  std::vector<fs::path> files;
  std::vector<WeightFile> mapped;
  std::map<std::string, const StoredArray*, std::less<>> arrays;
  std::map<std::string, ArraySpec, std::less<>> specs;
  std::unordered_map<std::string, size_t> file_of;
  const Container* container = nullptr;
  std::unordered_map<std::string, StoredTensor> stored;
  std::vector<TensorEntry> tensors;
  std::map<std::string, size_t, std::less<>> by_name;

  explicit Impl(const fs::path& opened) : path(opened) {
    find_files();
    read_json_files();
    map_arrays();
    check_index();
    find_container();
    make_entries();
  }

  void find_files() {
    std::error_code ignored;
    if (!fs::exists(path, ignored)) fail("cannot-open", path, "no such file or directory", "check the path");
    directory = fs::is_directory(path) ? path : path.parent_path();
    if (fs::is_directory(path)) {
      if (!fs::exists(path / "config.json"))
        fail("no-config", path, "it holds no config.json", "give a Hugging Face model directory");
      WeightFiles found = find_weight_files(path);
      files = std::move(found.files);
      index = std::move(found.index);
    } else {
      files = {path};
    }
  }

  void read_json_files() {
    if (fs::exists(directory / "config.json")) config = read_json_object(directory / "config.json");
    if (fs::exists(directory / kMetadata)) metadata = read_json_object(directory / kMetadata);
  }

  void map_arrays() {
    mapped.reserve(files.size());
    for (const fs::path& file : files) mapped.emplace_back(file);
    const auto shard_of = index.empty() ? std::map<std::string, std::string>() : read_weight_map(index);
    for (size_t f = 0; f < files.size(); ++f)
      for (const StoredArray& array : mapped[f].arrays()) {
        const auto listed = shard_of.find(array.name);
        if (listed != shard_of.end() && files[f].filename() != listed->second) continue;  // a copy; the index decides
        if (!arrays.emplace(array.name, &array).second)
          fail("bad-safetensors", files[f], fmt::format("tensor '{}' is in another shard too", printable(array.name)));
        specs[array.name] = {array.name, array.dtype, array.shape};
        file_of[array.name] = f;
      }
  }

  void check_index() {
    if (index.empty()) return;
    const auto is_in = [this](const std::string& tensor, const std::string& shard) {
      const auto found = file_of.find(tensor);
      return found != file_of.end() && files[found->second].filename() == shard;
    };
    for (const auto& [tensor, shard] : read_weight_map(index))
      if (!is_in(tensor, shard))
        fail("missing-tensor", directory / shard,
             fmt::format("tensor '{}' is missing, the index lists it", printable(tensor)));
  }

  CheckpointView view() const {
    return {.arrays = specs,
            .config = config,
            .quantization_metadata = metadata,
            .facts = mapped.size() == 1 ? mapped.front().facts() : nullptr,
            .bytes = [this](const std::string& name) { return arrays.at(name)->data; },
            .where = path.string()};
  }

  void find_container() {
    for (const Container* candidate : all_containers())
      if (candidate->detect(view())) {
        container = candidate;
        for (StoredTensor& tensor : candidate->list(view()))
          if (const std::string name = tensor.name; !stored.emplace(name, std::move(tensor)).second)
            fail("bad-container", path, fmt::format("tensor '{}' is stored twice", printable(name)));
        return;
      }
    auto declared = config.find("quantization_config");
    if (declared == config.end()) declared = config.find("quantization");  // MLX
    if (declared == config.end() || declared->is_null()) return;
    std::string method = "unknown";
    for (const char* key : {"mode", "quant_method"})
      if (declared->is_object() && declared->contains(key)) method = (*declared)[key].dump();
    fail("unsupported-container", directory / "config.json",
         fmt::format("the model is quantized by method {}, whose tensors are not among those known", printable(method)),
         "see `bitwright formats`");
  }

  /// Quantized tensors stand where the first of their arrays stands.
  void make_entries() {
    std::unordered_map<std::string, const StoredTensor*> owner;
    for (const auto& [name, tensor] : stored)
      for (const std::string& array : tensor.arrays)
        if (!owner.emplace(array, &tensor).second)
          fail("bad-container", path, fmt::format("array '{}' belongs to two tensors", printable(array)));
    std::set<const StoredTensor*> done;
    for (const WeightFile& file : mapped)
      for (const StoredArray& array : file.arrays()) {
        if (arrays.at(array.name) != &array) continue;  // a copy
        const auto found = owner.find(array.name);
        if (found == owner.end()) {
          add_plain(array);
        } else if (done.insert(found->second).second) {
          add_quantized(*found->second);
        }
      }
    for (size_t i = 0; i < tensors.size(); ++i)
      if (!by_name.emplace(tensors[i].name, i).second)
        fail("bad-container", path, fmt::format("tensor '{}' is stored twice", printable(tensors[i].name)));
  }

  void add_plain(const StoredArray& array) {
    const ElementType* element = info(array.dtype).is_float ? find_element(info(array.dtype).name) : nullptr;
    tensors.push_back({.name = array.name,
                       .shape = array.shape,
                       .scheme = {.element = element},
                       .dtype = array.dtype,
                       .stored_bytes = array.data.size()});
  }

  void add_quantized(const StoredTensor& tensor) {
    uint64_t bytes = 0;
    for (const std::string& array : tensor.arrays) bytes += arrays.at(array)->data.size();
    tensors.push_back({.name = tensor.name,
                       .shape = tensor.shape,
                       .scheme = tensor.scheme,
                       .dtype = tensor.value_dtype,
                       .stored_bytes = bytes});
  }
};

Checkpoint::Checkpoint(const fs::path& path) : impl_(std::make_unique<Impl>(path)) {}
Checkpoint::~Checkpoint() = default;
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;

const fs::path& Checkpoint::path() const { return impl_->path; }
const Json& Checkpoint::config() const { return impl_->config; }
const Json& Checkpoint::quantization_metadata() const { return impl_->metadata; }
const Container* Checkpoint::container() const { return impl_->container; }
const WeightFormat& Checkpoint::format() const { return impl_->mapped.front().format(); }
std::span<const TensorEntry> Checkpoint::tensors() const { return impl_->tensors; }

uint64_t Checkpoint::weight_bytes() const {
  uint64_t bytes = 0;
  for (const WeightFile& file : impl_->mapped) bytes += file.bytes().size();
  return bytes;
}

void Checkpoint::verify_digests() const {
  if (impl_->metadata.empty()) return;
  const Json digests = impl_->metadata.value("files", Json());
  for (size_t f = 0; f < impl_->files.size(); ++f) {
    const std::string name = impl_->files[f].filename().string();
    const Json recorded = digests.is_object() ? digests.value(name, Json()) : Json();
    if (!recorded.is_object() || !recorded.contains("sha256") || recorded["sha256"] != sha256(impl_->mapped[f].bytes()))
      fail("digest-mismatch", impl_->files[f], fmt::format("its bytes are not those recorded in {}", kMetadata));
  }
}

const TensorEntry* Checkpoint::find(std::string_view name) const {
  const auto found = impl_->by_name.find(name);
  return found == impl_->by_name.end() ? nullptr : &impl_->tensors[found->second];
}

std::span<const std::byte> Checkpoint::plain_bytes(const TensorEntry& entry) const {
  BW_ASSERT(!entry.quantized());
  return impl_->arrays.at(entry.name)->data;
}

QuantizedTensor Checkpoint::read(const TensorEntry& entry) const {
  if (entry.quantized()) {
    QuantizedTensor tensor = impl_->container->unpack(impl_->stored.at(entry.name), impl_->view());
    check_sizes(tensor, entry.name);
    check_group_index(tensor, entry.name);
    return tensor;
  }
  BW_ASSERT(entry.scheme.element != nullptr);
  const std::span<const std::byte> bytes = plain_bytes(entry);
  return {.scheme = entry.scheme, .shape = entry.shape, .codes = {bytes.begin(), bytes.end()}};
}

std::vector<float> Checkpoint::read_f32(const TensorEntry& entry) const {
  if (entry.quantized()) return decode(read(entry));
  std::vector<float> values(static_cast<size_t>(element_count(entry.shape)));
  to_f32(entry.dtype, plain_bytes(entry), values);
  return values;
}

}  // namespace bitwright
