// Four lines: config.json, quantization_metadata.json (hf_quant_config.json too), a bitsandbytes quant_state or numbers
// for GPTQ's g_idx, {"values": HQQ's facts of layer h as a pickle has them, "map": quanto_qmap.json}; against fixed
// sets of arrays.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
  add(arrays, "n.input.scales", DType::f32, {1});
  add(arrays, "n.input.zeros", DType::i8, {1});
  add(arrays, "m.weight", DType::u32, {2, 8});
  add(arrays, "m.scales", DType::bf16, {2, 2});
  add(arrays, "m.biases", DType::bf16, {2, 2});
  // Of MLX: mxfp8, mxfp4, nvfp4, nvfp4 under a global scale.
  for (const auto& [name, groups] : std::map<std::string, int64_t>{{"u", 1}, {"x", 2}, {"y", 4}, {"z", 4}}) {
    add(arrays, name + ".weight", DType::u32, {2, 8});
    add(arrays, name + ".scales", DType::u8, {2, groups});
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

/// Layers of the two kinds whose arrays have the same names: 64 x 32 in groups of 16.
Arrays make_gptq(const std::string& indices) {
  constexpr int64_t kRows = 64, kColumns = 32, kGroups = 2, kZeros = 8;
  Arrays arrays;
  add(arrays, "g.qweight", DType::i32, {kColumns / 8, kRows});
  add(arrays, "g.qzeros", DType::i32, {kGroups, kZeros});
  add(arrays, "g.scales", DType::f16, {kGroups, kRows});
  add(arrays, "g.g_idx", DType::i32, {kColumns});
  for (size_t k = 0; k < kColumns; ++k) {  // now and then beyond the last group, or negative
    const char c = k < indices.size() ? indices[k] : k < kColumns / 2 ? '0' : '1';
    const int32_t group = c - '0';
    std::memcpy(&arrays["g.g_idx"].second[k * sizeof group], &group, sizeof group);
  }
  return arrays;
}
Arrays make_awq(bool gemv) {
  Arrays arrays;
  add(arrays, "a.qweight", DType::i32, {64, 8});
  add(arrays, "a.qzeros", DType::i32, gemv ? Shape{64, 4} : Shape{2, 8});
  add(arrays, "a.scales", DType::f16, gemv ? Shape{64, 32} : Shape{2, 64});
  return arrays;
}

/// Modules w (packed, with zero points), v (fp4), f (fp8) and x (int8) by one configuration.
Arrays make_compressed_tensors() {
  Arrays arrays;
  add(arrays, "w.weight_packed", DType::i32, {2, 8});
  add(arrays, "w.weight_scale", DType::bf16, {2, 2});
  add(arrays, "w.weight_zero_point", DType::i32, {1, 2});
  add(arrays, "w.weight_shape", DType::i64, {2});
  add(arrays, "w.weight_g_idx", DType::i32, {64});
  arrays["w.weight_shape"].second.assign(16, std::byte{0});
  arrays["w.weight_shape"].second[0] = std::byte{2};
  arrays["w.weight_shape"].second[8] = std::byte{64};
  arrays["w.weight_g_idx"].second.assign(256, std::byte{0});
  add(arrays, "v.weight_packed", DType::u8, {2, 16});
  add(arrays, "v.weight_scale", DType::f8_e4m3, {2, 2});
  add(arrays, "v.weight_global_scale", DType::f32, {1});
  add(arrays, "f.weight", DType::f8_e4m3, {2, 8});
  add(arrays, "f.weight_scale", DType::f32, {1});
  add(arrays, "f.input_scale", DType::f32, {1});
  add(arrays, "x.weight", DType::i8, {2, 8});
  add(arrays, "x.weight_scale", DType::f32, {2, 1});
  add(arrays, "x.k_scale", DType::f32, {1});
  return arrays;
}

/// By tensor, by row, by block.
Arrays make_fp8() {
  Arrays arrays;
  add(arrays, "f.weight", DType::f8_e4m3, {4, 8});
  add(arrays, "f.weight_scale_inv", DType::f32, {2, 2});
  add(arrays, "g.weight", DType::f8_e4m3, {4, 8});
  add(arrays, "g.weight_scale", DType::f32, {});
  add(arrays, "g.input_scale", DType::f32, {1});
  add(arrays, "h.weight", DType::f8_e4m3, {4, 8});
  add(arrays, "h.weight_scale", DType::f32, {4, 1});
  return arrays;
}

Arrays make_modelopt(bool by_row, bool mixed) {
  Arrays arrays;
  add(arrays, "f.weight", DType::f8_e4m3, {4, 32});
  add(arrays, "f.weight_scale", DType::f32, by_row ? Shape{4} : Shape{});
  add(arrays, "f.input_scale", DType::f32, {});
  add(arrays, "f.k_scale", DType::f32, {});
  if (!mixed) return arrays;
  add(arrays, "g.weight", DType::u8, {4, 16});
  add(arrays, "g.weight_scale", DType::f8_e4m3, {4, 2});
  add(arrays, "g.weight_scale_2", DType::f32, {});
  return arrays;
}

Arrays make_mxfp4() {
  Arrays arrays;
  add(arrays, "e.experts.down_proj_blocks", DType::u8, {2, 3, 1, 16});
  add(arrays, "e.experts.down_proj_scales", DType::u8, {2, 3, 1});
  return arrays;
}

Arrays make_hqq_and_quanto() {
  Arrays arrays;
  add(arrays, "h.W_q", DType::u8, {2, 8});
  add(arrays, "h.scale", DType::f16, {4, 1});
  add(arrays, "h.zero", DType::f16, {4, 1});
  add(arrays, "q.weight._data._data", DType::u8, {2, 32});
  add(arrays, "q.weight._scale", DType::bf16, {4, 1});
  add(arrays, "q.weight._shift", DType::bf16, {4, 1});
  add(arrays, "q.input_scale", DType::bf16, {});
  add(arrays, "r.weight._data", DType::i8, {2, 8});
  add(arrays, "r.weight._scale", DType::f32, {2, 1});
  return arrays;
}

/// As a GGUF file may have them under any name: blocks, which other containers must not take for bytes.
Arrays in_blocks(Arrays arrays) {
  static constexpr BlockType kQ4 = {.name = "Q4_0", .elements = 32, .bytes = 18};
  for (auto& [name, array] : arrays) {
    auto& [spec, bytes] = array;
    if (spec.dtype != DType::u8 || element_count(spec.shape) % kQ4.elements != 0) continue;
    if (spec.shape.back() % kQ4.elements != 0) spec.shape = {element_count(spec.shape)};  // rows of whole blocks
    spec.block = &kQ4;
    bytes = std::vector<std::byte>(spec.bytes(), std::byte{1});  // of its own size: reading past its end is seen
  }
  return arrays;
}

/// What is said beside the weights.
struct Said {
  Json config, metadata, values = Json::object();
  std::map<std::string, Json, std::less<>> documents;
};
Said parse(const std::string& config, const std::string& metadata, const std::string& more) {
  Said said = {.config = parse_json(config, "config"), .metadata = parse_json(metadata, "metadata"), .documents = {}};
  said.documents["hf_quant_config.json"] = said.metadata;
  if (more.empty()) return said;
  const Json both = parse_json(more, "more");
  if (!both.is_object()) return said;
  if (both.contains("values")) said.values = both["values"];
  if (both.contains("map")) said.documents["quanto_qmap.json"] = both["map"];
  return said;
}
bool are_objects(const Said& said) {
  return said.config.is_object() && said.metadata.is_object() && said.values.is_object() &&
         std::ranges::all_of(said.documents, [](const auto& document) { return document.second.is_object(); });
}

void read_all(const Arrays& arrays, const Said& said) {
  std::map<std::string, ArraySpec, std::less<>> specs;
  for (const auto& [name, array] : arrays) specs[name] = array.first;
  const CheckpointView view = {
      .arrays = specs,
      .config = said.config,
      .quantization_metadata = said.metadata,
      .documents = &said.documents,
      .values = &said.values,
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
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string lines[4];
  for (size_t i = 0, line = 0; i < size && line < 4; ++i) {
    if (data[i] == '\n')
      ++line;
    else
      lines[line] += static_cast<char>(data[i]);
  }
  try {
    const Said said = parse(lines[0], lines[1], lines[3]);
    if (!are_objects(said)) return 0;
    for (const Arrays& arrays :
         {make_arrays(lines[2]), in_blocks(make_arrays(lines[2])), in_blocks(make_compressed_tensors()),
          in_blocks(make_hqq_and_quanto()), in_blocks(make_mxfp4()), make_gptq(lines[2]), make_awq(false),
          make_awq(true), make_compressed_tensors(), make_fp8(), make_modelopt(false, false),
          make_modelopt(true, false), make_modelopt(false, true), make_mxfp4(), make_hqq_and_quanto()})
      read_all(arrays, said);
  } catch (const Error&) {
  }
  return 0;
}
