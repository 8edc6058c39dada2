#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "kernels/packed_matrix.hpp"

namespace bitwright {

/// The tensor called `name`. Throws Error{"missing-tensor"}, {"wrong-shape"} naming it and both shapes.
const TensorEntry& require_tensor(const Checkpoint& checkpoint, const std::string& name, const Shape& shape);
/// Throws Error{"unsupported-tensor"} if a tensor of that name is there: to leave it out would change the result.
void refuse_tensor(const Checkpoint& checkpoint, const std::string& name);

PackedMatrix load_matrix(const Checkpoint& checkpoint, const std::string& name, int64_t rows, int64_t columns);
std::vector<float> load_vector(const Checkpoint& checkpoint, const std::string& name, int64_t size);

/// A matrix from which single rows are read. Plain floats stay in the mapped file.
class RowSource {
 public:
  RowSource(const Checkpoint& checkpoint, const std::string& name, int64_t rows, int64_t columns);
  /// out: one row.
  void read(size_t row, std::span<float> out) const;
  /// The whole matrix for products: what is packed already where it is quantized.
  const PackedMatrix& packed();

 private:
  DType dtype_ = DType::f32;
  std::span<const std::byte> bytes_;  ///< of plain floats
  size_t rows_, columns_;
  std::optional<PackedMatrix> packed_;
};

}  // namespace bitwright
