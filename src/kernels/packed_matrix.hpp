#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/dtype.hpp"
#include "kernels/kernel_level.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// Vectors of it are aligned for every vector width.
struct alignas(64) CacheLine {
  std::byte bytes[64];
};

/// How a panel's weights lie. Each is [columns][kPanel] numbers of the named type, but for `nibble`:
/// [ceil(columns / 8)][kPanel] words of 32 bits, bits 4 i … 4 i + 3 of which are the code of column 8 j + i.
enum class CodeKind : uint8_t {
  f32,
  f16,
  bf16,
  nibble,     ///< codes of up to 4 bits, an index into `table`
  int8,       ///< integer values
  uint8,      ///< integer values
  table,      ///< codes of up to 8 bits, an index into `table`
  reference,  ///< kept as it came and decoded by scheme's Decoder: whatever the others cannot express
};

/// What a decoded code e becomes; s and z are the group's; every step is rounded to f32.
enum class Affine : uint8_t {
  scale,           ///< e * s
  subtract_scale,  ///< (e - z) * s
  scale_add,       ///< e * s + z; a minimum to be subtracted is kept negated, which gives the same bits
};

/// One parameter of every group: [panels][groups][kPanel], f16 or bf16 where that holds every value exactly.
struct GroupValues {
  DType dtype = DType::f32;
  float constant = 1;  ///< every value, where there is no array
  std::vector<CacheLine> values{};
};

/// A weight matrix [rows, columns], repacked once into panels of kPanel rows for the kernels; the last panel is padded.
struct PackedMatrix {
  size_t rows = 0, columns = 0;
  CodeKind kind = CodeKind::f32;
  size_t panel_bytes = 0;  ///< a multiple of 64
  std::vector<CacheLine> codes{};

  // Of quantized kinds. Groups run along a row: columns [group_size * g, group_size * (g + 1)).
  Affine affine = Affine::scale;
  size_t group_size = 0, groups = 0;
  GroupValues scale{}, offset{};
  std::vector<float> table{};  ///< of `nibble` 16 values, of `table` 256

  std::shared_ptr<const QuantizedTensor> source{};  ///< of `reference`
  std::shared_ptr<const Decoder> decoder{};

  size_t panels() const { return (rows + kPanel - 1) / kPanel; }
  const std::byte* panel(size_t p) const { return reinterpret_cast<const std::byte*>(codes.data()) + p * panel_bytes; }
  size_t stored_bytes() const;  ///< what one product reads
};

/// What pack_matrix will take for a matrix of this scheme, known before there are values. A parameter that turns out to
/// fit 16 bits although its type is wider takes less.
size_t packed_bytes(const Scheme& scheme, size_t rows, size_t columns);

/// dtype: f32, f16 or bf16. data: rows * columns numbers, row-major, at any alignment; not kept.
PackedMatrix pack_matrix(DType dtype, std::span<const std::byte> data, size_t rows, size_t columns);
/// `tensor` has two dimensions and passes check_sizes; kept only where no fast layout can express it.
PackedMatrix pack_matrix(std::shared_ptr<const QuantizedTensor> tensor);

}  // namespace bitwright
