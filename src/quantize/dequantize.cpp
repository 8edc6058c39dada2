#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "base/size.hpp"
#include "kernels/decode.hpp"
#include "quantize/model_files.hpp"
#include "quantize/quantize.hpp"
#include "quantize/stream.hpp"
#include "quantize/write_output.hpp"
#include "scheme/transposed.hpp"

namespace bitwright {
namespace {

constexpr double kSecondsAByte = 1 / 0.5e9;  ///< of input, on one thread of a common machine

bool becomes_float(const TensorEntry& entry) { return entry.quantized() || info(entry.dtype).is_float; }

/// Damaged weights, and weights too large for the type asked for, do not leave unnoticed.
void check_finite(const std::string& name, DType dtype, std::span<const std::byte> bytes, int64_t first) {
  const auto bad = find_non_finite({dtype, bytes});
  if (!bad) return;
  throw Error({.code = "not-finite",
               .what = "cannot dequantize",
               .where = fmt::format("tensor '{}'", printable(name)),
               .why = fmt::format("element {} would be {} as {}", first + static_cast<int64_t>(bad->position),
                                  bad->value, info(dtype).name),
               .fix = "the weights are damaged, or too large for the type: try --dtype float32"});
}

/// Plain floats from any model, piece by piece.
class Plain {
 public:
  Plain(const Checkpoint& source, DType dtype) : source_(source), dtype_(dtype) {}

  Job job() const {
    Job job = {.label = "dequantizing",
               .identity = {{"command", "dequantize"}, {"dtype", info(dtype_).name}},
               .arrays = {},
               .pieces = {},
               .produce = [this](const Piece& piece) { return produce(piece); },
               .prefetch = [](const Piece&) {}};
    std::string schemes;  // of some containers config.json says how the bytes are read
    for (const TensorEntry& entry : source_.tensors()) {
      schemes += fmt::format("{} {}\n", entry.name, entry.quantized() ? to_json(entry.scheme).dump() : "plain");
      const size_t i = job.arrays.size();
      Shape shape = entry.shape;
      if (entry.transposed) std::swap(shape[0], shape[1]);
      job.arrays.push_back({{entry.name, becomes_float(entry) ? dtype_ : entry.dtype, std::move(shape)}});
      for (const RowRange rows : entry.quantized() ? source_.row_pieces(entry) : element_pieces(entry.shape)) {
        const auto elements = static_cast<uint64_t>((rows.end - rows.begin) * width(entry));
        // Codes packed and not, floats, and what they become.
        const uint64_t memory = elements * (2 + sizeof(float) + size_bytes(dtype_) + size_bytes(entry.dtype));
        job.pieces.push_back({.tensor = i, .rows = rows, .bytes = elements * size_bytes(dtype_), .memory = memory});
      }
    }
    job.identity["recipe"] = sha256(schemes);
    return job;
  }

 private:
  static int64_t width(const TensorEntry& entry) {
    return entry.quantized() && !entry.shape.empty() ? entry.shape.back() : 1;
  }

  Produced produce(const Piece& piece) const {
    const TensorEntry& entry = source_.tensors()[piece.tensor];
    const int64_t first = piece.rows.begin * width(entry);
    const auto elements = static_cast<size_t>((piece.rows.end - piece.rows.begin) * width(entry));
    const size_t width_bytes = size_bytes(becomes_float(entry) ? dtype_ : entry.dtype);
    std::vector<std::byte> bytes;
    if (entry.quantized()) {
      bytes = decoded(source_.read_rows(entry, piece.rows.begin, piece.rows.end), elements);
    } else {
      bytes.resize(elements * size_bytes(entry.dtype));
      source_.read_bytes(entry, static_cast<uint64_t>(first) * size_bytes(entry.dtype), bytes);
      if (becomes_float(entry)) {
        std::vector<float> values(elements);
        to_f32(entry.dtype, bytes, values);
        bytes.resize(elements * width_bytes);
        from_f32(dtype_, values, bytes);
      }
    }
    if (becomes_float(entry)) check_finite(entry.name, dtype_, bytes, first);
    if (entry.transposed) bytes = transposed(bytes, entry.shape[0], entry.shape[1], width_bytes);
    Produced produced;
    produced.slices.push_back(
        {.array = 0, .offset = static_cast<uint64_t>(first) * width_bytes, .data = std::move(bytes)});
    return produced;
  }

  /// A few values at a time, which stay in the first-level cache while they are rounded.
  std::vector<std::byte> decoded(const QuantizedTensor& tensor, size_t elements) const {
    const RangeDecoder decoder(tensor);
    const size_t bytes_each = size_bytes(dtype_);
    std::vector<std::byte> bytes(elements * bytes_each);
    std::array<float, 4096> values;
    for (size_t begin = 0; begin < elements; begin += values.size()) {
      const auto some = std::span(values).first(std::min(values.size(), elements - begin));
      decoder.decode(static_cast<int64_t>(begin), some);
      from_f32(dtype_, some, std::span(bytes).subspan(begin * bytes_each, some.size() * bytes_each));
    }
    return bytes;
  }

  const Checkpoint& source_;
  DType dtype_;
};

void write_config(const Checkpoint& source, const std::filesystem::path& directory, DType dtype) {
  OrderedJson config = read_config(source);
  drop_quantization(config);
  for (const char* key : {"torch_dtype", "dtype"})
    if (config.contains(key)) config[key] = info(dtype).name;
  write_text_file(directory / "config.json", config.dump(2) + "\n");
}

}  // namespace

OrderedJson dequantize(const Checkpoint& source, const OutputOptions& options, DType dtype) {
  check_apart(source, options.output);
  for (const TensorEntry& entry : source.tensors()) source.require_decoded(entry);
  const Plain plain(source, dtype);
  Job job = plain.job();
  const ShardPlan shards = plan_shards(job.arrays, options.shard_bytes());
  const uint64_t bytes = shards.bytes();
  const Estimate expected = estimate(job, bytes, source.tensors().size(), kSecondsAByte, options.max_memory);
  const auto finish = [&](const std::filesystem::path& staging, std::span<const SquaredError> /*errors*/) {
    write_config(source, staging, dtype);
  };
  write_output(source, job, shards, expected, options, {.finish = finish});
  return {{"output", options.output.string()},
          {"dtype", info(dtype).name},
          {"bytes", bytes},
          {"estimate", to_json(expected)},
          {"peak_memory_bytes", peak_memory()}};
}

}  // namespace bitwright
