#include "quantize/verify.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>

#include "base/progress.hpp"
#include "base/threads.hpp"
#include "model/model.hpp"
#include "quantize/model_files.hpp"
#include "quantize/stream.hpp"
#include "scheme/transposed.hpp"
#include "tokenizer/tokenizer.hpp"

namespace bitwright {
namespace {

constexpr int64_t kContext = 256;
constexpr int64_t kMostWindows = 32;
constexpr double kMostOperations = 4e12;  // a minute or so on a small machine

/// Errors after which a model is merely not judged: it is of a kind the runtime or the tokenizer does not know.
bool means_not_runnable(const Error& error) {
  constexpr std::array<std::string_view, 4> kCodes = {"unknown-architecture", "unsupported-config",
                                                      "unsupported-tensor", "unsupported-tokenizer"};
  return std::ranges::find(kCodes, error.code()) != kCodes.end();
}

/// As many windows as the budget of operations allows, two models each.
int64_t affordable_windows(const Checkpoint& model) {
  double parameters = 0;
  for (const TensorEntry& entry : model.tensors()) parameters += static_cast<double>(element_count(entry.shape));
  const double windows = kMostOperations / (2 * 2 * parameters * static_cast<double>(kContext));
  return std::clamp<int64_t>(static_cast<int64_t>(windows), 1, kMostWindows);
}

Shape shape_in_model(const TensorEntry& entry) {
  Shape shape = entry.shape;
  if (entry.transposed) std::swap(shape[0], shape[1]);
  return shape;
}

/// Quantized, or floats turned into others: read back by values, not by bytes.
bool is_encoded(const TensorEntry& original, const TensorEntry& found) {
  return found.quantized() || found.dtype != original.dtype;
}

/// Every piece of a written model against the original's.
class ReadBack {
 public:
  ReadBack(const Checkpoint& source, const Checkpoint& written, const std::vector<LayerResult>& layers)
      : source_(source), written_(written) {
    if (source.tensors().size() != written.tensors().size())
      verification_failed(written.path().string(), fmt::format("{} tensors, the original has {}",
                                                               written.tensors().size(), source.tensors().size()));
    for (const TensorEntry& entry : source.tensors()) {
      const TensorEntry* found = written.find(entry.name);
      if (found == nullptr || shape_in_model(*found) != entry.shape)
        verification_failed(entry.name, "missing, or of another shape");
      if (!found->quantized() && !has_dtype(*found, entry, layers))
        verification_failed(entry.name, "kept, but of another type");
      for (const RowRange rows : pieces_of(entry, *found, layers))
        pieces_.push_back({.entry = &entry, .found = found, .rows = rows});
    }
  }

  void run(const std::vector<LayerResult>& layers, uint64_t piece_memory) {
    uint64_t total = 0;
    for (const Piece& piece : pieces_) total += bytes_of(piece);
    Progress progress("verifying", total);
    std::mutex mutex;
    parallel_within(
        pieces_.size(), piece_memory,
        [&](size_t i) {
          const auto elements = static_cast<int64_t>(bytes_of(pieces_[i]) / size_bytes(pieces_[i].entry->dtype));
          return quantized_piece_memory(elements, pieces_[i].entry->dtype);
        },
        [&](size_t i) {
          throw_if_interrupted();
          check(pieces_[i]);
          const std::lock_guard lock(mutex);
          progress.advance(bytes_of(pieces_[i]));
        });
    check_layers(layers);
  }

 private:
  struct Piece {
    const TensorEntry *entry, *found;
    RowRange rows;
    SquaredError error{};
  };

  /// Its own, or what the layer was turned into.
  static bool has_dtype(const TensorEntry& found, const TensorEntry& original, const std::vector<LayerResult>& layers) {
    if (found.dtype == original.dtype) return found.stored_bytes == original.stored_bytes;
    const auto layer = std::ranges::find(layers, original.name, &LayerResult::name);
    return layer != layers.end() && layer->scheme.is_plain() && dtype_of(*layer->scheme.element) == found.dtype;
  }

  /// As it was written by: an error is a sum of the pieces' sums.
  std::vector<RowRange> pieces_of(const TensorEntry& original, const TensorEntry& found,
                                  const std::vector<LayerResult>& layers) const {
    if (found.quantized()) {
      const auto layer = std::ranges::find(layers, original.name, &LayerResult::name);
      const Algorithm* const algorithm = layer == layers.end() ? nullptr : find_algorithm(layer->algorithm);
      std::vector<RowRange> pieces = written_.row_pieces(found);
      return algorithm != nullptr && algorithm->weighted ? within_matrices(pieces, original.shape) : pieces;
    }
    if (!is_encoded(original, found)) return element_pieces(original.shape);
    return row_pieces(StoredTensor{.name = found.name, .shape = found.shape, .scheme = plain(found.dtype)});
  }

  QuantizedTensor read(const Piece& piece) const {
    if (piece.found->quantized()) return written_.read_rows(*piece.found, piece.rows.begin, piece.rows.end);
    const auto columns = static_cast<int64_t>(width(piece));
    QuantizedTensor t = {.scheme = plain(piece.found->dtype), .shape = {piece.rows.end - piece.rows.begin, columns}};
    const uint64_t row = width(piece) * size_bytes(piece.found->dtype);
    t.codes.resize(static_cast<size_t>(piece.rows.end - piece.rows.begin) * row);
    written_.read_bytes(*piece.found, static_cast<uint64_t>(piece.rows.begin) * row, t.codes);
    return t;
  }

  /// Elements of a row; a kept tensor's pieces are ranges of elements.
  static uint64_t width(const Piece& piece) {
    return is_encoded(*piece.entry, *piece.found) && !piece.found->shape.empty()
               ? static_cast<uint64_t>(piece.found->shape.back())
               : 1;
  }
  static uint64_t bytes_of(const Piece& piece) {
    const auto rows = static_cast<uint64_t>(piece.rows.end - piece.rows.begin);
    return rows * width(piece) * size_bytes(piece.entry->dtype);
  }

  void check(Piece& piece) const {
    const uint64_t offset = static_cast<uint64_t>(piece.rows.begin) * width(piece) * size_bytes(piece.entry->dtype);
    const size_t size = bytes_of(piece);
    const auto buffer = std::make_unique_for_overwrite<std::byte[]>(size);
    const std::span original(buffer.get(), size);
    source_.read_bytes(*piece.entry, offset, original);
    if (!is_encoded(*piece.entry, *piece.found)) {
      const auto kept = std::make_unique_for_overwrite<std::byte[]>(size);
      written_.read_bytes(*piece.found, offset, std::span(kept.get(), size));
      if (size > 0 && std::memcmp(original.data(), kept.get(), size) != 0)
        verification_failed(piece.entry->name, "its bytes differ from the original's");
      return;
    }
    const QuantizedTensor written = read(piece);
    const Shape& shape = piece.entry->shape;
    if (!piece.found->transposed)
      piece.error = squared_error({piece.entry->dtype, original}, written);
    else
      piece.error = squared_error(
          {piece.entry->dtype, transposed(original, shape[0], shape[1], size_bytes(piece.entry->dtype))}, written);
  }

  void check_layers(const std::vector<LayerResult>& layers) const {
    auto layer = layers.begin();
    for (auto piece = pieces_.begin(); piece != pieces_.end();) {
      const TensorEntry& entry = *piece->entry;
      const bool quantized = is_encoded(entry, *piece->found);
      SquaredError sums;
      for (; piece != pieces_.end() && piece->entry == &entry; ++piece) sums += piece->error;
      if (!quantized) continue;
      const double error = sums.relative();
      if (layer == layers.end() || layer->name != entry.name || layer->relative_error != error || !std::isfinite(error))
        verification_failed(entry.name, fmt::format("reads back with a relative error of {}", error));
      ++layer;
    }
    if (layer != layers.end()) verification_failed(layer->name, "it was quantized and reads back as kept");
  }

  const Checkpoint &source_, &written_;
  std::vector<Piece> pieces_;
};

/// Both models in memory, the written one's file too, and the logits of a window. Measured, of peak memory: 1.2 times
/// for 311 MB of bf16 as int4 and as int8, 1.5 for 8 MB.
uint64_t judging_memory(const Checkpoint& source, const Checkpoint& written) {
  constexpr uint64_t kFixed = uint64_t{32} << 20;
  constexpr uint64_t kLogitCopies = 4;
  uint64_t largest_rows = 0, codes = 0;
  for (const TensorEntry& entry : written.tensors()) {
    if (entry.shape.size() == 2) largest_rows = std::max(largest_rows, static_cast<uint64_t>(entry.shape[0]));
    if (entry.quantized()) codes += static_cast<uint64_t>(element_count(entry.shape));
  }
  return kFixed + source.weight_bytes() + 2 * written.weight_bytes() + codes +
         kLogitCopies * sizeof(float) * static_cast<uint64_t>(kContext) * largest_rows;
}

}  // namespace

void verification_failed(const std::string& where, const std::string& why) {
  throw Error({.code = "verification-failed",
               .what = "the written model is not what was meant",
               .where = where,
               .why = why,
               .fix = "nothing was kept; check the disk and memory, and report this"});
}

uint64_t quantized_piece_memory(int64_t elements, DType dtype) {
  // Stored, widened and decoded values; codes, packed codes, and parameters with what the allocator holds back.
  constexpr uint64_t kOthers = 4 + 4 + 1 + 1 + 2;
  return static_cast<uint64_t>(elements) * (size_bytes(dtype) + kOthers);
}

void verify_tensors(const Checkpoint& source, const Checkpoint& written, const std::vector<LayerResult>& layers,
                    uint64_t piece_memory) {
  ReadBack(source, written, layers).run(layers, piece_memory);
}

std::string why_not_judged(const Checkpoint& source) {
  if (!std::filesystem::is_regular_file(tokenizer_path(source)) && !Tokenizer::exists_in(model_directory(source)))
    return "the model has no tokenizer";
  try {
    const Tokenizer tokenizer(tokenizer_path(source));
    if (const Architecture* architecture = find_architecture(source.config()))
      architecture->configure(source.config(), source.path().string());
  } catch (const Error& e) {
    if (!means_not_runnable(e)) throw;
    return e.what();
  }
  return {};
}

std::optional<Judgement> judge(const Checkpoint& source, const Checkpoint& written, uint64_t most_memory,
                               std::string& reason) {
  try {
    const Tokenizer tokenizer(tokenizer_path(source));
    if (const uint64_t needed = judging_memory(source, written); needed > most_memory) {
      reason = fmt::format("both models at once would take {} of memory, there is {}", format_bytes(needed),
                           format_bytes(most_memory));
      return std::nullopt;
    }
    const Model original(source), quantized(written);
    Judgement j;
    j.protocol.context = std::min(kContext, original.config().context);
    j.protocol.stride = j.protocol.context;
    j.protocol.split = "<|endoftext|>";
    j.protocol.bos = tokenizer.adds_bos() && tokenizer.bos_id() ? Protocol::Bos::document : Protocol::Bos::none;
    j.protocol.max_windows = affordable_windows(source);
    const std::vector<int32_t> tokens = token_stream(tokenizer, bundled_text(), j.protocol);
    j.quality = evaluate(quantized, &original, tokens, j.protocol, tokenizer.bos_id());
    return j;
  } catch (const Error& e) {
    if (!means_not_runnable(e)) throw;
    reason = e.what();
    return std::nullopt;
  }
}

}  // namespace bitwright
