#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.hpp"
#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/weight_file.hpp"
#include "container/container.hpp"
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
  /// The type of blocks that no container here decodes ("Q4_K"): such a tensor can be listed, not read.
  const BlockType* undecoded = nullptr;
  bool rearranged = false;   ///< lies in the file in another order: plain_bytes cannot give it, read_bytes can
  QuantizedLinear linear{};  ///< what belongs to its layer
  /// Shape and values are the transpose of what the model has under this name (InputsFirst::transposed).
  bool transposed = false;
  bool quantized() const { return !scheme.is_plain(); }
  double bits_per_weight() const;
};

/// An array as the model wants it, made from one that a file stores. Bytes move; only `added` and `as_f32` change them.
struct ArrayView {
  std::string name;    ///< as the model knows it
  std::string source;  ///< as the file does; empty: the array is `made`
  Shape shape;
  /// Row r of this array is row rows[r] of the source, both seen as matrices of their last dimension (as a column where
  /// they have but one). Empty: rows from first_row on, in their order.
  std::vector<int64_t> rows{};
  int64_t first_row = 0;
  bool transposed = false;  ///< `shape` is the source's matrix transposed; excludes the two above
  float added = 0;          ///< to each number of a plain array; the result is f32
  bool as_f32 = false;      ///< likewise, for small arrays: the numbers are kept in memory
  /// Of a stack: arrays that follow `source`, of its shape and type; `shape` counts all. Excludes all of the above.
  std::vector<std::string> stacked{};
  std::vector<float> made{};  ///< the numbers, where no file stores them
};

/// What a file that describes its model in its own words says in Hugging Face's.
struct Translation {
  std::shared_ptr<const Json> config;
  std::vector<ArrayView> arrays;  ///< all there are; what is not among them is not part of the model
};
/// Nothing: all stays as it is stored.
using Translator = std::function<std::optional<Translation>(const CheckpointView& stored)>;

/// An opened model: configuration and mapped weights. Opening reads headers only; every length, offset, count and name
/// in them is checked. Weights are read when asked for. Immutable; may be shared between threads.
class Checkpoint {
 public:
  /// An output that is not finished is refused, but for whoever is writing it.
  enum class Unfinished { refuse, allow };
  /// A model quantized by a method that no container here knows is refused, or listed as the arrays it consists of;
  /// `list_all`: so is every other (one that its container cannot list).
  enum class Foreign { refuse, list, list_all };
  /// A directory (config.json, not needed with GGUF; weights in one file or several, with or without an index; the
  /// links of a Hugging Face cache) or one file of weights of a known kind, with config.json beside it or not.
  /// Throws Error naming the file and what is wrong with it.
  /// translate: asked how the arrays appear; null leaves everything as it is stored.
  explicit Checkpoint(const std::filesystem::path& path, const Translator& translate = nullptr,
                      Unfinished unfinished = Unfinished::refuse, Foreign foreign = Foreign::refuse);
  ~Checkpoint();
  Checkpoint(Checkpoint&&) noexcept;

  const std::filesystem::path& path() const;  ///< as it was opened; of GGUF always the file, the first of several
  /// Reads every file through and compares it with the digest that quantization_metadata.json records, where it does.
  /// Throws Error{"digest-mismatch"}.
  void verify_digests() const;
  std::string_view format() const;  ///< of its weight files: "safetensors"
  uint64_t weight_bytes() const;    ///< size of those files
  /// The weight files, by which a later run knows that the model is still the same.
  struct File {
    std::string name;
    FileIdentity identity;      ///< as it is now
    std::string header_sha256;  ///< of what comes before the first tensor's data
  };
  std::vector<File> files() const;

  std::filesystem::path config_path() const;  ///< of the file that config() is or would be from
  const Json& config() const;                 ///< an empty object if there is no config.json
  const Json& quantization_metadata() const;  ///< likewise for quantization_metadata.json
  /// What the weight file itself says of the model, by key (GGUF: "general.architecture", "tokenizer.ggml.tokens" …;
  /// strings may be any bytes). Null: nothing.
  const Json* facts() const;
  const Container* container() const;  ///< how it is quantized; null for plain models

  /// All arrays under the names and in the shapes that the files have them.
  std::vector<StoredArray> stored_arrays() const;
  const QuantizedModel& quantized_model() const;  ///< what of it belongs to no weight

  std::span<const TensorEntry> tensors() const;  ///< in file order
  const TensorEntry* find(std::string_view name) const;

  /// Throws Error{"unsupported-tensor"} for one that can only be listed. All that follow do.
  void require_decoded(const TensorEntry& entry) const;
  /// The mapped bytes of a plain tensor, in its dtype. Not of one that is rearranged.
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
