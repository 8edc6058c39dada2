#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "base/error.hpp"
#include "base/utf8.hpp"
#include "checkpoint/weight_file.hpp"
#include "checkpoint/zip.hpp"

namespace bitwright {
namespace {

// A zip archive of NAME.npy: "\x93NUMPY", version, length of the header, a Python dict {'descr': '<f4',
// 'fortran_order': False, 'shape': (2, 3)} padded by spaces and a line's end, data. numpy.save, mlx.core.savez.

constexpr std::string_view kSuffix = ".npy", kMagic = "\x93NUMPY";
constexpr size_t kMaxRank = 32, kLongestName = 1024;

[[noreturn]] void fail(const std::string& where, std::string_view name, const std::string& why,
                       std::string_view fix = "the download is incomplete or damaged, fetch it again") {
  throw Error({.code = "bad-npz",
               .what = "cannot read model",
               .where = where,
               .why = fmt::format("array '{}' {}", printable(name), why),
               .fix = std::string(fix)});
}

/// What the header of an array says. Its words are parsed, never evaluated.
struct Header {
  std::optional<std::string_view> descr{};
  std::optional<bool> fortran_order{};
  std::optional<Shape> shape{};
};

/// Parses the dict; each `take` says whether what it looks for comes next.
class HeaderParser {
 public:
  explicit HeaderParser(std::string_view text) : text_(text) {}

  /// Nothing if it is not written as numpy and MLX write it.
  std::optional<Header> parse() {
    Header header;
    if (!take('{')) return std::nullopt;
    while (!take('}')) {
      if (!item(header)) return std::nullopt;
      if (take(',')) continue;
      if (take('}')) break;
      return std::nullopt;
    }
    skip_spaces();
    if (text_.starts_with('\n')) text_.remove_prefix(1);
    const bool complete = text_.empty() && header.descr && header.fortran_order && header.shape;
    return complete ? std::optional(std::move(header)) : std::nullopt;
  }

 private:
  bool item(Header& header) {
    const auto key = quoted();
    if (!key || !take(':')) return false;
    if (*key == "descr" && !header.descr) return (header.descr = quoted()).has_value();
    if (*key == "fortran_order" && !header.fortran_order) return (header.fortran_order = boolean()).has_value();
    if (*key == "shape" && !header.shape) return (header.shape = tuple()).has_value();
    return false;
  }

  void skip_spaces() { text_.remove_prefix(std::min(text_.find_first_not_of(' '), text_.size())); }
  bool take(char c) {
    skip_spaces();
    if (!text_.starts_with(c)) return false;
    text_.remove_prefix(1);
    return true;
  }
  bool take_word(std::string_view word) {
    skip_spaces();
    if (!text_.starts_with(word)) return false;
    text_.remove_prefix(word.size());
    return true;
  }
  std::optional<std::string_view> quoted() {
    const char quote = take('\'') ? '\'' : take('"') ? '"' : '\0';
    const size_t end = text_.find(quote);
    if (quote == '\0' || end == std::string_view::npos) return std::nullopt;
    const std::string_view inside = text_.substr(0, end);
    text_.remove_prefix(end + 1);
    return inside;
  }
  std::optional<bool> boolean() {
    if (take_word("True")) return true;
    if (take_word("False")) return false;
    return std::nullopt;
  }
  std::optional<int64_t> number() {
    skip_spaces();
    constexpr size_t kDigits = 18;  // of which every number fits
    const size_t digits = std::min(text_.find_first_not_of("0123456789"), text_.size());
    if (digits == 0 || digits > kDigits) return std::nullopt;
    int64_t value = 0;
    for (const char c : text_.substr(0, digits)) value = value * 10 + (c - '0');
    text_.remove_prefix(digits);
    return value;
  }
  /// "()", "(3,)", "(2, 3)", "(2, 3, )"
  std::optional<Shape> tuple() {
    Shape shape;
    if (!take('(')) return std::nullopt;
    while (!take(')')) {
      const auto dim = number();
      if (!dim || shape.size() == kMaxRank) return std::nullopt;
      shape.push_back(*dim);
      if (take(',')) continue;
      if (shape.size() > 1 && take(')')) break;
      return std::nullopt;
    }
    return shape;
  }

  std::string_view text_;
};

DType dtype_of(std::string_view descr, std::string_view name, const std::string& where) {
  struct Row {
    std::string_view kind;
    DType dtype;
  };
  // bfloat16 is no type of numpy's: its bytes are two of anything.
  constexpr std::array<Row, 13> kRows = {{{"f8", DType::f64},
                                          {"f4", DType::f32},
                                          {"f2", DType::f16},
                                          {"V2", DType::bf16},
                                          {"i8", DType::i64},
                                          {"i4", DType::i32},
                                          {"i2", DType::i16},
                                          {"i1", DType::i8},
                                          {"u8", DType::u64},
                                          {"u4", DType::u32},
                                          {"u2", DType::u16},
                                          {"u1", DType::u8},
                                          {"b1", DType::boolean}}};
  const auto* const row = std::ranges::find(kRows, descr.substr(std::min<size_t>(descr.size(), 1)), &Row::kind);
  if (row == kRows.end() || std::string_view("<|=>").find(descr[0]) == std::string_view::npos)
    fail(where, name, fmt::format("has type '{}', which no model is of", printable(descr)),
         "save numbers of 8 to 64 bits");
  if (descr[0] == '>' && size_bytes(row->dtype) > 1)
    fail(where, name, "is not little-endian", "save it again on a common machine");
  return row->dtype;
}

class NpzReader {
 public:
  NpzReader(std::span<const std::byte> file, const std::string& where) : file_(file), where_(where) {}

  WeightContents read() {
    std::vector<ZipEntry> entries = parse_zip(file_, where_, Compressed::allow);
    std::ranges::stable_sort(entries, {}, [](const ZipEntry& entry) { return entry.data.data(); });
    size_t room = file_.size();  // entries that share bytes could inflate them over and over
    for (const ZipEntry& entry : entries) {
      if (entry.data.size() > room) fail(where_, entry.name, "shares its bytes with another");
      room -= entry.data.size();
    }
    for (const ZipEntry& entry : entries) add(entry);
    return std::move(contents_);
  }

 private:
  std::span<const std::byte> own(std::vector<std::byte> bytes) {
    return contents_.owned.emplace_back(std::move(bytes));
  }

  void add(const ZipEntry& entry) {
    std::string_view name = entry.name;
    if (!name.ends_with(kSuffix)) fail(where_, name, "is no .npy file", "give a file that numpy.savez or MLX wrote");
    name.remove_suffix(kSuffix.size());
    if (name.empty() || name.size() > kLongestName || !is_utf8(name)) fail(where_, name, "has a bad name");
    std::span<const std::byte> data = entry.deflated ? own(inflate_entry(entry, where_)) : entry.data;
    const Header header = read_header(data, name);
    const DType dtype = dtype_of(*header.descr, name, where_);
    const auto count = checked_element_count(*header.shape);
    uint64_t bytes = 0;
    if (!count || __builtin_mul_overflow(static_cast<uint64_t>(*count), size_bytes(dtype), &bytes) ||
        bytes != data.size())
      fail(where_, name,
           fmt::format("of shape {} and type {} has {} bytes of data", to_string(*header.shape), info(dtype).name,
                       data.size()));
    if (*header.fortran_order) data = in_rows(data, *header.shape, size_bytes(dtype));
    contents_.arrays.push_back({.name = std::string(name), .dtype = dtype, .shape = *header.shape, .data = data});
  }

  /// Takes the header off `data`.
  Header read_header(std::span<const std::byte>& data, std::string_view name) const {
    constexpr size_t kVersionAt = 6, kLengthAt = 8;
    const auto too_short = [&] { fail(where_, name, "ends within its header"); };
    if (data.size() < kLengthAt + sizeof(uint32_t)) too_short();
    if (std::memcmp(data.data(), kMagic.data(), kMagic.size()) != 0) fail(where_, name, "does not begin as .npy does");
    const auto version = std::to_integer<int>(data[kVersionAt]);
    if (version < 1 || version > 3)
      fail(where_, name, fmt::format("has version {} of .npy; known are 1 to 3", version), "update Bitwright");
    const size_t length_bytes = version == 1 ? sizeof(uint16_t) : sizeof(uint32_t);
    uint32_t length = 0;
    std::memcpy(&length, data.data() + kLengthAt, length_bytes);
    data = data.subspan(kLengthAt + length_bytes);
    if (length > data.size()) too_short();
    const std::string_view text(reinterpret_cast<const char*>(data.data()), length);
    std::optional<Header> header = HeaderParser(text).parse();
    if (!header) fail(where_, name, "has a header that is not as numpy writes it");
    data = data.subspan(length);
    return std::move(*header);
  }

  /// Of an array in Fortran's order (the first index is the fastest) the elements in rows. One dimension has but one
  /// order.
  std::span<const std::byte> in_rows(std::span<const std::byte> data, const Shape& shape, size_t size) {
    if (data.empty() || std::ranges::count_if(shape, [](int64_t dim) { return dim > 1; }) < 2) return data;
    std::vector<size_t> strides;  // in bytes
    size_t stride = size;
    for (const int64_t dim : shape) {
      strides.push_back(stride);
      stride *= static_cast<size_t>(dim);
    }
    std::vector<std::byte> out(data.size());
    std::vector<int64_t> index(shape.size());
    size_t from = 0;
    for (size_t to = 0; to < out.size(); to += size) {
      std::memcpy(&out[to], &data[from], size);
      for (size_t axis = shape.size(); axis-- > 0;) {
        from += strides[axis];
        if (++index[axis] < shape[axis]) break;
        from -= strides[axis] * static_cast<size_t>(shape[axis]);
        index[axis] = 0;
      }
    }
    return own(std::move(out));
  }

  std::span<const std::byte> file_;
  const std::string& where_;
  WeightContents contents_{};
};

bool detect(std::span<const std::byte> start) { return first_zip_name(start).ends_with(kSuffix); }

WeightContents parse(std::span<const std::byte> file, const std::string& where) {
  return NpzReader(file, where).read();
}

}  // namespace

extern const WeightFormat npz_format;
const WeightFormat npz_format = {.name = "npz",
                                 .suffix = ".npz",
                                 .usual_name = "weights.npz",
                                 .source = "numpy, lib/format.py; mlx 0.32.2 (846d176), io/load.cpp",
                                 .detect = detect,
                                 .parse = parse};

}  // namespace bitwright
