#include "checkpoint/checkpoint.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "checkpoint/safetensors.hpp"
#include "tests/golden_cases.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::TemporaryDirectory;
using test::write_file;

std::string safetensors(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + header + data;
}

std::string code_of(const std::string& file) {
  // A copy of exact size on the heap: a read past the end is seen by the address sanitizer.
  const std::vector<char> bytes(file.begin(), file.end());
  try {
    parse_safetensors(std::as_bytes(std::span(bytes)), "file");
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("file"), std::string::npos) << error.what();
    return error.code();
  }
  return "none";
}

std::string code_of_open(const std::filesystem::path& path) {
  try {
    const Checkpoint checkpoint(path);
    for (const TensorEntry& entry : checkpoint.tensors()) checkpoint.read_f32(entry);
  } catch (const Error& error) {
    return error.code();
  }
  return "none";
}

const std::string kGood = safetensors(
    R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}})",
    std::string(22, '\1'));

TEST(Safetensors, ReadsInDataOrder) {
  const auto arrays = parse_safetensors(std::as_bytes(std::span(kGood)), "file");
  ASSERT_EQ(arrays.size(), 2u);
  EXPECT_EQ(arrays[0].name, "a");
  EXPECT_EQ(arrays[1].shape, (Shape{3}));
  EXPECT_EQ(arrays[1].data.size(), 6u);
  EXPECT_EQ(code_of(safetensors("{}", "")), "none");
}

TEST(Safetensors, EveryTruncationIsRefused) {
  for (size_t size = 0; size < kGood.size(); ++size) EXPECT_NE(code_of(kGood.substr(0, size)), "none") << size;
  EXPECT_EQ(code_of(kGood + "x"), "bad-safetensors");
}

TEST(Safetensors, EveryHeaderBitFlipIsReadOrRefused) {
  const size_t header_end = kGood.size() - 22;
  for (size_t byte = 0; byte < header_end; ++byte)
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = kGood;
      flipped[byte] = static_cast<char>(flipped[byte] ^ (1 << bit));
      code_of(flipped);  // a name may change unseen; nothing may crash or read outside
    }
}

TEST(Safetensors, HostileHeaders) {
  const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return safetensors(R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}",
                       std::string(16, '\0'));
  };
  EXPECT_EQ(code_of(one("F32", "[4]", "[0,16]")), "none");
  EXPECT_EQ(code_of(one("F32", "[5]", "[0,20]")), "tensor-outside-file");
  EXPECT_EQ(code_of(one("F32", "[4]", "[0,18446744073709551615]")), "bad-safetensors");
  EXPECT_EQ(code_of(one("F32", "[4]", "[9223372036854775807,9223372036854775807]")), "tensor-outside-file");
  for (const auto& [dtype, shape, offsets] :
       std::vector<std::array<std::string, 3>>{{"F32", "[4]", "[-16,0]"},
                                               {"F32", "[4]", "[16,0]"},
                                               {"F32", "[4]", "[0]"},
                                               {"F32", "[4]", "\"0,16\""},
                                               {"F32", "[3]", "[0,16]"},
                                               {"F32", "[-4]", "[0,16]"},
                                               {"F32", "[4.0]", "[0,16]"},
                                               {"F32", "[4294967296,4294967296]", "[0,16]"},
                                               {"F32", "[9223372036854775807,2]", "[0,16]"},
                                               {"F32", "[1,1,1,1,1,1,1,1,4]", "[0,16]"},
                                               {"Q4", "[4]", "[0,16]"},
                                               {"F32", "[2]", "[0,8]"},
                                               {"F32", "[2]", "[8,16]"}})
    EXPECT_EQ(code_of(one(dtype, shape, offsets)), "bad-safetensors") << dtype << shape << offsets;
  EXPECT_EQ(code_of(safetensors(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},)"
                                R"("b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}})",
                                std::string(24, '\0'))),
            "bad-safetensors");  // overlap
  EXPECT_EQ(code_of(safetensors("[]", "")), "bad-safetensors");
  EXPECT_EQ(code_of(safetensors(R"({"a":[]})", "")), "bad-safetensors");
  EXPECT_EQ(code_of(safetensors(std::string("{\"a\0", 4), "")), "bad-json");
}

TEST(Safetensors, WriterAndReaderAgree) {
  const TemporaryDirectory dir;
  const std::vector<float> values = {1, 2, 3};
  SafetensorsWriter writer(dir / "x.safetensors", {{"v", DType::f32, {3}}, {"empty", DType::f16, {0, 4}}});
  writer.add(std::as_bytes(std::span(values)));
  writer.add({});
  writer.finish();
  const WeightFile file(dir / "x.safetensors");
  ASSERT_EQ(file.arrays().size(), 2u);
  for (const StoredArray& array : file.arrays())
    if (array.name == "v") {
      EXPECT_TRUE(std::ranges::equal(array.data, std::as_bytes(std::span(values))));
      EXPECT_EQ((array.data.data() - file.bytes().data()) % 64, 0);
    }
}

class Shards : public ::testing::Test {
 protected:
  void SetUp() override {
    write_file(dir / "config.json", "{}");
    const auto shard = [](const std::string& name) {
      return safetensors(R"({")" + name + R"(":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                         std::string(4, '\0'));
    };
    write_file(dir / "model-00001-of-00002.safetensors", shard("a"));
    write_file(dir / "model-00002-of-00002.safetensors", shard("b"));
    index(R"({"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})");
  }
  void index(const std::string& map) {
    write_file(dir / "model.safetensors.index.json", R"({"weight_map":)" + map + "}");
  }
  const TemporaryDirectory dir;
};

TEST_F(Shards, AreJoined) {
  EXPECT_EQ(Checkpoint(dir.path()).tensors().size(), 2u);
  std::filesystem::remove(dir / "model.safetensors.index.json");
  EXPECT_EQ(Checkpoint(dir.path()).tensors().size(), 2u);
}

TEST_F(Shards, LinksAreFollowedButNamesStayInside) {
  const TemporaryDirectory blobs;
  std::filesystem::rename(dir / "model-00001-of-00002.safetensors", blobs / "blob");
  std::filesystem::create_symlink(blobs / "blob", dir / "model-00001-of-00002.safetensors");
  EXPECT_EQ(Checkpoint(dir.path()).tensors().size(), 2u);
  for (const char* name : {"../blob", "/etc/passwd", "..", "sub/x", "", "a\\b"}) {
    index(Json({{"a", name}}).dump());
    EXPECT_EQ(code_of_open(dir.path()), "bad-shard-name") << name;
  }
}

TEST_F(Shards, WhatIsMissingIsNamed) {
  index(R"({"a":"model-00001-of-00002.safetensors","c":"model-00002-of-00002.safetensors"})");
  EXPECT_EQ(code_of_open(dir.path()), "missing-tensor");
  index(R"({"a":"model-00002-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})");
  EXPECT_EQ(code_of_open(dir.path()), "missing-tensor");
  index("[]");
  EXPECT_EQ(code_of_open(dir.path()), "bad-index");
  std::filesystem::remove(dir / "model-00002-of-00002.safetensors");
  index(R"({"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})");
  EXPECT_EQ(code_of_open(dir.path()), "missing-shard");
  std::filesystem::remove(dir / "model.safetensors.index.json");
  EXPECT_EQ(code_of_open(dir.path()), "missing-shard");
}

TEST(Checkpoint, WhatIsNoModelIsRefused) {
  const TemporaryDirectory dir;
  EXPECT_EQ(code_of_open(dir / "none"), "cannot-open");
  EXPECT_EQ(code_of_open(dir.path()), "no-config");
  write_file(dir / "config.json", "{");
  EXPECT_EQ(code_of_open(dir.path()), "no-weights");
  write_file(dir / "model.safetensors", kGood);
  EXPECT_EQ(code_of_open(dir.path()), "bad-json");
  write_file(dir / "config.json", "[]");
  EXPECT_EQ(code_of_open(dir.path()), "bad-json");
  write_file(dir / "config.json", R"({"quantization_config":{"quant_method":"gptq"}})");
  EXPECT_EQ(code_of_open(dir.path()), "unsupported-container");
  write_file(dir / "config.json", "{}");
  EXPECT_EQ(code_of_open(dir.path()), "none");
  write_file(dir / "model.safetensors", "");
  EXPECT_EQ(code_of_open(dir.path()), "bad-safetensors");
  EXPECT_EQ(code_of_open(dir / "model.safetensors"), "bad-safetensors");
}

// The two-layer models that bitsandbytes' and MLX's own code wrote, read as whole checkpoints.
TEST(Golden, models_of_other_libraries) {
  size_t cases = 0;
  for (const std::string name : {"bnb_nf4/model_nf4", "bnb_fp4/model_fp4_dq", "mlx_affine/model_affine_w4"}) {
    const auto path = test::shared_dir() / "golden" / name;
    if (!std::filesystem::exists(path / "model.safetensors")) continue;
    SCOPED_TRACE(name);
    const Checkpoint model(path);
    const WeightFile reference(path / "reference.safetensors");
    size_t compared = 0;
    for (const StoredArray& array : reference.arrays()) {
      const std::string suffix = ".dequantized";
      if (!array.name.ends_with(suffix)) continue;
      const TensorEntry* entry = model.find(array.name.substr(0, array.name.size() - suffix.size()) + ".weight");
      if (entry == nullptr) entry = model.find(array.name.substr(0, array.name.size() - suffix.size()));
      ASSERT_NE(entry, nullptr) << array.name;
      std::vector<float> expected(static_cast<size_t>(element_count(array.shape)));
      to_f32(array.dtype, array.data, expected);
      const QuantizedTensor stored = model.read(*entry);
      const bool is_mlx = stored.scheme.offset_kind == OffsetKind::bias;
      std::vector<float> values = is_mlx ? test::decode_in_scale_dtype(stored) : decode(stored);
      for (float& value : values) value = round_to(array.dtype, value);
      EXPECT_EQ(values, expected) << array.name;
      EXPECT_TRUE(entry->quantized());
      ++compared;
    }
    EXPECT_GT(compared, 0u);
    ++cases;
  }
  if (cases == 0) GTEST_SKIP() << "no golden cases here";
  std::cout << "cases: " << cases << '\n';
}

}  // namespace
}  // namespace bitwright
