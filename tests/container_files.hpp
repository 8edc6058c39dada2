#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "container/container.hpp"

namespace bitwright::test {

/// A checkpoint's arrays and JSON files in memory.
struct ContainerFiles {
  std::map<std::string, ArraySpec, std::less<>> arrays{};
  std::map<std::string, std::vector<std::byte>> data{};
  std::map<std::string, Json, std::less<>> documents{};
  Json config = Json::object(), metadata = Json::object();

  void add(const ArraySpec& spec, std::vector<std::byte> bytes);
  void add(std::vector<NamedArray> named);
  CheckpointView view() const;  ///< refers to this
};

/// Normal numbers, the same in each run; one is 40 times as large; zero_share of them are 0.
std::vector<float> random_weights(const Shape& shape, float zero_share = 0);
std::vector<std::byte> as_dtype(DType dtype, std::span<const float> values);

/// One tensor as `container` quantizes and stores it, with the configuration it writes.
ContainerFiles written_by(const Container& container, const StoredTensor& tensor, std::span<const float> values);

/// Encoded, packed, listed, unpacked and packed again: every byte, type and shape the same. Returns the tensor.
QuantizedTensor check_round_trip(const Container& container, const StoredTensor& tensor, std::span<const float> values);

/// Rows [begin, end) of the folded tensor, encoded and packed by themselves, are the parts of the whole's arrays where
/// `place` says.
void check_pieces_are_parts(const Container& container, const StoredTensor& whole, std::span<const float> values,
                            int64_t begin, int64_t end);

/// The code of the Error that listing throws, or "none".
std::string code_of_listing(const Container& container, const ContainerFiles& files);

/// Of each array: another type, a dimension more, and its absence are refused with bad-container; so is each pair of
/// arrays swapped, where their types or shapes differ.
void check_damage_is_refused(const Container& container, const ContainerFiles& files);

/// As a directory: each file shorter than the whole is refused.
void check_truncation_is_refused(const ContainerFiles& files);

}  // namespace bitwright::test
