#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/checkpoint.hpp"
#include "container/container.hpp"
#include "container/rows.hpp"
#include "recipe/recipe.hpp"

namespace bitwright {

/// A tensor of an output, made of tensors of the source.
struct ArrangedTensor {
  std::string name;                       ///< as the output calls it
  Shape shape;                            ///< as the output has it; of an identical arrangement as the model has it
  std::vector<const TensorEntry*> parts;  ///< one, or the matrices of a stack; none: `made`
  std::vector<int64_t> rows{};            ///< of the part, in their new order; empty: all as they are
  bool transposed = false;                ///< the part is the transpose of `shape`
  std::optional<Scheme> scheme{};         ///< of its numbers in this order; none: plain, or to be had as floats alone
  bool as_f32 = false;                    ///< the owner has it in f32, quantized or not
  float added = 0;                        ///< to each number of a plain one
  std::vector<float> made{};

  bool quantized() const { return !parts.empty() && parts.front()->quantized(); }
};

/// A model's tensors, quantized or not, as another file calls and orders them. Codes are moved, never changed.
class Arranged {
 public:
  /// As they are.
  explicit Arranged(const Checkpoint& source);
  /// views: of `source`'s tensors (ArrayView::source is such a name). Throws Error{"no-gguf"} where some of a stack's
  /// matrices are quantized and some are not.
  Arranged(const Checkpoint& source, std::span<const ArrayView> views);

  const Checkpoint& source() const { return source_; }
  std::span<const ArrangedTensor> tensors() const { return tensors_; }
  /// Of the tensors in their order, with the type of floats that a plain one is stored as.
  const std::vector<TensorFacts>& facts() const { return facts_; }

  /// The pieces in which a quantized tensor is converted: those of the source that are pieces of the target too; one
  /// where it is turned. turned: the target stores the transpose of the part.
  std::vector<RowRange> pieces(size_t i, const Container& container, const StoredTensor& target, bool turned) const;
  /// Pieces of one that becomes floats.
  std::vector<RowRange> pieces(size_t i, bool turned) const;
  /// Those of a plain tensor: ranges of elements.
  std::vector<RowRange> plain_pieces(size_t i) const;

  /// A piece of a tensor that has a scheme, as the target has its rows.
  QuantizedTensor read(size_t i, bool turned, RowRange rows) const;
  /// The same numbers by another way: each part is decoded as the source has it, and then put in order.
  std::vector<float> decoded(size_t i, bool turned, RowRange rows) const;
  /// A piece of a plain tensor.
  std::vector<std::byte> read_plain(size_t i, RowRange elements) const;

 private:
  struct Selection;
  void add(const ArrayView& view);
  bool is_one_matrix(const ArrangedTensor& t) const { return t.parts.size() == 1 && t.parts[0]->shape.size() == 2; }
  Selection select(const TensorEntry& entry, std::vector<int64_t> rows) const;
  std::vector<Selection> selections(const ArrangedTensor& t, RowRange rows) const;
  QuantizedTensor read_rows(const TensorEntry& entry, RowRange rows) const;

  const Checkpoint& source_;
  std::vector<ArrangedTensor> tensors_;
  std::vector<TensorFacts> facts_;
};

}  // namespace bitwright
