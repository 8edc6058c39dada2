#include "container/stored_arrays.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"

namespace bitwright {
namespace {

constexpr std::string_view kWeight = "weight";

bool is_weight(std::string_view array) { return array == kWeight || array.ends_with(".weight"); }

}  // namespace

bool is_plain_float(DType dtype) { return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16; }

bool is_plain_float(const Scheme& scheme) {
  const auto dtype = scheme.is_plain() ? dtype_of(*scheme.element) : std::nullopt;
  return dtype && is_plain_float(*dtype);
}

DType scale_dtype_of(const SchemeChoice& choice, DType weight) {
  if (choice.scale_dtype != SchemeChoice::kWeightDtype) return dtype_from_name(choice.scale_dtype).value();
  return weight == DType::f32 || weight == DType::bf16 ? weight : DType::f16;
}

std::string layer_of(std::string_view weight) {
  constexpr std::string_view kDotted = ".weight";
  if (weight == kWeight) return {};
  return std::string(weight.ends_with(kDotted) ? weight.substr(0, weight.size() - kDotted.size()) : weight);
}

std::string member(const std::string& layer, std::string_view name) {
  return layer.empty() ? std::string(name) : fmt::format("{}.{}", layer, name);
}

const Json& quantization_config(const CheckpointView& checkpoint) {
  static const Json nothing = Json::object();
  const auto found = checkpoint.config.find("quantization_config");
  return found != checkpoint.config.end() && found->is_object() ? *found : nothing;
}

std::shared_ptr<QuantizedTensor> numbers(const Scheme& scheme, const Shape& shape, std::span<const std::byte> data) {
  return std::make_shared<QuantizedTensor>(
      QuantizedTensor{.scheme = scheme, .shape = shape, .codes = {data.begin(), data.end()}});
}

DType model_dtype(const Json& config, DType otherwise) {
  if (!config.is_object()) return otherwise;
  for (const char* key : {"dtype", "torch_dtype"}) {
    const auto found = config.find(key);
    if (found == config.end() || !found->is_string()) continue;
    const auto dtype = dtype_from_name(found->get_ref<const std::string&>());
    if (dtype && is_plain_float(*dtype)) return *dtype;
  }
  const auto text = config.find("text_config");
  return text != config.end() && text->is_object() ? model_dtype(*text, otherwise) : otherwise;
}

std::vector<std::string> string_list(const Json& object, const char* key) {
  std::vector<std::string> out;
  const Json list = object.is_object() ? object.value(key, Json()) : Json();
  if (list.is_array())
    for (const Json& item : list)
      if (item.is_string()) out.push_back(item.get<std::string>());
  return out;
}

void wrong_array(const CheckpointView& checkpoint, const std::string& tensor, const ArraySpec& found,
                 const ArraySpec& expected) {
  bad_container(checkpoint, tensor,
                fmt::format("array '{}' is {} {}, expected {} {}", printable(found.name), info(found.dtype).name,
                            to_string(found.shape), info(expected.dtype).name, to_string(expected.shape)));
}

void check_stored(const CheckpointView& checkpoint, const std::string& tensor, const ArraySpec& expected) {
  const ArraySpec& found = need_array(checkpoint, tensor, expected.name);
  const auto scalar = [](const Shape& shape) { return shape.empty() || shape == Shape{1}; };
  const bool same = found.shape == expected.shape || (scalar(found.shape) && scalar(expected.shape));
  if (found.dtype != expected.dtype || !same) wrong_array(checkpoint, tensor, found, expected);
}

std::shared_ptr<const QuantizedTensor> static_scale(const CheckpointView& checkpoint, const std::string& tensor,
                                                    const std::string& array) {
  const ArraySpec& spec = need_array(checkpoint, tensor, array);
  if (!is_plain_float(spec.dtype) || element_count(spec.shape) != 1 || spec.shape.size() > 1)
    bad_container(checkpoint, tensor,
                  fmt::format("array '{}' is {} {}, expected one float", printable(array), info(spec.dtype).name,
                              to_string(spec.shape)));
  return numbers(plain(spec.dtype), spec.shape, checkpoint.bytes(array));
}

ArraySpec static_scale_array(const std::string& name, const QuantizedTensor& scale) {
  return {
      .name = name, .dtype = *dtype_of(*scale.scheme.element), .shape = scale.shape, .row_axis = ArraySpec::kNoRows};
}

std::string prefix_of_weight(const std::string& weight) {
  BW_ASSERT(is_weight(weight));
  return weight.substr(0, weight.size() - kWeight.size());
}

void check_no_weight_is_left(const CheckpointView& checkpoint, std::span<const StoredTensor> tensors,
                             std::span<const DType> dtypes) {
  std::set<std::string_view> listed;
  for (const StoredTensor& t : tensors) listed.insert(t.name);
  for (const auto& [array, spec] : checkpoint.arrays)
    if (is_weight(array) && std::ranges::find(dtypes, spec.dtype) != dtypes.end() && !listed.contains(array))
      bad_container(checkpoint, array, fmt::format("it is {}, and no scale is stored", info(spec.dtype).name));
}

}  // namespace bitwright
