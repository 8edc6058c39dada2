#include "checkpoint/imatrix.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <limits>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/gguf.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::TemporaryDirectory;

/// Two matrices, one of them a stack of three of which the second saw nothing.
Imatrix example() {
  Imatrix out = {.datasets = {"text.txt"}, .chunks = 2, .chunk_size = 8};
  out.entries["blk.0.attn_q.weight"] = {.sums = {16, 32, 4, 0}, .counts = {16}};
  out.entries["blk.0.ffn_up_exps.weight"] = {.sums = {9, 3, 0, 0, 14, 7}, .counts = {9, 0, 7}};
  return out;
}

std::string written(const Imatrix& imatrix, ImatrixForm form) {
  const TemporaryDirectory dir;
  write_imatrix(imatrix, dir / "file", form);
  return read_text_file(dir / "file");
}

Imatrix parsed(std::string_view bytes) { return parse_imatrix(std::as_bytes(std::span(bytes)), "test"); }

std::vector<float> means(const Imatrix& imatrix, const char* name) {
  const InputSquares& entry = imatrix.entries.find(name)->second;
  return mean_squares(entry, 0, entry.sums.size());
}

TEST(Imatrix, KeepsSumsAndCountsAsGguf) {
  const std::string bytes = written(example(), ImatrixForm::gguf);
  const Imatrix read = parsed(bytes);
  EXPECT_EQ(read.datasets, example().datasets);
  EXPECT_EQ(read.chunks, 2u);
  EXPECT_EQ(read.chunk_size, 8u);
  ASSERT_EQ(read.entries.size(), 2u);
  for (const auto& [name, entry] : example().entries) {
    EXPECT_EQ(read.entries.find(name)->second.sums, entry.sums);
    EXPECT_EQ(read.entries.find(name)->second.counts, entry.counts);
  }
  EXPECT_EQ(written(read, ImatrixForm::gguf), bytes);
}

TEST(Imatrix, MeansAreOneWhereNothingWasSeen) {
  for (const ImatrixForm form : {ImatrixForm::gguf, ImatrixForm::dat}) {
    const Imatrix read = parsed(written(example(), form));
    EXPECT_EQ(means(read, "blk.0.attn_q.weight"), (std::vector<float>{1, 2, 0.25, 0}));
    EXPECT_EQ(means(read, "blk.0.ffn_up_exps.weight"), (std::vector<float>{1, 1.0f / 3, 1, 1, 2, 1}));
  }
}

// i32 entries; i32 length, name, i32 pieces, i32 values, values; i32 pieces, i32 length, text's name.
TEST(Imatrix, OlderFormIsLlamaCpps) {
  Imatrix imatrix = {.datasets = {"first", "t"}, .chunks = 3, .chunk_size = 8};
  imatrix.entries["ab"] = {.sums = {17, 34}, .counts = {17}};  // 17 tokens: three pieces of 8, the last one not full
  imatrix.entries["nothing"] = {.sums = {0}, .counts = {0}};
  std::string expected("\1\0\0\0\2\0\0\0ab\3\0\0\0\2\0\0\0", 18);
  for (const float v : {3.0f, 6.0f}) {
    char bytes[sizeof v];
    std::memcpy(bytes, &v, sizeof v);
    expected.append(bytes, sizeof v);
  }
  expected.append("\3\0\0\0\1\0\0\0t", 9);
  EXPECT_EQ(written(imatrix, ImatrixForm::dat), expected);
  const Imatrix read = parsed(expected);
  EXPECT_EQ(read.chunks, 3u);
  EXPECT_EQ(read.datasets, std::vector<std::string>{"t"});
  EXPECT_EQ(written(read, ImatrixForm::dat), expected);
}

TEST(Imatrix, OlderFormMayEndAfterTheEntries) {
  const std::string bytes = written(example(), ImatrixForm::dat), tail("\2\0\0\0\10\0\0\0text.txt", 16);
  ASSERT_TRUE(bytes.ends_with(tail));
  const std::string cut = bytes.substr(0, bytes.size() - tail.size());
  EXPECT_EQ(parsed(cut).entries.size(), 2u);
  EXPECT_EQ(parsed(cut + tail.substr(0, 4)).chunks, 2u);
}

TEST(Imatrix, EveryTruncationIsRefused) {
  for (const ImatrixForm form : {ImatrixForm::gguf, ImatrixForm::dat}) {
    const std::string bytes = written(example(), form);
    const size_t tail = form == ImatrixForm::dat ? 16 : 0;
    for (size_t size = 0; size < bytes.size(); ++size) {
      // Complete files: see above. Of GGUF the padding after the last numbers does not matter.
      if (tail != 0 && (size == bytes.size() - tail || size == bytes.size() - tail + 4)) continue;
      if (tail == 0 && size >= bytes.size() - 20) continue;
      EXPECT_THROW(parsed(bytes.substr(0, size)), Error) << size;
    }
    if (tail != 0) EXPECT_THROW(parsed(bytes + '\0'), Error);
  }
}

TEST(Imatrix, NumbersThatMeanNothingAreRefused) {
  const auto refused = [](const std::function<void(Imatrix&)>& change) {
    Imatrix imatrix = example();
    change(imatrix);
    for (const ImatrixForm form : {ImatrixForm::gguf, ImatrixForm::dat}) {
      try {
        parsed(written(imatrix, form));
        ADD_FAILURE() << "read";
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), "bad-imatrix") << error.what();
      }
    }
  };
  refused([](Imatrix& i) { i.entries.clear(); });
  refused([](Imatrix& i) { i.entries["blk.0.attn_q.weight"].sums[1] = -1; });
  refused([](Imatrix& i) { i.entries["blk.0.attn_q.weight"].sums[1] = std::numeric_limits<float>::quiet_NaN(); });
  refused([](Imatrix& i) { i.entries["blk.0.attn_q.weight"].sums[1] = std::numeric_limits<float>::infinity(); });
}

TEST(Imatrix, TensorsThatDoNotBelongTogetherAreRefused) {
  const TemporaryDirectory dir;
  const auto file = [&](const std::vector<ArraySpec>& specs) {
    GgufWriter writer(dir / "file", GgufMetadata(), specs);
    for (const ArraySpec& spec : specs) writer.add(std::vector<std::byte>(spec.bytes()));
    writer.finish();
    return read_text_file(dir / "file");
  };
  EXPECT_NO_THROW(parsed(file({{"a.in_sum2", DType::f32, {6}}, {"a.counts", DType::f32, {2, 1}}})));
  EXPECT_THROW(parsed(file({{"a.in_sum2", DType::f32, {6}}, {"a.counts", DType::f32, {4, 1}}})), Error);
  EXPECT_THROW(parsed(file({{"a.in_sum2", DType::f32, {6}}})), Error);
  EXPECT_THROW(parsed(file({{"a.counts", DType::f32, {1}}})), Error);
  EXPECT_THROW(parsed(file({{"a.in_sum2", DType::f16, {6}}, {"a.counts", DType::f32, {1}}})), Error);
  EXPECT_THROW(parsed(file({{"blk.0.attn_q.weight", DType::f32, {6}}})), Error);
}

TEST(Imatrix, CountsOfTheOlderFormAreBounded) {
  std::string bytes = written(example(), ImatrixForm::dat);
  for (const size_t at : {size_t{0}, size_t{4}}) {
    for (const int32_t value : {INT32_MAX, INT32_MIN, -1}) {
      std::string changed = bytes;
      std::memcpy(changed.data() + at, &value, sizeof value);
      EXPECT_THROW(parsed(changed), Error);
    }
  }
}

}  // namespace
}  // namespace bitwright
