// Arrays as a translation asks for them.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <numeric>

#include "checkpoint/checkpoint.hpp"
#include "checkpoint/gguf.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

constexpr int64_t kRows = 6, kColumns = 64;

class Views : public ::testing::Test {
 protected:
  Views() {
    std::iota(values.begin(), values.end(), 1.0f);
    const QuantizedTensor q = encode(q8_0, {kRows, kColumns}, values);
    decoded = decode(q);
    const auto pack = [&](const std::string& name) {
      return find_container("gguf")->pack({.name = name, .shape = {kRows, kColumns}, .scheme = q8_0}, q).front();
    };
    const NamedArray packed = pack("q");
    GgufMetadata metadata;
    metadata.add("general.architecture", "none");
    GgufWriter writer(dir / "x.gguf", metadata,
                      {{"f", DType::f32, {kRows, kColumns}}, packed.spec, {"v", DType::f32, {kRows}}});
    writer.add(std::as_bytes(std::span(values)));
    writer.add(packed.data);
    writer.add(std::as_bytes(std::span(values).first(kRows)));
    writer.finish();
  }

  /// Opens it with these views.
  Checkpoint open(std::vector<ArrayView> views) const {
    return Checkpoint(dir / "x.gguf", [&](const CheckpointView&) {
      return Translation{.config = std::make_shared<const Json>(Json::object()), .arrays = views};
    });
  }
  static std::vector<float> rows_of(const std::vector<float>& from, const std::vector<int64_t>& rows) {
    std::vector<float> out;
    for (const int64_t row : rows) out.insert(out.end(), &from[row * kColumns], &from[row * kColumns] + kColumns);
    return out;
  }

  const test::TemporaryDirectory dir;
  const Scheme q8_0 = {.element = &integer_element(8, true),
                       .scale = parameter(Grouping::along(32), plain(DType::f16))};
  std::vector<float> values = std::vector<float>(kRows * kColumns), decoded;
};

/// As read_bytes gives it in pieces that cut rows and even numbers.
void expect_bytes(const Checkpoint& model, const TensorEntry& entry, const std::vector<float>& expected, size_t piece) {
  std::vector<std::byte> bytes(entry.stored_bytes);
  for (size_t at = 0; at < bytes.size(); at += piece)
    model.read_bytes(entry, at, std::span(bytes).subspan(at, std::min(piece, bytes.size() - at)));
  EXPECT_TRUE(std::ranges::equal(bytes, std::as_bytes(std::span(expected))));
}

TEST_F(Views, RowsInAnotherOrder) {
  const std::vector<int64_t> order = {5, 0, 3, 1, 4, 2};
  const Checkpoint model = open({{.name = "F", .source = "f", .shape = {kRows, kColumns}, .rows = order},
                                 {.name = "Q", .source = "q", .shape = {kRows, kColumns}, .rows = order},
                                 {.name = "V", .source = "v", .shape = {kRows}, .rows = order}});
  ASSERT_EQ(model.tensors().size(), 3u);
  EXPECT_EQ(model.find("f"), nullptr);
  const TensorEntry& f = *model.find("F");
  EXPECT_TRUE(f.rearranged);
  EXPECT_EQ(model.read_f32(f), rows_of(values, order));
  EXPECT_EQ(decode(model.read(f)), rows_of(values, order));
  expect_bytes(model, f, rows_of(values, order), 77);
  EXPECT_EQ(model.read_f32(*model.find("Q")), rows_of(decoded, order));
  EXPECT_EQ(model.read_f32(*model.find("V")), (std::vector<float>{6, 1, 4, 2, 5, 3}));
}

TEST_F(Views, PartsStayMapped) {
  const Checkpoint model = open({{.name = "a", .source = "f", .shape = {2, kColumns}, .first_row = 0},
                                 {.name = "b", .source = "f", .shape = {4, kColumns}, .first_row = 2},
                                 {.name = "c", .source = "q", .shape = {3, kColumns}, .first_row = 3}});
  EXPECT_FALSE(model.find("b")->rearranged);
  EXPECT_EQ(model.plain_bytes(*model.find("b")).size(), 4 * kColumns * sizeof(float));
  EXPECT_EQ(model.read_f32(*model.find("a")), rows_of(values, {0, 1}));
  EXPECT_EQ(model.read_f32(*model.find("b")), rows_of(values, {2, 3, 4, 5}));
  EXPECT_EQ(model.read_f32(*model.find("c")), rows_of(decoded, {3, 4, 5}));
  EXPECT_EQ(model.find("c")->stored_bytes, 3u * 2 * 34);
}

TEST_F(Views, Transposed) {
  const auto transpose = [](const std::vector<float>& in) {
    std::vector<float> out;
    for (int64_t c = 0; c < kColumns; ++c)
      for (int64_t r = 0; r < kRows; ++r) out.push_back(in[static_cast<size_t>(r * kColumns + c)]);
    return out;
  };
  const Checkpoint model = open({{.name = "F", .source = "f", .shape = {kColumns, kRows}, .transposed = true},
                                 {.name = "Q", .source = "q", .shape = {kColumns, kRows}, .transposed = true}});
  EXPECT_EQ(model.read_f32(*model.find("F")), transpose(values));
  expect_bytes(model, *model.find("F"), transpose(values), 100);
  const TensorEntry& q = *model.find("Q");
  EXPECT_EQ(model.read_f32(q), transpose(decoded));
  EXPECT_EQ(model.read(q).scheme, q.scheme);
  EXPECT_EQ(q.shape, (Shape{kColumns, kRows}));
}

TEST_F(Views, AddedNumbers) {
  const Checkpoint model = open({{.name = "V", .source = "v", .shape = {kRows}, .added = -1}});
  EXPECT_EQ(model.read_f32(*model.find("V")), (std::vector<float>{0, 1, 2, 3, 4, 5}));
  EXPECT_FALSE(model.find("V")->rearranged);
}

}  // namespace
}  // namespace bitwright
