#include "container/rows.hpp"

#include <algorithm>
#include <numeric>

#include "base/error.hpp"

namespace bitwright {
namespace {

constexpr int64_t kPieceElements = int64_t{1} << 18;  // f32, with its codes: it stays in the cache of one core
constexpr int64_t kStep = 32;  // of so many rows, of any width and any code, a row or a column ends at a whole word

/// Multiples of how many rows hold whole groups; 0: none.
int64_t rows_of_groups(const Grouping& grouping, const Shape& shape) {
  const int64_t columns = shape.back();
  switch (grouping.kind) {
    case Grouping::Kind::axis:
      if (grouping.axis == -1) return 1;
      // Of a stack of matrices, whole ones: their groups are those of one matrix of all their rows.
      return shape.size() == 3 && grouping.size > 0 && shape[1] % grouping.size == 0 ? shape[1] : 0;
    case Grouping::Kind::flat:
      return grouping.interleaved || grouping.size <= 0 ? 0 : grouping.size / std::gcd(grouping.size, columns);
    case Grouping::Kind::block:
      return shape.size() == 2 ? grouping.block_rows : 0;
    case Grouping::Kind::index:
      return 1;
    case Grouping::Kind::tensor:
      return 0;
  }
  return 0;
}

}  // namespace

int64_t row_count(const Shape& shape) {
  return shape.empty() || shape.back() == 0 ? 1 : element_count(shape) / shape.back();
}

StoredTensor rows_of(const StoredTensor& whole, int64_t begin, int64_t end) {
  BW_ASSERT(whole.shape.size() >= 2 && 0 <= begin && begin <= end && end <= row_count(whole.shape));
  StoredTensor piece = whole;
  piece.shape = {end - begin, whole.shape.back()};
  piece.whole = whole.shape;
  return piece;
}

namespace {

/// Do groups of a parameter's own numbers lie within its rows, one row a row of the tensor?
bool nested_by_rows(const Parameter& p) {
  const auto along_rows = [](const Grouping& g) { return g.kind == Grouping::Kind::axis && g.axis == -1; };
  const std::optional<Parameter>& scale = p.scheme->scale;
  return p.scheme->is_plain() || (along_rows(p.grouping) && scale && along_rows(scale->grouping) &&
                                  scale->scheme->is_plain() && !p.scheme->offset);
}

}  // namespace

std::optional<int64_t> row_step(const Scheme& scheme, const Shape& shape) {
  if (shape.size() < 2 || element_count(shape) == 0 || scheme.element->kind == ElementKind::block_code)
    return std::nullopt;
  int64_t step = kStep;
  for (const std::optional<Parameter>* p : {&scheme.scale, &scheme.offset}) {
    if (!p->has_value()) continue;
    const int64_t rows = rows_of_groups((*p)->grouping, shape);
    if (rows == 0 || !nested_by_rows(**p)) return std::nullopt;
    if (rows > kPieceElements) return std::nullopt;
    step = std::lcm(step, rows);
  }
  return step;
}

Placement place(const ArraySpec& whole, const ArraySpec& before, const ArraySpec& piece) {
  if (piece.row_axis == ArraySpec::kNoRows)
    return {.offset = 0, .run = piece.bytes(), .stride = piece.bytes(), .runs = 1};
  if (piece.row_axis == 0) return {.offset = before.bytes(), .run = piece.bytes(), .stride = piece.bytes(), .runs = 1};
  const auto axis = static_cast<size_t>(piece.row_axis);
  BW_ASSERT(whole.shape.size() == piece.shape.size() && axis < whole.shape.size() && whole.block == nullptr);
  uint64_t runs = 1, inner = size_bytes(whole.dtype);
  for (size_t i = 0; i < axis; ++i) runs *= static_cast<uint64_t>(whole.shape[i]);
  for (size_t i = axis + 1; i < whole.shape.size(); ++i) inner *= static_cast<uint64_t>(whole.shape[i]);
  return {.offset = static_cast<uint64_t>(before.shape[axis]) * inner,
          .run = static_cast<uint64_t>(piece.shape[axis]) * inner,
          .stride = static_cast<uint64_t>(whole.shape[axis]) * inner,
          .runs = runs};
}

std::vector<RowRange> row_pieces(const Container& container, const StoredTensor& tensor) {
  if (container.by_rows) return row_pieces(tensor);
  return {{0, row_count(tensor.shape)}};
}

std::vector<RowRange> row_pieces(const StoredTensor& tensor) {
  const int64_t rows = row_count(tensor.shape);
  const auto step = row_step(tensor.scheme, tensor.shape);
  if (!step) return {{0, rows}};
  const int64_t wanted = kPieceElements / tensor.shape.back() / *step * *step;
  const int64_t piece = std::max(wanted, *step);
  std::vector<RowRange> pieces;
  for (int64_t begin = 0; begin < rows; begin += piece) pieces.push_back({begin, std::min(rows, begin + piece)});
  return pieces;
}

std::vector<RowRange> within_matrices(std::span<const RowRange> pieces, const Shape& shape) {
  const int64_t rows = shape[shape.size() - 2];
  std::vector<RowRange> cut;
  for (RowRange piece : pieces)
    for (; piece.begin < piece.end; piece.begin = cut.back().end)
      cut.push_back({piece.begin, std::min(piece.end, (piece.begin / rows + 1) * rows)});
  return cut;
}

}  // namespace bitwright
