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

TEST(Safetensors, MayCarryTheDocumentsOfItsModel) {
  const TemporaryDirectory dir;
  const std::vector<float> numbers = {1, 2};
  SafetensorsWriter writer(dir / "one.safetensors", {{"a.weight", DType::f32, {2}}},
                           {{"config.json", {{"model_type", "toy"}}}});
  writer.add(std::as_bytes(std::span(numbers)));
  writer.finish();
  write_file(dir / "config.json", R"({"model_type": "another"})");
  const Checkpoint checkpoint(dir / "one.safetensors");
  EXPECT_EQ(checkpoint.config()["model_type"], "toy");
  EXPECT_EQ(checkpoint.read_f32(*checkpoint.find("a.weight")), numbers);
  EXPECT_EQ(code_of(safetensors(R"({"__metadata__":{"config.json":"{}","x":"y"}})", "")), "none");
  EXPECT_EQ(code_of(safetensors(R"({"__metadata__":{"config.json":"[]"}})", "")), "bad-safetensors");
  EXPECT_NE(code_of(safetensors(R"({"__metadata__":{"config.json":"{"}})", "")), "none");
}

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

/// A file of one tensor each, named and sized as asked.
std::string one_tensor(const std::string& name, const std::string& dtype, const std::string& shape, size_t bytes) {
  return safetensors(R"({")" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":[0,)" +
                         std::to_string(bytes) + "]}}",
                     std::string(bytes, '\0'));
}

std::vector<std::string> names_of(const std::filesystem::path& path) {
  const Checkpoint checkpoint(path);
  std::vector<std::string> names;
  for (const TensorEntry& entry : checkpoint.tensors()) names.push_back(entry.name);
  return names;
}
using Names = std::vector<std::string>;

// models--ORG--NAME/{blobs,snapshots/COMMIT}: every file of a snapshot is a relative link to a blob named by digest.
TEST_F(Shards, HuggingFaceCache) {
  const TemporaryDirectory cache;
  const auto blobs = cache / "blobs", snapshot = cache / "snapshots/abc";
  std::filesystem::create_directories(blobs);
  std::filesystem::create_directories(snapshot);
  int digest = 0;
  for (const auto& file : test::files_in(dir.path())) {
    const std::string blob = "d1ge57" + std::to_string(digest++);
    std::filesystem::rename(file, blobs / blob);
    std::filesystem::create_symlink("../../blobs/" + blob, snapshot / file.filename());
  }
  EXPECT_EQ(names_of(snapshot), (Names{"a", "b"}));
  EXPECT_EQ(code_of_open(snapshot), "none");
  std::filesystem::remove(blobs / "d1ge570");  // config.json
  EXPECT_EQ(code_of_open(snapshot), "no-config");
}

TEST_F(Shards, ABrokenLinkIsAMissingShard) {
  std::filesystem::remove(dir / "model-00001-of-00002.safetensors");
  std::filesystem::create_symlink("../gone", dir / "model-00001-of-00002.safetensors");
  EXPECT_EQ(code_of_open(dir.path()), "missing-shard");
  std::filesystem::remove(dir / "model.safetensors.index.json");
  EXPECT_EQ(code_of_open(dir.path()), "missing-shard");
}

TEST_F(Shards, TheIndexDecidesBetweenCopies) {
  const std::string both = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                           R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},)"
                           R"("more":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})";
  write_file(dir / "model-00002-of-00002.safetensors", safetensors(both, std::string(12, '\1')));
  EXPECT_EQ(names_of(dir.path()), (Names{"a", "b", "more"})) << "a shard may hold more than the index lists";
  const Checkpoint checkpoint(dir.path());
  EXPECT_EQ(checkpoint.read_f32(*checkpoint.find("a")), std::vector<float>{0}) << "of the first shard";
  std::filesystem::remove(dir / "model.safetensors.index.json");
  EXPECT_EQ(code_of_open(dir.path()), "bad-weights") << "nothing says which";
}

TEST_F(Shards, TheUsualNamesComeFirst) {
  write_file(dir / "consolidated.safetensors", one_tensor("layers.0.attention.wq.weight", "F32", "[1]", 4));
  EXPECT_EQ(names_of(dir.path()), (Names{"a", "b"}));
  std::filesystem::remove(dir / "model.safetensors.index.json");
  EXPECT_EQ(names_of(dir.path()), (Names{"a", "b"})) << "a whole series without its index";
  write_file(dir / "consolidated-00001-of-00001.safetensors", one_tensor("c", "F32", "[1]", 4));
  EXPECT_EQ(names_of(dir.path()), (Names{"a", "b"}));
  std::filesystem::remove(dir / "model-00001-of-00002.safetensors");
  EXPECT_EQ(code_of_open(dir.path()), "missing-shard");
  std::filesystem::remove(dir / "model-00002-of-00002.safetensors");
  EXPECT_EQ(names_of(dir.path()), Names{"c"}) << "the only series";
  std::filesystem::rename(dir / "consolidated-00001-of-00001.safetensors",
                          dir / "mixture-of-experts-00001-of-00001.safetensors");
  EXPECT_EQ(names_of(dir.path()), Names{"c"}) << "the last \"-of-\" counts";
  std::filesystem::rename(dir / "mixture-of-experts-00001-of-00001.safetensors",
                          dir / "consolidated-00001-of-00001.safetensors");
  std::filesystem::remove(dir / "consolidated-00001-of-00001.safetensors");
  EXPECT_EQ(names_of(dir.path()), Names{"layers.0.attention.wq.weight"}) << "the only file";
  write_file(dir / "other.safetensors", one_tensor("d", "F32", "[1]", 4));
  EXPECT_EQ(code_of_open(dir.path()), "no-index");
  write_file(dir / "model.safetensors", one_tensor("e", "F32", "[1]", 4));
  EXPECT_EQ(names_of(dir.path()), Names{"e"});
}

class TorchModel : public ::testing::Test {
 protected:
  void SetUp() override { write_file(dir / "config.json", "{}"); }
  void copy(const std::string& fixture, const std::string& name) {
    std::filesystem::copy_file("tests/golden/torch/" + fixture, dir / name);
  }
  const TemporaryDirectory dir;
};

TEST_F(TorchModel, TheRestOfATrainingRunIsNotRead) {
  copy("views.pt", "pytorch_model.bin");
  copy("module.pt", "training_args.bin");
  copy("module.pt", "optimizer.pt");
  EXPECT_EQ(Checkpoint(dir.path()).tensors().size(), 20u);
  EXPECT_EQ(code_of_open(dir.path()), "none");
  EXPECT_EQ(code_of_open(dir / "training_args.bin"), "unsafe-pickle");
  write_file(dir / "model.safetensors", one_tensor("e", "F32", "[1]", 4));
  EXPECT_EQ(names_of(dir.path()), Names{"e"}) << "safetensors is preferred";
}

TEST_F(TorchModel, Shards) {
  copy("views.pt", "pytorch_model-00001-of-00002.bin");
  copy("training.pt", "pytorch_model-00002-of-00002.bin");
  copy("module.pt", "training_args.bin");
  EXPECT_EQ(Checkpoint(dir.path()).tensors().size(), 24u);
  const Json map = {{"plain", "pytorch_model-00001-of-00002.bin"}, {"0.bias", "pytorch_model-00002-of-00002.bin"}};
  write_file(dir / "pytorch_model.bin.index.json", Json({{"weight_map", map}}).dump());
  EXPECT_EQ(Checkpoint(dir.path()).tensors().size(), 24u);
  std::filesystem::remove(dir / "pytorch_model-00002-of-00002.bin");
  EXPECT_EQ(code_of_open(dir.path()), "missing-shard");
}

TEST_F(TorchModel, AnyOnlyFile) {
  copy("training.pt", "checkpoint.pth");
  EXPECT_EQ(Checkpoint(dir.path()).tensors().size(), 4u);
}

TEST(Checkpoint, ASingleFileTakesTheConfigurationBesideIt) {
  const TemporaryDirectory dir;
  write_file(dir / "weights.safetensors", one_tensor("a", "F32", "[1]", 4));
  EXPECT_TRUE(Checkpoint(dir / "weights.safetensors").config().empty());
  write_file(dir / "config.json", R"({"model_type":"llama"})");
  EXPECT_EQ(Checkpoint(dir / "weights.safetensors").config()["model_type"], "llama");
  std::filesystem::rename(dir / "weights.safetensors", dir / "weights");
  EXPECT_EQ(names_of(dir / "weights"), Names{"a"}) << "told by its contents";
}

TEST(Checkpoint, TensorsOfEveryKind) {
  const std::vector<std::tuple<std::string, std::string, size_t, size_t>> kinds = {
      {"F64", "[2,3]", 48, 6},
      {"F8_E4M3", "[4]", 4, 4},
      {"F8_E5M2", "[4]", 4, 4},
      {"F8_E8M0", "[4]", 4, 4},
      {"F32", "[0,7]", 0, 0},
      {"BF16", "[]", 2, 1},
      {"F16", "[2,1,2,1,2]", 16, 8},
      {"I64", "[3]", 24, 3},
      {"U8", "[3]", 3, 3},
      {"BOOL", "[2,2]", 4, 4},
      {"F32", "[1,2,1,2,1,2,1,2]", 64, 16}};
  for (const auto& [dtype, shape, bytes, count] : kinds) {
    const TemporaryDirectory dir;
    write_file(dir / "x.safetensors", one_tensor("t", dtype, shape, bytes));
    const Checkpoint checkpoint(dir / "x.safetensors");
    const TensorEntry& entry = checkpoint.tensors().front();
    EXPECT_EQ(info(entry.dtype).safetensors, dtype);
    EXPECT_EQ(Json(entry.shape).dump(), shape);
    EXPECT_FALSE(entry.quantized());
    const std::vector<float> values = checkpoint.read_f32(entry);
    EXPECT_EQ(values.size(), count) << dtype << shape;
    EXPECT_EQ(values, std::vector<float>(count, dtype == "F8_E8M0" ? 0x1p-127F : 0.0F));
    EXPECT_EQ(entry.scheme.element == nullptr ? bytes : checkpoint.read(entry).codes.size(), bytes);
  }
}

TEST(Checkpoint, WhatIsNoModelIsRefused) {
  const TemporaryDirectory dir;
  EXPECT_EQ(code_of_open(dir / "none"), "cannot-open");
  EXPECT_EQ(code_of_open(dir.path()), "no-weights");
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
  std::filesystem::remove(dir / "config.json");
  EXPECT_EQ(code_of_open(dir.path()), "no-config");
  write_file(dir / "model.safetensors", "");
  EXPECT_EQ(code_of_open(dir.path()), "bad-safetensors");
  EXPECT_EQ(code_of_open(dir / "model.safetensors"), "bad-safetensors");
}

}  // namespace
}  // namespace bitwright
