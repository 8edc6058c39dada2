#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "base/json.hpp"
#include "checkpoint/gguf.hpp"
#include "checkpoint/imatrix.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {

/// How much the columns of a model's matrices count, from a file of calibration statistics. Tensors are known by the
/// names and shapes that GGUF gives them.
class Importance {
 public:
  /// Throws what read_imatrix does.
  explicit Importance(const std::filesystem::path& file);

  /// Are the tensors that `recipe` weights by importance all known? Adds a warning where some are not, or none is
  /// weighted. Throws Error{"bad-imatrix"} where lengths differ or none is known.
  void check(const Recipe& recipe, std::span<const TensorFacts> tensors, std::vector<Warning>& warnings) const;

  /// Of the columns of matrix `index` of a tensor; empty: not known.
  std::vector<float> of(const std::string& tensor, const Shape& shape, int64_t index) const;

  uint64_t memory_bytes() const;
  const std::string& digest() const { return digest_; }  ///< SHA-256 of the file
  OrderedJson to_json() const;
  void add_to(GgufMetadata& metadata) const;  ///< as llama-quantize does

 private:
  [[noreturn]] void fail(const std::string& why) const;
  std::string path_, digest_;
  Imatrix imatrix_;
};

}  // namespace bitwright
