#pragma once

#include <filesystem>

#include "base/json.hpp"
#include "checkpoint/gguf.hpp"

namespace bitwright::test {

/// What llama.cpp's converter (convert_hf_to_gguf.py) makes of a Hugging Face directory, but for the vocabulary: its
/// names, keys and order of rows, written here a second time, the other way round. Matrices whose rows are multiples of
/// its block size are stored as `type`, all else as F32. more: metadata to go before.
void write_gguf_model(const std::filesystem::path& model, const std::filesystem::path& out, std::string_view type,
                      GgufMetadata more = {});

}  // namespace bitwright::test
