#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/dtype.hpp"
#include "base/json.hpp"

namespace bitwright {

enum class ElementKind : uint8_t {
  integer,     ///< two's complement or unsigned
  floating,    ///< IEEE-like
  table,       ///< a code is an index into fixed values
  block_code,  ///< codes mean something only together (GGUF's IQ1-IQ3, TQ): kept as raw blocks
};

/// What one stored code means before scale and offset: a row of a table.
struct ElementType {
  std::string_view name;    ///< "uint4", "nf4", "float16"; files hold it, so it is never renamed
  std::string_view source;  ///< document, or library and commit, that defines it
  ElementKind kind;
  int bits;                ///< of one code, as containers pack it; of a whole block for block codes
  float lowest, highest;   ///< smallest and largest decoded value
  float full_scale;        ///< a symmetric group's largest magnitude is scaled to this: 127 for int8, 1 for nf4
  int64_t block_size = 1;  ///< elements of a block code

  float (*decode)(const ElementType& type, uint32_t code);
  /// The code whose value is nearest to `value`, which is finite. Ties as `source` has them.
  uint32_t (*nearest)(const ElementType& type, float value);

  /// Bytes of one code where codes are not packed (QuantizedTensor): 1 up to 8 bits, else bits / 8.
  size_t code_bytes() const { return bits <= 8 ? 1 : static_cast<size_t>(bits) / 8; }
};

std::span<const ElementType* const> all_elements();
const ElementType* find_element(std::string_view name);  ///< null where there is none
const ElementType& integer_element(int bits, bool is_signed);
const ElementType& float_element(DType dtype);           ///< for f32, f16, bf16, f8_e4m3, f8_e5m2, f8_e8m0
std::optional<DType> dtype_of(const ElementType& type);  ///< the inverse, and int8/uint8; where a file has the type

/// Which elements of a tensor share a parameter. Groups act within the last two dimensions; leading ones (experts) are
/// a batch, except for `flat`.
struct Grouping {
  enum class Kind : uint8_t {
    tensor,  ///< one group a matrix
    axis,    ///< `size` consecutive elements along `axis`; the last group of a line may be shorter
    flat,    ///< `size` consecutive elements of the row-major array, across rows (bitsandbytes, HQQ axis 1)
    block,   ///< `block_rows` x `block_columns` rectangles; those at the edges may be smaller
    index,   ///< column k of the last axis belongs to group `group_index[k]` (GPTQ's g_idx)
  };
  Kind kind = Kind::tensor;
  int axis = -1;             ///< for axis: counted from the end, -1 or -2
  int64_t size = 0;          ///< for axis, flat, index: elements a group; 0 for axis: the whole line ("channel")
  bool interleaved = false;  ///< for flat: group g holds elements g, g + G, g + 2G … of G groups (HQQ axis 0)
  int64_t block_rows = 0, block_columns = 0;

  static Grouping tensor() { return {}; }
  static Grouping channel() { return {.kind = Kind::axis}; }
  static Grouping along(int64_t size, int axis = -1) { return {.kind = Kind::axis, .axis = axis, .size = size}; }
  static Grouping flat(int64_t size) { return {.kind = Kind::flat, .size = size}; }
  bool operator==(const Grouping&) const = default;
};

struct Scheme;

/// A scale or an offset: one number a group, itself stored by a scheme (a plain `float16`, or a quantized one).
struct Parameter {
  Grouping grouping;
  std::shared_ptr<const Scheme> scheme;
  bool divides = false;  ///< a scale that divides (the global scale of NVFP4 in compressed-tensors)
};

/// Where zero lies. e is the decoded element, s the decoded scale; each step is rounded to f32.
enum class OffsetKind : uint8_t {
  none,        ///< e * s
  zero_point,  ///< (e - z) * s, z a stored integer
  float_zero,  ///< (e - z) * s, z a stored float (HQQ)
  bias,        ///< e * s + b (MLX, GGUF's _1 types)
  minimum,     ///< e * s - m (k-quants, Quanto's shift)
  shift,       ///< (e - c) * s, c fixed (GGUF Q4_0: 8, Q6_K: 32)
};

/// What a stored number means. Recursive: scales and offsets are stored by schemes of their own.
/// docs/decisions/0001-scheme.md writes down how each known format is expressed.
struct Scheme {
  const ElementType* element = nullptr;
  std::optional<Parameter> scale{};
  OffsetKind offset_kind = OffsetKind::none;
  std::optional<Parameter> offset{};  ///< none and shift store nothing
  float shift = 0;
  float factor = 1;  ///< multiplied last (LLM.int8 stores absmax: 1/127)

  /// True of a plain number: no scale, no offset.
  bool is_plain() const { return !scale && offset_kind == OffsetKind::none; }
};
bool operator==(const Parameter& a, const Parameter& b);
bool operator==(const Scheme& a, const Scheme& b);

Scheme plain(DType dtype);
Parameter parameter(const Grouping& grouping, Scheme scheme);

/// "int4 asymmetric, group 32, float16 scales"
std::string describe(const Scheme& scheme);
OrderedJson to_json(const Scheme& scheme);
/// Throws Error{"bad-scheme"} naming `where` on anything to_json would not write.
Scheme scheme_from_json(const Json& json, const std::string& where);

}  // namespace bitwright
