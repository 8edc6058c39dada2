#pragma once

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/json.hpp"
#include "base/output.hpp"
#include "checkpoint/checkpoint.hpp"
#include "checkpoint/safetensors.hpp"
#include "container/rows.hpp"
#include "quantize/journal.hpp"

namespace bitwright {

/// A part of a tensor that is read, worked on and written by itself, by one thread.
struct Piece {
  size_t tensor;    ///< of the source
  RowRange rows;    ///< of a quantized tensor; of a plain one the range of its elements
  uint64_t bytes;   ///< that are read
  uint64_t memory;  ///< taken while it is in work
};
/// Pieces of a tensor that is not quantized: any range of elements.
std::vector<RowRange> element_pieces(const Shape& shape);

/// A part of an array of the output.
struct Slice {
  size_t array;  ///< of its tensor
  uint64_t offset;
  std::vector<std::byte> data;
  uint64_t run = 0, stride = 0;  ///< data lies in the array as runs of `run` bytes, `stride` apart; 0: in one
};
struct Produced {
  std::vector<Slice> slices;
  SquaredError error{};
};

/// All that is needed to write a model tensor by tensor.
struct Job {
  std::string label;                           ///< for progress: "quantizing"
  OrderedJson identity;                        ///< the source and all that decides the bytes, member by member
  std::vector<std::vector<ArraySpec>> arrays;  ///< of each tensor
  std::vector<Piece> pieces;                   ///< in the order of the output
  uint64_t memory = 0;                         ///< held from beginning to end, beside the pieces
  std::function<Produced(const Piece&)> produce;
  std::function<void(const Piece&)> prefetch;
};

/// Finds the lengths of arrays that depend on their values (ArraySpec::sized_by_value): those tensors, of one piece
/// each, are produced once more, for it alone. Are there any?
bool find_sizes(Job& job, std::optional<uint64_t> most_memory);

/// What a run takes, known before it starts.
struct Estimate {
  uint64_t memory_bytes;  ///< at most, at the limit that was set
  uint64_t disk_bytes;    ///< of the output
  double seconds;
  uint64_t piece_memory;  ///< of memory_bytes: for pieces in work
};
/// How much memory a run may take, and what it is refused with. seconds_a_byte: of input, on one thread.
/// Throws Error{"memory-limit"} naming what it would need.
Estimate estimate(const Job& job, uint64_t output_bytes, size_t tensors, double seconds_a_byte,
                  std::optional<uint64_t> most_memory);
OrderedJson to_json(const Estimate& estimate);
/// Says it on stderr. Throws Error{"disk-full"} where `directory` has less room.
void announce(const Estimate& estimate, const std::filesystem::path& directory, uint64_t already_there);

/// Before a run goes on with `directory`: is all there that the journal counts on? Throws Error{"cannot-resume"}. What
/// else an interrupted run left is removed, since it is written anew.
void check_resumable(const Journal& journal, const Job& job, const ShardPlan& shards,
                     const std::filesystem::path& directory);

/// Produces what is not done yet on all threads and writes it. Meanwhile the journal follows what is on stable storage.
/// Returns the error of each piece. Throws what `produce` throws, after what was done is recorded.
std::vector<SquaredError> stream(const Job& job, uint64_t piece_memory, ShardWriter& writer, Journal& journal);

/// Names, sizes and times of the source's files.
OrderedJson source_identity(const Checkpoint& source);
/// Throws Error{"input-changed"} if they are no longer those in `before`.
void check_unchanged(const Checkpoint& source, const OrderedJson& before);

/// Runs `work`; a failure that is neither the input's nor the request's fault keeps what is in `output` and says so.
void resumable(OutputDirectory& output, const std::function<void()>& work);

}  // namespace bitwright
