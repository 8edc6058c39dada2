#include "kernels/packed_matrix.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr size_t kNibbles = 8;  // codes a word

size_t cache_lines(size_t bytes) { return (bytes + sizeof(CacheLine) - 1) / sizeof(CacheLine); }

/// Of one panel's codes.
size_t panel_size(CodeKind kind, size_t columns) {
  const auto bytes = [&](size_t a_row) { return cache_lines(a_row * kPanel) * sizeof(CacheLine); };
  switch (kind) {
    case CodeKind::f32:
      return bytes(columns * sizeof(float));
    case CodeKind::f16:
    case CodeKind::bf16:
      return bytes(columns * sizeof(uint16_t));
    case CodeKind::nibble:
      return bytes((columns + kNibbles - 1) / kNibbles * sizeof(uint32_t));
    case CodeKind::int8:
    case CodeKind::uint8:
    case CodeKind::table:
      return bytes(columns);
    case CodeKind::reference:
      return 0;
  }
  return 0;
}

void allocate_panels(PackedMatrix& w) {
  w.panel_bytes = panel_size(w.kind, w.columns);
  w.codes.resize(w.panels() * w.panel_bytes / sizeof(CacheLine));
}

std::byte* panel_begin(PackedMatrix& w, size_t p) {
  return reinterpret_cast<std::byte*>(w.codes.data()) + p * w.panel_bytes;
}

/// Transposes numbers of `bytes` bytes into panels.
template <size_t bytes>
void pack_numbers(const std::byte* data, PackedMatrix& w) {
  allocate_panels(w);
  parallel_for(w.panels(), [&](size_t p) {
    std::byte* const out = panel_begin(w, p);
    const size_t lanes = std::min(kPanel, w.rows - p * kPanel);
    const std::byte* const in = data + p * kPanel * w.columns * bytes;
    for (size_t k = 0; k < w.columns; ++k)
      for (size_t lane = 0; lane < lanes; ++lane)
        std::memcpy(out + (k * kPanel + lane) * bytes, in + (lane * w.columns + k) * bytes, bytes);
  });
}

void pack_nibbles(const std::byte* codes, PackedMatrix& w) {
  const size_t words = (w.columns + kNibbles - 1) / kNibbles;
  allocate_panels(w);
  parallel_for(w.panels(), [&](size_t p) {
    std::byte* const out = panel_begin(w, p);
    const size_t lanes = std::min(kPanel, w.rows - p * kPanel);
    for (size_t j = 0; j < words; ++j)
      for (size_t lane = 0; lane < lanes; ++lane) {
        const std::byte* const row = codes + (p * kPanel + lane) * w.columns;
        uint32_t word = 0;
        for (size_t k = j * kNibbles; k < std::min(w.columns, (j + 1) * kNibbles); ++k)
          word |= std::to_integer<uint32_t>(row[k]) << (4 * (k % kNibbles));
        std::memcpy(out + (j * kPanel + lane) * sizeof word, &word, sizeof word);
      }
  });
}

/// Integer codes as values of 8 bits, negative ones with their sign.
std::vector<std::byte> sign_extended(const QuantizedTensor& t) {
  std::vector<std::byte> values(t.codes.size());
  const auto sign = static_cast<unsigned>(1 << (t.scheme.element->bits - 1));
  std::transform(t.codes.begin(), t.codes.end(), values.begin(), [&](std::byte code) {
    return static_cast<std::byte>((std::to_integer<unsigned>(code) ^ sign) - sign);
  });
  return values;
}

/// How many neighbours in a row share one parameter, if every group lies within a row or holds whole rows.
std::optional<size_t> run_in_row(const std::optional<Parameter>& parameter, size_t columns) {
  if (!parameter || parameter->grouping.kind == Grouping::Kind::tensor) return columns;
  const Grouping& grouping = parameter->grouping;
  const auto size = static_cast<size_t>(grouping.size);
  if (grouping.kind == Grouping::Kind::axis && grouping.axis == -1)
    return size == 0 ? columns : std::min(size, columns);
  if (grouping.kind == Grouping::Kind::flat && !grouping.interleaved && (columns % size == 0 || size % columns == 0))
    return std::min(size, columns);
  return std::nullopt;
}

/// The group size that serves scale and offset both, or nothing where neither divides the other.
std::optional<size_t> common_group_size(const Scheme& scheme, size_t columns) {
  const std::optional<size_t> a = run_in_row(scheme.scale, columns), b = run_in_row(scheme.offset, columns);
  if (!a || !b) return std::nullopt;
  const auto [small, large] = std::minmax(*a, *b);
  if (large != columns && large % small != 0) return std::nullopt;
  return small;
}

CodeKind code_kind(const ElementType& element) {
  if (element.kind == ElementKind::block_code || element.bits > 8) return CodeKind::reference;
  if (element.bits <= 4) return CodeKind::nibble;
  if (element.kind != ElementKind::integer) return CodeKind::table;
  return element.lowest < 0 ? CodeKind::int8 : CodeKind::uint8;
}

/// What all of the matrix but its values says of how it is packed.
PackedMatrix frame_of(const Scheme& scheme, size_t rows, size_t columns) {
  PackedMatrix w{.rows = rows, .columns = columns};
  const auto dtype = scheme.is_plain() && scheme.factor == 1 ? dtype_of(*scheme.element) : std::nullopt;
  if (dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16) {
    w.kind = dtype == DType::f32 ? CodeKind::f32 : dtype == DType::f16 ? CodeKind::f16 : CodeKind::bf16;
    return w;
  }
  w.kind = code_kind(*scheme.element);
  const std::optional<size_t> group_size = common_group_size(scheme, columns);
  const bool divides = scheme.scale && scheme.scale->divides;
  if (w.kind == CodeKind::reference || !group_size || divides || scheme.factor != 1) {
    w.kind = CodeKind::reference;
    return w;
  }
  w.group_size = *group_size;
  w.groups = (columns + w.group_size - 1) / w.group_size;
  return w;
}

size_t parameter_lines(const PackedMatrix& w, size_t value_bytes) {
  return cache_lines(w.panels() * w.groups * kPanel * value_bytes);
}

/// Of one value of a parameter: 16 bits hold every number of 8, but not its product with a scale of its own.
size_t parameter_bytes(const Scheme& scheme) {
  const bool narrow = !scheme.scale && !scheme.offset && scheme.factor == 1 && scheme.element->bits <= 16;
  return narrow ? sizeof(uint16_t) : sizeof(float);
}

/// Of a tensor whose codes take a byte each.
size_t unpacked_bytes(const Scheme& scheme, const Shape& shape) {
  const auto count = static_cast<size_t>(element_count(shape));
  size_t bytes = count * std::max<size_t>(1, static_cast<size_t>(scheme.element->bits) / 8);
  for (const auto& p : {scheme.scale, scheme.offset})
    if (p) bytes += unpacked_bytes(*p->scheme, parameter_shape(p->grouping, shape));
  return bytes;
}

size_t held_bytes(const QuantizedTensor& t) {
  return t.codes.size() + (t.scale ? held_bytes(*t.scale) : 0) + (t.offset ? held_bytes(*t.offset) : 0) +
         t.group_index.size() * sizeof(int32_t);
}

DType narrowest_exact(std::span<const float> values) {
  for (const DType dtype : {DType::f16, DType::bf16})
    if (std::ranges::all_of(
            values, [&](float v) { return std::bit_cast<uint32_t>(round_to(dtype, v)) == std::bit_cast<uint32_t>(v); }))
      return dtype;
  return DType::f32;
}

/// sign: 1, or -1 to keep the values negated.
void pack_parameter(const Parameter& parameter, const QuantizedTensor& stored, const Shape& shape, float sign,
                    const PackedMatrix& w, GroupValues& out) {
  std::vector<float> decoded = decode(stored);
  for (float& value : decoded) value *= sign;
  const GroupMap map(parameter.grouping, shape);
  out.dtype = narrowest_exact(decoded);
  const size_t panel_values = w.groups * kPanel;
  out.values.resize(parameter_lines(w, size_bytes(out.dtype)));
  const auto bytes = std::as_writable_bytes(std::span(out.values));
  std::vector<float> panel(panel_values);
  for (size_t p = 0; p < w.panels(); ++p) {
    for (size_t i = 0; i < panel_values; ++i) {
      const size_t row = std::min(p * kPanel + i % kPanel, w.rows - 1);
      const size_t position = row * w.columns + i / kPanel * w.group_size;
      panel[i] = decoded[static_cast<size_t>(map.group_of(static_cast<int64_t>(position)))];
    }
    const size_t panel_size = panel_values * size_bytes(out.dtype);
    from_f32(out.dtype, panel, bytes.subspan(p * panel_size, panel_size));
  }
}

void pack_parameters(const QuantizedTensor& t, PackedMatrix& w) {
  const Scheme& scheme = t.scheme;
  const float sign = scheme.offset_kind == OffsetKind::minimum ? -1.0f : 1.0f;
  if (scheme.scale) pack_parameter(*scheme.scale, *t.scale, t.shape, 1, w, w.scale);
  if (scheme.offset) pack_parameter(*scheme.offset, *t.offset, t.shape, sign, w, w.offset);
  switch (scheme.offset_kind) {
    case OffsetKind::none:
      w.affine = Affine::scale;
      return;
    case OffsetKind::shift:
      w.offset.constant = scheme.shift;
      [[fallthrough]];
    case OffsetKind::zero_point:
    case OffsetKind::float_zero:
      w.affine = Affine::subtract_scale;
      return;
    case OffsetKind::bias:
    case OffsetKind::minimum:
      w.affine = Affine::scale_add;
      return;
  }
}

void pack_codes(const QuantizedTensor& t, PackedMatrix& w) {
  const ElementType& element = *t.scheme.element;
  if (w.kind == CodeKind::nibble || w.kind == CodeKind::table) {
    w.table.resize(w.kind == CodeKind::nibble ? 16 : 256);
    for (uint32_t code = 0; code < 1u << element.bits; ++code) w.table[code] = element.decode(element, code);
  }
  if (w.kind == CodeKind::nibble)
    pack_nibbles(t.codes.data(), w);
  else if (w.kind == CodeKind::int8)
    pack_numbers<1>(sign_extended(t).data(), w);
  else
    pack_numbers<1>(t.codes.data(), w);
}

}  // namespace

size_t PackedMatrix::stored_bytes() const {
  return (codes.size() + scale.values.size() + offset.values.size()) * sizeof(CacheLine) +
         (source ? held_bytes(*source) : 0);
}

size_t packed_bytes(const Scheme& scheme, size_t rows, size_t columns) {
  const PackedMatrix w = frame_of(scheme, rows, columns);
  if (w.kind == CodeKind::reference)
    return unpacked_bytes(scheme, {static_cast<int64_t>(rows), static_cast<int64_t>(columns)});
  size_t lines = w.panels() * panel_size(w.kind, columns) / sizeof(CacheLine);
  for (const auto& p : {scheme.scale, scheme.offset})
    if (p) lines += parameter_lines(w, parameter_bytes(*p->scheme));
  return lines * sizeof(CacheLine);
}

PackedMatrix pack_matrix(DType dtype, std::span<const std::byte> data, size_t rows, size_t columns) {
  BW_ASSERT(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16);
  BW_ASSERT(rows > 0 && columns > 0 && data.size() == rows * columns * size_bytes(dtype));
  PackedMatrix w{.rows = rows, .columns = columns};
  w.kind = dtype == DType::f32 ? CodeKind::f32 : dtype == DType::f16 ? CodeKind::f16 : CodeKind::bf16;
  if (dtype == DType::f32)
    pack_numbers<4>(data.data(), w);
  else
    pack_numbers<2>(data.data(), w);
  return w;
}

PackedMatrix pack_matrix(std::shared_ptr<const QuantizedTensor> tensor) {
  const QuantizedTensor& t = *tensor;
  BW_ASSERT(t.shape.size() == 2);
  const auto rows = static_cast<size_t>(t.shape[0]), columns = static_cast<size_t>(t.shape[1]);
  BW_ASSERT(rows > 0 && columns > 0);
  if (t.scheme.is_plain() && t.scheme.factor == 1)
    if (const auto dtype = dtype_of(*t.scheme.element);
        dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16)
      return pack_matrix(*dtype, t.codes, rows, columns);

  PackedMatrix w = frame_of(t.scheme, rows, columns);
  if (w.kind == CodeKind::reference) {
    w.decoder = std::make_shared<const Decoder>(t);
    w.source = std::move(tensor);
    return w;
  }
  pack_codes(t, w);
  pack_parameters(t, w);
  return w;
}

}  // namespace bitwright
