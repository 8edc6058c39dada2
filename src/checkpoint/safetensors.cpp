#include "checkpoint/safetensors.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>
#include <unordered_set>
#include <utility>

#include "base/error.hpp"
#include "base/json.hpp"

namespace bitwright {
namespace {

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeader = 100'000'000;  // the limit of the format's own library
constexpr size_t kMaxRank = 8;
constexpr size_t kAlignment = 64;
constexpr std::string_view kDamaged = "the download is incomplete or damaged, fetch it again";

class HeaderReader {
 public:
  HeaderReader(std::span<const std::byte> file, const std::string& where) : file_(file), where_(where) {}

  WeightContents read() {
    const uint64_t header = header_length();
    const std::string_view text(reinterpret_cast<const char*>(file_.data()) + kLengthBytes, header);
    data_ = file_.subspan(kLengthBytes + header);
    const Json json = parse_json(text, where_ + " (header)");
    if (!json.is_object()) fail("the header is no JSON object");
    for (const auto& [name, value] : json.items())
      if (name != "__metadata__") add(name, value);
    check_layout();
    return {.arrays = std::move(arrays_),
            .owned = {},
            .facts = nullptr,
            .values = nullptr,
            .documents = documents_of(json.value("__metadata__", Json()))};
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw Error({.code = "bad-safetensors",
                 .what = "cannot read model",
                 .where = where_,
                 .why = why,
                 .fix = std::string(kDamaged)});
  }
  [[noreturn]] void fail(const std::string& name, const std::string& why) const {
    fail(fmt::format("tensor '{}' {}", printable(name), why));
  }

  /// Texts named as JSON files are the model's: what stands beside the weights in a directory.
  std::shared_ptr<const Json> documents_of(const Json& metadata) const {
    Json documents = Json::object();
    if (metadata.is_object())
      for (const auto& [name, text] : metadata.items()) {
        if (!name.ends_with(".json") || !text.is_string()) continue;
        documents[name] = parse_json(text.get_ref<const std::string&>(), where_ + " (" + printable(name) + ")");
        if (!documents[name].is_object()) fail(fmt::format("'{}' in its metadata is no object", printable(name)));
      }
    return documents.empty() ? nullptr : std::make_shared<const Json>(std::move(documents));
  }

  uint64_t header_length() const {
    if (file_.size() < kLengthBytes) fail(fmt::format("{} bytes are too few for a safetensors file", file_.size()));
    uint64_t length = 0;
    std::memcpy(&length, file_.data(), sizeof length);
    const uint64_t rest = file_.size() - kLengthBytes;
    if (length > kMaxHeader || length > rest)
      fail(fmt::format("the header is said to have {} bytes, {} follow", length, rest));
    return length;
  }

  void add(const std::string& name, const Json& value) {
    if (!value.is_object()) fail(name, "is described by no object");
    for (const char* key : {"dtype", "shape", "data_offsets"})
      if (!value.contains(key)) fail(name, fmt::format("has no '{}'", key));
    if (value.size() != 3) fail(name, "has unknown members");
    const Json& dtype = value["dtype"];
    const auto known = dtype.is_string() ? dtype_from_safetensors(dtype.get_ref<const std::string&>()) : std::nullopt;
    if (!known) fail(name, fmt::format("has unknown dtype {}", printable(dtype.dump())));
    Shape shape = integers<kMaxRank>(name, value["shape"], "shape");
    const Shape offsets = integers<2>(name, value["data_offsets"], "data_offsets");
    if (offsets.size() != 2 || offsets[0] > offsets[1]) fail(name, "has data_offsets that are no range");
    const auto begin = static_cast<uint64_t>(offsets[0]), end = static_cast<uint64_t>(offsets[1]);
    if (end > data_.size())
      throw Error({.code = "tensor-outside-file",
                   .what = "cannot read model",
                   .where = where_,
                   .why = fmt::format("tensor '{}' ends at byte {}, the file at {}", printable(name),
                                      end + (file_.size() - data_.size()), file_.size()),
                   .fix = std::string(kDamaged)});
    const auto count = checked_element_count(shape);
    int64_t bytes = 0;
    if (!count || __builtin_mul_overflow(*count, static_cast<int64_t>(size_bytes(*known)), &bytes))
      fail(name, fmt::format("has shape {} that overflows", to_string(shape)));
    if (static_cast<uint64_t>(bytes) != end - begin)
      fail(name,
           fmt::format("of shape {} needs {} bytes, its data_offsets give {}", to_string(shape), bytes, end - begin));
    arrays_.push_back(
        {.name = name, .dtype = *known, .shape = std::move(shape), .data = data_.subspan(begin, end - begin)});
  }

  template <size_t most>
  Shape integers(const std::string& name, const Json& value, const char* key) const {
    if (!value.is_array() || value.size() > most) fail(name, fmt::format("has a '{}' that is no short list", key));
    Shape out;
    for (const Json& item : value) {
      if (!item.is_number_unsigned() || item.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX))
        fail(name, fmt::format("has {} in '{}'", printable(item.dump()), key));
      out.push_back(item.get<int64_t>());
    }
    return out;
  }

  /// Data must be covered exactly once: two readers must never see different tensors in one file.
  void check_layout() {
    std::sort(arrays_.begin(), arrays_.end(), [](const StoredArray& a, const StoredArray& b) {
      return std::pair(a.data.data(), a.data.size()) < std::pair(b.data.data(), b.data.size());
    });
    const std::byte* covered = data_.data();
    for (const StoredArray& array : arrays_) {
      if (array.data.data() < covered) fail(array.name, "overlaps the one before it");
      if (array.data.data() > covered)
        fail(array.name, fmt::format("leaves {} unused bytes before it", array.data.data() - covered));
      covered += array.data.size();
    }
    if (covered != data_.data() + data_.size())
      fail(fmt::format("{} bytes follow the last tensor", data_.data() + data_.size() - covered));
  }

  std::span<const std::byte> file_, data_;
  const std::string& where_;
  std::vector<StoredArray> arrays_;
};

uint64_t data_bytes(std::span<const ArraySpec> arrays) {
  uint64_t bytes = 0;
  for (const ArraySpec& array : arrays) bytes += array.bytes();
  return bytes;
}

/// All that comes before the data.
std::string header_of(std::span<const ArraySpec> arrays, std::string_view format,
                      const std::map<std::string, OrderedJson>& documents = {}) {
  OrderedJson metadata = {{"format", format}};
  for (const auto& [name, document] : documents) metadata[name] = document.dump();
  std::string text = R"({"__metadata__":)" + metadata.dump();
  uint64_t offset = 0;
  for (const ArraySpec& array : arrays) {
    const OrderedJson entry = {{"dtype", info(array.dtype).safetensors},
                               {"shape", array.shape},
                               {"data_offsets", {offset, offset + array.bytes()}}};
    text += "," + OrderedJson(array.name).dump() + ":" + entry.dump();
    offset += array.bytes();
  }
  text += "}";
  text.resize((text.size() + kLengthBytes + kAlignment - 1) / kAlignment * kAlignment - kLengthBytes, ' ');
  const uint64_t length = text.size();
  std::string header(kLengthBytes, '\0');
  std::memcpy(header.data(), &length, sizeof length);
  return header + text;
}

/// An array on its way into a file.
struct PlannedArray {
  const ArraySpec* spec;
  ShardPlan::Place* place;
};

constexpr size_t kWidest = 8;  ///< bytes of the widest element

}  // namespace

extern const WeightFormat safetensors_format;

std::vector<StoredArray> parse_safetensors(std::span<const std::byte> file, const std::string& where) {
  return HeaderReader(file, where).read().arrays;
}

uint64_t ShardPlan::bytes() const {
  uint64_t total = 0;
  for (const File& file : files) total += file.bytes;
  return total;
}

ShardPlan plan_shards(std::span<const std::vector<ArraySpec>> tensors, uint64_t most_bytes, std::string_view format) {
  ShardPlan plan;
  std::vector<std::vector<PlannedArray>> files;
  uint64_t data = 0;
  for (const std::vector<ArraySpec>& arrays : tensors) {
    const uint64_t bytes = data_bytes(arrays);
    if (files.empty() || (data > 0 && bytes > most_bytes - std::min(data, most_bytes))) {
      files.emplace_back();
      data = 0;
    }
    data += bytes;
    std::vector<ShardPlan::Place>& places = plan.places.emplace_back(arrays.size());
    for (size_t a = 0; a < arrays.size(); ++a) files.back().push_back({&arrays[a], &places[a]});
  }
  plan.files.resize(files.size());
  plan.has_index = files.size() > 1;
  for (size_t f = 0; f < files.size(); ++f) {
    ShardPlan::File& file = plan.files[f];
    // Loaders cast bytes to numbers in place; the format has no padding between arrays.
    std::ranges::stable_sort(files[f], {}, [](const PlannedArray& array) {
      return array.spec->bytes() % kWidest == 0 ? 0 : kWidest + 1 - size_bytes(array.spec->dtype);
    });
    data = 0;
    for (const PlannedArray& array : files[f]) {
      *array.place = {.file = f, .offset = data};
      data += array.spec->bytes();
      file.arrays.push_back(*array.spec);
    }
    file.name = plan.files.size() == 1 ? safetensors_format.usual_name
                                       : fmt::format("model-{:05}-of-{:05}.safetensors", f + 1, plan.files.size());
    file.header = header_of(file.arrays, format);
    file.bytes = file.header.size() + data;
  }
  for (std::vector<ShardPlan::Place>& places : plan.places)
    for (ShardPlan::Place& place : places) place.offset += plan.files[place.file].header.size();
  return plan;
}

ShardWriter::ShardWriter(const std::filesystem::path& directory, ShardPlan plan)
    : directory_(directory), plan_(std::move(plan)) {
  for (const ShardPlan::File& file : plan_.files) {
    files_.emplace_back(directory / file.name, OutputFile::Contents::keep);
    files_.back().resize(file.bytes);
    files_.back().write_at(0, std::as_bytes(std::span(file.header)));
  }
  sync_directory(directory);
}

void ShardWriter::write(size_t tensor, size_t array, uint64_t offset, std::span<const std::byte> data) {
  const ShardPlan::Place& place = plan_.places.at(tensor).at(array);
  files_[place.file].write_at(place.offset + offset, data);
}

void ShardWriter::sync_data() {
  for (OutputFile& file : files_) file.sync_data();
}

void ShardWriter::finish() {
  for (OutputFile& file : files_) file.finish();
  if (!plan_.has_index) return;
  uint64_t total = 0;
  Json map = Json::object();  // sorted by name, as the format's own library writes it
  for (const ShardPlan::File& file : plan_.files) {
    total += data_bytes(file.arrays);
    for (const ArraySpec& array : file.arrays) map[array.name] = file.name;
  }
  const OrderedJson index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  write_text_file(directory_ / fmt::format("{}.index.json", safetensors_format.usual_name), index.dump(2) + "\n");
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path, std::vector<ArraySpec> specs,
                                     const std::map<std::string, OrderedJson>& documents, std::string_view format)
    : file_(path), specs_(std::move(specs)) {
  file_.write(header_of(specs_, format, documents));
}

void SafetensorsWriter::add(std::span<const std::byte> data) {
  BW_ASSERT(next_ < specs_.size() && data.size() == specs_[next_].bytes());
  file_.write(data);
  ++next_;
}

void SafetensorsWriter::finish() {
  BW_ASSERT(next_ == specs_.size());
  file_.finish();
}

namespace {

/// The header's length, then its object.
bool detect(std::span<const std::byte> start) {
  return start.size() > kLengthBytes && start[kLengthBytes] == std::byte{'{'};
}

WeightContents parse(std::span<const std::byte> file, const std::string& where) {
  return HeaderReader(file, where).read();
}

}  // namespace

const WeightFormat safetensors_format = {.name = "safetensors",
                                         .suffix = ".safetensors",
                                         .usual_name = "model.safetensors",
                                         .source = "https://github.com/huggingface/safetensors, README \"Format\"",
                                         .detect = detect,
                                         .parse = parse};

}  // namespace bitwright
