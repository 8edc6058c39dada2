#pragma once

#include <span>
#include <string_view>

#include "container/container.hpp"

namespace bitwright {

/// A file type of llama.cpp: a type of blocks, and the tensors that get another. A row of a table.
struct GgufFileType {
  std::string_view name;  ///< as in --method: "q4_k_m"
  uint32_t id;            ///< general.file_type
  std::string_view type;  ///< of blocks: "Q4_K"
};
std::span<const GgufFileType> all_gguf_file_types();
const GgufFileType* find_gguf_file_type(std::string_view name);

/// The type that llama.cpp gives a tensor of such a file; where its rows are no whole blocks the one it takes instead,
/// which may be "F16" (llama.cpp b8000, src/llama-quant.cpp). A role without a name is any tensor.
std::string_view gguf_type_for(const GgufFileType& file, const TensorRole& role, const Shape& shape);
/// The same, were its rows whole blocks.
std::string_view gguf_type_wanted(const GgufFileType& file, const TensorRole& role, const Shape& shape);

}  // namespace bitwright
