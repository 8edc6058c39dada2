#pragma once

#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.hpp"
#include "base/json.hpp"
#include "scheme/quantized_linear.hpp"
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
  /// The axis along which the rows of a tensor lie: 0, 1 (GPTQ's qweight), or kNoRows for what does not depend on them
  /// (g_idx, a table). Says where the arrays of some rows (rows_of) belong in those of all.
  int row_axis = 0;
  bool sized_by_value = false;  ///< `layout` gives a guess, only `pack` the length (a number as text)
  static constexpr int kNoRows = -1;
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
  /// Those of the containers' `files` that are there, by name; null: none.
  const std::map<std::string, Json, std::less<>>* documents = nullptr;
  const Json* facts = nullptr;  ///< what the weight file itself says of the model (GGUF); null: nothing
  /// What lies beside the arrays under names of their kind (torch.save): numbers, texts, lists. Null: nothing.
  const Json* values = nullptr;
  /// The bytes of an array that is in `arrays`; only small ones are to be read while listing.
  std::function<std::span<const std::byte>(const std::string& name)> bytes;
  std::string where;  ///< for errors

  /// One of `documents`; an empty object where it is missing.
  const Json& document(std::string_view name) const;
};

/// A quantized tensor as a checkpoint stores it.
struct StoredTensor {
  std::string name;  ///< as the model knows it
  Shape shape{};
  Scheme scheme{};
  DType value_dtype = DType::f32;     ///< of the floats it stands for
  DType storage_dtype = DType::u8;    ///< what the packed bytes are labelled as (bitsandbytes' quant_storage)
  std::vector<std::string> arrays{};  ///< all arrays that store it and its layer's `linear`
  QuantizedLinear linear{};
  Shape whole{};  ///< of a piece (rows_of): the shape of its tensor
  std::string_view
      variant{};  ///< which of its container's layouts, by a name of the container's own; empty: as it writes
  /// Small arrays that say how it was made, which mean nothing to its numbers and are written again as they were.
  std::vector<NamedArray> notes{};
  const Shape& whole_shape() const { return whole.empty() ? shape : whole; }
};

/// What of a quantized model belongs to none of its weights.
struct QuantizedModel {
  std::vector<std::string> skipped{};  ///< modules that are kept in floats, as the owner lists them: names or patterns
  std::optional<ActivationScheme> kv_cache{};
  std::vector<std::string> arrays{};  ///< those that are no weights: scales of the KV cache
};

enum class Verdict : uint8_t { exact, bounded, impossible };
struct Fit {
  Verdict verdict;
  std::string reason{};  ///< empty when exact
};

/// What is known of a model when its metadata is written.
struct WrittenModel {
  std::span<const StoredTensor> tensors;  ///< the quantized ones
  /// Modules whose matrices are kept in floats, in the model's order: "lm_head" (a tied one too, though it has no
  /// tensor), "model.embed_tokens" …
  std::span<const std::string> kept;
  const OrderedJson& record;  ///< what quantize knows (recipe, layers, verification); empty at first
};

/// What is written beside the weights.
struct Metadata {
  OrderedJson& config;                        ///< config.json, to be added to
  std::map<std::string, OrderedJson>& files;  ///< further JSON files
};

/// A kind of code that a container holds, with all that belongs to it: a row of its table of defaults, and the request
/// for one tensor with every default filled in.
struct SchemeChoice {
  std::string_view quant_type = "int";  ///< as in the configuration: int, nf4, fp4, e4m3, e5m2, mxfp4, nvfp4
  int bits = 4;
  bool symmetric = false;
  std::string_view granularity = "group";  ///< tensor, channel, group, flat
  int64_t group_size = 0;                  ///< for group and flat
  std::string_view scale_dtype = kWeightDtype;
  bool nested_scales = false;
  bool weight_only = true;                                    ///< activations stay in floats
  static constexpr std::string_view kWeightDtype = "weight";  ///< f32, f16 or bf16, as the weight is
};

/// What an owner does with a matrix that a model stores [inputs, outputs] (GPT-2's Conv1D), and nobody else does.
enum class InputsFirst : uint8_t {
  refused,     ///< it knows linear layers alone
  as_it_is,    ///< a matrix like any other
  transposed,  ///< quantizes and stores [outputs, inputs]
};
/// Is this tensor such a matrix? config: config.json.
bool has_inputs_first(const Json& config, std::string_view tensor);
/// What a tensor is among those of its model, for containers that choose by it.
struct TensorRole {
  std::string name{};  ///< in the words of the container's file: "blk.3.ffn_down.weight"
  int64_t layers = 0, experts = 0;
  int64_t queries_a_key = 1;  ///< query heads that share keys and values
  bool has_output = true;     ///< the output matrix is no embedding
};

/// One way of laying quantized tensors out as bytes: a row of a table, not a base class.
struct Container {
  std::string_view name;      ///< as in --format; never renamed once released
  std::string_view summary;   ///< what of it is supported, for `formats`
  std::string_view source;    ///< the specification followed: document, or repository and commit
  std::string_view method{};  ///< what a model's configuration calls it, and engines' facts; empty: `name`
  /// What of it is read and never written anew, for docs/containers.md; empty: nothing, or it is not written at all.
  std::string_view only_read{};
  /// How new weights are rounded, and which of the owner's ways that is where it has several; empty: it is not written.
  std::string_view rounding{};

  /// Is anything of this checkpoint stored this way?
  bool (*detect)(const CheckpointView& checkpoint);
  /// The quantized tensors. Throws Error{"bad-container"} where arrays are missing or their types or sizes disagree.
  std::vector<StoredTensor> (*list)(const CheckpointView& checkpoint);
  /// What of a quantized model belongs to none of its weights; null: nothing.
  QuantizedModel (*model)(const CheckpointView& checkpoint) = nullptr;
  /// Does the owner store this weight this way at all? Others are kept in floats, unasked. Null: every matrix.
  bool (*takes)(std::string_view name, const Shape& shape) = nullptr;
  /// Can this layout hold `scheme` at `shape`, and why not (shapes that the owner refuses, too)? Asked before a byte is
  /// written.
  Fit (*fit)(const Scheme& scheme, const Shape& shape);
  /// The arrays that will store `tensor`, in the order of pack. Needs fit(...) != impossible.
  std::vector<ArraySpec> (*layout)(const StoredTensor& tensor);
  std::vector<NamedArray> (*pack)(const StoredTensor& tensor, const QuantizedTensor& values);
  /// The inverse of pack, bit for bit.
  QuantizedTensor (*unpack)(const StoredTensor& tensor, const CheckpointView& checkpoint);
  /// What the owner expects beside the weights. Null: tensors are packed, but no checkpoint is written this way.
  void (*write_metadata)(const WrittenModel& model, const Metadata& out);
  /// Do the arrays of a matrix hold its rows one after the other (each along its row_axis), so that those of some rows
  /// (rows_of; a multiple of 32 before them) are parts of those of all?
  bool by_rows = false;

  /// May these be in one checkpoint (of one type; what the owner fuses, by one scheme)? Null: whatever fits. Asked
  /// before a byte is written.
  Fit (*fit_model)(std::span<const StoredTensor> tensors) = nullptr;

  /// What is chosen where the request leaves it open: the first row that has all it says; so the first of all is what
  /// `--format` alone writes. Empty: a method must be given.
  std::span<const SchemeChoice> choices{};
  /// The scheme by which the owner stores a choice; null: the common one. dtype: of the weight.
  Scheme (*make_scheme)(const SchemeChoice& choice, DType dtype) = nullptr;
  /// What is done to the inputs of layers where a choice is not weight_only. Throws Error where that takes data.
  /// Null: it holds weights alone.
  QuantizedLinear (*make_linear)(const SchemeChoice& choice) = nullptr;
  /// The group size that the owner chooses for a weight of this shape where none is asked for; null: the choice's own.
  int64_t (*group_size)(const SchemeChoice& choice, const Shape& shape) = nullptr;
  /// How the owner rounds a float weight to a scheme that fits, bit for bit: what rtn with the range minmax writes.
  /// Null: as scheme/ defines it. Throws what scheme/'s encode throws.
  QuantizedTensor (*encode)(const Scheme& scheme, const Shape& shape, WeightView weight) = nullptr;
  /// The same with NVFP4's scale of the whole tensor for `largest`, the largest magnitude in all that engines make one
  /// matrix of, as they take one such scale. Null: its tensors keep their own.
  QuantizedTensor (*encode_fused)(const Scheme& scheme, const Shape& shape, WeightView weight, float largest) = nullptr;
  InputsFirst inputs_first = InputsFirst::refused;
  /// The kind of file (WeightFormat::name) that is a whole model: names, configuration and vocabulary are its own and
  /// stand in it. Empty: safetensors beside config.json, names as they are.
  std::string_view model_file{};
  /// In place of make_scheme, where it depends on what a tensor is for, and on its shape (K-quants of 256).
  /// May be plain numbers; where it is there, `takes` is not asked.
  Scheme (*scheme_for)(const SchemeChoice& choice, const TensorRole& role, const Shape& shape) = nullptr;
  /// Why a tensor of this shape gets another type than one that fits would; empty: it does not. Null: none does.
  std::string (*note_for)(const SchemeChoice& choice, const TensorRole& role, const Shape& shape) = nullptr;
  bool embeddings = false;  ///< its owner looks tokens up in a quantized matrix too
  /// What `quantize` would be asked for to round weights of so many bits anew; null: integers of as many.
  std::string_view (*method_for_bits)(int bits) = nullptr;
  std::string_view weights_format = "pt";     ///< "format" in the metadata of its safetensors
  std::span<const std::string_view> files{};  ///< JSON files beside config.json that say how a model is quantized
};

/// Row::method, or its name.
std::string_view method_of(const Container& container);
std::span<const Container* const> all_containers();  ///< in the order of containers.def
const Container* find_container(std::string_view name);

[[noreturn]] void bad_container(const CheckpointView& checkpoint, const std::string& tensor, const std::string& why);
/// An array by name, or bad_container.
const ArraySpec& need_array(const CheckpointView& checkpoint, const std::string& tensor, const std::string& array);

}  // namespace bitwright
