#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/safetensors.hpp"
#include "container/container.hpp"

namespace bitwright::test {

/// One file of $BITWRIGHT_SHARED/golden/FORMAT: what the owning library wrote, and what it decodes to.
struct GoldenCase {
  std::string name;
  WeightFile file;
  Json params;          ///< __metadata__.params
  std::string backend;  ///< __metadata__.backend
  const StoredArray* find(const std::string& array) const;
  const StoredArray& at(const std::string& array) const;
  std::vector<float> floats(const std::string& array) const;
};
/// The files of a folder, found when the test runs: each is a case, whatever it holds. `needs`: only those that have
/// this array.
std::vector<GoldenCase> golden_cases(const std::string& format, const std::string& needs = "");

/// Two-layer models of a folder: directories with model.safetensors, config.json and reference.safetensors.
std::vector<std::filesystem::path> golden_models(const std::string& format);
/// Opens the model and compares each NAME.dequantized of the reference with what is read as NAME.weight (or NAME),
/// rounded to the reference's dtype. values: how the library itself decodes, where that is not the definition.
void check_model(const std::filesystem::path& model, std::vector<float> (*values)(const QuantizedTensor&) = decode);

/// What the owning library was asked for and refused (`raised`) or took without a word.
struct NegativeCase {
  std::string name, function;
  Json params;
  bool raised;
  std::string message;
};
/// Of the folder's negative_*.json.
std::vector<NegativeCase> negative_cases(const std::string& format);
/// `refuse` must throw Error with one line of explanation.
void check_refused(const std::function<void()>& refuse);

/// Lists `arrays` (renamed to `prefix` + name) through `container` and checks: one tensor; unpack then pack gives the
/// same bytes under the same names. Returns the tensor.
QuantizedTensor check_container(const Container& container, const GoldenCase& c, const std::vector<std::string>& arrays,
                                const std::string& prefix, const Json& config);
/// The same for a view, which must hold one tensor. fit: what is said of writing one like it.
QuantizedTensor check_view(const Container& container, const CheckpointView& view, Verdict fit = Verdict::exact);
/// `decoded`, rounded to the dtype of the case's `dequantized`, must equal it.
void check_values(const GoldenCase& c, std::vector<float> decoded);

/// A bias scheme as MLX decodes it: in the dtype of the scales, rounded after the product and after the sum.
std::vector<float> decode_in_scale_dtype(const QuantizedTensor& t);

}  // namespace bitwright::test
