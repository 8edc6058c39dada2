#include "checkpoint/checkpoint.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>
#include <utility>

#include "base/error.hpp"
#include "base/output.hpp"
#include "base/threads.hpp"
#include "checkpoint/weight_file.hpp"
#include "container/container.hpp"
#include "container/rows.hpp"
#include "kernels/decode.hpp"
#include "scheme/transposed.hpp"

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

/// Which shard an index gives each tensor: the index's own object, there may be a hundred thousand.
using WeightMap = Json::object_t;

WeightMap read_weight_map(const fs::path& index) {
  Json json = read_json_object(index);
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object() || map->empty()) fail("bad-index", index, "it has no 'weight_map'");
  WeightMap shards = std::move(map->get_ref<WeightMap&>());
  for (const auto& [tensor, shard] : shards) {
    if (!shard.is_string()) fail("bad-index", index, fmt::format("tensor '{}' has no shard name", printable(tensor)));
    check_plain_name(index, shard.get_ref<const std::string&>());
  }
  return shards;
}

/// "model-00002-of-00005.safetensors": its stem, what follows the number, and how many there are.
struct SeriesName {
  std::string stem, tail;
  int total = 0;
};
std::optional<SeriesName> series_name(const std::string& name) {
  constexpr std::string_view kOf = "-of-";
  constexpr size_t kDigits = 5;
  const size_t of = name.rfind(kOf);  // the last: "mixture-of-experts-00001-of-00002.gguf"
  if (of == std::string::npos || of < kDigits) return std::nullopt;
  const std::string number = name.substr(of - kDigits, kDigits), total = name.substr(of + kOf.size(), kDigits);
  const auto is_number = [](const std::string& text) {
    return text.size() == kDigits && text.find_first_not_of("0123456789") == std::string::npos;
  };
  if (!is_number(number) || !is_number(total) || std::stoi(total) == 0) return std::nullopt;
  return SeriesName{.stem = name.substr(0, of - kDigits), .tail = name.substr(of), .total = std::stoi(total)};
}

/// Of a series without an index, all must be there.
std::vector<fs::path> files_of_series(const fs::path& directory, const SeriesName& series) {
  std::vector<fs::path> files;
  for (int i = 1; i <= series.total; ++i) {
    const std::string name = fmt::format("{}{:05}{}", series.stem, i, series.tail);
    if (!fs::exists(directory / name))
      fail("missing-shard", directory, fmt::format("shard '{}' is missing", printable(name)));
    files.push_back(directory / name);
  }
  return files;
}

/// The index of a model in shards: "model.safetensors.index.json".
fs::path index_of(const fs::path& directory, const WeightFormat& format) {
  return directory / fmt::format("{}.index.json", format.usual_name);
}

std::vector<fs::path> files_of_index(const fs::path& directory, const WeightMap& shard_of) {
  std::set<std::string> names;
  const Json* last = nullptr;  // neighbours mostly share a shard
  for (const auto& [tensor, shard] : shard_of) {
    if (last == nullptr || *last != shard) names.insert(shard.get_ref<const std::string&>());
    last = &shard;
  }
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
  WeightMap shard_of{};  ///< empty: there is no index
};

/// Those of the preferred format that the directory has.
WeightFiles find_weight_files(const fs::path& directory) {
  for (const WeightFormat* format : all_weight_formats()) {
    const fs::path index = index_of(directory, *format), only = directory / format->usual_name;
    if (fs::exists(only)) return {.files = {only}};  // before an index, as the transformers library does
    if (fs::exists(index)) {
      WeightFiles found = {.files = {}, .shard_of = read_weight_map(index)};
      found.files = files_of_index(directory, found.shard_of);
      return found;
    }
    if (std::vector<fs::path> files = files_with_suffix(directory, *format); !files.empty())
      return {.files = std::move(files)};
  }
  fail("no-weights", directory, "it holds no file of weights", "give a Hugging Face model directory");
}

/// Of a matrix of the last dimension; a list is a column.
int64_t view_rows(const Shape& shape) {
  if (shape.size() < 2) return element_count(shape);
  return element_count({shape.begin(), shape.end() - 1});
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
  fs::path path, directory;
  WeightMap shard_of;  ///< as the index says, until it is checked
  Json config = Json::object(), metadata = Json::object();
  std::map<std::string, Json, std::less<>> documents;  ///< the containers' own
  Json beside = Json::object();                        ///< values of all files
  std::vector<fs::path> files;
  std::vector<WeightFile> mapped;
  std::unordered_map<std::string_view, const StoredArray*> arrays;  ///< by their own names; so file_of and by_name
  std::map<std::string, ArraySpec, std::less<>> specs;
  std::unordered_map<std::string_view, size_t> file_of;
  /// How a view's bytes follow from `arrays`, where not simply a part of them.
  struct Rearrangement {
    std::vector<int64_t> rows;
    bool transposed;
    std::vector<const StoredArray*> stacked{};  ///< the parts of a stack, whose own data is empty
  };
  std::deque<StoredArray> views;              ///< those of a translation
  std::vector<std::vector<std::byte>> owned;  ///< their bytes, where values changed
  std::vector<const StoredArray*> order;      ///< all of `arrays`, in file order
  std::unordered_map<std::string, Rearrangement> rearranged;
  const Container* container = nullptr;
  QuantizedModel model;
  std::unordered_map<std::string, StoredTensor> stored;
  std::vector<TensorEntry> tensors;
  std::unordered_map<std::string_view, size_t> by_name;

  Impl(const fs::path& opened, const Translator& translator, Unfinished unfinished, Foreign foreign) : path(opened) {
    find_files(unfinished);
    map_arrays();
    if (facts() == nullptr) {
      read_json_files();
    } else {  // beside a file that speaks for itself they are another model's, and so is a tokenizer
      path = files[0];
    }
    check_index();
    if (translator != nullptr)
      if (std::optional<Translation> translation = translator(view())) translate(*std::move(translation));
    find_container(foreign);
    make_entries();
  }

  void find_files(Unfinished unfinished) {
    std::error_code ignored;
    if (!fs::exists(path, ignored)) fail("cannot-open", path, "no such file or directory", "check the path");
    directory = fs::is_directory(path) ? path : path.parent_path();
    if (unfinished == Unfinished::refuse && is_unfinished(directory.empty() ? "." : directory))
      fail("unfinished", path, "it is an output that is being written or was interrupted",
           "wait for the run that writes it, or repeat its command with --resume");
    if (fs::is_directory(path)) {
      WeightFiles found = find_weight_files(path);
      files = std::move(found.files);
      shard_of = std::move(found.shard_of);
    } else {
      files = {path};
    }
  }

  /// A file given by itself may carry its documents. Those beside it are another model's then.
  bool read_carried() {
    const Json* const carried = fs::is_directory(path) ? nullptr : mapped.front().documents();
    if (carried == nullptr) return false;
    config = carried->value("config.json", Json::object());
    metadata = carried->value(kMetadata, Json::object());
    for (const Container* each : all_containers())
      for (const std::string_view name : each->files)
        if (const auto found = carried->find(name); found != carried->end()) documents[std::string(name)] = *found;
    return true;
  }

  void read_json_files() {
    if (read_carried()) return;
    if (fs::exists(directory / "config.json")) {
      config = read_json_object(directory / "config.json");
    } else if (fs::is_directory(path)) {
      fail("no-config", path, "it holds no config.json", "give a Hugging Face model directory");
    }
    if (fs::exists(directory / kMetadata)) metadata = read_json_object(directory / kMetadata);
    for (const Container* each : all_containers())
      for (const std::string_view name : each->files)
        if (fs::exists(directory / name)) documents[std::string(name)] = read_json_object(directory / name);
  }

  /// A file that says it is one of several (GGUF's split.count) stands for all of them.
  void find_other_parts() {
    const Json* const says = mapped.front().facts();
    const Json count = says == nullptr ? Json() : says->value("split.count", Json());
    if (files.size() != 1 || !count.is_number_unsigned() || count.get<uint64_t>() <= 1) return;
    const std::optional<SeriesName> series = series_name(files[0].filename().string());
    if (!series || static_cast<uint64_t>(series->total) != count.get<uint64_t>())
      fail("missing-shard", path, fmt::format("it is one of {} parts, its name does not say which", count.dump()),
           "give it the name it had, NAME-00001-of-00003.gguf");
    files = files_of_series(directory, *series);
    map_files();
  }

  /// The first part says how many tensors all have together.
  void check_parts() const {
    const Json total = facts() == nullptr ? Json() : facts()->value("split.tensors.count", Json());
    if (total.is_number_integer() && total != arrays.size())
      fail("missing-tensor", path,
           fmt::format("the parts hold {} tensors, the first says {}", arrays.size(), total.dump()));
  }

  void map_arrays() {
    map_files();
    find_other_parts();
    for (const WeightFile& file : mapped)
      if (file.values() != nullptr) beside.update(*file.values());
    for (size_t f = 0; f < files.size(); ++f) {
      const std::string file = files[f].filename().string();
      auto near = specs.begin();  // where the next one most likely belongs: after the last
      for (const StoredArray& array : mapped[f].arrays()) {
        const auto listed = shard_of.find(array.name);
        if (listed != shard_of.end() && file != listed->second) continue;  // a copy; the index decides
        if (!arrays.emplace(array.name, &array).second)
          fail("bad-weights", files[f], fmt::format("tensor '{}' is in another shard too", printable(array.name)));
        near = std::next(
            specs.try_emplace(near, array.name, ArraySpec{array.name, array.dtype, array.shape, array.block}));
        order.push_back(&array);
        file_of[array.name] = f;
      }
    }
    check_parts();
  }

  /// Reads the headers of all files; there may be hundreds.
  void map_files() {
    std::vector<std::optional<WeightFile>> opened(files.size());
    parallel_for(files.size(), [&](size_t f) { opened[f].emplace(files[f]); });
    mapped.clear();
    for (std::optional<WeightFile>& file : opened) mapped.push_back(*std::move(file));
  }

  void check_index() {
    std::vector<std::string> names;
    for (const fs::path& file : files) names.push_back(file.filename().string());
    const auto is_in = [&](const std::string& tensor, const std::string& shard) {
      const auto found = file_of.find(tensor);
      return found != file_of.end() && names[found->second] == shard;
    };
    for (const auto& [tensor, shard] : std::exchange(shard_of, {}))
      if (!is_in(tensor, shard))
        fail("missing-tensor", directory / shard,
             fmt::format("tensor '{}' is missing, the index lists it", printable(tensor)));
  }

  /// Is `data` a part of the file, or did its reader make it?
  bool holds(size_t file, std::span<const std::byte> data) const {
    const std::span<const std::byte> bytes = mapped[file].bytes();
    const std::less_equal<> before;  // of pointers that may belong to different arrays
    return before(bytes.data(), data.data()) && before(data.data() + data.size(), bytes.data() + bytes.size());
  }

  void translate(Translation translation) {
    config = *translation.config;
    const auto stored_arrays = std::exchange(arrays, {});
    specs.clear();
    order.clear();
    for (ArrayView& wanted : translation.arrays) {
      const StoredArray& array =
          views.emplace_back(wanted.source.empty() ? made(wanted) : view_of(*stored_arrays.at(wanted.source), wanted));
      if (!arrays.emplace(array.name, &array).second)
        fail("bad-weights", path, fmt::format("two tensors are both the model's '{}'", printable(array.name)));
      specs[array.name] = {array.name, array.dtype, array.shape, array.block};
      order.push_back(&array);
      file_of[array.name] = wanted.source.empty() ? 0 : file_of.at(wanted.source);
      if (!wanted.stacked.empty()) {
        stack(array, wanted, stored_arrays);
      } else if (!wanted.rows.empty() || wanted.transposed) {
        rearranged[array.name] = {.rows = std::move(wanted.rows), .transposed = wanted.transposed};
      }
    }
  }

  StoredArray made(const ArrayView& wanted) {
    const auto bytes = std::as_bytes(std::span(wanted.made));
    return {wanted.name, DType::f32, wanted.shape, owned.emplace_back(bytes.begin(), bytes.end())};
  }

  void stack(const StoredArray& array, const ArrayView& wanted,
             const std::unordered_map<std::string_view, const StoredArray*>& stored_arrays) {
    Rearrangement& parts = rearranged[array.name];
    parts.stacked.push_back(stored_arrays.at(wanted.source));
    for (const std::string& name : wanted.stacked) parts.stacked.push_back(stored_arrays.at(name));
    for (const StoredArray* part : parts.stacked)
      if (part->dtype != array.dtype || part->block != nullptr ||
          part->data.size() * parts.stacked.size() != specs.at(array.name).bytes())
        fail("bad-weights", path,
             fmt::format("tensor '{}' is not of its neighbours' type and shape", printable(part->name)));
  }

  void read_stack(const Rearrangement& parts, uint64_t offset, std::span<std::byte> out) const {
    const uint64_t each = parts.stacked.front()->data.size();
    for (uint64_t done = 0; done < out.size();) {
      const StoredArray& part = *parts.stacked[(offset + done) / each];
      const uint64_t within = (offset + done) % each, length = std::min<uint64_t>(each - within, out.size() - done);
      read_stored(file_of.at(part.name), part.data.subspan(within, length), out.subspan(done, length));
      done += length;
    }
  }

  StoredArray view_of(const StoredArray& source, const ArrayView& wanted) {
    StoredArray array = {wanted.name, source.dtype, wanted.shape, source.data, source.block};
    if (!wanted.stacked.empty()) {
      array.data = {};
      return array;
    }
    const uint64_t bytes = ArraySpec{{}, array.dtype, array.shape, array.block}.bytes();
    if (!wanted.transposed && wanted.rows.empty() && bytes != source.data.size()) {
      const uint64_t row = bytes / static_cast<uint64_t>(std::max<int64_t>(view_rows(wanted.shape), 1));
      array.data = source.data.subspan(static_cast<uint64_t>(wanted.first_row) * row, bytes);
    }
    BW_ASSERT(array.data.size() == bytes || !wanted.rows.empty());
    if (wanted.added == 0 && !wanted.as_f32) return array;
    std::vector<float> values(static_cast<size_t>(element_count(source.shape)));
    to_f32(source.dtype, source.data, values);
    for (float& value : values) value += wanted.added;
    const auto changed = std::as_bytes(std::span(values));
    array.dtype = DType::f32;
    array.data = owned.emplace_back(changed.begin(), changed.end());
    return array;
  }

  /// Bytes from `offset` on of an array as the model knows it; a transposed array of blocks as it is stored.
  void read_array(const std::string& name, uint64_t offset, std::span<std::byte> out) const {
    const StoredArray& array = *arrays.at(name);
    const uint64_t size = array_bytes(array);
    BW_ASSERT(offset <= size && out.size() <= size - offset);
    const auto found = rearranged.find(name);
    if (found != rearranged.end() && !found->second.stacked.empty()) {
      read_stack(found->second, offset, out);
    } else if (found == rearranged.end() || (found->second.transposed && array.block != nullptr)) {
      read_stored(file_of.at(name), array.data.subspan(offset, out.size()), out);
    } else if (found->second.transposed) {
      read_transposed(array, offset, out);
    } else {
      gather_rows(array, found->second.rows, offset, out);
    }
  }

  static uint64_t array_bytes(const StoredArray& array) {
    return ArraySpec{{}, array.dtype, array.shape, array.block}.bytes();
  }

  /// From the file itself where `data` is a part of it.
  void read_stored(size_t file, std::span<const std::byte> data, std::span<std::byte> out) const {
    if (holds(file, data))
      mapped[file].file().read(data, out);
    else
      std::ranges::copy(data, out.begin());
  }

  static void gather_rows(const StoredArray& array, const std::vector<int64_t>& rows, uint64_t offset,
                          std::span<std::byte> out) {
    const uint64_t row_bytes = array_bytes(array) / rows.size();
    for (uint64_t done = 0; done < out.size();) {
      const uint64_t row = (offset + done) / row_bytes, within = (offset + done) % row_bytes;
      const uint64_t length = std::min<uint64_t>(row_bytes - within, out.size() - done);
      const auto begin = static_cast<uint64_t>(rows[row]) * row_bytes + within;
      std::ranges::copy(array.data.subspan(begin, length), out.subspan(done).begin());
      done += length;
    }
  }

  /// array.shape [rows, columns]; its data is [columns, rows].
  static void read_transposed(const StoredArray& array, uint64_t offset, std::span<std::byte> out) {
    const size_t size = size_bytes(array.dtype);
    BW_ASSERT(offset % size == 0 && out.size() % size == 0);
    const auto rows = static_cast<uint64_t>(array.shape[0]), columns = static_cast<uint64_t>(array.shape[1]);
    for (uint64_t done = 0; done < out.size(); done += size) {
      const uint64_t i = (offset + done) / size;
      std::ranges::copy(array.data.subspan((i % columns * rows + i / columns) * size, size), out.subspan(done).begin());
    }
  }

  std::vector<std::byte> read_array(const std::string& name) const {
    std::vector<std::byte> bytes(array_bytes(*arrays.at(name)));
    read_array(name, 0, bytes);
    return bytes;
  }

  /// A quantized tensor from the bytes of `from`, transposed where the model wants it so.
  QuantizedTensor unpack(const std::string& name, const CheckpointView& from) const {
    StoredTensor tensor = stored.at(name);
    const auto found = rearranged.find(name);
    const bool transposes = found != rearranged.end() && found->second.transposed;
    if (transposes) std::swap(tensor.shape[0], tensor.shape[1]);
    QuantizedTensor quantized = container->unpack(tensor, from);
    check_sizes(quantized, name);
    check_group_index(quantized, name);
    return transposes ? transposed(quantized) : quantized;
  }

  /// The same from copies that nothing keeps in memory.
  QuantizedTensor read_whole(const std::string& name) const {
    std::map<std::string, std::vector<std::byte>, std::less<>> data;
    for (const std::string& array : stored.at(name).arrays) data[array] = read_array(array);
    CheckpointView copies = view();
    copies.bytes = [&data](const std::string& array) -> std::span<const std::byte> { return data.at(array); };
    return unpack(name, copies);
  }

  const Json* facts() const { return mapped.front().facts(); }

  CheckpointView view() const { return view(specs); }
  CheckpointView view(const std::map<std::string, ArraySpec, std::less<>>& of) const {
    return {.arrays = of,
            .config = config,
            .quantization_metadata = metadata,
            .documents = &documents,
            .facts = facts(),
            .values = &beside,
            .bytes = [this](const std::string& name) { return arrays.at(name)->data; },
            .where = path.string()};
  }

  void find_container(Foreign foreign) {
    if (foreign == Foreign::list_all) return;
    for (const Container* candidate : all_containers())
      if (candidate->detect(view())) {
        container = candidate;
        for (StoredTensor& tensor : candidate->list(view()))
          if (const std::string name = tensor.name; !stored.emplace(name, std::move(tensor)).second)
            fail("bad-container", path, fmt::format("tensor '{}' is stored twice", printable(name)));
        if (candidate->model != nullptr) model = candidate->model(view());
        return;
      }
    auto declared = config.find("quantization_config");
    if (declared == config.end()) declared = config.find("quantization");  // MLX
    if (declared == config.end() || declared->is_null() || foreign == Foreign::list) return;
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
    const std::set<std::string_view> no_weights(model.arrays.begin(), model.arrays.end());
    for (const StoredArray* array : order) {
      const auto found = owner.find(array->name);
      if (no_weights.contains(array->name)) continue;
      if (found == owner.end()) {
        add_plain(*array);
      } else if (done.insert(found->second).second) {
        add_quantized(*found->second);
      }
    }
    by_name.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i)
      if (!by_name.emplace(tensors[i].name, i).second)
        fail("bad-container", path, fmt::format("tensor '{}' is stored twice", printable(tensors[i].name)));
  }

  void add_plain(const StoredArray& array) {
    const bool has_element = array.block == nullptr && info(array.dtype).is_float;
    const ElementType* element = has_element ? find_element(info(array.dtype).name) : nullptr;
    tensors.push_back({.name = array.name,
                       .shape = array.shape,
                       .scheme = {.element = element},
                       .dtype = array.dtype,
                       .stored_bytes = array_bytes(array),
                       .undecoded = array.block,
                       .rearranged = rearranged.contains(array.name)});
  }

  void add_quantized(const StoredTensor& tensor) {
    uint64_t bytes = 0;
    for (const std::string& array : tensor.arrays) bytes += arrays.at(array)->data.size();
    const auto found = rearranged.find(tensor.name);
    const bool is_transposed = found != rearranged.end() && found->second.transposed;
    tensors.push_back(
        {.name = tensor.name,
         .shape = tensor.shape,
         .scheme = is_transposed ? transposed(tensor.scheme) : tensor.scheme,
         .dtype = tensor.value_dtype,
         .stored_bytes = bytes,
         .rearranged = found != rearranged.end(),
         .linear = tensor.linear,
         .transposed = container->inputs_first == InputsFirst::transposed && has_inputs_first(config, tensor.name)});
  }
};

Checkpoint::Checkpoint(const fs::path& path, const Translator& translate, Unfinished unfinished, Foreign foreign)
    : impl_(std::make_unique<Impl>(path, translate, unfinished, foreign)) {}
Checkpoint::~Checkpoint() = default;
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;

const fs::path& Checkpoint::path() const { return impl_->path; }
fs::path Checkpoint::config_path() const { return facts() == nullptr ? impl_->directory / "config.json" : impl_->path; }
const Json& Checkpoint::config() const { return impl_->config; }
const Json& Checkpoint::quantization_metadata() const { return impl_->metadata; }
const Json* Checkpoint::facts() const { return impl_->facts(); }
const Container* Checkpoint::container() const { return impl_->container; }
const QuantizedModel& Checkpoint::quantized_model() const { return impl_->model; }
std::span<const TensorEntry> Checkpoint::tensors() const { return impl_->tensors; }

std::vector<StoredArray> Checkpoint::stored_arrays() const {
  std::vector<StoredArray> arrays;
  for (const WeightFile& file : impl_->mapped) arrays.insert(arrays.end(), file.arrays().begin(), file.arrays().end());
  return arrays;
}

std::string_view Checkpoint::format() const { return impl_->mapped.front().format().name; }

uint64_t Checkpoint::weight_bytes() const {
  uint64_t bytes = 0;
  for (const WeightFile& file : impl_->mapped) bytes += file.bytes().size();
  return bytes;
}

void Checkpoint::verify_digests() const {
  if (impl_->metadata.empty()) return;
  const Json digests = impl_->metadata.value("files", Json());
  parallel_for(impl_->files.size(), [&](size_t f) {
    const std::string name = impl_->files[f].filename().string();
    const Json recorded = digests.is_object() ? digests.value(name, Json()) : Json();
    if (!recorded.is_object() || !recorded.contains("sha256") || recorded["sha256"] != impl_->mapped[f].file().digest())
      fail("digest-mismatch", impl_->files[f], fmt::format("its bytes are not those recorded in {}", kMetadata));
  });
}

std::vector<Checkpoint::File> Checkpoint::files() const {
  constexpr size_t kMostHeader = size_t{1} << 27;
  std::vector<File> files;
  for (size_t f = 0; f < impl_->files.size(); ++f) {
    const WeightFile& file = impl_->mapped[f];
    size_t header = std::min(kMostHeader, file.bytes().size());
    for (const StoredArray& array : file.arrays())
      if (impl_->holds(f, array.data))
        header = std::min(header, static_cast<size_t>(array.data.data() - file.bytes().data()));
    files.push_back({.name = impl_->files[f].filename().string(),
                     .identity = file.file().identity(),
                     .header_sha256 = sha256(file.bytes().first(header))});
  }
  return files;
}

const TensorEntry* Checkpoint::find(std::string_view name) const {
  const auto found = impl_->by_name.find(name);
  return found == impl_->by_name.end() ? nullptr : &impl_->tensors[found->second];
}

void Checkpoint::require_decoded(const TensorEntry& entry) const {
  if (entry.undecoded == nullptr) return;
  throw Error({.code = "unsupported-tensor",
               .what = "cannot read model",
               .where = impl_->path.string(),
               .why = fmt::format("tensor '{}': {} is not decoded yet", printable(entry.name), entry.undecoded->name),
               .fix = "take the model in another type, see `bitwright formats`"});
}

std::span<const std::byte> Checkpoint::plain_bytes(const TensorEntry& entry) const {
  BW_ASSERT(!entry.quantized());
  BW_ASSERT(!entry.rearranged);
  require_decoded(entry);
  return impl_->arrays.at(entry.name)->data;
}

void Checkpoint::read_bytes(const TensorEntry& entry, uint64_t offset, std::span<std::byte> out) const {
  BW_ASSERT(!entry.quantized());
  require_decoded(entry);
  impl_->read_array(entry.name, offset, out);
}

void Checkpoint::prefetch(const TensorEntry& entry, uint64_t offset, uint64_t bytes) const {
  if (entry.rearranged) return;
  const std::span<const std::byte> data = impl_->arrays.at(entry.name)->data;
  const size_t file = impl_->file_of.at(entry.name);
  if (impl_->holds(file, data)) impl_->mapped[file].file().prefetch(data.subspan(offset, bytes));
}

std::vector<RowRange> Checkpoint::row_pieces(const TensorEntry& entry) const {
  const auto found = impl_->rearranged.find(entry.name);
  const bool transposed = found != impl_->rearranged.end() && found->second.transposed;
  if (transposed || entry.transposed) return {{0, row_count(entry.shape)}};
  return bitwright::row_pieces(*impl_->container, impl_->stored.at(entry.name));
}

QuantizedTensor Checkpoint::read_rows(const TensorEntry& entry, int64_t begin, int64_t end) const {
  if (begin == 0 && end == row_count(entry.shape)) return impl_->read_whole(entry.name);
  const StoredTensor& whole = impl_->stored.at(entry.name);
  const StoredTensor piece = rows_of(whole, begin, end);
  std::map<std::string, ArraySpec, std::less<>> specs;
  std::map<std::string, std::vector<std::byte>, std::less<>> data;
  const std::vector<ArraySpec> all = impl_->container->layout(whole), wanted = impl_->container->layout(piece);
  const std::vector<ArraySpec> before = impl_->container->layout(rows_of(whole, 0, begin));
  for (size_t a = 0; a < wanted.size(); ++a) {
    specs[wanted[a].name] = wanted[a];
    std::vector<std::byte>& bytes = data[wanted[a].name];
    const Placement at = place(all[a], before[a], wanted[a]);
    bytes.resize(at.run * at.runs);
    for (uint64_t r = 0; r < at.runs; ++r)
      impl_->read_array(wanted[a].name, at.offset + r * at.stride, std::span(bytes).subspan(r * at.run, at.run));
  }
  CheckpointView view = impl_->view(specs);
  view.bytes = [&data](const std::string& name) -> std::span<const std::byte> { return data.at(name); };
  QuantizedTensor tensor = impl_->container->unpack(piece, view);
  check_sizes(tensor, entry.name);
  check_group_index(tensor, entry.name);
  return tensor;
}

QuantizedTensor Checkpoint::read(const TensorEntry& entry) const {
  if (entry.quantized())
    return entry.rearranged ? impl_->read_whole(entry.name) : impl_->unpack(entry.name, impl_->view());
  require_decoded(entry);
  BW_ASSERT(entry.scheme.element != nullptr);
  return {.scheme = entry.scheme, .shape = entry.shape, .codes = impl_->read_array(entry.name)};
}

std::vector<float> Checkpoint::read_f32(const TensorEntry& entry) const {
  if (!entry.quantized()) require_decoded(entry);
  std::vector<float> values(static_cast<size_t>(element_count(entry.shape)));
  if (entry.quantized()) {
    decode(read(entry), values);
  } else if (entry.rearranged) {
    to_f32(entry.dtype, impl_->read_array(entry.name), values);
  } else {
    to_f32(entry.dtype, plain_bytes(entry), values);
  }
  return values;
}

}  // namespace bitwright
