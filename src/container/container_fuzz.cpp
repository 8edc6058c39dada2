// Three lines: config.json, quantization_metadata.json, a bitsandbytes quant_state; against a fixed set of arrays.
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.hpp"
#include "container/container.hpp"

namespace {

using namespace bitwright;

using Arrays = std::map<std::string, std::pair<ArraySpec, std::vector<std::byte>>>;

void add(Arrays& arrays, const std::string& name, DType dtype, const Shape& shape) {
  const ArraySpec spec = {name, dtype, shape};
  arrays[name] = {spec, std::vector<std::byte>(spec.bytes(), std::byte{1})};
}

void set_table(Arrays& arrays, const std::string& name, const ElementType& type) {
  for (uint32_t code = 0; code < 1u << type.bits; ++code) {
    const float value = type.decode(type, code);
    from_f32(DType::f32, std::span(&value, 1), std::span(arrays[name].second).subspan(4 * code, 4));
  }
}

Arrays make_arrays(const std::string& state) {
  Arrays arrays;
  add(arrays, "n.codes", DType::u8, {2, 32});
  add(arrays, "n.scales", DType::f16, {2, 2});
  add(arrays, "n.zeros", DType::u8, {2, 1});
  add(arrays, "m.weight", DType::u32, {2, 8});
  add(arrays, "m.scales", DType::bf16, {2, 2});
  add(arrays, "m.biases", DType::bf16, {2, 2});
  for (const char* layer : {"x", "y", "z"}) {  // of MLX: mxfp4 and mxfp8, nvfp4, nvfp4 under a global scale
    const std::string name = layer;
    add(arrays, name + ".weight", DType::u32, {2, 8});
    add(arrays, name + ".scales", DType::u8, {2, name == "x" ? 2 : 4});
  }
  add(arrays, "z.global_scale", DType::f32, {});
  add(arrays, "b", DType::u8, {64, 1});
  add(arrays, "b.absmax", DType::f32, {2});
  add(arrays, "b.quant_map", DType::f32, {16});
  set_table(arrays, "b.quant_map", *find_element("nf4"));
  add(arrays, "b.quant_state.bitsandbytes__nf4", DType::u8, {static_cast<int64_t>(state.size())});
  // b and c (nested) have one state, whatever its text says.
  add(arrays, "c", DType::u8, {64, 1});
  add(arrays, "c.absmax", DType::u8, {2});
  add(arrays, "c.nested_absmax", DType::f32, {1});
  add(arrays, "c.nested_quant_map", DType::f32, {256});
  set_table(arrays, "c.nested_quant_map", *find_element("dynamic8"));
  arrays["c.quant_map"] = arrays["b.quant_map"];
  arrays["c.quant_map"].first.name = "c.quant_map";
  add(arrays, "i.weight", DType::i8, {2, 8});
  add(arrays, "i.SCB", DType::f32, {2});
  const auto bytes = std::as_bytes(std::span(state));
  add(arrays, "c.quant_state.bitsandbytes__nf4", DType::u8, {static_cast<int64_t>(state.size())});
  arrays["c.quant_state.bitsandbytes__nf4"].second.assign(bytes.begin(), bytes.end());
  arrays["b.quant_state.bitsandbytes__nf4"].second.assign(bytes.begin(), bytes.end());
  return arrays;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string lines[3];
  for (size_t i = 0, line = 0; i < size && line < 3; ++i) {
    if (data[i] == '\n')
      ++line;
    else
      lines[line] += static_cast<char>(data[i]);
  }
  const Arrays arrays = make_arrays(lines[2]);
  std::map<std::string, ArraySpec, std::less<>> specs;
  for (const auto& [name, array] : arrays) specs[name] = array.first;
  try {
    const Json config = parse_json(lines[0], "config"), metadata = parse_json(lines[1], "metadata");
    if (!config.is_object() || !metadata.is_object()) return 0;
    const CheckpointView view = {
        .arrays = specs,
        .config = config,
        .quantization_metadata = metadata,
        .bytes = [&](const std::string& name) { return std::span<const std::byte>(arrays.at(name).second); },
        .where = "fuzz"};
    for (const Container* container : all_containers()) {
      try {
        if (!container->detect(view)) continue;
        if (container->model != nullptr) container->model(view);
        for (const StoredTensor& tensor : container->list(view)) {
          const QuantizedTensor t = container->unpack(tensor, view);
          check_sizes(t, "fuzz");
          decode(t);
        }
      } catch (const Error&) {
      }
    }
  } catch (const Error&) {
  }
  return 0;
}
