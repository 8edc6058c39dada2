#include "container/rows.hpp"

#include <gtest/gtest.h>

#include <random>

#include "scheme/quantized_tensor.hpp"

namespace bitwright {
namespace {

std::vector<std::byte> appended(const std::vector<std::vector<NamedArray>>& pieces, size_t array) {
  std::vector<std::byte> bytes;
  for (const std::vector<NamedArray>& piece : pieces)
    bytes.insert(bytes.end(), piece[array].data.begin(), piece[array].data.end());
  return bytes;
}

Scheme integers(int bits, bool is_signed, const Grouping& grouping, bool zero) {
  Scheme scheme = {.element = &integer_element(bits, is_signed), .scale = parameter(grouping, plain(DType::f16))};
  if (zero) {
    scheme.offset_kind = OffsetKind::zero_point;
    scheme.offset = parameter(grouping, {.element = scheme.element});
  }
  return scheme;
}

/// Quantizing and packing by pieces must be the same as all at once: this is what makes streaming exact.
TEST(Rows, PiecesAreTheWhole) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const Container& native = *find_container("native");
  for (const Shape& shape : {Shape{53, 33}, Shape{64, 64}, Shape{3, 24, 20}, Shape{16, 1}})
    for (const Scheme& scheme :
         {integers(4, false, Grouping::along(32), true), integers(3, false, Grouping::along(7), true),
          integers(8, true, Grouping::channel(), false), integers(5, true, Grouping::flat(48), false),
          Scheme{.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))}}) {
      SCOPED_TRACE(describe(scheme) + " " + to_string(shape));
      std::vector<float> values(static_cast<size_t>(element_count(shape)));
      for (float& value : values) value = normal(random);
      const StoredTensor whole = {.name = "w", .shape = shape, .scheme = scheme};
      const auto expected = native.pack(whole, encode(scheme, shape, values));
      const int64_t step = row_step(scheme, shape).value();
      std::vector<std::vector<NamedArray>> pieces;
      for (int64_t begin = 0; begin < row_count(shape); begin += step) {
        const StoredTensor piece = rows_of(whole, begin, std::min(row_count(shape), begin + step));
        const std::span<const float> part = std::span(values).subspan(static_cast<size_t>(begin * shape.back()),
                                                                      static_cast<size_t>(element_count(piece.shape)));
        const std::vector<ArraySpec> before = native.layout(rows_of(whole, 0, begin));
        for (size_t a = 0; a < before.size(); ++a) EXPECT_EQ(before[a].bytes(), appended(pieces, a).size());
        pieces.push_back(native.pack(piece, encode(scheme, piece.shape, part)));
      }
      for (size_t a = 0; a < expected.size(); ++a)
        EXPECT_EQ(appended(pieces, a), expected[a].data) << expected[a].spec.name;
    }
}

/// Codes as [K, N], one scale a row as [1, N], and a table that does not depend on rows: GPTQ's form.
std::vector<ArraySpec> columns_layout(const StoredTensor& t) {
  const int64_t rows = row_count(t.shape), columns = t.shape.back();
  return {{.name = "codes", .dtype = DType::u8, .shape = {columns, rows}, .row_axis = 1},
          {.name = "scales", .dtype = DType::f16, .shape = {1, rows}, .row_axis = 1},
          {.name = "order", .dtype = DType::i32, .shape = {columns}, .row_axis = ArraySpec::kNoRows}};
}

std::vector<NamedArray> columns_pack(const StoredTensor& t, const QuantizedTensor& values) {
  const auto rows = static_cast<size_t>(row_count(t.shape)), columns = static_cast<size_t>(t.shape.back());
  std::vector<std::byte> codes(rows * columns);
  for (size_t r = 0; r < rows; ++r)
    for (size_t c = 0; c < columns; ++c) codes[c * rows + r] = values.codes[r * columns + c];
  const std::vector<ArraySpec> specs = columns_layout(t);
  return {{specs[0], codes}, {specs[1], values.scale->codes}, {specs[2], std::vector<std::byte>(columns * 4)}};
}

/// All arrays of `whole`, put together from pieces as a writer does it.
std::vector<std::vector<std::byte>> assembled(const Container& container, const StoredTensor& whole,
                                              std::span<const float> values) {
  const std::vector<ArraySpec> all = container.layout(whole);
  std::vector<std::vector<std::byte>> arrays;
  for (const ArraySpec& spec : all) arrays.emplace_back(spec.bytes());
  const int64_t step = row_step(whole.scheme, whole.shape).value();
  for (int64_t begin = 0; begin < row_count(whole.shape); begin += step) {
    const StoredTensor piece = rows_of(whole, begin, std::min(row_count(whole.shape), begin + step));
    const std::span<const float> part = values.subspan(static_cast<size_t>(begin * whole.shape.back()),
                                                       static_cast<size_t>(element_count(piece.shape)));
    const std::vector<ArraySpec> before = container.layout(rows_of(whole, 0, begin));
    const std::vector<NamedArray> packed = container.pack(piece, encode(piece.scheme, piece.shape, part));
    for (size_t a = 0; a < packed.size(); ++a) {
      const Placement at = place(all[a], before[a], packed[a].spec);
      EXPECT_EQ(at.run * at.runs, packed[a].data.size());
      for (uint64_t r = 0; r < at.runs; ++r)
        std::copy_n(packed[a].data.begin() + static_cast<std::ptrdiff_t>(r * at.run), at.run,
                    arrays[a].begin() + static_cast<std::ptrdiff_t>(at.offset + r * at.stride));
    }
  }
  return arrays;
}

TEST(Rows, PiecesLieWhereTheWholeHasThem) {
  Container columns = *find_container("native");
  columns.layout = columns_layout;
  columns.pack = columns_pack;
  const Scheme nf4 = {.element = find_element("nf4"), .scale = parameter(Grouping::flat(64), plain(DType::f32))};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const Shape& shape : {Shape{100, 64}, Shape{32, 33}, Shape{65, 8}})
    for (const auto& [container, scheme] :
         {std::pair<const Container*, Scheme>(&columns, integers(8, true, Grouping::channel(), false)),
          {find_container("bitsandbytes"), nf4}}) {
      SCOPED_TRACE(std::string(container->name) + " " + to_string(shape));
      std::vector<float> values(static_cast<size_t>(element_count(shape)));
      for (float& value : values) value = normal(random);
      const StoredTensor whole = {.name = "w.weight", .shape = shape, .scheme = scheme};
      const auto arrays = assembled(*container, whole, values);
      const auto expected = container->pack(whole, encode(scheme, shape, values));
      for (size_t a = 0; a < expected.size(); ++a) EXPECT_EQ(arrays[a], expected[a].data) << expected[a].spec.name;
    }
}

TEST(Rows, WhatReachesAcrossRowsIsWhole) {
  const Shape shape = {4096, 4096};
  EXPECT_EQ(row_step(integers(8, true, Grouping::tensor(), false), shape), std::nullopt);
  EXPECT_EQ(row_step(integers(8, true, Grouping::along(64, -2), false), shape), std::nullopt);
  EXPECT_EQ(row_step(integers(8, true, Grouping::channel(), false), {4096}), std::nullopt);
  Scheme nested = integers(8, true, Grouping::channel(), false);
  nested.scale = parameter(Grouping::channel(), {.element = &float_element(DType::f8_e4m3),
                                                 .scale = parameter(Grouping::tensor(), plain(DType::f32))});
  EXPECT_EQ(row_step(nested, shape), std::nullopt);
  const Container& native = *find_container("native");
  EXPECT_EQ(row_pieces(native, {.name = "w", .shape = shape, .scheme = nested}).size(), 1u);
  const auto pieces =
      row_pieces(native, {.name = "w", .shape = shape, .scheme = integers(8, true, Grouping::channel(), false)});
  EXPECT_EQ(pieces.size(), 64u);
  EXPECT_EQ(pieces.back().end, 4096);
}

// So are they written by importance, and read back: sums of errors are the same to the bit.
TEST(Rows, PiecesEndWhereMatricesDo) {
  const std::vector<RowRange> pieces = {{0, 1024}, {1024, 2048}, {2048, 3072}};
  std::vector<int64_t> ends;
  for (const RowRange piece : within_matrices(pieces, {4, 768, 256})) ends.push_back(piece.end);
  EXPECT_EQ(ends, (std::vector<int64_t>{768, 1024, 1536, 2048, 2304, 3072}));
}

}  // namespace
}  // namespace bitwright
