#include "quantize/arranged.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/error.hpp"
#include "kernels/decode.hpp"
#include "quantize/output_layout.hpp"
#include "quantize/stream.hpp"
#include "scheme/take_rows.hpp"
#include "scheme/transposed.hpp"

namespace bitwright {
namespace {

bool is_indexed(const Scheme& scheme) { return scheme.scale && scheme.scale->grouping.kind == Grouping::Kind::index; }

/// Of the floats that a tensor of a file without a type of its own stands for: that of its scales.
DType type_of_scales(const Scheme& scheme) {
  const Scheme* innermost = &scheme;
  while (innermost->scale) innermost = &*innermost->scale->scheme;
  const std::optional<DType> type = dtype_of(*innermost->element);
  return type && size_bytes(*type) >= 2 ? *type : DType::f16;
}

Shape folded(const Shape& shape) { return {row_count(shape), shape.back()}; }

}  // namespace

/// Rows of one part, and what is read to have them.
struct Arranged::Selection {
  const TensorEntry* entry;
  RowRange read;
  std::vector<int64_t> rows;  ///< within what is read; empty: all of it
};

Arranged::Arranged(const Checkpoint& source) : source_(source), facts_(facts_of(source)) {
  const bool untyped = source.container() != nullptr && !source.container()->model_file.empty();
  for (size_t i = 0; i < facts_.size(); ++i) {
    const TensorEntry& entry = source.tensors()[i];
    tensors_.push_back(
        {.name = entry.name, .shape = facts_[i].shape, .parts = {&entry}, .transposed = entry.transposed});
    if (!entry.quantized()) continue;
    tensors_.back().scheme = entry.scheme;
    if (untyped) facts_[i].dtype = type_of_scales(entry.scheme);
  }
}

Arranged::Arranged(const Checkpoint& source, std::span<const ArrayView> views) : source_(source) {
  for (const ArrayView& view : views) add(view);
}

void Arranged::add(const ArrayView& view) {
  ArrangedTensor t = {.name = view.name,
                      .shape = view.shape,
                      .parts = {},
                      .rows = view.rows,
                      .transposed = view.transposed,
                      .as_f32 = view.as_f32 || view.added != 0 || view.source.empty(),
                      .added = view.added,
                      .made = view.made};
  const auto add_part = [&](const std::string& name) {
    const TensorEntry* const part = source_.find(name);
    BW_ASSERT(part != nullptr);  // views are of this model's tensors
    t.parts.push_back(part);
  };
  if (!view.source.empty()) add_part(view.source);
  std::ranges::for_each(view.stacked, add_part);
  for (const TensorEntry* part : t.parts)
    if (const TensorEntry& first = *t.parts.front();
        part->shape != first.shape || part->scheme != first.scheme || part->dtype != first.dtype)
      throw Error({.code = "no-gguf",
                   .what = "cannot write the model as GGUF",
                   .where = source_.path().string(),
                   .why = fmt::format("tensor '{}' is not of its neighbours' type and shape", printable(part->name)),
                   .fix = "choose another --format"});
  DType dtype = DType::f32;
  if (!t.parts.empty()) {
    const TensorEntry& entry = *t.parts.front();
    const bool moved = !t.rows.empty() || t.parts.size() > 1;
    if (!t.as_f32) dtype = entry.dtype;
    if (entry.quantized() && !moved) t.scheme = entry.scheme;
    if (entry.quantized() && moved && !(t.parts.size() > 1 && is_indexed(entry.scheme)))
      t.scheme = scheme_of_rows(entry.scheme, entry.shape, is_one_matrix(t));
  }
  facts_.push_back(
      {.name = t.name, .shape = t.shape, .is_float = info(dtype).is_float, .bytes = size_bytes(dtype), .dtype = dtype});
  tensors_.push_back(std::move(t));
}

std::vector<RowRange> Arranged::pieces(size_t i, bool turned) const {
  const ArrangedTensor& t = tensors_[i];
  const int64_t height = row_count(t.parts.front()->shape);
  const std::vector<RowRange> first = source_.row_pieces(*t.parts.front());
  if (turned || (!t.rows.empty() && static_cast<int64_t>(t.rows.size()) != height))
    return {{0, turned ? t.parts.front()->shape.back() : static_cast<int64_t>(t.rows.size())}};
  std::vector<RowRange> all;
  for (size_t p = 0; p < t.parts.size(); ++p)
    for (const RowRange piece : first) {
      const int64_t begin = static_cast<int64_t>(p) * height;
      all.push_back({begin + piece.begin, begin + piece.end});
    }
  return all;
}

std::vector<RowRange> Arranged::pieces(size_t i, const Container& container, const StoredTensor& target,
                                       bool turned) const {
  const ArrangedTensor& t = tensors_[i];
  const auto step = container.by_rows ? row_step(target.scheme, target.shape) : std::nullopt;
  if (!step || turned) return {{0, row_count(target.shape)}};
  const bool some = !t.rows.empty() && static_cast<int64_t>(t.rows.size()) != row_count(t.parts.front()->shape);
  if (some && source_.row_pieces(*t.parts.front()).size() > 1) return row_pieces(container, target);
  std::vector<RowRange> common;
  for (const RowRange piece : pieces(i, turned)) {
    if (common.empty() || piece.begin % *step == 0)
      common.push_back(piece);
    else
      common.back().end = piece.end;
  }
  return common;
}

std::vector<RowRange> Arranged::plain_pieces(size_t i) const {
  const ArrangedTensor& t = tensors_[i];
  if (t.transposed || t.as_f32) return {{0, element_count(t.shape)}};
  return element_pieces(t.shape);
}

/// Source rows of whole pieces, as a container's groups may ask for.
Arranged::Selection Arranged::select(const TensorEntry& entry, std::vector<int64_t> rows) const {
  const auto [low, high] = std::ranges::minmax(rows);
  RowRange read = {0, 0};
  for (const RowRange piece : source_.row_pieces(entry)) {
    if (piece.end <= low || piece.begin > high) continue;
    if (read.end == 0) read.begin = piece.begin;
    read.end = piece.end;
  }
  bool all = static_cast<int64_t>(rows.size()) == read.end - read.begin;
  for (size_t r = 0; r < rows.size(); ++r) {
    rows[r] -= read.begin;
    all = all && rows[r] == static_cast<int64_t>(r);
  }
  if (all) rows.clear();
  return {&entry, read, std::move(rows)};
}

std::vector<Arranged::Selection> Arranged::selections(const ArrangedTensor& t, RowRange rows) const {
  const auto from = static_cast<size_t>(rows.begin), count = static_cast<size_t>(rows.end - rows.begin);
  if (!t.rows.empty()) {
    const std::span<const int64_t> wanted = std::span(t.rows).subspan(from, count);
    return {select(*t.parts.front(), {wanted.begin(), wanted.end()})};
  }
  std::vector<Selection> all;
  const int64_t height = row_count(t.parts.front()->shape);
  for (int64_t row = rows.begin; row < rows.end;) {
    const int64_t part = row / height, first = row % height, end = std::min(height, first + rows.end - row);
    std::vector<int64_t> wanted(static_cast<size_t>(end - first));
    std::iota(wanted.begin(), wanted.end(), first);
    all.push_back(select(*t.parts[static_cast<size_t>(part)], std::move(wanted)));
    row += end - first;
  }
  return all;
}

QuantizedTensor Arranged::read_rows(const TensorEntry& entry, RowRange rows) const {
  const bool whole = rows.begin == 0 && rows.end == row_count(entry.shape);
  return whole ? source_.read(entry) : source_.read_rows(entry, rows.begin, rows.end);
}

QuantizedTensor Arranged::read(size_t i, bool turned, RowRange rows) const {
  const ArrangedTensor& t = tensors_[i];
  const TensorEntry& first = *t.parts.front();
  if (turned) return transposed(source_.read(first));
  if (t.rows.empty() && t.parts.size() == 1) return read_rows(first, rows);
  std::vector<QuantizedTensor> parts;
  for (const Selection& s : selections(t, rows)) {
    const QuantizedTensor stored = read_rows(*s.entry, s.read);
    std::vector<int64_t> wanted = s.rows;
    if (wanted.empty()) {
      wanted.resize(static_cast<size_t>(s.read.end - s.read.begin));
      std::iota(wanted.begin(), wanted.end(), 0);
    }
    parts.push_back(*rows_as_stored(stored, wanted, is_one_matrix(t)));
  }
  return stacked(parts);
}

std::vector<float> Arranged::decoded(size_t i, bool turned, RowRange rows) const {
  const ArrangedTensor& t = tensors_[i];
  const TensorEntry& first = *t.parts.front();
  if (turned) {
    const std::vector<float> values = source_.read_f32(first);
    const std::vector<std::byte> bytes =
        transposed(std::as_bytes(std::span(values)), first.shape[0], first.shape[1], sizeof(float));
    std::vector<float> out(values.size());
    std::ranges::copy(bytes, std::as_writable_bytes(std::span(out)).begin());
    return out;
  }
  std::vector<float> out;
  for (const Selection& s : selections(t, rows)) {
    const auto width = static_cast<size_t>(folded(s.entry->shape)[1]);
    std::vector<float> values(static_cast<size_t>(s.read.end - s.read.begin) * width);
    decode(read_rows(*s.entry, s.read), values);
    if (s.rows.empty()) out.insert(out.end(), values.begin(), values.end());
    for (const int64_t row : s.rows) {
      const auto begin = values.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(row) * width);
      out.insert(out.end(), begin, begin + static_cast<std::ptrdiff_t>(width));
    }
  }
  return out;
}

std::vector<std::byte> Arranged::read_plain(size_t i, RowRange elements) const {
  const ArrangedTensor& t = tensors_[i];
  if (t.parts.empty()) {
    const auto bytes = std::as_bytes(std::span(t.made));
    return {bytes.begin(), bytes.end()};
  }
  const TensorEntry& entry = *t.parts.front();
  const uint64_t each = size_bytes(entry.dtype);
  std::vector<std::byte> bytes(static_cast<uint64_t>(elements.end - elements.begin) * each);
  const uint64_t part_bytes = static_cast<uint64_t>(element_count(entry.shape)) * each;
  const uint64_t row_bytes =
      t.rows.empty() ? part_bytes : (entry.shape.size() < 2 ? 1 : static_cast<uint64_t>(entry.shape.back())) * each;
  const uint64_t begin = static_cast<uint64_t>(elements.begin) * each;
  for (uint64_t done = 0; done < bytes.size();) {
    const uint64_t row = (begin + done) / row_bytes, within = (begin + done) % row_bytes;
    const uint64_t length = std::min<uint64_t>(row_bytes - within, bytes.size() - done);
    const std::span<std::byte> out = std::span(bytes).subspan(done, length);
    if (t.rows.empty())
      source_.read_bytes(*t.parts[row], within, out);
    else
      source_.read_bytes(entry, static_cast<uint64_t>(t.rows[row]) * row_bytes + within, out);
    done += length;
  }
  if (t.transposed) bytes = transposed(bytes, entry.shape[0], entry.shape[1], each);
  if (!t.as_f32 || (entry.dtype == DType::f32 && t.added == 0)) return bytes;
  std::vector<float> values(bytes.size() / each);
  to_f32(entry.dtype, bytes, values);
  for (float& value : values) value += t.added;
  const auto changed = std::as_bytes(std::span(values));
  return {changed.begin(), changed.end()};
}

}  // namespace bitwright
