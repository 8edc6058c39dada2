#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.hpp"
#include "base/json.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// How a file lays `elements` neighbours of a row out as `bytes` bytes together (GGUF's types).
struct BlockType {
  std::string_view name;  ///< as the file's own specification says it: "Q4_K"
  int64_t elements;
  uint64_t bytes;
};

/// Name, type and shape of an array in a file, without its bytes.
struct ArraySpec {
  std::string name;
  DType dtype;  ///< u8 where there is a block type
  Shape shape;  ///< of elements
  const BlockType* block = nullptr;
  uint64_t bytes() const {
    const auto count = static_cast<uint64_t>(element_count(shape));
    return block != nullptr ? count / static_cast<uint64_t>(block->elements) * block->bytes : count * size_bytes(dtype);
  }
};

/// An array to be written.
struct NamedArray {
  ArraySpec spec;
  std::vector<std::byte> data;
};

/// What a container sees of a checkpoint.
struct CheckpointView {
  const std::map<std::string, ArraySpec, std::less<>>& arrays;
  const Json& config;                 ///< config.json, an empty object where there is none
  const Json& quantization_metadata;  ///< quantization_metadata.json, likewise
  const Json* facts = nullptr;        ///< what the weight file itself says of the model (GGUF); null: nothing
  /// The bytes of an array that is in `arrays`; only small ones are to be read while listing.
  std::function<std::span<const std::byte>(const std::string& name)> bytes;
  std::string where;  ///< for errors
};

/// A quantized tensor as a checkpoint stores it.
struct StoredTensor {
  std::string name;  ///< as the model knows it
  Shape shape{};
  Scheme scheme{};
  DType value_dtype = DType::f32;     ///< of the floats it stands for
  DType storage_dtype = DType::u8;    ///< what the packed bytes are labelled as (bitsandbytes' quant_storage)
  std::vector<std::string> arrays{};  ///< all arrays that store it
};

enum class Verdict : uint8_t { exact, bounded, impossible };
struct Fit {
  Verdict verdict;
  std::string reason{};  ///< empty when exact
};

/// What is written beside the weights.
struct Metadata {
  OrderedJson& config;                        ///< config.json, to be added to
  std::map<std::string, OrderedJson>& files;  ///< further JSON files
};

/// One way of laying quantized tensors out as bytes: a row of a table, not a base class.
struct Container {
  std::string_view name;     ///< as in --format; never renamed once released
  std::string_view summary;  ///< what of it is supported, for `formats`
  std::string_view source;   ///< the specification followed: document, or repository and commit

  /// Is anything of this checkpoint stored this way?
  bool (*detect)(const CheckpointView& checkpoint);
  /// The quantized tensors. Throws Error{"bad-container"} where arrays are missing or their types or sizes disagree.
  std::vector<StoredTensor> (*list)(const CheckpointView& checkpoint);
  /// Can this layout hold `scheme` at `shape`, and why not? Asked before a byte is written.
  Fit (*fit)(const Scheme& scheme, const Shape& shape);
  /// The arrays that will store `tensor`, in the order of pack. Needs fit(...) != impossible.
  std::vector<ArraySpec> (*layout)(const StoredTensor& tensor);
  std::vector<NamedArray> (*pack)(const StoredTensor& tensor, const QuantizedTensor& values);
  /// The inverse of pack, bit for bit.
  QuantizedTensor (*unpack)(const StoredTensor& tensor, const CheckpointView& checkpoint);
  /// What the owner expects beside the weights. Null: tensors are packed, but no checkpoint is written this way.
  /// record: what quantize knows (recipe, layers, verification).
  void (*write_metadata)(std::span<const StoredTensor> tensors, const OrderedJson& record, const Metadata& out);
  /// Do the arrays of a matrix hold its rows one after the other, so that those of some rows (rows_of) are parts of
  /// those of all?
  bool by_rows = false;
};

std::span<const Container* const> all_containers();  ///< in the order of containers.def
const Container* find_container(std::string_view name);

[[noreturn]] void bad_container(const CheckpointView& checkpoint, const std::string& tensor, const std::string& why);
/// An array by name, or bad_container.
const ArraySpec& need_array(const CheckpointView& checkpoint, const std::string& tensor, const std::string& array);

}  // namespace bitwright
