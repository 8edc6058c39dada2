#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {
namespace {

constexpr size_t kDecodeGrain = size_t{1} << 16;

uint32_t load_code(const std::byte* codes, size_t i, size_t code_bytes) {
  uint32_t code = 0;
  std::memcpy(&code, codes + i * code_bytes, code_bytes);
  return code;
}

std::vector<float> element_values(const ElementType& type) {
  std::vector<float> values;
  if (type.bits <= 8 && type.kind != ElementKind::block_code)
    for (uint32_t code = 0; code < 1u << type.bits; ++code) values.push_back(type.decode(type, code));
  return values;
}

[[noreturn]] void wrong_size(const std::string& where, const std::string& why) {
  throw Error({.code = "bad-tensor", .what = "wrong size", .where = where, .why = why});
}

void check_parameter(const std::optional<Parameter>& p, const std::shared_ptr<const QuantizedTensor>& stored,
                     const Shape& shape, const std::string& where) {
  if (p.has_value() != (stored != nullptr)) wrong_size(where, "stored without being in the scheme, or the reverse");
  if (!p) return;
  const Shape expected = parameter_shape(p->grouping, shape);
  if (element_count(stored->shape) != element_count(expected))
    wrong_size(where, fmt::format("shape {} where {} is needed", to_string(stored->shape), to_string(expected)));
  if (stored->scheme != *p->scheme) wrong_size(where, "its scheme is not the one the tensor's scheme names");
  check_sizes(*stored, where);
}

}  // namespace

float decode_value(const Scheme& scheme, const GroupParameters& p, float element) {
  const float divided_or_scaled = scheme.scale && scheme.scale->divides ? element / p.scale : element * p.scale;
  switch (scheme.offset_kind) {
    case OffsetKind::none:
      return divided_or_scaled * scheme.factor;
    case OffsetKind::zero_point:
    case OffsetKind::float_zero:
      return (element - p.offset) * p.scale * scheme.factor;
    case OffsetKind::bias:
      return divided_or_scaled * scheme.factor + p.offset;
    case OffsetKind::minimum:
      return divided_or_scaled * scheme.factor - p.offset;
    case OffsetKind::shift:
      return (element - scheme.shift) * p.scale * scheme.factor;
  }
  return 0;
}

bool operator==(const QuantizedTensor& a, const QuantizedTensor& b) {
  const auto same = [](const auto& p, const auto& q) { return p == q || (p && q && *p == *q); };
  return a.scheme == b.scheme && a.shape == b.shape && a.codes == b.codes && same(a.scale, b.scale) &&
         same(a.offset, b.offset) && a.group_index == b.group_index;
}

void check_sizes(const QuantizedTensor& t, const std::string& where) {
  const ElementType& type = *t.scheme.element;
  const auto blocks = static_cast<uint64_t>(element_count(t.shape) / type.block_size);
  const uint64_t code_bytes =
      blocks * (type.kind == ElementKind::block_code ? static_cast<uint64_t>(type.bits) / 8 : type.code_bytes());
  if (t.codes.size() != code_bytes)
    wrong_size(where, fmt::format("{} bytes of codes where {} are needed", t.codes.size(), code_bytes));
  if (type.bits < 8) {
    std::byte all{0};  // no early exit, so that it is done in vectors
    for (const std::byte code : t.codes) all |= code;
    if (std::to_integer<unsigned>(all) >> type.bits != 0)
      wrong_size(where, fmt::format("a code has more than {} bits", type.bits));
  }
  check_parameter(t.scheme.scale, t.scale, t.shape, where + " (scale)");
  check_parameter(t.scheme.offset, t.offset, t.shape, where + " (offset)");
}

Decoder::Decoder(const QuantizedTensor& tensor) : tensor_(tensor), elements_(element_values(*tensor.scheme.element)) {
  BW_ASSERT(tensor.scheme.element->kind != ElementKind::block_code);
  const auto load = [&](const std::optional<Parameter>& p, const std::shared_ptr<const QuantizedTensor>& stored,
                        std::vector<float>& values, std::unique_ptr<GroupMap>& groups) {
    if (!p) return;
    const bool indexed = p->grouping.kind == Grouping::Kind::index;
    groups =
        std::make_unique<GroupMap>(p->grouping, tensor.shape, indexed ? tensor.group_index : std::vector<int32_t>{});
    values = bitwright::decode(*stored);
    BW_ASSERT(static_cast<int64_t>(values.size()) == groups->group_count());
  };
  load(tensor.scheme.scale, tensor.scale, scale_, scale_groups_);
  load(tensor.scheme.offset, tensor.offset, offset_, offset_groups_);
}

void Decoder::decode(int64_t begin, std::span<float> out) const {
  const ElementType& type = *tensor_.scheme.element;
  const auto first = static_cast<size_t>(begin);
  const size_t bytes = type.code_bytes();
  BW_ASSERT((first + out.size()) * bytes <= tensor_.codes.size());
  const auto dtype = dtype_of(type);
  if (dtype && type.kind == ElementKind::floating)
    to_f32(*dtype, std::span(tensor_.codes).subspan(first * bytes, out.size() * bytes), out);
  else
    for (size_t i = 0; i < out.size(); ++i) {
      const uint32_t code = load_code(tensor_.codes.data(), first + i, bytes);
      out[i] = elements_.empty() ? type.decode(type, code) : elements_[code];
    }
  if (tensor_.scheme.is_plain()) return;
  const auto total = static_cast<int64_t>(out.size());
  for (int64_t i = 0; i < total;) {
    int64_t run = total - i;
    GroupParameters p;
    const auto take = [&](const std::unique_ptr<GroupMap>& groups, const std::vector<float>& values, float& value) {
      if (!groups) return;
      value = values[static_cast<size_t>(groups->group_of(begin + i))];
      run = std::min(run, groups->run_length(begin + i));
    };
    take(scale_groups_, scale_, p.scale);
    take(offset_groups_, offset_, p.offset);
    for (float& value : out.subspan(static_cast<size_t>(i), static_cast<size_t>(run)))
      value = decode_value(tensor_.scheme, p, value);
    i += run;
  }
}

std::vector<float> decode(const QuantizedTensor& tensor) {
  std::vector<float> values(static_cast<size_t>(element_count(tensor.shape)));
  const Decoder decoder(tensor);
  parallel_ranges(values.size(), kDecodeGrain, [&](size_t begin, size_t end) {
    decoder.decode(static_cast<int64_t>(begin), std::span(values).subspan(begin, end - begin));
  });
  return values;
}

}  // namespace bitwright
