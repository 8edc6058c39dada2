#include "quantize/stream.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::read_file;
using test::TemporaryDirectory;
using test::write_file;

constexpr size_t kPieces = 400, kPieceBytes = 64;

/// One tensor of many pieces, each filled with its number. fail_at: where produce throws.
Job job_of(std::atomic<size_t>& produced, size_t fail_at = kPieces) {
  Job job = {
      .label = "",
      .identity = {{"recipe", "x"}},
      .arrays = {{{"a", DType::u8, {kPieces * kPieceBytes}}}},
      .pieces = {},
      .produce =
          [&produced, fail_at](const Piece& piece) {
            const auto i = static_cast<size_t>(piece.rows.begin);
            if (i == fail_at) throw Error({.code = "boom", .what = "boom", .resumable = true});
            ++produced;
            Produced result = {.slices = {}, .error = {.difference = 1.0 / static_cast<double>(i + 3), .norm = 2}};
            result.slices.push_back(
                {.array = 0, .offset = i * kPieceBytes, .data = std::vector(kPieceBytes, static_cast<std::byte>(i))});
            return result;
          },
      .prefetch = [](const Piece&) {}};
  for (int64_t i = 0; i < int64_t{kPieces}; ++i)
    job.pieces.push_back({.tensor = 0, .rows = {i, i + 1}, .bytes = size_t{1} << 20, .memory = 1});
  return job;
}

std::vector<SquaredError> run(const Job& job, const TemporaryDirectory& dir) {
  Journal journal(dir / "journal", job.identity);
  ShardWriter writer(dir.path(), plan_shards(job.arrays, 1 << 20));
  std::vector<SquaredError> errors = stream(job, 1000, writer, journal);
  writer.finish();
  return errors;
}

TEST(StreamThreads, AFailureIsResumedToTheSame) {
  std::atomic<size_t> produced = 0;
  const TemporaryDirectory whole, broken;
  write_file(whole / "journal", "");
  const std::vector<SquaredError> expected = run(job_of(produced), whole);
  EXPECT_EQ(produced, kPieces);
  write_file(broken / "journal", "");
  for (const size_t fail_at : {5u, 150u, 390u}) {
    EXPECT_THROW(run(job_of(produced, fail_at), broken), Error);
    // All before the failure was done and is recorded before the error leaves; what lies after the hole does not count.
    EXPECT_EQ(Journal(broken / "journal", {{"recipe", "x"}}).done().size(), fail_at);
  }
  produced = 0;
  const std::vector<SquaredError> errors = run(job_of(produced), broken);
  EXPECT_EQ(produced, kPieces - 390);
  for (size_t i = 0; i < kPieces; ++i) {
    EXPECT_EQ(errors[i].difference, expected[i].difference);
    EXPECT_EQ(errors[i].norm, expected[i].norm);
  }
  EXPECT_EQ(read_file(broken / "model.safetensors"), read_file(whole / "model.safetensors"));
}

TEST(Resume, NeedsWhatTheJournalCountsOn) {
  std::atomic<size_t> produced = 0;
  const TemporaryDirectory dir;
  write_file(dir / ".journal", "");
  const Job job = job_of(produced, 150);
  const ShardPlan shards = plan_shards(job.arrays, 1 << 20);
  const auto check = [&](size_t pieces = kPieces) {
    Job fewer = job;
    fewer.pieces.resize(pieces);
    try {
      check_resumable(Journal(dir / ".journal", job.identity), fewer, shards, dir.path());
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), "cannot-resume");
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(check(), "");  // nothing is done: nothing is needed
  {
    Journal journal(dir / ".journal", job.identity);
    ShardWriter writer(dir.path(), shards);
    EXPECT_THROW(stream(job, 1000, writer, journal), Error);
  }
  write_file(dir / "tokenizer.json", "of a model that has none any more");
  EXPECT_EQ(check(), "");
  EXPECT_EQ(test::files_in(dir.path()).size(), 2u);  // the journal and the weights
  EXPECT_NE(check(149).find("its journal counts 150 pieces, there are 149"), std::string::npos);
  const std::string whole = read_file(dir / "model.safetensors");
  for (const auto& damage :
       {std::optional(whole.substr(1)), std::optional(whole + "x"), std::optional<std::string>()}) {
    std::filesystem::remove(dir / "model.safetensors");
    if (damage) write_file(dir / "model.safetensors", *damage);
    EXPECT_NE(check().find("model.safetensors is missing, or not as the run left it"), std::string::npos);
  }
}

TEST(Journal, ATornOrStrangeEndIsIgnored) {
  const TemporaryDirectory dir;
  const auto path = dir / "journal";
  const OrderedJson header = {{"tool", "1"}, {"recipe", "abc"}};
  write_file(path, "");
  {
    Journal journal(path, header);
    journal.record(std::vector<SquaredError>{{0.1, 2}, {1e-300, 3}});
    journal.record(std::vector<SquaredError>{{0.3, 4}});
  }
  const std::string whole = read_file(path);
  const size_t second = whole.rfind("{");
  for (size_t cut = 0; cut < whole.size(); ++cut) {
    write_file(path, whole.substr(0, cut));
    Journal journal(path, header);
    const size_t lines = static_cast<size_t>(std::ranges::count(whole.substr(0, cut), '\n'));
    const size_t done = lines < 2 ? 0 : 2;
    ASSERT_EQ(journal.done().size(), done) << cut;
    journal.record(std::vector<SquaredError>{{0.5, 1}});  // a new line is not glued to a torn one
    ASSERT_EQ(Journal(path, header).done().size(), done + 1) << cut;
  }
  for (const char* tail :
       {"\0\0\0\0", "{\"done\": 9, \"errors\": []}\n", "{\"done\": 4, \"errors\": [[1]]}\n", "[]\n"}) {
    write_file(path, whole + tail);
    EXPECT_EQ(Journal(path, header).done().size(), 3u) << tail;
  }
  EXPECT_EQ(Journal(path, header).done()[1].difference, 1e-300);
  EXPECT_LT(second, whole.size());
}

TEST(Journal, AnotherRunIsRefusedWithTheReason) {
  const TemporaryDirectory dir;
  write_file(dir / "journal", "");
  Journal(dir / "journal", {{"tool", "0.1.0"}, {"recipe", "abc"}});
  const auto message = [&](const OrderedJson& header) {
    try {
      Journal(dir / "journal", header);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), "cannot-resume");
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message({{"tool", "0.1.0"}, {"recipe", "abc"}}), "");
  EXPECT_NE(message({{"tool", "0.2.0"}, {"recipe", "abc"}}).find("the tool was 0.1.0 and is 0.2.0"), std::string::npos);
  EXPECT_NE(message({{"tool", "0.1.0"}, {"recipe", "abd"}}).find("the recipe was abc"), std::string::npos);
}

TEST(Estimate, LimitsAreKeptOrRefused) {
  std::atomic<size_t> produced = 0;
  Job job = job_of(produced);
  for (Piece& piece : job.pieces) piece.memory = uint64_t{20} << 20;
  const Estimate free = estimate(job, 100, 1, 1e-9, std::nullopt);
  EXPECT_EQ(free.piece_memory, std::min<uint64_t>(thread_count(), 16) * (uint64_t{20} << 20));
  const Estimate tight = estimate(job, 100, 1, 1e-9, free.memory_bytes - free.piece_memory + (uint64_t{21} << 20));
  EXPECT_EQ(tight.piece_memory, uint64_t{21} << 20);
  try {
    estimate(job, 100, 1, 1e-9, uint64_t{40} << 20);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), "memory-limit");
    const uint64_t needed = free.memory_bytes - free.piece_memory + (uint64_t{20} << 20);
    EXPECT_NE(std::string(error.what()).find(std::to_string((needed >> 20) + 1) + " MiB"), std::string::npos);
  }
  EXPECT_THROW(announce({.memory_bytes = 0, .disk_bytes = uint64_t{1} << 60, .seconds = 1, .piece_memory = 0}, ".", 0),
               Error);
}

}  // namespace
}  // namespace bitwright
