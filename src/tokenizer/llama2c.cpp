#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/mapped_file.hpp"
#include "base/utf8.hpp"
#include "tokenizer/byte_level.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/scored_vocabulary.hpp"

namespace bitwright {
namespace {

// u32, the longest token's bytes; for each token f32, its score, i32, its bytes, and those, a space for U+2581. The
// first three are <unk>, BOS and EOS, the latter two with line ends around them (llama2.c, tokenizer.py, export).
constexpr uint32_t kLongestToken = 1 << 16;
constexpr size_t kHeader = 4, kTokenHeader = 8;
constexpr int32_t kUnknown = 0, kBos = 1, kEos = 2;

uint32_t u32_at(std::string_view bytes, size_t at) {
  uint32_t value = 0;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

bool is_llama2c(std::string_view bytes) {
  if (bytes.size() < kHeader + kTokenHeader) return false;
  const uint32_t longest = u32_at(bytes, 0), first = u32_at(bytes, kHeader + 4);
  return longest > 0 && longest <= kLongestToken && first > 0 && first <= longest;
}

ScoredPiece piece_of(std::string_view text, float score, size_t id) {
  ScoredPiece piece = {.text = {}, .score = score, .type = PieceType::normal};
  if (id == kBos || id == kEos) {
    piece = {.text = id == kBos ? "<s>" : "</s>", .score = 0, .type = PieceType::control};
    return piece;
  }
  for (const char c : text) c == ' ' ? piece.text.append(kMetaspace) : piece.text.append(1, c);
  if (byte_of_token(text)) piece.type = PieceType::byte;
  if (id == kUnknown) piece.type = PieceType::unknown;
  return piece;
}

TokenizerPipeline read(const std::filesystem::path& path) {
  const MappedFile file(path);
  TokenizerPipeline pipeline = read_llama2c(file.text(), path.string());
  apply_tokenizer_config(path, pipeline);
  return pipeline;
}

}  // namespace

ScoredVocabulary llama2c_vocabulary(std::string_view bytes, const std::string& file) {
  if (!is_llama2c(bytes)) bad_tokenizer(file, "it does not begin as llama2.c's tokenizers do");
  const uint32_t longest = u32_at(bytes, 0);
  bytes.remove_prefix(kHeader);
  ScoredVocabulary vocabulary;
  while (!bytes.empty()) {
    const size_t id = vocabulary.pieces.size();
    if (bytes.size() < kTokenHeader) bad_tokenizer(file, fmt::format("it ends within token {}", id));
    float score = 0;
    std::memcpy(&score, bytes.data(), sizeof score);
    const uint32_t length = u32_at(bytes, 4);
    bytes.remove_prefix(kTokenHeader);
    if (length > longest || length > bytes.size())
      bad_tokenizer(file, fmt::format("token {} has {} bytes, the longest {}, the file {} more", id, length, longest,
                                      bytes.size()));
    const std::string_view text = bytes.substr(0, length);
    if (!is_utf8(text)) bad_tokenizer(file, fmt::format("token {} is not UTF-8", id));
    vocabulary.pieces.push_back(piece_of(text, score, id));
    bytes.remove_prefix(length);
  }
  vocabulary.bos = kBos;
  vocabulary.eos = kEos;
  vocabulary.adds_bos = true;
  vocabulary.normalization.remove_extra_whitespaces = false;
  return vocabulary;
}

TokenizerPipeline read_llama2c(std::string_view bytes, const std::string& file) {
  return pipeline_of(llama2c_vocabulary(bytes, file), file);
}

extern const TokenizerFormat llama2c_tokenizer;
const TokenizerFormat llama2c_tokenizer = {
    .name = "llama2.c tokenizer.bin",
    .source = "karpathy/llama2.c 350e04fe, tokenizer.py and run.c",
    .find = [](const std::filesystem::path& directory) { return file_in(directory, "tokenizer.bin"); },
    .recognises = is_llama2c,
    .read = read};

}  // namespace bitwright
