#include "scheme/take_rows.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace bitwright {
namespace {

/// Neighbours in a row that share one parameter, everywhere; or nothing.
std::optional<int64_t> run_in_row(const Grouping& grouping, int64_t columns) {
  switch (grouping.kind) {
    case Grouping::Kind::tensor:
      return columns;
    case Grouping::Kind::axis:
      if (grouping.axis != -1) return std::nullopt;
      return grouping.size == 0 ? columns : std::min(grouping.size, columns);
    case Grouping::Kind::flat:
      if (grouping.interleaved || (columns % grouping.size != 0 && grouping.size % columns != 0)) return std::nullopt;
      return std::min(grouping.size, columns);
    case Grouping::Kind::block:
      return std::min(grouping.block_columns, columns);
    case Grouping::Kind::index:
      return std::nullopt;
  }
  return std::nullopt;
}

/// A parameter of the rows taken, as plain f32.
struct TakenParameter {
  Parameter parameter;
  std::shared_ptr<const QuantizedTensor> stored;
};

TakenParameter plain_parameter(const Parameter& old, const Grouping& grouping, int64_t rows,
                               const std::vector<float>& values) {
  Parameter parameter = bitwright::parameter(grouping, plain(DType::f32));
  parameter.divides = old.divides;
  const auto bytes = std::as_bytes(std::span(values));
  const Shape shape = {rows, rows == 0 ? 0 : static_cast<int64_t>(values.size()) / rows};
  QuantizedTensor stored = {.scheme = plain(DType::f32), .shape = shape, .codes = {bytes.begin(), bytes.end()}};
  return {std::move(parameter), std::make_shared<const QuantizedTensor>(std::move(stored))};
}

/// Only the groups of the rows taken are decoded: a stack of experts is cut many times.
std::optional<TakenParameter> take(const Parameter& parameter, const QuantizedTensor& stored, const Shape& shape,
                                   std::span<const int64_t> rows) {
  const int64_t columns = shape.back(), stored_rows = element_count(shape) / columns;
  const bool indexed = parameter.grouping.kind == Grouping::Kind::index;  // a line of groups a row, in any order
  const std::optional<int64_t> run =
      indexed ? std::optional(parameter.grouping.size) : run_in_row(parameter.grouping, columns);
  if (!run) return std::nullopt;
  const int64_t groups = (columns + *run - 1) / *run;
  const Decoder decoder(stored);
  const std::optional<GroupMap> map = indexed ? std::nullopt : std::optional<GroupMap>({parameter.grouping, shape});
  std::vector<float> values(rows.size() * static_cast<size_t>(groups));
  for (size_t i = 0; i < rows.size(); ++i) {
    BW_ASSERT(rows[i] >= 0 && rows[i] < stored_rows);
    const auto group_of = [&](int64_t k) { return map ? map->group_of(rows[i] * columns + k) : rows[i] * groups; };
    // A row's groups are numbered one after another, in every grouping that gets here.
    decoder.decode(group_of(0),
                   std::span(values).subspan(i * static_cast<size_t>(groups), static_cast<size_t>(groups)));
    BW_ASSERT(indexed || group_of(columns - 1) == group_of(0) + groups - 1);
  }
  const Grouping grouping = indexed ? parameter.grouping : Grouping::along(*run);
  return plain_parameter(parameter, grouping, static_cast<int64_t>(rows.size()), values);
}

}  // namespace

std::optional<QuantizedTensor> take_rows(const QuantizedTensor& tensor, std::span<const int64_t> rows) {
  BW_ASSERT(tensor.shape.size() >= 2 && tensor.shape.back() > 0);
  if (tensor.scheme.element->kind == ElementKind::block_code) return std::nullopt;
  const int64_t columns = tensor.shape.back(), stored_rows = element_count(tensor.shape) / columns;
  QuantizedTensor out = {.scheme = tensor.scheme,
                         .shape = {static_cast<int64_t>(rows.size()), columns},
                         .group_index = tensor.group_index};
  const auto take_parameter = [&](std::optional<Parameter>& parameter, const auto& from, auto& to) {
    if (!parameter) return true;
    std::optional<TakenParameter> taken = take(*parameter, *from, tensor.shape, rows);
    if (!taken) return false;
    parameter = std::move(taken->parameter);
    to = std::move(taken->stored);
    return true;
  };
  if (!take_parameter(out.scheme.scale, tensor.scale, out.scale) ||
      !take_parameter(out.scheme.offset, tensor.offset, out.offset))
    return std::nullopt;
  const auto row_bytes = columns * static_cast<int64_t>(tensor.scheme.element->code_bytes());
  out.codes.reserve(rows.size() * static_cast<size_t>(row_bytes));
  for (const int64_t row : rows) {
    BW_ASSERT(row >= 0 && row < stored_rows);
    out.codes.insert(out.codes.end(), tensor.codes.begin() + row * row_bytes,
                     tensor.codes.begin() + (row + 1) * row_bytes);
  }
  return out;
}

}  // namespace bitwright
