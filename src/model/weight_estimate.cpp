#include "model/weight_estimate.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "kernels/packed_matrix.hpp"
#include "model/model.hpp"
#include "model/model_config.hpp"

namespace bitwright {
namespace {

bool ends_as(std::string_view name, const std::string& module) {
  const std::string end = module + ".weight";
  return !module.empty() && (name == end || name.ends_with("." + end));
}

/// Where the tensors of this architecture lie; of one that is not known, where most have them.
TensorPlaces places_of(const Json& config) {
  try {
    if (const Architecture* row = find_architecture(config)) return row->configure(config, "config.json").places;
  } catch (const Error&) {  // an estimate needs less than a run: that the configuration lacks something is said there
  }
  return {};
}

bool is_transposed(const TensorPlaces& places, std::string_view name) {
  return std::ranges::any_of(
      std::to_array({&places.q, &places.k, &places.v, &places.o, &places.gate, &places.up, &places.down}),
      [&](const MatrixPlace* place) { return place->transposed && ends_as(name, place->name); });
}

uint64_t plain_bytes(const StoredTensor& t) {
  return static_cast<uint64_t>(element_count(t.shape)) * size_bytes(t.value_dtype);
}

uint64_t bytes_of(const TensorPlaces& places, const StoredTensor& t, bool has_head) {
  if (t.scheme.element == nullptr) return plain_bytes(t);
  if (t.shape.size() < 2) return static_cast<uint64_t>(element_count(t.shape)) * sizeof(float);
  const bool plain = t.scheme.is_plain();
  const bool is_table = (ends_as(t.name, places.embedding) && has_head) || ends_as(t.name, places.positions);
  if (plain && is_table) return plain_bytes(t);
  const bool as_f32 = plain ? size_bytes(t.value_dtype) > sizeof(float) : is_transposed(places, t.name);
  const auto columns = static_cast<size_t>(t.shape.back()), rows = static_cast<size_t>(t.shape[t.shape.size() - 2]);
  uint64_t count = 1;
  for (size_t i = 0; i + 2 < t.shape.size(); ++i) count *= static_cast<uint64_t>(t.shape[i]);
  if (rows == 0 || columns == 0) return 0;
  return count * packed_bytes(as_f32 ? bitwright::plain(DType::f32) : t.scheme, rows, columns);
}

}  // namespace

uint64_t estimated_weight_bytes(const Json& config, std::span<const StoredTensor> tensors) {
  const TensorPlaces places = places_of(config);
  const bool has_head =
      std::ranges::any_of(tensors, [&](const StoredTensor& t) { return ends_as(t.name, places.head); });
  uint64_t sum = 0;
  for (const StoredTensor& tensor : tensors) sum += bytes_of(places, tensor, has_head);
  return sum;
}

}  // namespace bitwright
