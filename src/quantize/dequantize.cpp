#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/output.hpp"
#include "base/progress.hpp"
#include "base/threads.hpp"
#include "checkpoint/safetensors.hpp"
#include "quantize/model_files.hpp"
#include "quantize/quantize.hpp"

namespace bitwright {
namespace {

bool becomes_float(const TensorEntry& entry) { return entry.quantized() || info(entry.dtype).is_float; }

/// Damaged weights, and weights too large for the type asked for, do not leave unnoticed.
void check_finite(const std::string& name, DType dtype, std::span<const std::byte> bytes) {
  std::vector<float> stored(bytes.size() / size_bytes(dtype));
  to_f32(dtype, bytes, stored);
  const auto bad = std::ranges::find_if(stored, [](float value) { return !std::isfinite(value); });
  if (bad == stored.end()) return;
  throw Error({.code = "not-finite",
               .what = "cannot dequantize",
               .where = fmt::format("tensor '{}'", printable(name)),
               .why = fmt::format("element {} would be {} as {}", bad - stored.begin(), *bad, info(dtype).name),
               .fix = "the weights are damaged, or too large for the type: try --dtype float32"});
}

void write_weights(const Checkpoint& source, const std::filesystem::path& path, DType dtype) {
  std::vector<ArraySpec> specs;
  uint64_t total = 0;
  for (const TensorEntry& entry : source.tensors()) {
    specs.push_back({entry.name, becomes_float(entry) ? dtype : entry.dtype, entry.shape});
    total += specs.back().bytes();
  }
  Progress progress("dequantizing", total);
  SafetensorsWriter writer(path, specs);
  std::vector<std::byte> bytes;
  for (size_t i = 0; i < specs.size(); ++i) {
    throw_if_interrupted();
    const TensorEntry& entry = source.tensors()[i];
    if (becomes_float(entry)) {
      const std::vector<float> values = source.read_f32(entry);
      bytes.resize(specs[i].bytes());
      from_f32(dtype, values, bytes);
      check_finite(entry.name, dtype, bytes);
      writer.add(bytes);
    } else {
      bytes.resize(entry.stored_bytes);
      source.read_bytes(entry, 0, bytes);
      writer.add(bytes);
    }
    progress.advance(specs[i].bytes());
  }
  writer.finish();
}

}  // namespace

OrderedJson dequantize(const Checkpoint& source, const std::filesystem::path& output, DType dtype, bool force) {
  check_apart(source, output);
  for (const TensorEntry& entry : source.tensors()) source.require_decoded(entry);
  OutputDirectory directory(output, force);
  write_weights(source, directory.staging() / "model.safetensors", dtype);
  OrderedJson config = read_config(source);
  config.erase("quantization_config");
  config.erase("quantization");  // MLX
  for (const char* key : {"torch_dtype", "dtype"})
    if (config.contains(key)) config[key] = info(dtype).name;
  write_text_file(directory.staging() / "config.json", config.dump(2) + "\n");
  copy_side_files(source, directory.staging());
  const uint64_t bytes = std::filesystem::file_size(directory.staging() / "model.safetensors");
  directory.commit();
  return {{"output", output.string()}, {"dtype", info(dtype).name}, {"bytes", bytes}};
}

}  // namespace bitwright
