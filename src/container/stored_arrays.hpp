#pragma once

#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "container/container.hpp"

namespace bitwright {

// What containers of plain arrays beside config.json do alike.

/// A list of arrays without a copy of their bytes, as a list in braces would be.
template <size_t count>
std::vector<NamedArray> moved(NamedArray (&&arrays)[count]) {
  return {std::make_move_iterator(std::begin(arrays)), std::make_move_iterator(std::end(arrays))};
}
/// float32, float16 or bfloat16.
bool is_plain_float(DType dtype);
bool is_plain_float(const Scheme& scheme);

/// The type of a choice's scales: the named one, else the weight's own (float16 where that is none of the three).
DType scale_dtype_of(const SchemeChoice& choice, DType weight);

/// "model.layers.0.mlp.up_proj" of a layer's "model.layers.0.mlp.up_proj.weight"; empty of "weight".
std::string layer_of(std::string_view weight);
/// "LAYER.NAME", or NAME of the layer without a name.
std::string member(const std::string& layer, std::string_view name);

/// A parameter as it is stored.
std::shared_ptr<QuantizedTensor> numbers(const Scheme& scheme, const Shape& shape, std::span<const std::byte> data);

/// config.json's quantization_config, or an empty object.
const Json& quantization_config(const CheckpointView& checkpoint);

/// The float type that the model's weights stand for: config.json's `dtype` or `torch_dtype` (its text_config's, too);
/// `otherwise` where it names none.
DType model_dtype(const Json& config, DType otherwise = DType::bf16);

/// The strings of a list that may be there.
std::vector<std::string> string_list(const Json& object, const char* key);

/// bad_container: the array is not as expected.
[[noreturn]] void wrong_array(const CheckpointView& checkpoint, const std::string& tensor, const ArraySpec& found,
                              const ArraySpec& expected);
/// bad_container unless the array is there with this type and shape; [] and [1] are one shape.
void check_stored(const CheckpointView& checkpoint, const std::string& tensor, const ArraySpec& expected);

/// One float16, bfloat16 or float32 that was calibrated for activations; as stored. Or bad_container.
std::shared_ptr<const QuantizedTensor> static_scale(const CheckpointView& checkpoint, const std::string& tensor,
                                                    const std::string& array);
/// Its array.
ArraySpec static_scale_array(const std::string& name, const QuantizedTensor& scale);

/// "model.layers.0.mlp." of a layer's "model.layers.0.mlp.weight".
std::string prefix_of_weight(const std::string& weight);

/// Names of weights of quantized type ("….weight" of these types) that none of `tensors` is: their scales are missing.
/// bad_container for the first of them.
void check_no_weight_is_left(const CheckpointView& checkpoint, std::span<const StoredTensor> tensors,
                             std::span<const DType> dtypes);

}  // namespace bitwright
