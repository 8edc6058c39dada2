#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "checkpoint/safetensors.hpp"
#include "container/container.hpp"
#include "tests/support.hpp"

namespace bitwright::test {

/// Arrays as they lie in a file, to be listed or damaged.
struct MemoryCheckpoint {
  std::map<std::string, ArraySpec, std::less<>> arrays{};
  std::map<std::string, std::vector<std::byte>> data{};
  Json config = Json::object(), metadata = Json::object();
  std::map<std::string, Json, std::less<>> documents{};

  MemoryCheckpoint() = default;
  explicit MemoryCheckpoint(std::vector<NamedArray> named) {
    for (NamedArray& array : named) add(array.spec, std::move(array.data));
  }
  void add(const ArraySpec& spec, std::vector<std::byte> bytes) {
    arrays[spec.name] = spec;
    data[spec.name] = std::move(bytes);
  }
  CheckpointView view() const {
    return {.arrays = arrays,
            .config = config,
            .quantization_metadata = metadata,
            .documents = &documents,
            .bytes = [this](const std::string& name) { return std::span<const std::byte>(data.at(name)); },
            .where = "memory"};
  }
  /// As a model directory.
  void write(const std::filesystem::path& directory) const {
    write_file(directory / "config.json", config.dump());
    for (const auto& [name, json] : documents) write_file(directory / name, json.dump());
    std::vector<ArraySpec> specs;
    for (const auto& [name, spec] : arrays) specs.push_back(spec);
    SafetensorsWriter writer(directory / "model.safetensors", specs);
    for (const auto& [name, spec] : arrays) writer.add(data.at(name));
    writer.finish();
  }
};

/// The arrays of one tensor, with what its container writes beside them.
inline MemoryCheckpoint written_model(const Container& container, const StoredTensor& tensor,
                                      const QuantizedTensor& values) {
  MemoryCheckpoint files(container.pack(tensor, values));
  OrderedJson config = OrderedJson::object();
  const OrderedJson record = OrderedJson::object();
  std::map<std::string, OrderedJson> others;
  container.write_metadata({.tensors = std::span(&tensor, 1), .kept = {}, .record = record},
                           {.config = config, .files = others});
  files.config = Json::parse(config.dump());
  for (const auto& [name, json] : others) files.documents[name] = Json::parse(json.dump());
  return files;
}

/// Normally distributed, with an outlier; a share of them 0.
inline std::vector<float> random_values(const Shape& shape, float zero_share = 0) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> values(static_cast<size_t>(element_count(shape)));
  for (float& value : values) value = uniform(random) < zero_share ? 0.0f : normal(random);
  if (!values.empty() && zero_share < 1) values[values.size() / 2] *= 40;
  return values;
}

inline std::vector<std::byte> as_dtype(DType dtype, std::span<const float> values) {
  std::vector<std::byte> bytes(values.size() * size_bytes(dtype));
  from_f32(dtype, values, bytes);
  return bytes;
}

}  // namespace bitwright::test
