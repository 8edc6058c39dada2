#pragma once

#include <optional>
#include <span>
#include <vector>

#include "base/error.hpp"
#include "model/gguf_export.hpp"
#include "quantize/importance.hpp"
#include "quantize/output_layout.hpp"
#include "tokenizer/gguf_vocabulary.hpp"

namespace bitwright {

/// A model on its way into one GGUF file: its weights under llama.cpp's names and in its order, and all that its
/// metadata says.
class GgufOutput {
 public:
  /// Adds a warning where llama.cpp would cut text into other tokens. Throws what gguf_model and gguf_vocabulary_of do.
  GgufOutput(const Checkpoint& model, std::vector<Warning>& warnings);
  const Checkpoint& arranged() const { return *arranged_; }  ///< of a plain model, and of a GGUF file
  bool is_gguf() const { return is_gguf_; }  ///< the model is a GGUF file already: `model` has no arrays
  const GgufModel& model() const { return model_; }
  ForeignNames names() const { return {.names = model_.names, .role = role_}; }
  /// arrays: what the file will hold. file_type: as --gguf-type names it; another name: that of most of the numbers.
  /// importance: by which the weights are quantized; null: none.
  GgufMetadata metadata(std::span<const std::vector<ArraySpec>> arrays, std::string_view file_type,
                        const Importance* importance = nullptr) const;

 private:
  GgufModel model_;
  std::optional<Checkpoint> arranged_;
  bool is_gguf_ = false;
  TensorRole role_;
  GgufVocabulary vocabulary_;
  std::string name_, chat_template_;
};

/// Warns of tensors whose type llama.cpp does not write without the importance of their columns. arrays: those of the
/// file; of none of them is it known.
void warn_of_importance(std::span<const std::vector<ArraySpec>> arrays, std::vector<Warning>& warnings);

}  // namespace bitwright
