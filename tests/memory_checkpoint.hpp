#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "checkpoint/safetensors.hpp"
#include "container/container.hpp"
#include "container/rows.hpp"
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

/// The bytes of a piece's array, where they belong in those of the whole.
template <class Move>
void for_each_run(const Placement& at, const Move& move) {
  for (uint64_t r = 0; r < at.runs; ++r) move(at.offset + r * at.stride, r * at.run, at.run);
}

/// Quantizing, packing and reading back by pieces of `step` rows must be the same as all at once: this is what makes
/// streaming exact.
inline void check_pieces(const Container& container, const StoredTensor& whole, WeightView weight, int64_t step) {
  const int64_t rows = row_count(whole.shape);
  const auto row_bytes = static_cast<size_t>(whole.shape.back()) * size_bytes(weight.dtype);
  const QuantizedTensor all = container.encode(whole.scheme, whole.shape, weight);
  const std::vector<NamedArray> expected = container.pack(whole, all);
  MemoryCheckpoint placed = written_model(container, whole, all);
  for (auto& [name, bytes] : placed.data) bytes.assign(bytes.size(), std::byte{0});
  for (int64_t begin = 0; begin < rows; begin += step) {
    const StoredTensor piece = rows_of(whole, begin, std::min(rows, begin + step));
    const auto bytes =
        weight.bytes.subspan(static_cast<size_t>(begin) * row_bytes, static_cast<size_t>(piece.shape[0]) * row_bytes);
    const std::vector<ArraySpec> before = container.layout(rows_of(whole, 0, begin));
    size_t a = 0;
    for (const NamedArray& array :
         container.pack(piece, container.encode(whole.scheme, piece.shape, {weight.dtype, bytes}))) {
      std::vector<std::byte>& to = placed.data.at(array.spec.name);
      for_each_run(place(expected[a].spec, before[a], array.spec),
                   [&](uint64_t in_whole, uint64_t in_piece, uint64_t n) {
                     std::memcpy(&to[in_whole], &array.data[in_piece], n);
                   });
      ++a;
    }
  }
  for (const NamedArray& array : expected)
    EXPECT_TRUE(placed.data.at(array.spec.name) == array.data) << array.spec.name;

  const StoredTensor read = container.list(placed.view()).at(0);
  std::vector<std::byte> codes;
  for (int64_t begin = 0; begin < rows; begin += step) {
    const StoredTensor piece = rows_of(read, begin, std::min(rows, begin + step));
    const std::vector<ArraySpec> before = container.layout(rows_of(read, 0, begin)), wanted = container.layout(piece);
    MemoryCheckpoint part;
    for (size_t a = 0; a < wanted.size(); ++a) {
      std::vector<std::byte> bytes(wanted[a].bytes());
      const std::vector<std::byte>& from = placed.data.at(wanted[a].name);
      for_each_run(
          place(expected[a].spec, before[a], wanted[a]),
          [&](uint64_t in_whole, uint64_t in_piece, uint64_t n) { std::memcpy(&bytes[in_piece], &from[in_whole], n); });
      part.add(wanted[a], std::move(bytes));
    }
    const QuantizedTensor t = container.unpack(piece, part.view());
    check_sizes(t, "piece");
    codes.insert(codes.end(), t.codes.begin(), t.codes.end());
  }
  EXPECT_TRUE(codes == all.codes);
}

}  // namespace bitwright::test
