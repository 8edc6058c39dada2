#include "checkpoint/gguf.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <unordered_set>
#include <utility>

#include "base/error.hpp"
#include "base/json.hpp"
#include "base/utf8.hpp"

namespace bitwright {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr uint32_t kOldest = 2, kNewest = 3;
constexpr uint64_t kDefaultAlignment = 32;
constexpr size_t kLongestName = 63;  // ggml keeps names in 64 bytes
constexpr uint32_t kMaxRank = 4;
constexpr std::string_view kAlignmentKey = "general.alignment";
constexpr std::string_view kDamaged = "the download is incomplete or damaged, fetch it again";

struct ValueType {
  std::string_view name;
  size_t bytes;  ///< 0: not fixed
};
constexpr std::array<ValueType, 13> kValueTypes = {{{"u8", 1},
                                                    {"i8", 1},
                                                    {"u16", 2},
                                                    {"i16", 2},
                                                    {"u32", 4},
                                                    {"i32", 4},
                                                    {"f32", 4},
                                                    {"bool", 1},
                                                    {"string", 0},
                                                    {"array", 0},
                                                    {"u64", 8},
                                                    {"i64", 8},
                                                    {"f64", 8}}};
const ValueType& info(GgufValueType type) { return kValueTypes.at(static_cast<size_t>(type)); }

template <class T>
T load(std::span<const std::byte> bytes) {
  T value;
  std::memcpy(&value, bytes.data(), sizeof value);
  return value;
}

/// The next multiple of `alignment`, a power of two; nothing where it would wrap.
std::optional<uint64_t> padded(uint64_t size, uint64_t alignment) {
  if (size > std::numeric_limits<uint64_t>::max() - (alignment - 1)) return std::nullopt;
  return (size + alignment - 1) & ~(alignment - 1);
}

class GgufReader {
 public:
  GgufReader(std::span<const std::byte> file, const std::string& where) : file_(file), where_(where) {}

  GgufContents read() {
    read_version();
    const uint64_t tensors = count("tensors");
    const uint64_t entries = count("metadata entries");
    for (uint64_t i = 0; i < entries; ++i) read_entry(i);
    read_alignment();
    for (uint64_t i = 0; i < tensors; ++i) read_tensor(i);
    place_tensors();
    return std::move(contents_);
  }

 private:
  [[noreturn]] void fail(const std::string& why, const char* code = "bad-gguf", std::string_view fix = kDamaged) const {
    throw Error({.code = code, .what = "cannot read model", .where = where_, .why = why, .fix = std::string(fix)});
  }

  uint64_t left() const { return file_.size() - at_; }

  std::span<const std::byte> take(uint64_t size, std::string_view what) {
    if (size > left())
      fail(fmt::format("{} has {} bytes at byte {}, the file ends at {}", what, size, at_, file_.size()));
    const std::span taken = file_.subspan(at_, size);
    at_ += size;
    return taken;
  }

  template <class T>
  T number(std::string_view what) {
    return load<T>(take(sizeof(T), what));
  }

  std::string_view text(std::string_view what) {
    const std::span bytes = take(number<uint64_t>(what), what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  void read_version() {
    if (file_.size() < kMagic.size()) fail(fmt::format("{} bytes are too few for a GGUF file", file_.size()));
    const std::span start = take(kMagic.size(), "the magic");
    const std::string_view magic(reinterpret_cast<const char*>(start.data()), start.size());
    if (magic != kMagic) fail(fmt::format("it begins with '{}', not with 'GGUF'", printable(magic)));
    contents_.version = number<uint32_t>("the version");
    if ((contents_.version & 0xffff) == 0 && contents_.version != 0)
      fail("its numbers are big-endian", "unsupported-gguf", "take a little-endian file");
    if (contents_.version < kOldest || contents_.version > kNewest)
      fail(fmt::format("GGUF version {} is not supported, only {} and {} are", contents_.version, kOldest, kNewest),
           "unsupported-gguf",
           contents_.version > kNewest ? "use a newer bitwright" : "convert the model again with a current llama.cpp");
  }

  /// Each takes bytes of the file, so nothing is ever reserved for more of them than it has.
  uint64_t count(const char* what) {
    const auto n = number<uint64_t>(fmt::format("the number of {}", what));
    if (n > left())
      fail(fmt::format("it is said to hold {} {}, {} bytes follow", static_cast<int64_t>(n), what, left()));
    return n;
  }

  GgufValueType value_type(std::string_view key) {
    const auto type = number<uint32_t>(fmt::format("the type of key '{}'", printable(key)));
    if (type >= kValueTypes.size()) fail(fmt::format("key '{}' has unknown value type {}", printable(key), type));
    return static_cast<GgufValueType>(type);
  }

  void read_entry(uint64_t index) {
    GgufEntry entry = {
        .key = text(fmt::format("metadata key {}", index)), .type = {}, .is_array = false, .count = 1, .raw = {}};
    const std::string shown = fmt::format("key '{}'", printable(entry.key));
    if (entry.key.empty()) fail(fmt::format("metadata key {} is empty", index));
    if (!is_utf8(entry.key)) fail(fmt::format("{} is not UTF-8", shown));
    if (!keys_.insert(entry.key).second) fail(fmt::format("{} is there twice", shown));
    entry.type = value_type(entry.key);
    entry.is_array = entry.type == GgufValueType::array;
    if (entry.is_array) {
      entry.type = value_type(entry.key);
      if (entry.type == GgufValueType::array) fail(fmt::format("{} is an array of arrays", shown));
      entry.count = number<uint64_t>(shown);
    }
    const size_t each = info(entry.type).bytes, least = each == 0 ? sizeof(uint64_t) : each;
    if (entry.count > left() / least)
      fail(fmt::format("{} has {} values, {} bytes follow", shown, entry.count, left()));
    const uint64_t begin = at_;
    if (each != 0) {
      take(entry.count * each, shown);
    } else {
      for (uint64_t i = 0; i < entry.count; ++i) text(shown);
    }
    entry.raw = file_.subspan(begin, at_ - begin);
    contents_.metadata.push_back(entry);
  }

  void read_alignment() {
    contents_.alignment = kDefaultAlignment;
    const auto found = std::ranges::find(contents_.metadata, kAlignmentKey, &GgufEntry::key);
    if (found == contents_.metadata.end()) return;
    if (found->is_array || found->type != GgufValueType::u32)
      fail(
          fmt::format("key '{}' is {}, not u32", kAlignmentKey, found->is_array ? "an array" : info(found->type).name));
    contents_.alignment = load<uint32_t>(found->raw);
    if (!std::has_single_bit(contents_.alignment))
      fail(fmt::format("the alignment {} is no power of two", contents_.alignment));
  }

  void read_tensor(uint64_t index) {
    const std::string_view name = text(fmt::format("the name of tensor {}", index));
    const std::string shown = fmt::format("tensor '{}'", printable(name));
    if (name.size() > kLongestName)
      fail(fmt::format("{} has a name of {} bytes, the most are {}", shown, name.size(), kLongestName));
    if (!is_utf8(name) || name.find('\0') != std::string_view::npos) fail(fmt::format("{} has no proper name", shown));
    if (!names_.insert(name).second) fail(fmt::format("{} is there twice", shown));
    StoredArray array = {.name = std::string(name), .dtype = DType::u8, .shape = read_shape(shown), .data = {}};
    const auto id = number<uint32_t>(shown);
    const GgufType* const type = find_gguf_type(id);
    if (type == nullptr) fail(fmt::format("{} has unknown type {}", shown, id), "bad-gguf", "use a newer bitwright");
    array.dtype = type->dtype.value_or(DType::u8);
    array.block = type->dtype ? nullptr : &type->block;
    const int64_t row = array.shape.empty() ? 1 : array.shape.back();
    if (row % type->block.elements != 0)
      fail(fmt::format("{} of type {} has {} elements per row, not a multiple of its block size {}", shown,
                       type->block.name, row, type->block.elements));
    offsets_.push_back(number<uint64_t>(shown));
    contents_.arrays.push_back(std::move(array));
  }

  /// The file names the fastest dimension first.
  Shape read_shape(const std::string& shown) {
    const auto rank = number<uint32_t>(shown);
    if (rank > kMaxRank) fail(fmt::format("{} has {} dimensions, the most are {}", shown, rank, kMaxRank));
    Shape shape(rank);
    for (uint32_t i = 0; i < rank; ++i) {
      const auto size = number<int64_t>(shown);
      if (size < 0) fail(fmt::format("{} has dimension {}", shown, size));
      shape[rank - 1 - i] = size;
    }
    if (!checked_element_count(shape)) fail(fmt::format("{} has shape {} that overflows", shown, to_string(shape)));
    return shape;
  }

  void place_tensors() {
    const std::optional<uint64_t> begin = padded(at_, contents_.alignment);
    uint64_t expected = 0;
    for (size_t i = 0; i < contents_.arrays.size(); ++i) {
      StoredArray& array = contents_.arrays[i];
      if (offsets_[i] != expected)
        fail(fmt::format("tensor '{}' has offset {}, expected {}", printable(array.name), offsets_[i], expected));
      // at most 2^63 / 64 elements of at most 8 bytes: this does not wrap
      const uint64_t bytes = ArraySpec{{}, array.dtype, array.shape, array.block}.bytes();
      const uint64_t room = file_.size() - std::min<uint64_t>(file_.size(), *begin);
      if (expected > room || bytes > room - expected)
        fail(fmt::format("tensor '{}' has {} bytes at offset {} of the data, the file has {} there",
                         printable(array.name), bytes, expected, room),
             "tensor-outside-file");
      array.data = bytes == 0 ? std::span<const std::byte>() : file_.subspan(*begin + expected, bytes);
      expected += *padded(bytes, contents_.alignment);
    }
  }

  std::span<const std::byte> file_;
  const std::string& where_;
  uint64_t at_ = 0;
  GgufContents contents_;
  std::vector<uint64_t> offsets_;
  std::unordered_set<std::string_view> keys_, names_;
};

template <class T, class Value = T>
Json numbers(const GgufEntry& entry) {
  if (!entry.is_array) return static_cast<Value>(load<T>(entry.raw));
  Json::array_t values;
  values.reserve(entry.count);
  for (size_t i = 0; i < entry.count; ++i)
    values.emplace_back(static_cast<Value>(load<T>(entry.raw.subspan(i * sizeof(T)))));
  return values;
}

Json strings(const GgufEntry& entry) {
  Json::array_t values;
  values.reserve(entry.count);
  for (size_t at = 0; at < entry.raw.size();) {
    const auto length = load<uint64_t>(entry.raw.subspan(at));
    const std::span bytes = entry.raw.subspan(at + sizeof length, length);
    values.emplace_back(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
    at += sizeof length + length;
  }
  return entry.is_array ? Json(std::move(values)) : std::move(values.front());
}

}  // namespace

GgufContents parse_gguf(std::span<const std::byte> file, const std::string& where) {
  return GgufReader(file, where).read();
}

Json to_json(const GgufEntry& entry) {
  switch (entry.type) {
    case GgufValueType::u8:
      return numbers<uint8_t, uint64_t>(entry);
    case GgufValueType::i8:
      return numbers<int8_t, int64_t>(entry);
    case GgufValueType::u16:
      return numbers<uint16_t, uint64_t>(entry);
    case GgufValueType::i16:
      return numbers<int16_t, int64_t>(entry);
    case GgufValueType::u32:
      return numbers<uint32_t, uint64_t>(entry);
    case GgufValueType::i32:
      return numbers<int32_t, int64_t>(entry);
    case GgufValueType::f32:
      return numbers<float, double>(entry);
    case GgufValueType::boolean:
      return numbers<uint8_t, bool>(entry);
    case GgufValueType::string:
      return strings(entry);
    case GgufValueType::u64:
      return numbers<uint64_t>(entry);
    case GgufValueType::i64:
      return numbers<int64_t>(entry);
    case GgufValueType::f64:
      return numbers<double>(entry);
    case GgufValueType::array:
      break;
  }
  BW_ASSERT(false);
}

namespace {

void append(std::string& out, std::span<const std::byte> bytes) {
  out.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}
template <class T>
void append_number(std::string& out, T value) {
  append(out, std::as_bytes(std::span(&value, 1)));
}
void append_text(std::string& out, std::string_view text) {
  append_number<uint64_t>(out, text.size());
  out += text;
}

}  // namespace

void GgufMetadata::add_raw(std::string_view key, GgufValueType type, bool is_array, uint64_t count,
                           std::span<const std::byte> raw) {
  append_text(bytes_, key);
  if (is_array) append_number(bytes_, GgufValueType::array);
  append_number(bytes_, type);
  if (is_array) append_number(bytes_, count);
  append(bytes_, raw);
  ++count_;
  if (key == kAlignmentKey) alignment_ = load<uint32_t>(raw);
}

void GgufMetadata::add(std::string_view key, uint16_t value) {
  add_raw(key, GgufValueType::u16, false, 1, std::as_bytes(std::span(&value, 1)));
}
void GgufMetadata::add(std::string_view key, int32_t value) {
  add_raw(key, GgufValueType::i32, false, 1, std::as_bytes(std::span(&value, 1)));
}
void GgufMetadata::add(std::string_view key, uint32_t value) {
  add_raw(key, GgufValueType::u32, false, 1, std::as_bytes(std::span(&value, 1)));
}
void GgufMetadata::add(std::string_view key, float value) {
  add_raw(key, GgufValueType::f32, false, 1, std::as_bytes(std::span(&value, 1)));
}
void GgufMetadata::add(std::string_view key, bool value) {
  add_raw(key, GgufValueType::boolean, false, 1, std::as_bytes(std::span(&value, 1)));
}
void GgufMetadata::add(std::string_view key, std::string_view value) {
  std::string raw;
  append_text(raw, value);
  add_raw(key, GgufValueType::string, false, 1, std::as_bytes(std::span(raw)));
}
void GgufMetadata::add(std::string_view key, std::span<const std::string> values) {
  std::string raw;
  for (const std::string& value : values) append_text(raw, value);
  add_raw(key, GgufValueType::string, true, values.size(), std::as_bytes(std::span(raw)));
}
void GgufMetadata::add(std::string_view key, std::span<const float> values) {
  add_raw(key, GgufValueType::f32, true, values.size(), std::as_bytes(values));
}
void GgufMetadata::add(std::string_view key, std::span<const int32_t> values) {
  add_raw(key, GgufValueType::i32, true, values.size(), std::as_bytes(values));
}
void GgufMetadata::add(const GgufEntry& entry) {
  add_raw(entry.key, entry.type, entry.is_array, entry.count, entry.raw);
}

namespace {

/// All that stands before the data. `offsets`: where each array begins in it; the last one is its end.
std::string header_of(std::span<const ArraySpec> specs, const GgufMetadata& metadata, std::vector<uint64_t>& offsets) {
  std::string header(kMagic);
  append_number(header, kNewest);
  append_number<uint64_t>(header, specs.size());
  append_number(header, metadata.count());
  header += metadata.bytes();
  offsets = {0};
  for (const ArraySpec& spec : specs) {
    const GgufType* const type = gguf_type_of(spec);
    BW_ASSERT(type != nullptr && spec.shape.size() <= kMaxRank && spec.name.size() <= kLongestName);
    BW_ASSERT(spec.shape.empty() || spec.shape.back() % type->block.elements == 0);
    append_text(header, spec.name);
    append_number(header, static_cast<uint32_t>(spec.shape.size()));
    for (size_t i = spec.shape.size(); i-- > 0;) append_number(header, spec.shape[i]);
    append_number(header, type->id);
    append_number(header, offsets.back());
    offsets.push_back(offsets.back() + *padded(spec.bytes(), metadata.alignment()));
  }
  return header;
}

void check_writable(const ArraySpec& spec) {
  const auto fail = [&](const std::string& why) {
    throw Error({.code = "no-gguf",
                 .what = "cannot write the model as GGUF",
                 .where = fmt::format("tensor '{}'", printable(spec.name)),
                 .why = why,
                 .fix = "choose another --format"});
  };
  if (gguf_type_of(spec) == nullptr) fail(fmt::format("GGUF has no type {}", info(spec.dtype).name));
  if (spec.shape.size() > kMaxRank) fail(fmt::format("it has {} dimensions", spec.shape.size()));
  if (spec.name.size() > kLongestName) fail(fmt::format("its name has more than {} bytes", kLongestName));
}

}  // namespace

extern const WeightFormat gguf_format;

ShardPlan plan_gguf(std::span<const std::vector<ArraySpec>> tensors, const GgufMetadata& metadata,
                    std::optional<uint64_t> most_bytes) {
  constexpr size_t kMostFiles = 65535;  // split.count has 16 bits
  ShardPlan plan;
  plan.files.emplace_back();
  uint64_t data = 0;
  int32_t count = 0;
  for (const std::vector<ArraySpec>& arrays : tensors) {
    uint64_t bytes = 0;
    for (const ArraySpec& array : arrays) {
      check_writable(array);
      bytes += array.bytes();
      ++count;
    }
    if (most_bytes && data > 0 && bytes > *most_bytes - std::min(data, *most_bytes) && plan.files.size() < kMostFiles) {
      plan.files.emplace_back();
      data = 0;
    }
    data += bytes;
    ShardPlan::File& file = plan.files.back();
    file.arrays.insert(file.arrays.end(), arrays.begin(), arrays.end());
    plan.places.emplace_back(arrays.size(), ShardPlan::Place{.file = plan.files.size() - 1, .offset = 0});
  }
  auto places = plan.places.begin();
  for (size_t f = 0; f < plan.files.size(); ++f) {
    ShardPlan::File& file = plan.files[f];
    file.name = gguf_format.usual_name;
    GgufMetadata own = f == 0 ? metadata : GgufMetadata();
    if (plan.files.size() > 1) {
      file.name = fmt::format("model-{:05}-of-{:05}.gguf", f + 1, plan.files.size());
      own.add("split.no", static_cast<uint16_t>(f));
      own.add("split.tensors.count", count);
      own.add("split.count", static_cast<uint16_t>(plan.files.size()));
    }
    std::vector<uint64_t> offsets;
    file.header = header_of(file.arrays, own, offsets);
    file.header.resize(*padded(file.header.size(), own.alignment()));
    file.bytes = file.header.size() + offsets.back();
    size_t next = 0;
    for (; places != plan.places.end() && (places->empty() || places->front().file == f); ++places)
      for (ShardPlan::Place& place : *places) place.offset = file.header.size() + offsets[next++];
  }
  return plan;
}

GgufWriter::GgufWriter(const std::filesystem::path& path, const GgufMetadata& metadata, std::vector<ArraySpec> specs)
    : file_(path), specs_(std::move(specs)), alignment_(metadata.alignment()) {
  std::vector<uint64_t> offsets;
  const std::string header = header_of(specs_, metadata, offsets);
  file_.write(header);
  if (!specs_.empty()) pad(header.size());
}

void GgufWriter::pad(uint64_t written) {
  const std::vector<std::byte> zeros(*padded(written, alignment_) - written);
  file_.write(zeros);
}

void GgufWriter::add(std::span<const std::byte> data) {
  BW_ASSERT(next_ < specs_.size() && data.size() == specs_[next_].bytes());
  file_.write(data);
  pad(data.size());
  ++next_;
}

void GgufWriter::finish() {
  BW_ASSERT(next_ == specs_.size());
  file_.finish();
}

namespace {

bool detect(std::span<const std::byte> start) {
  return start.size() >= kMagic.size() && std::memcmp(start.data(), kMagic.data(), kMagic.size()) == 0;
}

WeightContents parse(std::span<const std::byte> file, const std::string& where) {
  GgufContents contents = parse_gguf(file, where);
  Json facts = Json::object();
  for (const GgufEntry& entry : contents.metadata) facts.emplace(std::string(entry.key), to_json(entry));
  return {.arrays = std::move(contents.arrays), .owned = {}, .facts = std::make_shared<const Json>(std::move(facts))};
}

}  // namespace

const WeightFormat gguf_format = {.name = "gguf",
                                  .suffix = ".gguf",
                                  .usual_name = "model.gguf",
                                  .source = "ggml (d99724f), docs/gguf.md and src/gguf.cpp, versions 2 and 3",
                                  .detect = detect,
                                  .parse = parse};

}  // namespace bitwright
