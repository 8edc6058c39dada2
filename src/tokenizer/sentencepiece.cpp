#include <fmt/format.h>

#include <cstring>

#include "base/mapped_file.hpp"
#include "base/utf8.hpp"
#include "tokenizer/formats.hpp"
#include "tokenizer/scored_vocabulary.hpp"

namespace bitwright {
namespace {

/// The fields of a protocol buffer's message, one after the other.
class Message {
 public:
  Message(std::string_view all, const std::string& file) : rest_(all), file_(file) {}

  uint64_t number = 0;       ///< of the field
  uint64_t value = 0;        ///< where it is a number
  std::string_view bytes{};  ///< where it is a text or a message
  float real = 0;            ///< where it is 32 bits wide

  bool next() {
    if (rest_.empty()) return false;
    const uint64_t tag = varint();
    number = tag >> 3;
    switch (tag & 7) {
      case 0:
        value = varint();
        return true;
      case 1:
        take(8);
        return true;
      case 2:
        bytes = take(varint());
        return true;
      case 5:
        bytes = take(4);
        std::memcpy(&real, bytes.data(), sizeof real);
        return true;
      default:
        bad_tokenizer(file_, fmt::format("it has a field of wire type {}", tag & 7));
    }
  }

 private:
  std::string_view take(uint64_t size) {
    if (size > rest_.size()) bad_tokenizer(file_, fmt::format("it ends {} bytes early", size - rest_.size()));
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }
  uint64_t varint() {
    uint64_t number_read = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      number_read |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if ((byte & 0x80) == 0) return number_read;
    }
    bad_tokenizer(file_, "it has a number of more than 64 bits");
  }

  std::string_view rest_;
  const std::string& file_;
};

ScoredPiece read_piece(std::string_view bytes, const std::string& file) {
  ScoredPiece piece;
  Message field(bytes, file);
  while (field.next()) {
    if (field.number == 1) piece.text = field.bytes;
    if (field.number == 2) piece.score = field.real;
    if (field.number != 3) continue;
    if (field.value < 1 || field.value > 6) bad_tokenizer(file, fmt::format("a piece is of type {}", field.value));
    piece.type = static_cast<PieceType>(field.value);
  }
  if (!is_utf8(piece.text)) bad_tokenizer(file, fmt::format("piece {} is not UTF-8", shown_token(piece.text)));
  return piece;
}

void read_trainer(std::string_view bytes, const std::string& file, ScoredVocabulary& out) {
  uint64_t model = 1;  // unigram
  out.bos = 1;
  out.eos = 2;
  Message field(bytes, file);
  while (field.next()) {
    if (field.number == 3) model = field.value;
    if (field.number == 24) out.normalization.treat_whitespace_as_suffix = field.value != 0;
    if (field.number == 41) out.bos = static_cast<int32_t>(field.value);
    if (field.number == 42) out.eos = static_cast<int32_t>(field.value);
  }
  if (model != 1 && model != 2) unsupported_tokenizer(file, fmt::format("model type {}", model));
  out.unigram = model == 1;
}

void read_normalizer(std::string_view bytes, const std::string& file, SentencePieceNormalization& out) {
  Message field(bytes, file);
  while (field.next()) {
    if (field.number == 2 && !field.bytes.empty()) {
      out.charsmap = Charsmap::read(field.bytes);
      out.charsmap_bytes = field.bytes;
      if (!out.charsmap) bad_tokenizer(file, "precompiled_charsmap is damaged");
    }
    if (field.number == 3) out.add_dummy_prefix = field.value != 0;
    if (field.number == 4) out.remove_extra_whitespaces = field.value != 0;
    if (field.number == 5) out.escape_whitespaces = field.value != 0;
  }
}

/// It begins with a piece: field 1 of the model, whose own field 1 is the text.
bool is_model(std::string_view bytes) {
  if (!bytes.starts_with('\x0a')) return false;
  size_t at = 1;
  while (at < bytes.size() && (static_cast<unsigned char>(bytes[at]) & 0x80) != 0) ++at;
  return at + 1 < bytes.size() && bytes[at + 1] == '\x0a';
}

std::optional<std::filesystem::path> find(const std::filesystem::path& directory) {
  for (const char* name : {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model"})
    if (auto path = file_in(directory, name); path && is_model(MappedFile(*path).text())) return path;
  return std::nullopt;
}

TokenizerPipeline read(const std::filesystem::path& path) {
  const MappedFile file(path);
  TokenizerPipeline pipeline = read_sentencepiece(file.text(), path.string());
  apply_tokenizer_config(path, pipeline);
  return pipeline;
}

}  // namespace

ScoredVocabulary sentencepiece_vocabulary(std::string_view bytes, const std::string& file) {
  ScoredVocabulary vocabulary;
  vocabulary.single_precision = true;
  read_trainer("", file, vocabulary);
  Message field(bytes, file);
  while (field.next()) {
    if (field.number == 1) vocabulary.pieces.push_back(read_piece(field.bytes, file));
    if (field.number == 2) read_trainer(field.bytes, file, vocabulary);
    if (field.number == 3) read_normalizer(field.bytes, file, vocabulary.normalization);
    if (vocabulary.pieces.size() > kMaxVocabulary) bad_tokenizer(file, "it has too many pieces");
  }
  // SentencePiece itself leaves BOS to the caller; the models it was made for (Llama, Mistral, Gemma) want it.
  vocabulary.adds_bos = vocabulary.bos >= 0;
  return vocabulary;
}

TokenizerPipeline read_sentencepiece(std::string_view bytes, const std::string& file) {
  return pipeline_of(sentencepiece_vocabulary(bytes, file), file);
}

extern const TokenizerFormat sentencepiece_tokenizer;
const TokenizerFormat sentencepiece_tokenizer = {.name = "SentencePiece model",
                                                 .source = "google/sentencepiece v0.2.0, sentencepiece_model.proto",
                                                 .find = find,
                                                 .recognises = is_model,
                                                 .read = read};

}  // namespace bitwright
