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

std::vector<std::byte> transposed(std::span<const std::byte> elements, int64_t rows, int64_t columns, size_t size) {
  const auto height = static_cast<size_t>(rows), width = static_cast<size_t>(columns);
  BW_ASSERT(elements.size() == height * width * size);
  std::vector<std::byte> out(elements.size());
  for (size_t r = 0; r < height; ++r)
    for (size_t c = 0; c < width; ++c)
      std::copy_n(elements.data() + (r * width + c) * size, size, out.data() + (c * height + r) * size);
  return out;
}

bool can_transpose(const Scheme& scheme) {
  if (scheme.element->kind == ElementKind::block_code) return false;
  for (const auto& parameter : {scheme.scale, scheme.offset}) {
    if (!parameter) continue;
    const Grouping::Kind kind = parameter->grouping.kind;
    if (kind != Grouping::Kind::tensor && kind != Grouping::Kind::axis) return false;
    if (!can_transpose(*parameter->scheme)) return false;
  }
  return true;
}

Scheme transposed(const Scheme& scheme) {
  Scheme out = scheme;
  out.scale = transposed(scheme.scale);
  out.offset = transposed(scheme.offset);
  return out;
}

QuantizedTensor transposed(const QuantizedTensor& matrix) {
  BW_ASSERT(matrix.shape.size() == 2 && matrix.scheme.element->kind != ElementKind::block_code);
  QuantizedTensor out = {.scheme = transposed(matrix.scheme), .shape = {matrix.shape[1], matrix.shape[0]}};
  out.codes = transposed(matrix.codes, matrix.shape[0], matrix.shape[1], matrix.scheme.element->code_bytes());
  out.scale = transposed(matrix.scheme.scale, matrix.scale);
  out.offset = transposed(matrix.scheme.offset, matrix.offset);
  return out;
}

}  // namespace bitwright
