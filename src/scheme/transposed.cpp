#include "scheme/transposed.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace bitwright {
namespace {

std::optional<Parameter> transposed(const std::optional<Parameter>& p) {
  if (!p) return std::nullopt;
  BW_ASSERT(p->grouping.kind == Grouping::Kind::tensor || p->grouping.kind == Grouping::Kind::axis);
  Parameter out = *p;
  out.grouping.axis = p->grouping.axis == -1 ? -2 : -1;
  if (p->grouping.kind == Grouping::Kind::tensor) out.grouping.axis = p->grouping.axis;
  out.scheme = std::make_shared<const Scheme>(bitwright::transposed(*p->scheme));
  return out;
}

std::shared_ptr<const QuantizedTensor> transposed(const std::optional<Parameter>& p,
                                                  const std::shared_ptr<const QuantizedTensor>& stored) {
  if (stored == nullptr) return nullptr;
  QuantizedTensor out = p->grouping.kind == Grouping::Kind::tensor ? *stored : bitwright::transposed(*stored);
  out.scheme = bitwright::transposed(stored->scheme);
  return std::make_shared<const QuantizedTensor>(std::move(out));
}

}  // namespace

Scheme transposed(const Scheme& scheme) {
  Scheme out = scheme;
  out.scale = transposed(scheme.scale);
  out.offset = transposed(scheme.offset);
  return out;
}

QuantizedTensor transposed(const QuantizedTensor& matrix) {
  BW_ASSERT(matrix.shape.size() == 2 && matrix.scheme.element->kind != ElementKind::block_code);
  const auto rows = static_cast<size_t>(matrix.shape[0]), columns = static_cast<size_t>(matrix.shape[1]);
  const size_t size = matrix.scheme.element->code_bytes();
  QuantizedTensor out = {.scheme = transposed(matrix.scheme), .shape = {matrix.shape[1], matrix.shape[0]}};
  out.codes.resize(matrix.codes.size());
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < columns; ++c)
      std::copy_n(&matrix.codes[(r * columns + c) * size], size, &out.codes[(c * rows + r) * size]);
  out.scale = transposed(matrix.scheme.scale, matrix.scale);
  out.offset = transposed(matrix.scheme.offset, matrix.offset);
  return out;
}

}  // namespace bitwright
