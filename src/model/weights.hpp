#pragma once

#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "kernels/activation.hpp"
#include "kernels/packed_matrix.hpp"
#include "model/lora_adapter.hpp"
#include "model/model.hpp"

namespace bitwright {

/// y = W x + b, and B A x where an adapter has learned that.
struct Linear {
  PackedMatrix weight;
  std::vector<float> bias{};  ///< empty: none
  /// Where the checkpoint quantizes x or y too, what does. Schemes that it does not know stay in floats.
  std::optional<ActivationQuantizer> input{}, output{};
  MatrixName name{};
  struct LowRank {
    PackedMatrix a, b;
  };
  std::optional<LowRank> adapter{};
  uint64_t bytes() const {
    const uint64_t adapted = adapter ? adapter->a.stored_bytes() + adapter->b.stored_bytes() : 0;
    return weight.stored_bytes() + bias.size() * sizeof(float) + adapted;
  }
};

/// A matrix from which single rows are read. Plain floats stay in the mapped file.
class RowSource {
 public:
  /// out: one row.
  void read(size_t row, std::span<float> out) const;
  /// The whole matrix for products: what is packed already where it is quantized.
  const PackedMatrix& packed();
  uint64_t bytes() const { return packed_ ? packed_->stored_bytes() : bytes_.size(); }

 private:
  friend class WeightReader;
  DType dtype_ = DType::f32;
  std::span<const std::byte> bytes_{};  ///< of plain floats
  size_t rows_ = 0, columns_ = 0;
  std::optional<PackedMatrix> packed_{};
};

/// The tensors of one model by the names that its architecture gives them, whatever prefix the checkpoint has before
/// them. Floats of 16 and 32 bits are packed as they are stored, quantized tensors stay quantized; only what neither
/// kernels nor schemes can express (f64, quantized matrices that are stored transposed, groups across the rows of a
/// fused matrix) becomes f32. Everything throws Error{"missing-tensor"}, {"wrong-shape"} naming the tensor and both
/// shapes, or {"unsupported-tensor"}.
class WeightReader {
 public:
  /// adapter: of the checkpoint's model, or null.
  WeightReader(const Checkpoint& checkpoint, const TensorPlaces& places, const LoraAdapter* adapter = nullptr);

  /// NAME.weight (and NAME.bias), `rows` x `columns` of it, below the prefix.
  Linear linear(const std::string& base, const MatrixPlace& place, int64_t rows, int64_t columns);
  /// Matrix `index` of a tensor [count, stored rows, columns]: `rows` of it from `first` on.
  Linear of_stack(const std::string& name, int64_t index, const Shape& shape, int64_t first, int64_t rows);
  std::vector<float> vector(const std::string& name, int64_t size);
  RowSource rows(const std::string& name, int64_t rows, int64_t columns);
  /// The output matrix, if one is stored; its prefix may be another one.
  std::optional<Linear> head(int64_t rows, int64_t columns);

  /// The tensor of this name, prefix and all, for others to read.
  const TensorEntry& require(const std::string& full_name, const Shape& shape);
  const std::string& prefix() const { return prefix_; }
  const TensorEntry* find_head() const;  ///< null: none is stored
  bool has(const std::string& name) const { return checkpoint_.find(prefix_ + name) != nullptr; }
  /// Throws Error{"unsupported-tensor"} if the checkpoint holds a tensor that was not read and that cannot be left out
  /// without changing the result, {"bad-adapter"} if the adapter has a layer that no matrix belongs to.
  void refuse_unread() const;

 private:
  struct Cut;
  PackedMatrix pack(const TensorEntry& entry, const Cut& cut);
  PackedMatrix pack_plain(const TensorEntry& entry, const Cut& cut) const;
  static PackedMatrix pack_floats(const std::vector<float>& all, const Cut& cut);
  PackedMatrix pack_quantized(const TensorEntry& entry, const Cut& cut);
  std::shared_ptr<const QuantizedTensor> read(const TensorEntry& entry);
  void adapt(Linear& linear, const std::string& stored, const std::string& usual, const Cut& cut);

  const Checkpoint& checkpoint_;
  const TensorPlaces& places_;
  const LoraAdapter* adapter_;
  std::string prefix_;
  std::set<std::string_view> adapted_{};
  std::set<const TensorEntry*> read_{};
  // The quantized tensor read last: several matrices may be cut from it.
  const TensorEntry* last_entry_ = nullptr;
  std::shared_ptr<const QuantizedTensor> last_{};
};

}  // namespace bitwright
