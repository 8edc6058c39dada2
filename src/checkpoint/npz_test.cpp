#include <gtest/gtest.h>
#include <zlib.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "checkpoint/weight_file.hpp"
#include "tests/archives.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::little;
using test::TemporaryDirectory;
using test::zip;
using test::ZipMember;

const WeightFormat& npz_format() {
  for (const WeightFormat* format : all_weight_formats())
    if (format->name == "npz") return *format;
  throw std::runtime_error("no row for npz");
}

WeightContents parse(const std::string& file) { return npz_format().parse(std::as_bytes(std::span(file)), "test"); }

/// The code of the Error that reading throws, or "none".
std::string code_of(const std::string& file) {
  try {
    parse(file);
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.code();
  }
  return "none";
}

std::string npy_of(const std::string& header, const std::string& data, char version = 1) {
  return "\x93NUMPY" + std::string{version, '\0'} + little(header.size(), version == 1 ? 2 : 4) + header + data;
}
std::string npy(const std::string& descr, const std::string& shape, const std::string& data,
                const std::string& order = "False", char version = 1) {
  return npy_of("{'descr': '" + descr + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }   \n", data,
                version);
}

std::string deflated(const std::string& data) {
  z_stream stream = {};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, -MAX_WBITS, 8, Z_DEFAULT_STRATEGY), Z_OK);
  std::string in = data, out(deflateBound(&stream, data.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(in.data());
  stream.avail_in = static_cast<uInt>(in.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}
uint32_t checksum(const std::string& data) {
  return static_cast<uint32_t>(crc32(0, reinterpret_cast<const Bytef*>(data.data()), static_cast<uInt>(data.size())));
}
ZipMember member(const std::string& name, const std::string& data) {
  return {.name = name, .data = deflated(data), .method = 8, .size = data.size(), .checksum = checksum(data)};
}

const StoredArray& find(const WeightContents& contents, const std::string& name) {
  for (const StoredArray& array : contents.arrays)
    if (array.name == name) return array;
  throw std::runtime_error("no array " + name);
}

template <class T>
std::vector<T> numbers(const StoredArray& array) {
  std::vector<T> out(array.data.size() / sizeof(T));
  std::memcpy(out.data(), array.data.data(), array.data.size());
  return out;
}

// tests/golden/npz/make.py made them: numpy, stored and deflated.
TEST(Npz, ReadsWhatNumpyWrote) {
  for (const char* name : {"numpy", "compressed"}) {
    SCOPED_TRACE(name);
    const WeightFile file("tests/golden/npz/" + std::string(name) + ".npz");
    EXPECT_EQ(&file.format(), &npz_format());
    ASSERT_EQ(file.arrays().size(), 5u);
    const auto at = [&](size_t i, const std::string& array, DType dtype, const Shape& shape) -> const StoredArray& {
      const StoredArray& found = file.arrays()[i];
      EXPECT_EQ(found.name, array);
      EXPECT_EQ(found.dtype, dtype);
      EXPECT_EQ(found.shape, shape);
      return found;
    };
    EXPECT_EQ(numbers<float>(at(0, "a.weight", DType::f32, {2, 3})), (std::vector<float>{0, 1, 2, 3, 4, 5}));
    const auto b = numbers<uint32_t>(at(1, "b.weight", DType::u32, {2, 3, 4}));  // in Fortran's order
    for (size_t i = 0; i < b.size(); ++i) EXPECT_EQ(b[i], i);
    EXPECT_EQ(numbers<uint16_t>(at(2, "c", DType::f16, {2})), (std::vector<uint16_t>{0x3c00, 0x4000}));
    EXPECT_EQ(numbers<int64_t>(at(3, "d", DType::i64, {})), (std::vector<int64_t>{7}));
    EXPECT_EQ(at(4, "e", DType::u8, {0, 4}).data.size(), 0u);
  }
}

TEST(Npz, ReadsHeadersAsMlxWritesThem) {
  const WeightFile file("tests/golden/npz/mlx.npz");
  ASSERT_EQ(file.arrays().size(), 5u);
  EXPECT_EQ(file.arrays()[0].shape, (Shape{2, 8}));
  EXPECT_EQ(file.arrays()[1].dtype, DType::bf16);
  EXPECT_EQ(numbers<uint16_t>(file.arrays()[2]), (std::vector<uint16_t>(4, 0xbf00)));
  EXPECT_EQ(file.arrays()[3].shape, Shape{3});
  EXPECT_EQ(file.arrays()[4].shape, Shape{});
}

TEST(Npz, ReadsEveryTypeAndVersion) {
  for (const auto& [descr, dtype] : std::vector<std::pair<std::string, DType>>{{"<f8", DType::f64},
                                                                               {"<f4", DType::f32},
                                                                               {"<f2", DType::f16},
                                                                               {"|V2", DType::bf16},
                                                                               {"<i8", DType::i64},
                                                                               {"=i4", DType::i32},
                                                                               {"<i2", DType::i16},
                                                                               {"|i1", DType::i8},
                                                                               {"<u8", DType::u64},
                                                                               {"<u4", DType::u32},
                                                                               {"<u2", DType::u16},
                                                                               {"|u1", DType::u8},
                                                                               {">u1", DType::u8},
                                                                               {"|b1", DType::boolean}})
    for (const char version : {'\1', '\2', '\3'}) {
      const std::string data(3 * size_bytes(dtype), '\1');
      const std::string file = zip({{"x.npy", npy(descr, "(3,)", data, "True", version)}});
      const WeightContents contents = parse(file);
      ASSERT_EQ(contents.arrays.size(), 1u);
      EXPECT_EQ(contents.arrays[0].dtype, dtype);
      EXPECT_EQ(contents.arrays[0].data.size(), data.size());
    }
}

TEST(Npz, HeadersAreParsedStrictly) {
  const auto header = [&](const std::string& text) { return code_of(zip({{"x.npy", npy_of(text, "abcd")}})); };
  EXPECT_EQ(header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}\n"), "none");
  EXPECT_EQ(header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}"), "none");
  EXPECT_EQ(header("{\"shape\":(1,1),\"fortran_order\":True,\"descr\":\"<f4\"}  \n"), "none");
  for (const char* bad : {
           "",
           "{",
           "{}",
           "x",
           "{'descr': '<f4', 'fortran_order': False}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (1)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (1,,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (1, }",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)} x",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}\n\n",
           "{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': [1]}",
           "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'more': 1}",
           "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '<f4, 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '', 'fortran_order': False, 'shape': (1,)}",
           "{'descr': 'f4', 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '<f3', 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '<c8', 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '>f4', 'fortran_order': False, 'shape': (1,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (0,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387905,)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
           "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
       })
    EXPECT_EQ(header(bad), "bad-npz") << bad;
  std::string deep = "(";
  for (int i = 0; i < 40; ++i) deep += "1, ";
  EXPECT_EQ(header("{'descr': '<f4', 'fortran_order': False, 'shape': " + deep + ")}"), "bad-npz");
}

TEST(Npz, DamagedFilesAreRefused) {
  const std::string good = npy("<f4", "(1,)", "abcd");
  EXPECT_EQ(code_of(zip({{"x.npy", good}})), "none");
  EXPECT_EQ(code_of(zip({{"x.npy", good}}, true)), "none");
  EXPECT_EQ(code_of(zip({{"x.npy", good}, {"y", good}})), "bad-npz") << "no .npy";
  EXPECT_EQ(code_of(zip({{".npy", good}})), "bad-npz") << "no name";
  EXPECT_EQ(code_of(zip({{"x\xff.npy", good}})), "bad-npz") << "no UTF-8";
  EXPECT_EQ(code_of(zip({{"x.npy", npy("<f4", "(1,)", "abcd", "False", 4)}})), "bad-npz") << "a later version";
  EXPECT_EQ(code_of(zip({{"x.npy", "x" + good.substr(1)}})), "bad-npz");
  EXPECT_EQ(code_of(zip({{"x.npy", good}, {"x.npy", good}})), "bad-zip");
  for (size_t length = 0; length < good.size(); ++length)
    EXPECT_EQ(code_of(zip({{"x.npy", good.substr(0, length)}})), "bad-npz") << length;
  EXPECT_EQ(code_of(zip({{"x.npy", good + "x"}})), "bad-npz");
}

TEST(Npz, DeflatedEntriesAreChecked) {
  const std::string data = npy("<f4", "(1000,)", std::string(4000, '\0'));
  const ZipMember good = member("x.npy", data);
  EXPECT_EQ(numbers<float>(find(parse(zip({good})), "x")), std::vector<float>(1000));
  EXPECT_EQ(code_of(zip({good}, true)), "none");
  const auto changed = [&](const auto& change) {
    ZipMember bad = good;
    change(bad);
    return code_of(zip({bad}));
  };
  EXPECT_EQ(changed([](ZipMember& m) { m.checksum ^= 1; }), "bad-zip");
  EXPECT_EQ(changed([](ZipMember& m) { *m.size += 1; }), "bad-zip");
  EXPECT_EQ(changed([](ZipMember& m) { *m.size -= 1; }), "bad-zip");
  EXPECT_EQ(changed([](ZipMember& m) { m.size = 0; }), "bad-zip");
  EXPECT_EQ(changed([](ZipMember& m) { m.size = uint64_t{1} << 31; }), "bad-zip") << "more than deflating can save";
  EXPECT_EQ(changed([](ZipMember& m) { m.data += "x"; }), "bad-zip");
  EXPECT_EQ(changed([](ZipMember& m) { m.data.clear(); }), "bad-zip");
  EXPECT_EQ(changed([](ZipMember& m) { m.method = 12; }), "bad-zip") << "bzip2";
  for (size_t length = 0; length < good.data.size(); ++length)
    EXPECT_EQ(changed([&](ZipMember& m) { m.data.resize(length); }), "bad-zip") << length;
}

// Of three entries each reaches to the end of the data, over the next ones.
TEST(Npz, SharedBytesAreRefused) {
  const std::vector<std::string> names = {"a.npy", "b.npy", "c.npy"};
  std::string file, list;
  for (const std::string& name : names)
    file += "PK\3\4" + little(20, 2) + little(0, 2) + little(8, 2) + little(0, 16) + little(name.size(), 2) +
            little(0, 2) + name;
  file += std::string(500, 'x');
  for (size_t i = 0; i < names.size(); ++i) {
    const size_t local = 35 * i, size = file.size() - local - 35;
    list += "PK\1\2" + little(20, 2) + little(20, 2) + little(0, 2) + little(8, 2) + little(0, 8) + little(size, 4) +
            little(size, 4) + little(names[i].size(), 2) + little(0, 12) + little(local, 4) + names[i];
  }
  const std::string end = "PK\5\6" + little(0, 4) + little(3, 2) + little(3, 2) + little(list.size(), 4) +
                          little(file.size(), 4) + little(0, 2);
  try {
    parse(file + list + end);
    ADD_FAILURE() << "not refused";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("shares its bytes"), std::string::npos) << error.what();
  }
}

// Each byte less, of files that numpy and MLX wrote.
TEST(Npz, TruncatedFilesAreRefused) {
  for (const char* name : {"numpy", "compressed", "mlx"}) {
    const std::string whole = test::read_file("tests/golden/npz/" + std::string(name) + ".npz");
    EXPECT_EQ(code_of(whole), "none");
    for (size_t length = 0; length < whole.size(); ++length)
      EXPECT_NE(code_of(whole.substr(0, length)), "none") << name << " " << length;
  }
}

TEST(Npz, IsToldFromPyTorchsArchives) {
  TemporaryDirectory directory;
  test::write_file(directory / "config.json", "{}");
  const std::string name = "a." + std::string(300, 'x') + ".weight.npy";
  test::write_file(directory / "weights.npz", zip({{name, npy("<f4", "(1,)", "abcd")}}));
  EXPECT_EQ(Checkpoint(directory.path()).format(), "npz");
  test::write_file(directory / "other.bin", zip({{"m/data.pkl", "x"}}));
  EXPECT_THROW(WeightFile(directory / "other.bin"), Error);
}

// A model of MLX in one file, whose quantized layers are found as in safetensors.
TEST(Npz, HoldsAQuantizedModel) {
  TemporaryDirectory directory;
  test::write_file(directory / "config.json", R"({"quantization": {"group_size": 32, "bits": 4}})");
  std::string codes(2 * 32, '\x21'), ones, halves;  // [2, 64]: codes 1, 2, 1, 2 …
  for (int i = 0; i < 4; ++i) {
    ones += std::string("\x80\x3f", 2);
    halves += std::string("\x00\xbf", 2);
  }
  test::write_file(directory / "weights.npz", zip({member("l.weight.npy", npy("<u4", "(2, 8)", codes)),
                                                   {"l.scales.npy", npy("<V2", "(2, 2)", ones)},
                                                   {"l.biases.npy", npy("<V2", "(2, 2)", halves)}}));
  const Checkpoint model(directory.path());
  ASSERT_NE(model.container(), nullptr);
  EXPECT_EQ(model.container()->name, "mlx");
  const std::vector<float> values = model.read_f32(*model.find("l.weight"));
  ASSERT_EQ(values.size(), 128u);
  for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(values[i], i % 2 == 0 ? 0.5f : 1.5f);
  EXPECT_EQ(decode(model.read_rows(*model.find("l.weight"), 0, 2)), values);
}

}  // namespace
}  // namespace bitwright
