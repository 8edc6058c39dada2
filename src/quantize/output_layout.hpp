#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "checkpoint/safetensors.hpp"
#include "container/container.hpp"
#include "quantize/stream.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {

/// What `quantize` writes, known from the headers of the source alone. quantize works it off and plan shows it, so what
/// is foretold is what is written.
struct OutputLayout {
  Recipe recipe;                               ///< a row for each tensor of the source
  std::vector<std::vector<ArraySpec>> arrays;  ///< of each tensor
  ShardPlan shards;
};
/// Of a source whose tensors have the names of the file that is written.
struct ForeignNames {
  const std::map<std::string, std::string>& names;  ///< the model's name for each, by which patterns know it
  TensorRole role;                                  ///< what is the same for all
};
/// As patterns know them.
std::vector<TensorFacts> renamed(std::span<const TensorFacts> source, const ForeignNames& foreign);
/// Throws what resolve does, Error{"does-not-fit"} where the container cannot hold a scheme, and Error{"name-clash"}.
OutputLayout lay_out(std::span<const TensorFacts> source, const QuantizationRequest& request,
                     const Container& container, uint64_t max_shard_bytes, const ForeignNames* names = nullptr);

/// The same of a recipe that is known.
OutputLayout lay_out(std::span<const TensorFacts> source, Recipe recipe, const Container& container,
                     uint64_t max_shard_bytes);

/// Can the container hold this tensor as `stored`? Asked of the tensor alone, not of the model.
Fit fit_of(const TensorFacts& tensor, const StoredTensor& stored, const Container& container);

/// The arrays of rows [rows.begin, rows.end) of `whole`, packed, and where they belong in its arrays `specs`.
std::vector<Slice> packed_rows(const Container& container, const StoredTensor& whole, std::span<const ArraySpec> specs,
                               RowRange rows, const QuantizedTensor& values);

/// What belongs beside the weights, by name: config.json, which `config` becomes, and further JSON files. record: as
/// WrittenModel has it. Throws Error where the container cannot describe such a model.
std::map<std::string, OrderedJson> metadata_of(std::span<const TensorFacts> source, const Recipe& recipe,
                                               const Container& container, OrderedJson config,
                                               const OrderedJson& record);

/// Will the container store the transpose of this tensor of the source, where it is quantized?
bool is_stored_transposed(const TensorFacts& tensor, const Container& container);

/// A tensor of the source as it will be stored. Needs plan.scheme.
StoredTensor stored_tensor(const TensorFacts& tensor, const TensorPlan& plan, const Container& container);

/// What a recipe needs to know of the tensors; shapes as the model has them.
std::vector<TensorFacts> facts_of(const Checkpoint& source);

}  // namespace bitwright
