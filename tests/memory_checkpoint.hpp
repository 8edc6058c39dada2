#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "container/container.hpp"

namespace bitwright::test {

/// A checkpoint's arrays and JSON files as they lie on disk, to be listed or damaged.
struct MemoryCheckpoint {
  std::map<std::string, ArraySpec, std::less<>> arrays{};
  std::map<std::string, std::vector<std::byte>> data{};
  Json config = Json::object(), metadata = Json::object();
  std::map<std::string, Json, std::less<>> documents{};

  MemoryCheckpoint() = default;
  explicit MemoryCheckpoint(std::vector<NamedArray> named);
  void add(const ArraySpec& spec, std::vector<std::byte> bytes);
  CheckpointView view() const;                               ///< refers to this
  void write(const std::filesystem::path& directory) const;  ///< as a model directory
};

/// Normal numbers, the same in each run; one is 40 times as large; zero_share of them are 0.
std::vector<float> random_values(const Shape& shape, float zero_share = 0);
std::vector<std::byte> as_dtype(DType dtype, std::span<const float> values);
/// As the container's owner rounds it; as scheme/ does where the container has no rounding of its own.
QuantizedTensor encoded(const Container& container, const StoredTensor& tensor, std::span<const float> values);

/// The arrays of one tensor, with what its container writes beside them.
MemoryCheckpoint written_model(const Container& container, const StoredTensor& tensor, const QuantizedTensor& values);
/// The same of values that are encoded first.
MemoryCheckpoint written_by(const Container& container, const StoredTensor& tensor, std::span<const float> values);

/// Written, detected as this container's and no other's, listed and unpacked to the same tensor, and written again to
/// the same bytes, types, shapes and JSON.
void check_comes_back(const Container& container, const StoredTensor& tensor, const QuantizedTensor& values);

/// Quantizing, packing and reading back by pieces of `step` rows must be the same as all at once: this is what makes
/// streaming exact.
void check_pieces(const Container& container, const StoredTensor& whole, WeightView weight, int64_t step);

/// What was damaged is refused by one line, or it is understood: packed again it has the same arrays and
/// means the same.
void check_refused_or_understood(const MemoryCheckpoint& damaged);
/// Arrays of other types and sizes, exchanged, missing; of one tensor.
void check_damage(const Container& container, const MemoryCheckpoint& files);
/// Each value of what is said beside the arrays missing, or another.
void check_damaged_json(const MemoryCheckpoint& files);

/// The code of the Error that listing throws, or "none".
std::string code_of_listing(const Container& container, const MemoryCheckpoint& files);

}  // namespace bitwright::test
