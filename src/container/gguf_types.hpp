#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "container/container.hpp"

namespace bitwright {

/// A tensor type of GGUF: a row of a table. Every type that ggml still reads stands here, whether its blocks are
/// decoded (container/gguf.cpp) or not.
struct GgufType {
  uint32_t id;  ///< as the file says it
  BlockType block;
  std::optional<DType> dtype{};  ///< of plain numbers
};
std::span<const GgufType> all_gguf_types();  ///< in the order of their ids
const GgufType* find_gguf_type(uint32_t id);
const GgufType* find_gguf_type(std::string_view name);
/// The type that an array has, null where GGUF has none (unsigned integers, 8-bit floats).
const GgufType* gguf_type_of(const ArraySpec& array);

}  // namespace bitwright
