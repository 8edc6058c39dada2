#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
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

}  // namespace bitwright::test
