#pragma once

#include <string>

#include "train/causal_lm.hpp"
#include "train/quantized_linear.hpp"

namespace bitwright::train {

// How a checkpoint is loaded of which no weight learns: as it is stored, one layer at a time.

/// For CausalLmOptions::load_linear: what a checkpoint has quantized stays so, and no float copy is ever made. True: it
/// was quantized, and the layer has its behaviour. transposed: the checkpoint has [in features, out features]; where
/// its groups cannot be turned (blocks, flat ones) the layer becomes floats.
bool keep_quantized(const std::string& path, torch::nn::LinearImpl& layer, const Checkpoint& checkpoint,
                    const TensorEntry& entry, bool transposed);
/// The same, and float16 or bfloat16 matrices stay what they are, frozen: for models of which only adapters learn.
bool keep_frozen(const std::string& path, torch::nn::LinearImpl& layer, const Checkpoint& checkpoint,
                 const TensorEntry& entry, bool transposed);

/// Rows of a quantized matrix: indices of any shape; [..., columns] f32.
torch::Tensor decode_rows(const CompactTensor& matrix, const torch::Tensor& indices);
/// For CausalLmOptions::load_embedding, what keep_frozen is for linear layers.
TableRows keep_table(const Checkpoint& checkpoint, const TensorEntry& entry);

}  // namespace bitwright::train
