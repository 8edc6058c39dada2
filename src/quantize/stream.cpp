#include "quantize/stream.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <limits>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <thread>
#include <utility>

#include "base/error.hpp"
#include "base/progress.hpp"
#include "base/size.hpp"
#include "base/threads.hpp"

namespace bitwright {
namespace {

constexpr int64_t kPieceElements = int64_t{1} << 20;
constexpr uint64_t kRecordBytes = uint64_t{64} << 20;  ///< of input, between two records of the journal
constexpr std::chrono::seconds kRecordTime{2};
constexpr uint64_t kProgramMemory = uint64_t{32} << 20;  ///< code, libraries, stacks, allocator
constexpr uint64_t kTensorMemory = uint64_t{12} << 10;   ///< of each tensor: header, recipe, records

/// A thread that records in the journal what the workers have done: first the data is synced, then the line written.
class Recorder {
 public:
  Recorder(const Job& job, ShardWriter& writer, Journal& journal, std::vector<SquaredError>& errors)
      : job_(job), writer_(writer), journal_(journal), errors_(errors), finished_(job.pieces.size(), false) {
    prefix_ = recorded_ = journal.done().size();
    thread_ = std::thread([this] { work(); });
  }
  ~Recorder() { stop(); }
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  /// Throws what went wrong in recording.
  void piece_done(size_t i, SquaredError error) {
    const std::lock_guard lock(mutex_);
    if (failure_) std::rethrow_exception(failure_);
    errors_[i] = error;
    finished_[i] = true;
    for (; prefix_ < finished_.size() && finished_[prefix_]; ++prefix_) unrecorded_bytes_ += job_.pieces[prefix_].bytes;
    if (unrecorded_bytes_ >= kRecordBytes) wake_.notify_one();
  }

  void finish() {
    stop();
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void stop() {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (bool last = false; !last && !failure_;) {
      wake_.wait_for(lock, kRecordTime, [this] { return stopped_ || unrecorded_bytes_ >= kRecordBytes; });
      last = stopped_;
      const size_t end = prefix_;
      unrecorded_bytes_ = 0;
      if (end == recorded_) continue;
      lock.unlock();
      std::exception_ptr failure;
      try {
        writer_.sync_data();
        journal_.record(std::span(errors_).subspan(recorded_, end - recorded_));
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      failure_ = failure;
      recorded_ = end;
    }
  }

  const Job& job_;
  ShardWriter& writer_;
  Journal& journal_;
  std::vector<SquaredError>& errors_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<bool> finished_;
  size_t prefix_, recorded_;  ///< pieces from the start that are done; of those in the journal
  uint64_t unrecorded_bytes_ = 0;
  bool stopped_ = false;
  std::exception_ptr failure_;
  std::thread thread_;
};

uint64_t largest_piece(const Job& job) {
  uint64_t most = 0;
  for (const Piece& piece : job.pieces) most = std::max(most, piece.memory);
  return most;
}

void write_slice(ShardWriter& writer, size_t tensor, const Slice& slice) {
  const std::span<const std::byte> data = slice.data;
  if (slice.run == 0) return writer.write(tensor, slice.array, slice.offset, data);
  for (uint64_t done = 0, at = slice.offset; done < data.size(); done += slice.run, at += slice.stride)
    writer.write(tensor, slice.array, at, data.subspan(done, slice.run));
}

std::string mebibytes(uint64_t bytes) {
  constexpr uint64_t kMebi = uint64_t{1} << 20;
  return fmt::format("{} MiB", (bytes + kMebi - 1) / kMebi);
}

}  // namespace

std::vector<RowRange> element_pieces(const Shape& shape) {
  std::vector<RowRange> pieces;
  const int64_t count = element_count(shape);
  for (int64_t begin = 0; begin < count; begin += kPieceElements)
    pieces.push_back({begin, std::min(count, begin + kPieceElements)});
  return pieces;
}

bool find_sizes(Job& job, std::optional<uint64_t> most_memory) {
  std::vector<const Piece*> unknown;
  for (const Piece& piece : job.pieces)
    if (std::ranges::any_of(job.arrays[piece.tensor], &ArraySpec::sized_by_value)) unknown.push_back(&piece);
  uint64_t most = most_memory.value_or(0);
  for (size_t i = 0; i < unknown.size(); ++i) {
    most = std::max(most, 2 * unknown[i]->memory);
    BW_ASSERT(i == 0 || unknown[i]->tensor != unknown[i - 1]->tensor);
  }
  parallel_within(
      unknown.size(), most, [&](size_t i) { return unknown[i]->memory; },
      [&](size_t i) {
        throw_if_interrupted();
        const Piece& piece = *unknown[i];
        const Produced produced = job.produce(piece);
        for (const Slice& slice : produced.slices) {
          ArraySpec& spec = job.arrays[piece.tensor][slice.array];
          if (spec.sized_by_value) spec.shape = {static_cast<int64_t>(slice.data.size() / size_bytes(spec.dtype))};
        }
      });
  return !unknown.empty();
}

Estimate estimate(const Job& job, uint64_t output_bytes, size_t tensors, double seconds_a_byte,
                  std::optional<uint64_t> most_memory) {
  const uint64_t fixed = kProgramMemory + tensors * kTensorMemory + job.memory, largest = largest_piece(job);
  if (most_memory && *most_memory < fixed + largest)
    throw Error(
        {.code = "memory-limit",
         .what = "cannot keep within --max-memory",
         .why = fmt::format("it would take {}: {} for the program and the list of tensors, {} for the largest part "
                            "of a tensor; allowed are {}",
                            mebibytes(fixed + largest), mebibytes(fixed), mebibytes(largest), mebibytes(*most_memory)),
         .fix = fmt::format("allow {}", mebibytes(fixed + largest))});
  uint64_t bytes = 0, pieces = 0;
  std::vector<uint64_t> memory;
  for (const Piece& piece : job.pieces) {
    bytes += piece.bytes;
    memory.push_back(piece.memory);
  }
  const size_t at_once = std::min(memory.size(), thread_count());
  std::partial_sort(memory.begin(), memory.begin() + static_cast<std::ptrdiff_t>(at_once), memory.end(),
                    std::greater<>());
  for (size_t i = 0; i < at_once; ++i) pieces += memory[i];
  // Tensors that cannot be taken apart: two at once, however many threads there are.
  constexpr uint64_t kUsual = uint64_t{16} << 20;
  pieces = std::min(pieces, std::max(2 * largest, thread_count() * kUsual));
  if (most_memory) pieces = std::min(pieces, *most_memory - fixed);
  return {.memory_bytes = fixed + pieces,
          .disk_bytes = output_bytes,
          .seconds = static_cast<double>(bytes) * seconds_a_byte / static_cast<double>(thread_count()),
          .piece_memory = pieces};
}

OrderedJson to_json(const Estimate& e) {
  return {{"memory_bytes", e.memory_bytes}, {"disk_bytes", e.disk_bytes}, {"seconds", e.seconds}};
}

void announce(const Estimate& e, const std::filesystem::path& directory, uint64_t already_there) {
  if (verbosity() != Verbosity::quiet)
    fmt::print(stderr, "estimate: {} of memory, {} on disk, {}\n", mebibytes(e.memory_bytes),
               format_bytes(e.disk_bytes), format_duration(e.seconds + 1));
  const auto room = free_disk(directory);
  const uint64_t needed = e.disk_bytes - std::min(e.disk_bytes, already_there);
  if (room && *room < needed)
    throw Error({.code = "disk-full",
                 .what = "cannot write output",
                 .where = directory.string(),
                 .why = fmt::format("it needs {}, {} are free there", format_bytes(needed), format_bytes(*room)),
                 .fix = "free some space or choose another place"});
}

void check_resumable(const Journal& journal, const Job& job, const ShardPlan& shards,
                     const std::filesystem::path& directory) {
  const auto refuse = [&](const std::string& why) {
    throw Error({.code = "cannot-resume",
                 .what = "cannot resume",
                 .where = directory.string(),
                 .why = why,
                 .fix = "add --force without --resume to start again"});
  };
  if (journal.done().size() > job.pieces.size())
    refuse(fmt::format("its journal counts {} pieces, there are {}", journal.done().size(), job.pieces.size()));
  std::set<std::string> ours;
  for (const ShardPlan::File& file : shards.files) {
    ours.insert(file.name);
    // Without this, what is missing would be zeros that count as done.
    std::error_code missing;
    const auto size = std::filesystem::file_size(directory / file.name, missing);
    if (!journal.done().empty() && (missing || size != file.bytes))
      refuse(fmt::format("{} is missing, or not as the run left it", file.name));
  }
  std::vector<std::filesystem::path> others;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(".") && !ours.contains(name)) others.push_back(entry.path());
  }
  for (const std::filesystem::path& path : others) std::filesystem::remove_all(path);
}

std::vector<SquaredError> stream(const Job& job, uint64_t piece_memory, ShardWriter& writer, Journal& journal) {
  std::vector<SquaredError> errors(job.pieces.size());
  const size_t first = std::ranges::copy(journal.done(), errors.begin()).in - journal.done().begin();
  uint64_t total = 0;
  for (const Piece& piece : job.pieces) total += piece.bytes;
  Progress progress(job.label, total);
  for (size_t i = 0; i < first; ++i) progress.advance(job.pieces[i].bytes);
  std::mutex progress_mutex;
  Recorder recorder(job, writer, journal, errors);
  parallel_within(
      job.pieces.size() - first, piece_memory, [&](size_t i) { return job.pieces[first + i].memory; },
      [&](size_t i) {
        throw_if_interrupted();
        const Piece& piece = job.pieces[first + i];
        if (const size_t next = first + i + thread_count(); next < job.pieces.size()) job.prefetch(job.pieces[next]);
        const Produced produced = job.produce(piece);
        for (const Slice& slice : produced.slices) write_slice(writer, piece.tensor, slice);
        recorder.piece_done(first + i, produced.error);
        const std::lock_guard lock(progress_mutex);
        progress.advance(piece.bytes);
      });
  recorder.finish();
  return errors;
}

OrderedJson source_identity(const Checkpoint& source) {
  OrderedJson files = OrderedJson::array();
  for (const Checkpoint::File& file : source.files())
    files.push_back({{"file", file.name},
                     {"bytes", file.identity.bytes},
                     {"modified_ns", file.identity.modified_ns},
                     {"header_sha256", file.header_sha256}});
  return files;
}

void check_unchanged(const Checkpoint& source, const OrderedJson& before) {
  if (source_identity(source) == before) return;
  throw Error({.code = "input-changed",
               .what = "cannot read model",
               .where = source.path().string(),
               .why = "its files were changed while they were read",
               .fix = "start again when they are whole"});
}

void resumable(OutputDirectory& output, const std::function<void()>& work) {
  output.keep();
  try {
    work();
  } catch (const Error& error) {
    if (!error.report().resumable) {
      output.discard();
      throw;
    }
    ErrorReport report = error.report();
    report.fix += (report.fix.empty() ? "" : "; ") + std::string("--resume goes on");
    throw Error(report);
  }
}

}  // namespace bitwright
