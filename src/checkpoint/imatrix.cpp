#include "checkpoint/imatrix.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string_view>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "checkpoint/gguf.hpp"

namespace bitwright {
namespace {

constexpr std::string_view kMagic = "GGUF";
constexpr std::string_view kSums = ".in_sum2", kCounts = ".counts";
constexpr const char *kDatasets = "imatrix.datasets", *kChunks = "imatrix.chunk_count",
                     *kChunkSize = "imatrix.chunk_size";

[[noreturn]] void bad(const std::string& where, const std::string& why) {
  throw Error({.code = "bad-imatrix",
               .what = "cannot read importance",
               .where = where,
               .why = why,
               .fix = "make the file anew with `bitwright calibrate` or llama-imatrix"});
}

void check(const Imatrix& imatrix, const std::string& where) {
  if (imatrix.entries.empty()) bad(where, "it holds the importance of no matrix");
  for (const auto& [name, entry] : imatrix.entries) {
    const auto fail = [&, shown = printable(name)](const std::string& why) {
      bad(where, fmt::format("entry '{}' {}", shown, why));
    };
    if (entry.counts.empty() || entry.sums.empty() || entry.sums.size() % entry.counts.size() != 0)
      fail(fmt::format("has {} sums and {} counts", entry.sums.size(), entry.counts.size()));
    for (const float v : entry.sums)
      if (!std::isfinite(v) || v < 0) fail(fmt::format("has {} as a sum of squares", v));
    for (const int64_t n : entry.counts)
      if (n < 0) fail(fmt::format("has the count {}", n));
  }
}

// ---- GGUF

std::vector<float> floats_of(const StoredArray& array, const std::string& where) {
  if (array.block != nullptr || array.dtype != DType::f32)
    bad(where, fmt::format("tensor '{}' is not F32", printable(array.name)));
  std::vector<float> values(static_cast<size_t>(element_count(array.shape)));
  to_f32(array.dtype, array.data, values);
  return values;
}

std::vector<int64_t> counts_of(const StoredArray& array, const std::string& where) {
  constexpr float kMost = 9e15f;
  std::vector<int64_t> counts;
  for (const float n : floats_of(array, where)) {
    if (!(std::fabs(n) <= kMost) || (n > 0 && n < 1))
      bad(where, fmt::format("tensor '{}' holds {}", printable(array.name), n));
    counts.push_back(std::llround(n));
  }
  return counts;
}

uint32_t unsigned_of(const GgufEntry& entry, const std::string& where) {
  if (entry.is_array || entry.type != GgufValueType::u32)
    bad(where, fmt::format("key '{}' is not u32", printable(entry.key)));
  return to_json(entry).get<uint32_t>();
}

std::vector<std::string> texts_of(const GgufEntry& entry, const std::string& where) {
  if (!entry.is_array || entry.type != GgufValueType::string)
    bad(where, fmt::format("key '{}' is no list of texts", printable(entry.key)));
  return to_json(entry).get<std::vector<std::string>>();
}

Imatrix parse_gguf_form(std::span<const std::byte> file, const std::string& where) {
  const GgufContents contents = parse_gguf(file, where);
  Imatrix out;
  for (const GgufEntry& entry : contents.metadata) {
    if (entry.key == kDatasets) out.datasets = texts_of(entry, where);
    if (entry.key == kChunks) out.chunks = unsigned_of(entry, where);
    if (entry.key == kChunkSize) out.chunk_size = unsigned_of(entry, where);
  }
  for (const StoredArray& array : contents.arrays) {
    const auto name_before = [&](std::string_view end) { return array.name.substr(0, array.name.size() - end.size()); };
    if (array.name.ends_with(kSums)) out.entries[name_before(kSums)].sums = floats_of(array, where);
    if (array.name.ends_with(kCounts)) out.entries[name_before(kCounts)].counts = counts_of(array, where);
  }
  return out;
}

void write_gguf_form(const Imatrix& imatrix, const std::filesystem::path& path) {
  GgufMetadata metadata;
  metadata.add("general.type", "imatrix");
  metadata.add(kDatasets, std::span(imatrix.datasets));
  metadata.add(kChunks, imatrix.chunks);
  metadata.add(kChunkSize, imatrix.chunk_size);
  std::vector<ArraySpec> specs;
  for (const auto& [name, entry] : imatrix.entries) {
    const auto matrices = static_cast<int64_t>(entry.counts.size()),
               columns = static_cast<int64_t>(entry.sums.size()) / matrices;
    const auto shape = [&](int64_t each) { return matrices == 1 ? Shape{each} : Shape{matrices, each}; };
    specs.push_back({name + std::string(kSums), DType::f32, shape(columns)});
    specs.push_back({name + std::string(kCounts), DType::f32, shape(1)});
  }
  GgufWriter writer(path, metadata, std::move(specs));
  for (const auto& [name, entry] : imatrix.entries) {
    const std::vector<float> counts(entry.counts.begin(), entry.counts.end());
    writer.add(std::as_bytes(std::span(entry.sums)));
    writer.add(std::as_bytes(std::span(counts)));
  }
  writer.finish();
}

// ---- the older form: i32 entries; of each i32 length, name, i32 pieces, i32 values, the values; then, where there is
// anything more, i32 pieces of the whole text and, where there is still more, i32 length and the text's name.

class LegacyReader {
 public:
  LegacyReader(std::span<const std::byte> file, const std::string& where) : file_(file), where_(where) {}

  Imatrix read() {
    Imatrix out;
    const int32_t entries = number("the number of entries");
    constexpr size_t kLeast = 4 * sizeof(int32_t);
    if (entries < 1 || static_cast<size_t>(entries) > left() / kLeast)
      bad(where_, fmt::format("it counts {} entries, {} bytes follow", entries, left()));
    for (int32_t i = 0; i < entries; ++i) read_entry(i, out);
    if (left() > 0) out.chunks = static_cast<uint32_t>(length("the number of pieces"));
    if (left() > 0)
      if (const int32_t size = length("the length of the text's name"); size > 0)
        out.datasets.push_back(text(size, "the text's name"));
    if (left() > 0) bad(where_, fmt::format("{} bytes follow its end", left()));
    return out;
  }

 private:
  size_t left() const { return file_.size() - at_; }

  std::span<const std::byte> take(size_t bytes, const std::string& what) {
    if (bytes > left()) bad(where_, fmt::format("{} takes {} bytes, {} follow", what, bytes, left()));
    at_ += bytes;
    return file_.subspan(at_ - bytes, bytes);
  }
  int32_t number(const std::string& what) {
    int32_t value = 0;
    std::memcpy(&value, take(sizeof value, what).data(), sizeof value);
    return value;
  }
  int32_t length(const std::string& what) {
    const int32_t value = number(what);
    if (value < 0) bad(where_, fmt::format("{} is {}", what, value));
    return value;
  }
  std::string text(int32_t size, const std::string& what) {
    const std::span bytes = take(static_cast<size_t>(size), what);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  void read_entry(int32_t index, Imatrix& out) {
    const std::string name = text(length(fmt::format("the length of name {}", index)), fmt::format("name {}", index));
    const std::string shown = fmt::format("entry '{}'", printable(name));
    const auto [entry, is_new] = out.entries.try_emplace(name);
    if (!is_new) bad(where_, fmt::format("{} is there twice", shown));
    const int32_t pieces = number(shown), count = length(shown);
    if (static_cast<size_t>(count) > left() / sizeof(float))
      bad(where_, fmt::format("{} has {} values, {} bytes follow", shown, count, left()));
    const std::span values = take(static_cast<size_t>(count) * sizeof(float), shown);
    entry->second.sums.resize(static_cast<size_t>(count));
    to_f32(DType::f32, values, entry->second.sums);
    entry->second.counts = {pieces > 0 ? pieces : 1};  // else the values are means
  }

  std::span<const std::byte> file_;
  const std::string& where_;
  size_t at_ = 0;
};

void write_number(OutputFile& file, size_t value) {
  BW_ASSERT(value <= INT32_MAX);
  const auto number = static_cast<int32_t>(value);
  file.write(std::as_bytes(std::span(&number, 1)));
}

void write_legacy_entry(const std::string& name, const InputSquares& entry, int64_t chunk_size, OutputFile& file) {
  const int64_t most = *std::ranges::max_element(entry.counts), pieces = most / chunk_size + (most % chunk_size != 0);
  std::vector<float> values = mean_squares(entry, 0, entry.sums.size());
  for (float& v : values) v *= static_cast<float>(pieces);
  write_number(file, name.size());
  file.write(name);
  write_number(file, static_cast<size_t>(pieces));
  write_number(file, values.size());
  file.write(std::as_bytes(std::span(values)));
}

void write_legacy_form(const Imatrix& imatrix, const std::filesystem::path& path) {
  const auto has_data = [](const auto& item) {
    return std::ranges::any_of(item.second.counts, [](int64_t n) { return n > 0; });
  };
  OutputFile file(path);
  write_number(file, static_cast<size_t>(std::ranges::count_if(imatrix.entries, has_data)));
  for (const auto& item : imatrix.entries)
    if (has_data(item)) write_legacy_entry(item.first, item.second, std::max<int64_t>(imatrix.chunk_size, 1), file);
  const std::string dataset = imatrix.datasets.empty() ? "" : imatrix.datasets.back();
  write_number(file, imatrix.chunks);
  write_number(file, dataset.size());
  file.write(dataset);
  file.finish();
}

}  // namespace

std::vector<float> mean_squares(const InputSquares& squares, size_t first, size_t count) {
  BW_ASSERT(!squares.counts.empty() && squares.sums.size() % squares.counts.size() == 0);
  BW_ASSERT(first <= squares.sums.size() && count <= squares.sums.size() - first);
  std::vector<float> means(count, 1.0f);
  const size_t columns = squares.sums.size() / squares.counts.size();
  for (size_t i = 0; i < count; ++i)
    if (const int64_t rows = squares.counts[(first + i) / columns]; rows > 0)
      means[i] = squares.sums[first + i] / static_cast<float>(rows);
  return means;
}

Imatrix parse_imatrix(std::span<const std::byte> file, const std::string& where) {
  const bool is_gguf = file.size() >= kMagic.size() && std::memcmp(file.data(), kMagic.data(), kMagic.size()) == 0;
  Imatrix out = is_gguf ? parse_gguf_form(file, where) : LegacyReader(file, where).read();
  check(out, where);
  return out;
}

Imatrix read_imatrix(const std::filesystem::path& path) {
  return parse_imatrix(MappedFile(path).bytes(), path.string());
}

ImatrixForm imatrix_form(const std::filesystem::path& path) {
  return path.extension() == ".dat" ? ImatrixForm::dat : ImatrixForm::gguf;
}

void write_imatrix(const Imatrix& imatrix, const std::filesystem::path& path, ImatrixForm form) {
  if (form == ImatrixForm::dat) return write_legacy_form(imatrix, path);
  write_gguf_form(imatrix, path);
}

}  // namespace bitwright
