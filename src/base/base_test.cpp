#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <thread>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/json.hpp"
#include "base/mapped_file.hpp"
#include "base/nearest.hpp"
#include "base/output.hpp"
#include "base/progress.hpp"
#include "base/size.hpp"
#include "base/threads.hpp"
#include "base/utf8.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::read_file;
using test::TemporaryDirectory;
using test::write_file;

std::string code_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.code();
  }
  return "none";
}

TEST(Error, IsOneLine) {
  const Error error(
      {.code = "c", .what = "cannot read", .where = "a\nb", .why = "size 1, not 2", .fix = "fetch again"});
  EXPECT_STREQ(error.what(), "cannot read: a\\x0ab: size 1, not 2; fetch again");
  EXPECT_EQ(error.status(), ExitStatus::failed);
}

/// The nearest of all values that `decode` gives, ties to the even code: the definition of a conversion.
template <class Bits>
uint32_t nearest_by_search(float value, uint32_t codes, float (*decode)(Bits)) {
  uint32_t best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (uint32_t code = 0; code < codes; ++code) {
    const double candidate = decode(static_cast<Bits>(code));
    if (!std::isfinite(candidate) || std::signbit(candidate) != std::signbit(value)) continue;
    const double distance = std::fabs(candidate - static_cast<double>(value));
    if (distance < least || (distance == least && code % 2 == 0)) {
      least = distance;
      best = code;
    }
  }
  return best;
}

TEST(DType, EightBitFloatsRoundToNearestEven) {
  for (uint32_t i = 0; i < 20000; ++i) {
    const float value =
        std::ldexp(static_cast<float>(static_cast<int32_t>(i * 2654435761u)), -31 - static_cast<int>(i % 24) + 12);
    if (std::fabs(value) <= 448) {
      ASSERT_EQ(f32_to_e4m3(value), nearest_by_search<uint8_t>(value, 256, e4m3_to_f32)) << value;
    }
    if (std::fabs(value) <= 57344) {
      ASSERT_EQ(f32_to_e5m2(value), nearest_by_search<uint8_t>(value, 256, e5m2_to_f32)) << value;
    }
  }
  EXPECT_EQ(f32_to_e4m3(464.0f), 0x7e);  // a tie, to even
  EXPECT_EQ(f32_to_e4m3(464.01f), 0x7f);
  EXPECT_EQ(f32_to_e5m2(1e9f), 0x7c);
}

TEST(DType, HalvesRoundTripAndRoundToEven) {
  for (uint32_t code = 0; code < 65536; ++code) {
    const auto bits = static_cast<uint16_t>(code);
    if (std::isnan(f16_to_f32(bits))) continue;
    ASSERT_EQ(f32_to_f16(f16_to_f32(bits)), bits);
    if (!std::isnan(bf16_to_f32(bits))) {
      ASSERT_EQ(f32_to_bf16(bf16_to_f32(bits)), bits);
    }
    if (bits < 0x7bff) {  // halfway to the next goes to the even one, a little more goes up
      const float halfway = (f16_to_f32(bits) + f16_to_f32(static_cast<uint16_t>(bits + 1))) / 2;
      ASSERT_EQ(f32_to_f16(halfway), bits % 2 == 0 ? bits : bits + 1);
      ASSERT_EQ(f32_to_f16(std::nextafter(halfway, 1e9f)), bits + 1);
    }
  }
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(NAN))));
  EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(DType, PowersOfTwo) {
  for (uint32_t code = 0; code < 255; ++code) {
    EXPECT_EQ(f32_to_e8m0(e8m0_to_f32(static_cast<uint8_t>(code))), code);
  }
  EXPECT_TRUE(std::isnan(e8m0_to_f32(255)));
}

TEST(DType, IntegersSaturate) {
  EXPECT_EQ(round_to(DType::i8, 200.0f), 127.0f);
  EXPECT_EQ(round_to(DType::i8, -2.5f), -2.0f);
  EXPECT_EQ(round_to(DType::u8, -3.0f), 0.0f);
  EXPECT_EQ(round_to(DType::i64, std::numeric_limits<float>::infinity()), 9223372036854775807.0f);
}

TEST(DType, ElementCountRefusesOverflow) {
  EXPECT_EQ(checked_element_count({2, 3}), 6);
  EXPECT_EQ(checked_element_count({}), 1);
  EXPECT_FALSE(checked_element_count({int64_t{1} << 32, int64_t{1} << 32}));
  EXPECT_FALSE(checked_element_count({-1}));
  EXPECT_EQ(checked_element_count({5, 0}), 0);
  EXPECT_FALSE(checked_element_count({int64_t{1} << 62, 0, 4}));
}

TEST(Json, RefusesWhatIsNotStrict) {
  EXPECT_EQ(parse_json("{\"a\": [1, 2]}", "x")["a"][1], 2);
  for (const std::string text :
       {"", "{", "{\"a\":1,}", "{\"a\":1,\"a\":2}", "// c\n{}", "\"\xff\"", "nul", "1e999", "[1e999]"})
    EXPECT_EQ(code_of([&] { parse_json(text, "x"); }), "bad-json") << text;
  EXPECT_EQ(code_of([] { parse_json(std::string(200, '[') + std::string(200, ']'), "x"); }), "bad-json");
  EXPECT_TRUE(is_utf8("a…"));
  EXPECT_FALSE(is_utf8("a\xff"));
  EXPECT_EQ(parse_json("{\"a\":{\"b\":1},\"c\":{\"b\":2}}", "x").size(), 2u);  // the same name in two objects
}

TEST(Threads, EachIndexOnceAndErrorsArrive) {
  std::vector<std::atomic<int>> hits(1000);
  parallel_for(hits.size(), [&](size_t i) { ++hits[i]; });
  for (const auto& hit : hits) EXPECT_EQ(hit, 1);
  EXPECT_EQ(code_of([] {
              parallel_for(100, [](size_t i) {
                if (i == 57) throw Error({.code = "boom"});
              });
            }),
            "boom");
  std::atomic<size_t> sum = 0;  // usable again after an error, and from inside itself
  parallel_for(10, [&](size_t) { parallel_ranges(10, 3, [&](size_t begin, size_t end) { sum += end - begin; }); });
  EXPECT_EQ(sum, 100u);
}

TEST(Threads, DigestsLeaveNothingBehind) {  // at exit: the leak detector's business
  std::atomic<size_t> inside = 0;
  parallel_for(thread_count(), [&](size_t) {
    ++inside;
    while (inside < thread_count()) std::this_thread::yield();  // so that each thread has its share
    EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  });
}

TEST(Threads, ManyShortCallsLoseNothing) {
  std::vector<size_t> values(64);
  for (size_t round = 0; round < 2000; ++round) parallel_for(values.size(), [&](size_t i) { values[i] += i; });
  EXPECT_EQ(std::accumulate(values.begin(), values.end(), size_t{0}), 2000u * 63 * 64 / 2);
}

TEST(Threads, EveryPieceOfBytesIsWritten) {
  const size_t before = thread_count();
  for (const size_t threads : {1u, 3u}) {
    set_thread_count(threads);
    for (const size_t total : {0u, 1u, 99u, 100u, 1001u}) {
      const auto bytes = parallel_bytes(total, 100, [](size_t begin, size_t end, std::byte* all) {
        for (size_t i = begin; i < end; ++i) all[i] = static_cast<std::byte>(all[i] == std::byte{0} ? i % 251 : 255);
      });
      ASSERT_EQ(bytes.size(), total);
      for (size_t i = 0; i < total; ++i) ASSERT_EQ(std::to_integer<size_t>(bytes[i]), i % 251);
    }
  }
  set_thread_count(before);
}

TEST(Threads, WeightsStayWithinTheBudget) {
  constexpr uint64_t kBudget = 10;
  const auto weight = [](size_t i) { return i % 50 == 7 ? uint64_t{25} : i % 4; };  // some are too heavy for it
  std::vector<std::atomic<int>> hits(500);
  std::atomic<uint64_t> used = 0;
  std::atomic<bool> over = false;
  parallel_within(hits.size(), kBudget, weight, [&](size_t i) {
    const uint64_t with = used += weight(i);
    if (weight(i) != 0 && with > kBudget && with != weight(i)) over = true;  // what weighs nothing may always run
    std::this_thread::yield();
    ++hits[i];
    used -= weight(i);
  });
  for (const auto& hit : hits) EXPECT_EQ(hit, 1);
  EXPECT_FALSE(over);
  std::atomic<int> started = 0;
  EXPECT_EQ(code_of([&] {
              parallel_within(1000, kBudget, weight, [&](size_t i) {
                ++started;
                if (i == 5) throw Error({.code = "boom"});
              });
            }),
            "boom");
  EXPECT_LT(started, 1000);
}

TEST(Size, ParsesWhatPeopleWrite) {
  EXPECT_EQ(parse_size("4096"), 4096u);
  EXPECT_EQ(parse_size("8GiB"), uint64_t{8} << 30);
  EXPECT_EQ(parse_size("500 MB"), 500'000'000u);
  EXPECT_EQ(parse_size("1.5k"), 1536u);
  EXPECT_EQ(parse_size("5gb"), 5'000'000'000u);
  for (const char* bad : {"", "GB", "-1", "1e3", "8 GiBs", "nan", "inf", "99999999TiB", "1 000"})
    EXPECT_EQ(parse_size(bad), std::nullopt) << bad;
  EXPECT_GT(available_memory(), 0u);
  EXPECT_GT(peak_memory(), uint64_t{1} << 20);
  EXPECT_GT(free_disk("."), 0u);
  EXPECT_EQ(free_disk("/no/such/place"), std::nullopt);
}

TEST(Output, AnUnfinishedRunIsKeptAndResumed) {
  const TemporaryDirectory dir;
  const auto target = dir / "out", staging = dir / ".out.partial";
  {
    OutputDirectory output(target, Existing::resume);  // nothing to resume: starts
    EXPECT_TRUE(read_file(output.journal()).empty());
    EXPECT_TRUE(is_unfinished(output.staging()));
    output.keep();
    write_file(output.journal(), "{}\n");
    write_file(output.staging() / "half", "1");
  }
  EXPECT_EQ(read_file(staging / "half"), "1");
  EXPECT_TRUE(is_unfinished(staging));
  EXPECT_EQ(code_of([&] { OutputDirectory(target, Existing::refuse); }), "output-unfinished");
  EXPECT_EQ(read_file(staging / "half"), "1");
  {
    OutputDirectory output(target, Existing::resume);
    EXPECT_EQ(read_file(output.journal()), "{}\n");
    EXPECT_EQ(read_file(output.staging() / "half"), "1");
    output.commit();
  }
  EXPECT_FALSE(std::filesystem::exists(staging));
  EXPECT_FALSE(is_unfinished(target));
  EXPECT_EQ(test::files_in(target).size(), 1u);  // no journal
}

TEST(Output, AJournalIsEmptiedBeforeItsFilesGo) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may remove anything";
  const TemporaryDirectory dir;
  const auto target = dir / "out", staging = dir / ".out.partial";
  std::filesystem::create_directories(staging / "locked/in");
  write_file(staging / ".bitwright-partial", "{}\n");
  std::filesystem::permissions(staging / "locked", std::filesystem::perms::owner_read);
  EXPECT_ANY_THROW(OutputDirectory(target, Existing::replace));  // stopped while it clears
  EXPECT_EQ(read_file(staging / ".bitwright-partial"), "");
  std::filesystem::permissions(staging / "locked", std::filesystem::perms::owner_all);
}

TEST(Output, KilledWhileItGetsItsName) {
  const TemporaryDirectory dir;
  const auto target = dir / "out", staging = dir / ".out.partial";
  // Complete, not yet renamed: it can still be resumed, and is not taken for a model.
  std::filesystem::create_directory(staging);
  write_file(staging / ".bitwright-complete", "{}\n");
  EXPECT_TRUE(is_unfinished(staging));
  EXPECT_EQ(code_of([&] { OutputDirectory(target, Existing::refuse); }), "output-unfinished");
  { OutputDirectory(target, Existing::resume).commit(); }
  EXPECT_TRUE(std::filesystem::exists(target));
  // Exchanged with an old one, which is not yet removed.
  write_file(target / ".bitwright-complete", "{}\n");
  write_file(target / "config.json", "{}");
  write_file(target / "model.safetensors", "");
  std::filesystem::create_directory(staging);
  write_file(staging / "config.json", "old");
  EXPECT_FALSE(is_unfinished(target));
  EXPECT_EQ(code_of([&] { OutputDirectory(target, Existing::resume); }), "output-exists");
  EXPECT_FALSE(std::filesystem::exists(staging));
  EXPECT_EQ(test::files_in(target).size(), 2u);
}

TEST(Output, DirectoryAppearsWholeOrNotAtAll) {
  const TemporaryDirectory dir;
  const auto target = dir / "out";
  {
    OutputDirectory output(target, Existing::refuse);
    write_text_file(output.staging() / "a", "1");
    EXPECT_FALSE(std::filesystem::exists(target));
    EXPECT_EQ(code_of([&] { OutputDirectory(target, Existing::refuse); }), "output-busy");
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
  {
    OutputDirectory output(target, Existing::refuse);
    write_text_file(output.staging() / "a", "2");
    output.commit();
  }
  EXPECT_EQ(read_file(target / "a"), "2");
  EXPECT_EQ(code_of([&] { OutputDirectory(target, Existing::refuse); }), "output-exists");
  EXPECT_EQ(code_of([&] { OutputDirectory(target, Existing::replace); }),
            "output-exists");  // not a model: never replaced
  write_file(target / "config.json", "{}");
  write_file(target / "model.safetensors", "");
  {
    OutputDirectory output(target, Existing::replace);
    write_text_file(output.staging() / "b", "3");
    output.commit();
  }
  EXPECT_EQ(read_file(target / "b"), "3");
  EXPECT_FALSE(std::filesystem::exists(target / "a"));
  EXPECT_EQ(code_of([&] { OutputDirectory(dir / "no/such/parent", Existing::refuse); }), "cannot-write");
}

TEST(Output, StagingThatIsNotOursIsLeftAlone) {
  const TemporaryDirectory dir;
  std::filesystem::create_directory(dir / "victim");
  write_file(dir / "victim/file", "precious");
  std::filesystem::create_directory_symlink(dir / "victim", dir / ".out.partial");
  EXPECT_EQ(code_of([&] { OutputDirectory(dir / "out", Existing::refuse); }), "output-busy");
  std::filesystem::rename(dir / "victim", dir / ".other.partial");
  EXPECT_EQ(code_of([&] { OutputDirectory(dir / "other", Existing::refuse); }), "output-busy");
  EXPECT_EQ(read_file(dir / ".other.partial/file"), "precious");
  write_file(dir / ".other.partial/.bitwright-partial", "");  // what a killed run leaves
  OutputDirectory output(dir / "other", Existing::refuse);
  EXPECT_FALSE(std::filesystem::exists(output.staging() / "file"));
}

TEST(Output, FullDiskIsAnError) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP();
  OutputFile file("/dev/full");
  EXPECT_EQ(code_of([&] { file.write("x"); }), "cannot-write");
}

TEST(MappedFile, ReadsAndRefuses) {
  const TemporaryDirectory dir;
  write_file(dir / "a", "abc");
  write_file(dir / "empty", "");
  EXPECT_EQ(MappedFile(dir / "a").text(), "abc");
  EXPECT_TRUE(MappedFile(dir / "empty").bytes().empty());
  EXPECT_EQ(code_of([&] { MappedFile(dir.path()); }), "cannot-open");
  EXPECT_EQ(code_of([&] { MappedFile(dir / "none"); }), "cannot-open");
  ASSERT_EQ(::mkfifo((dir / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(code_of([&] { MappedFile(dir / "pipe"); }), "cannot-open");
  EXPECT_EQ(sha256(std::string_view("abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(MappedFile, AFileThatShrankIsAnError) {
  const TemporaryDirectory dir;
  write_file(dir / "a", std::string(10'000, 'x'));
  const MappedFile file(dir / "a");
  std::vector<std::byte> out(5'000);
  file.read(file.bytes().subspan(5'000), out);
  EXPECT_EQ(out.back(), std::byte{'x'});
  EXPECT_EQ(file.digest(), sha256(std::string(10'000, 'x')));
  const FileIdentity before = file.identity();
  std::filesystem::resize_file(dir / "a", 6'000);
  EXPECT_NE(file.identity(), before);
  EXPECT_EQ(code_of([&] { file.read(file.bytes().subspan(5'000), out); }), "input-changed");
  EXPECT_EQ(code_of([&] { file.digest(); }), "input-changed");
}

TEST(MappedFileDeathTest, TouchingOneIsOneLine) {
  const TemporaryDirectory dir;
  write_file(dir / "a", std::string(10'000, 'x'));
  const MappedFile file(dir / "a");
  std::filesystem::resize_file(dir / "a", 0);
  EXPECT_EXIT(
      {
        install_bus_error_handler();
        volatile std::byte touched = file.bytes()[9'000];
        static_cast<void>(touched);
      },
      ::testing::ExitedWithCode(1), "^error: cannot read input: .* shrank, .*\n$");
}

TEST(Nearest, SuggestsOrLists) {
  const std::vector<std::string> known = {"group_size", "bits"};
  EXPECT_EQ(suggest("groupsize", known), "did you mean 'group_size'?");
  EXPECT_EQ(suggest("temperature", known), "valid: group_size, bits");
}

TEST(Progress, Figures) {
  EXPECT_EQ(remaining_seconds(25, 100, 10), 30);
  EXPECT_EQ(format_duration(3725), "1h02m");
  EXPECT_EQ(format_duration(190), "3m10s");
  EXPECT_EQ(format_bytes(8397648), "8.40 MB");
}

}  // namespace
}  // namespace bitwright
