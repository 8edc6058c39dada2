#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace bitwright {

struct GroupEncoding;
struct GroupDecoding;
struct GroupNumbers;
struct FakeGroups;
struct PackedMatrix;
enum class Activation : uint8_t;
struct Range;
enum class DType : uint8_t;

/// Columns of one panel: the lanes of a kernel run over them.
constexpr size_t kPanel = 16;

/// y[r, c] = sum over k, in order, of x[r, k] * w[k, c], each step one fused multiply-add, from 0 or from y.
struct Tile {
  const float* x;  ///< [rows, depth]
  size_t x_stride;
  const float* w;   ///< [panels][depth][kPanel]
  size_t w_stride;  ///< floats from one panel to the next
  float* y;         ///< [rows, columns]; nothing beside it is touched
  size_t y_stride;
  size_t rows, depth, columns;
  bool add;  ///< start from y
};

/// The innermost loops for one instruction set: a row of a table, best first, the definition ("scalar") last.
/// Every row gives the same bits. None allocates or can fail.
struct KernelLevel {
  std::string_view name;  ///< what BITWRIGHT_KERNEL and `doctor` use
  bool (*usable)();       ///< may this process run it on this CPU?

  void (*multiply_tile)(const Tile& tile);
  /// out[(k - k_begin) * kPanel + lane] = the weights of `panel` for k in [k_begin, k_end).
  void (*expand)(const PackedMatrix& w, size_t panel, size_t k_begin, size_t k_end, float* out);
  /// y[n] = sum over k, in order, of x[k] * w[n, k], fused, for the rows n of panels [panel_begin, panel_end).
  void (*multiply_vector)(const PackedMatrix& w, size_t panel_begin, size_t panel_end, const float* x, float* y);
  // As elementwise.hpp defines them.
  void (*activate)(Activation activation, float* x, const float* factor, size_t count);
  void (*activation_slope)(Activation activation, float* x, size_t count);
  void (*soft_cap)(float* x, size_t count, float scale, float cap);
  float (*softmax_terms)(float* scores, size_t count, float scale);

  // Quantizing. values: f16, bf16 or f32 numbers; groups of `size` lie one after the other.
  /// Smallest and largest of `count` > 0 numbers, +0 rather than -0; false if one is NaN or infinite.
  bool (*find_extremes)(DType dtype, const std::byte* values, size_t count, Range& range);
  /// ranges[g] = least_squares_range of group g, for integers; false as above. scratch: size * kPanel floats.
  bool (*search_ranges)(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                        float* scratch, Range* ranges);
  /// Scales as their type holds them, and zero points. All three arrays have room for a multiple of kPanel.
  void (*group_parameters)(const GroupEncoding& e, const Range* ranges, size_t groups, float* scales, float* zeros);
  /// codes[i] = the code of values[i]. zeros: null where there are none.
  void (*encode_integers)(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                          const float* scales, const float* zeros, std::byte* codes);
  /// The same for tables of 16 values and full blocks.
  void (*encode_table)(const GroupEncoding& e, DType dtype, const std::byte* values, size_t size, size_t groups,
                       const float* scales, std::byte* codes);
  /// out[i] = value of codes[i].
  void (*decode_groups)(const GroupDecoding& d, const GroupNumbers& numbers, const std::byte* codes, size_t size,
                        size_t groups, float* out);
  /// Adds (w - decoded)^2 and w^2 of element i, fused, to partial sum i % kPanel.
  void (*add_squares)(DType dtype, const std::byte* original, const float* decoded, size_t count,
                      double (&difference)[kPanel], double (&norm)[kPanel]);

  // Training, as fake_quantize.hpp defines it.
  void (*fake_quantize_groups)(const FakeGroups& q, DType type, std::byte* out);
  /// Sums over each group: of what belongs to its scale, and of the gradients of clipped values.
  void (*fake_quantize_gradients)(const FakeGroups& q, DType type, const std::byte* gradient, std::byte* out,
                                  float* scale_sums, float* clipped_sums);
};

std::span<const KernelLevel> kernel_levels();

/// The level called `name`, or the best usable one if it is empty.
/// Throws Error{"unknown-kernel"} naming the usable ones if there is none of this name or this CPU cannot run it.
const KernelLevel& find_kernel_level(std::string_view name);

/// What the environment variable BITWRIGHT_KERNEL asks for, else the best usable. Read once.
const KernelLevel& active_kernel_level();

}  // namespace bitwright
