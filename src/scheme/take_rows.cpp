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

/// How a parameter of the rows taken is grouped: a line of groups a row.
std::optional<Grouping> taken_grouping(const Grouping& grouping, int64_t columns) {
  if (grouping.kind == Grouping::Kind::index) return grouping;
  const std::optional<int64_t> run = run_in_row(grouping, columns);
  return run ? std::optional(Grouping::along(*run)) : std::nullopt;
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
  const std::optional<Grouping> grouping = taken_grouping(parameter.grouping, columns);
  if (!grouping) return std::nullopt;
  const bool indexed = grouping->kind == Grouping::Kind::index;
  const int64_t groups = (columns + grouping->size - 1) / grouping->size;
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
  return plain_parameter(parameter, *grouping, static_cast<int64_t>(rows.size()), values);
}

bool lies_within_rows(const Parameter& p, bool one_matrix) {
  const Grouping& g = p.grouping;
  if (g.kind == Grouping::Kind::tensor) return one_matrix;
  if (g.kind != Grouping::Kind::index && !(g.kind == Grouping::Kind::axis && g.axis == -1)) return false;
  return (!p.scheme->scale || lies_within_rows(*p.scheme->scale, one_matrix)) &&
         (!p.scheme->offset || lies_within_rows(*p.scheme->offset, one_matrix));
}
bool stays_as_stored(const Scheme& s, bool one_matrix) {
  return (!s.scale || lies_within_rows(*s.scale, one_matrix)) && (!s.offset || lies_within_rows(*s.offset, one_matrix));
}

std::vector<std::byte> codes_of_rows(const QuantizedTensor& tensor, std::span<const int64_t> rows) {
  const int64_t columns = tensor.shape.back(), stored_rows = element_count(tensor.shape) / columns;
  const auto row_bytes = columns * static_cast<int64_t>(tensor.scheme.element->code_bytes());
  std::vector<std::byte> codes;
  codes.reserve(rows.size() * static_cast<size_t>(row_bytes));
  for (const int64_t row : rows) {
    BW_ASSERT(row >= 0 && row < stored_rows);
    codes.insert(codes.end(), tensor.codes.begin() + row * row_bytes, tensor.codes.begin() + (row + 1) * row_bytes);
  }
  return codes;
}

/// Of a tensor whose parameters lie within rows.
QuantizedTensor picked(const QuantizedTensor& tensor, std::span<const int64_t> rows) {
  QuantizedTensor out = {.scheme = tensor.scheme,
                         .shape = {static_cast<int64_t>(rows.size()), tensor.shape.back()},
                         .codes = codes_of_rows(tensor, rows),
                         .group_index = tensor.group_index};
  const auto pick = [&](const std::optional<Parameter>& p, const std::shared_ptr<const QuantizedTensor>& from) {
    if (!p || p->grouping.kind == Grouping::Kind::tensor) return from;
    return std::make_shared<const QuantizedTensor>(picked(*from, rows));
  };
  out.scale = pick(tensor.scheme.scale, tensor.scale);
  out.offset = pick(tensor.scheme.offset, tensor.offset);
  return out;
}

}  // namespace

std::optional<QuantizedTensor> take_rows(const QuantizedTensor& tensor, std::span<const int64_t> rows) {
  BW_ASSERT(tensor.shape.size() >= 2 && tensor.shape.back() > 0);
  if (tensor.scheme.element->kind == ElementKind::block_code) return std::nullopt;
  QuantizedTensor out = {.scheme = tensor.scheme,
                         .shape = {static_cast<int64_t>(rows.size()), tensor.shape.back()},
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
  out.codes = codes_of_rows(tensor, rows);
  return out;
}

std::optional<QuantizedTensor> rows_as_stored(const QuantizedTensor& tensor, std::span<const int64_t> rows,
                                              bool one_matrix) {
  BW_ASSERT(tensor.shape.size() >= 2 && tensor.shape.back() > 0);
  if (tensor.scheme.element->kind == ElementKind::block_code) return std::nullopt;
  return stays_as_stored(tensor.scheme, one_matrix) ? picked(tensor, rows) : take_rows(tensor, rows);
}

std::optional<Scheme> scheme_of_rows(const Scheme& scheme, const Shape& shape, bool one_matrix) {
  if (shape.size() < 2 || shape.back() == 0 || scheme.element->kind == ElementKind::block_code) return std::nullopt;
  if (stays_as_stored(scheme, one_matrix)) return scheme;
  Scheme out = scheme;
  for (std::optional<Parameter>* p : {&out.scale, &out.offset}) {
    if (!p->has_value()) continue;
    const std::optional<Grouping> grouping = taken_grouping((*p)->grouping, shape.back());
    if (!grouping) return std::nullopt;
    const bool divides = (*p)->divides;
    *p = parameter(*grouping, plain(DType::f32));
    (*p)->divides = divides;
  }
  return out;
}

QuantizedTensor stacked(std::span<const QuantizedTensor> parts) {
  if (parts.size() == 1) return parts.front();
  QuantizedTensor out = {.scheme = parts.front().scheme,
                         .shape = {0, parts.front().shape.back()},
                         .group_index = parts.front().group_index};
  for (const QuantizedTensor& part : parts) {
    BW_ASSERT(part.scheme == out.scheme && part.shape.back() == out.shape.back());
    out.shape[0] += element_count(part.shape) / part.shape.back();
    out.codes.insert(out.codes.end(), part.codes.begin(), part.codes.end());
  }
  const auto stack = [&](const auto& of) -> std::shared_ptr<const QuantizedTensor> {
    if (of(parts.front()) == nullptr) return nullptr;
    std::vector<QuantizedTensor> all;
    for (const QuantizedTensor& part : parts) all.push_back(*of(part));
    return std::make_shared<const QuantizedTensor>(stacked(all));
  };
  out.scale = stack([](const QuantizedTensor& t) { return t.scale; });
  out.offset = stack([](const QuantizedTensor& t) { return t.offset; });
  return out;
}

}  // namespace bitwright
