#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "container/container.hpp"
#include "quantize/arranged.hpp"
#include "quantize/output_layout.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {

/// What a conversion costs a tensor; the later, the more.
enum class ConversionVerdict : uint8_t {
  exact,        ///< equal values
  bounded,      ///< every code stays what it is; scales and offsets are rounded
  requantized,  ///< rounded to another grid
  impossible,
};
std::string_view name_of(ConversionVerdict verdict);

/// How far two tensors' values are from each other; NaN is equal to NaN. Infinite where only one of two is NaN.
double max_abs_difference(const QuantizedTensor& a, const QuantizedTensor& b);
double max_abs_difference(std::span<const float> values, const QuantizedTensor& b);

struct ConversionRequest {
  const Container* container = nullptr;
  bool exact = false;                  ///< scales may take f32 to be exact
  bool requantize = false;             ///< what has no place on the target's grid
  std::optional<DType> scale_dtype{};  ///< of integers' scales and offsets, where the container leaves it open
  std::string method{};                ///< of what is requantized, as `quantize` has it; empty: as many bits as now
};

/// What becomes of one tensor.
struct TensorConversion {
  ConversionVerdict verdict = ConversionVerdict::exact;
  bool turned = false;  ///< the target stores the transpose of what the source stores
  TensorPlan plan;      ///< no scheme: it is plain and copied, or nothing can be done; an algorithm: requantized
  std::optional<DType> floats{};               ///< it was quantized and its owner will have it in floats
  std::optional<double> max_abs_difference{};  ///< of its values from what they were; of requantized ones found later
  std::string reason{};                        ///< why it is impossible or requantized
};

/// For each tensor of a quantized model the cheapest way the container holds it that changes nothing, else as little as
/// can be. Found by making it, piece by piece: verdicts are facts. names: of a container whose names are its own.
/// Throws Error{"not-quantized"}.
std::vector<TensorConversion> plan_conversion(const Arranged& source, const ConversionRequest& request,
                                              const ForeignNames* names, std::optional<uint64_t> most_memory);

}  // namespace bitwright
