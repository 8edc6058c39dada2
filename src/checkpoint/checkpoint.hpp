#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.hpp"
#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "container/rows.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// A tensor as the model knows it; quantized ones stand here once, whatever arrays store them.
struct TensorEntry {
  std::string name;  ///< "model.layers.0.mlp.up_proj.weight"
  Shape shape;
  Scheme scheme;  ///< of quantized tensors; of plain ones too where their dtype is an element (not f64, i64 …)
  DType dtype;    ///< of plain tensors; of quantized ones that of the floats they stand for
  uint64_t stored_bytes;  ///< of all arrays that store it
  bool quantized() const { return !scheme.is_plain(); }
  double bits_per_weight() const;
};

/// An opened model: configuration and mapped weights. Opening reads headers only; every length, offset, count and name
/// in them is checked. Weights are read when asked for. Immutable; may be shared between threads.
class Checkpoint {
 public:
  /// An output that is not finished is refused, but for whoever is writing it.
  enum class Unfinished { refuse, allow };
  /// A directory (config.json, *.safetensors with or without an index) or one .safetensors file.
  /// Throws Error naming the file and what is wrong with it.
  explicit Checkpoint(const std::filesystem::path& path, Unfinished unfinished = Unfinished::refuse);
  ~Checkpoint();
  Checkpoint(Checkpoint&&) noexcept;

  const std::filesystem::path& path() const;
  /// Reads every file through and compares it with the digest that quantization_metadata.json records, where it does.
  /// Throws Error{"digest-mismatch"}.
  void verify_digests() const;
  uint64_t weight_bytes() const;  ///< size of those files
  /// The weight files, by which a later run knows that the model is still the same.
  struct File {
    std::string name;
    FileIdentity identity;      ///< as it is now
    std::string header_sha256;  ///< of what comes before the first tensor's data
  };
  std::vector<File> files() const;

  const Json& config() const;                 ///< an empty object if there is no config.json
  const Json& quantization_metadata() const;  ///< likewise for quantization_metadata.json
  const Container* container() const;         ///< how it is quantized; null for plain models

  std::span<const TensorEntry> tensors() const;  ///< in file order
  const TensorEntry* find(std::string_view name) const;

  /// The mapped bytes of a plain tensor, in its dtype.
  std::span<const std::byte> plain_bytes(const TensorEntry& entry) const;
  /// Bytes from `offset` on of a plain tensor, read from the file: unlike plain_bytes, nothing stays in memory, and a
  /// file that changed or fails is an Error.
  void read_bytes(const TensorEntry& entry, uint64_t offset, std::span<std::byte> out) const;
  /// The pieces in which a quantized tensor can be read.
  std::vector<RowRange> row_pieces(const TensorEntry& entry) const;
  /// Rows of one piece (or several) as a tensor of their own: [end - begin, columns]. Read like read_bytes. A tensor of
  /// one piece is whole, of its own shape.
  QuantizedTensor read_rows(const TensorEntry& entry, int64_t begin, int64_t end) const;
  /// Asks the system to read bytes of a plain tensor ahead.
  void prefetch(const TensorEntry& entry, uint64_t offset, uint64_t bytes) const;
  /// Any tensor as it is stored; a plain one becomes a QuantizedTensor of a plain scheme (a copy; not f64 or integers).
  QuantizedTensor read(const TensorEntry& entry) const;
  /// Any tensor as f32 values.
  std::vector<float> read_f32(const TensorEntry& entry) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace bitwright
