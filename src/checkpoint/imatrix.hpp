#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace bitwright {

/// What went into a matrix, or into each matrix of a stack, while a text was read.
struct InputSquares {
  std::vector<float> sums;      ///< of the squares in each column: [matrices, columns]
  std::vector<int64_t> counts;  ///< rows that are summed up, of each matrix; one alone: of all
};

/// An importance matrix, as llama.cpp's llama-imatrix makes it and llama-quantize reads it (b8000, tools/imatrix and
/// common/imatrix-loader).
struct Imatrix {
  std::map<std::string, InputSquares, std::less<>> entries{};  ///< by GGUF's name: "blk.0.attn_q.weight"
  std::vector<std::string> datasets{};                         ///< the texts' names
  uint32_t chunks = 0;                                         ///< pieces of text
  uint32_t chunk_size = 0;                                     ///< tokens of a piece; 0: not known
};

/// How much an error in each column counts: the mean of the squares, of `count` numbers from `first` on; 1 in a matrix
/// that saw nothing.
std::vector<float> mean_squares(const InputSquares& squares, size_t first, size_t count);

/// Reads either form: a GGUF file of general.type "imatrix" (NAME.in_sum2, NAME.counts), or the older one, whose counts
/// are pieces of text and whose sums are means times them. Throws Error{"bad-imatrix"}, and what parse_gguf does.
Imatrix parse_imatrix(std::span<const std::byte> file, const std::string& where);
Imatrix read_imatrix(const std::filesystem::path& path);

enum class ImatrixForm : uint8_t { gguf, dat };
/// The older one for names that end in ".dat".
ImatrixForm imatrix_form(const std::filesystem::path& path);
/// The older form leaves out what saw nothing at all.
void write_imatrix(const Imatrix& imatrix, const std::filesystem::path& path, ImatrixForm form);

}  // namespace bitwright
