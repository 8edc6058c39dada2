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

/// Arrays of the containers that look for any weight without a scale: only of the one that config.json names.
void add_named(Arrays& arrays, std::string_view config) {
  const auto named = [&](std::string_view name) { return config.find(name) != std::string_view::npos; };
  if (named("\"fp8\"") || named("fbgemm")) {
    add(arrays, "f.weight", DType::f8_e4m3, {4, 8});
    add(arrays, "f.weight_scale_inv", DType::f32, {2, 2});
    add(arrays, "g.weight", DType::f8_e4m3, {4, 8});
    add(arrays, "g.weight_scale", DType::f32, {});
    add(arrays, "g.input_scale", DType::f32, {1});
    add(arrays, "h.weight", DType::f8_e4m3, {4, 8});
    add(arrays, "h.weight_scale", DType::f32, {4, 1});
  }
  if (named("modelopt")) {
    add(arrays, "f.weight", DType::f8_e4m3, {4, 32});
    add(arrays, "f.weight_scale", DType::f32, named("CHANNEL") ? Shape{4} : Shape{});
    add(arrays, "f.input_scale", DType::f32, {});
    if (named("MIXED")) {
      add(arrays, "g.weight", DType::u8, {4, 16});
      add(arrays, "g.weight_scale", DType::f8_e4m3, {4, 2});
      add(arrays, "g.weight_scale_2", DType::f32, {});
    }
    add(arrays, "f.k_scale", DType::f32, {});
  }
  if (named("mxfp4")) {
    add(arrays, "e.experts.down_proj_blocks", DType::u8, {2, 3, 1, 16});
    add(arrays, "e.experts.down_proj_scales", DType::u8, {2, 3, 1});
  }
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
  Arrays arrays = make_arrays(lines[2]);
  add_named(arrays, lines[0]);
  std::map<std::string, ArraySpec, std::less<>> specs;
  for (const auto& [name, array] : arrays) specs[name] = array.first;
  try {
    const Json config = parse_json(lines[0], "config"), metadata = parse_json(lines[1], "metadata");
    if (!config.is_object() || !metadata.is_object()) return 0;
    const std::map<std::string, Json, std::less<>> documents = {{"hf_quant_config.json", metadata}};
    const CheckpointView view = {
        .arrays = specs,
        .config = config,
        .quantization_metadata = metadata,
        .documents = &documents,
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
