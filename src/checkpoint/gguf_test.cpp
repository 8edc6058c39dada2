#include "checkpoint/gguf.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::read_file;
using test::TemporaryDirectory;

/// Little-endian pieces of a file, written by hand so that they can be wrong.
struct Bytes {
  std::string text;
  template <class T>
  Bytes& number(T value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Bytes& string(std::string_view value) {
    number<uint64_t>(value.size()).text += value;
    return *this;
  }
  Bytes& header(uint64_t tensors, uint64_t entries, uint32_t version = 3) {
    text += "GGUF";
    return number(version).number(tensors).number(entries);
  }
  Bytes& tensor(std::string_view name, const std::vector<uint64_t>& sizes, uint32_t type, uint64_t offset) {
    string(name).number(static_cast<uint32_t>(sizes.size()));
    for (const uint64_t size : sizes) number(size);
    return number(type).number(offset);
  }
  Bytes& data(size_t bytes, size_t alignment = 32) {
    text.resize((text.size() + alignment - 1) / alignment * alignment);
    text.append(bytes, '\1');
    return *this;
  }
};

std::string error_of(const std::string& bytes) {
  try {
    parse_gguf(std::as_bytes(std::span(bytes)), "x.gguf");
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_EQ(what.find('\n'), std::string::npos);
    return error.code() + ": " + error.report().why;
  }
  return "none";
}

TEST(Gguf, WhatIsWrongIsNamed) {
  const auto one = [](const std::string& name, const std::vector<uint64_t>& sizes, uint32_t type, uint64_t offset = 0) {
    return Bytes().header(1, 0).tensor(name, std::move(sizes), type, offset).data(256).text;
  };
  EXPECT_EQ(error_of(one("a", {32, 2}, 0)), "none");
  EXPECT_EQ(error_of(one("a", {}, 0)), "none");
  EXPECT_EQ(error_of(one("a", {0, 3}, 0)), "none");
  EXPECT_EQ(error_of(one("a", {64}, 0, 32)), "bad-gguf: tensor 'a' has offset 32, expected 0");
  EXPECT_EQ(error_of(one("a", {65}, 0)),
            "tensor-outside-file: tensor 'a' has 260 bytes at offset 0 of the data, the file has 256 there");
  EXPECT_EQ(error_of(one("a", {33}, 8)),
            "bad-gguf: tensor 'a' of type Q8_0 has 33 elements per row, not a multiple of its block size 32");
  for (const uint32_t id : {4u, 5u, 31u, 36u, 43u, 255u, UINT32_MAX})
    EXPECT_EQ(error_of(one("a", {32}, id)), "bad-gguf: tensor 'a' has unknown type " + std::to_string(id));
  EXPECT_EQ(error_of(one("a", {1, 1, 1, 1, 1}, 0)), "bad-gguf: tensor 'a' has 5 dimensions, the most are 4");
  EXPECT_EQ(error_of(one("a", {UINT64_MAX}, 0)), "bad-gguf: tensor 'a' has dimension -1");
  EXPECT_NE(error_of(one("a", {1ull << 40, 1ull << 40}, 0)).find("overflows"), std::string::npos);
  EXPECT_NE(error_of(one(std::string(64, 'n'), {1}, 0)).find("64 bytes, the most are 63"), std::string::npos);
  EXPECT_EQ(error_of(one("a\xff", {1}, 0)).substr(0, 8), "bad-gguf");
  EXPECT_EQ(error_of(one(std::string("a\0b", 3), {1}, 0)).substr(0, 8), "bad-gguf");
  EXPECT_EQ(error_of(Bytes().header(2, 0).tensor("a", {1}, 0, 0).tensor("a", {1}, 0, 32).data(64).text),
            "bad-gguf: tensor 'a' is there twice");
  EXPECT_EQ(error_of(Bytes().header(2, 0).tensor("a", {1}, 0, 0).tensor("b", {1}, 0, 4).data(64).text),
            "bad-gguf: tensor 'b' has offset 4, expected 32");
  EXPECT_EQ(error_of(Bytes().header(0, 0, 1).text),
            "unsupported-gguf: GGUF version 1 is not supported, only 2 and 3 are");
  EXPECT_EQ(error_of(Bytes().header(0, 0, 2).text), "none");
  EXPECT_EQ(error_of(Bytes().header(1ull << 60, 0).text),
            "bad-gguf: it is said to hold 1152921504606846976 tensors, 8 bytes follow");
}

TEST(Gguf, WrongMetadataIsNamed) {
  const auto entry = [](std::string_view key, uint32_t type) { return Bytes().header(0, 1).string(key).number(type); };
  const auto array = [&](uint32_t type, uint64_t count) { return entry("k", 9).number(type).number(count); };
  EXPECT_EQ(error_of(entry("k", 0).number('\1').text), "none");
  EXPECT_EQ(error_of(entry("", 0).number('\1').text), "bad-gguf: metadata key 0 is empty");
  EXPECT_EQ(error_of(entry("k", 13).number('\1').text), "bad-gguf: key 'k' has unknown value type 13");
  EXPECT_EQ(error_of(entry("k\xc0", 0).number('\1').text), "bad-gguf: key 'k\xc0' is not UTF-8");
  EXPECT_EQ(error_of(entry("k", 8).number<uint64_t>(5).text),
            "bad-gguf: key 'k' has 5 bytes at byte 45, the file ends at 45");
  EXPECT_EQ(error_of(array(9, 0).text), "bad-gguf: key 'k' is an array of arrays");
  EXPECT_EQ(error_of(array(0, 0).text), "none");
  EXPECT_EQ(error_of(array(8, 1ull << 61).text), "bad-gguf: key 'k' has 2305843009213693952 values, 0 bytes follow");
  EXPECT_EQ(error_of(array(10, (1ull << 61) + 1).number<uint64_t>(1).text),
            "bad-gguf: key 'k' has 2305843009213693953 values, 8 bytes follow");
  EXPECT_EQ(error_of(entry("general.alignment", 4).number(48u).text), "bad-gguf: the alignment 48 is no power of two");
  EXPECT_EQ(error_of(entry("general.alignment", 4).number(0u).text), "bad-gguf: the alignment 0 is no power of two");
  EXPECT_EQ(error_of(entry("general.alignment", 5).number(32u).text),
            "bad-gguf: key 'general.alignment' is i32, not u32");
  Bytes twice = Bytes().header(0, 2);
  for (int i = 0; i < 2; ++i) twice.string("k").number(0u).number('\1');
  EXPECT_EQ(error_of(twice.text), "bad-gguf: key 'k' is there twice");
}

/// Every value type, two tensors, an alignment of its own.
std::string sample() {
  const TemporaryDirectory dir;
  GgufMetadata metadata;
  metadata.add("general.architecture", "none");
  metadata.add("general.alignment", 64u);
  metadata.add("yes", true);
  metadata.add("half", 0.5f);
  metadata.add("words", std::vector<std::string>{"a", "", "\xff"});
  metadata.add("numbers", std::vector<int32_t>{-1, 2});
  metadata.add("scores", std::vector<float>{});
  const std::vector<ArraySpec> specs = {{"a", DType::f32, {3, 5}},
                                        {"b", DType::u8, {2, 64}, &find_gguf_type("Q8_0")->block}};
  GgufWriter writer(dir / "x.gguf", metadata, specs);
  for (const ArraySpec& spec : specs) writer.add(std::vector<std::byte>(spec.bytes(), std::byte{7}));
  writer.finish();
  return read_file(dir / "x.gguf");
}

TEST(Gguf, WhatIsWrittenIsRead) {
  const std::string bytes = sample();
  const GgufContents contents = parse_gguf(std::as_bytes(std::span(bytes)), "x");
  EXPECT_EQ(contents.version, 3u);
  EXPECT_EQ(contents.alignment, 64u);
  Json facts;
  for (const GgufEntry& entry : contents.metadata) facts[std::string(entry.key)] = to_json(entry);
  EXPECT_EQ(facts, (Json{{"general.architecture", "none"},
                         {"general.alignment", 64},
                         {"yes", true},
                         {"half", 0.5},
                         {"words", {"a", "", "\xff"}},
                         {"numbers", {-1, 2}},
                         {"scores", Json::array()}}));
  ASSERT_EQ(contents.arrays.size(), 2u);
  EXPECT_EQ(contents.arrays[0].shape, (Shape{3, 5}));
  EXPECT_EQ(contents.arrays[0].dtype, DType::f32);
  EXPECT_EQ(contents.arrays[1].shape, (Shape{2, 64}));
  EXPECT_EQ(contents.arrays[1].block->name, "Q8_0");
  EXPECT_EQ(contents.arrays[1].data.size(), 4u * 34);
  for (const StoredArray& array : contents.arrays) {
    EXPECT_EQ((reinterpret_cast<const char*>(array.data.data()) - bytes.data()) % 64, 0);
    EXPECT_TRUE(std::ranges::all_of(array.data, [](std::byte b) { return b == std::byte{7}; }));
  }
}

TEST(Gguf, EveryTruncationIsRefused) {
  const std::string bytes = sample();
  const size_t end_of_data = bytes.find_last_of('\7') + 1;
  for (size_t size = 0; size < end_of_data; ++size) EXPECT_NE(error_of(bytes.substr(0, size)), "none") << size;
  EXPECT_EQ(error_of(bytes.substr(0, end_of_data)), "none");  // some writers do not pad the end
  EXPECT_EQ(error_of(bytes), "none");
}

TEST(Gguf, EveryTypeIsListed) {
  const TemporaryDirectory dir;
  std::vector<ArraySpec> specs;
  for (const GgufType& type : all_gguf_types())
    specs.push_back({std::string(type.block.name),
                     type.dtype.value_or(DType::u8),
                     {3, 2 * type.block.elements},
                     type.dtype ? nullptr : &type.block});
  GgufWriter writer(dir / "x.gguf", {}, specs);
  for (const ArraySpec& spec : specs) writer.add(std::vector<std::byte>(spec.bytes()));
  writer.finish();
  const Checkpoint model(dir / "x.gguf");
  ASSERT_EQ(model.tensors().size(), all_gguf_types().size());
  size_t undecoded = 0;
  for (const GgufType& type : all_gguf_types()) {
    const TensorEntry* entry = model.find(type.block.name);
    ASSERT_NE(entry, nullptr);
    EXPECT_EQ(entry->shape, (Shape{3, 2 * type.block.elements}));
    EXPECT_EQ(entry->stored_bytes, 6 * type.block.bytes);
    if (entry->undecoded == nullptr) continue;
    ++undecoded;
    EXPECT_EQ(entry->undecoded, &type.block);
    EXPECT_FALSE(entry->quantized());
    try {
      model.read_f32(*entry);
      ADD_FAILURE() << type.block.name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), "unsupported-tensor");
      EXPECT_NE(error.report().why.find(std::string(type.block.name) + " is not decoded yet"), std::string::npos);
    }
  }
  EXPECT_GT(undecoded, 0u);
}

TEST(Gguf, LargeVocabulariesOpenAtOnce) {
  const TemporaryDirectory dir;
  std::vector<std::string> words(150'000), merges(300'000, "ab cd");
  for (size_t i = 0; i < words.size(); ++i) words[i] = "word" + std::to_string(i);
  GgufMetadata metadata;
  metadata.add("tokenizer.ggml.tokens", words);
  metadata.add("tokenizer.ggml.merges", merges);
  metadata.add("tokenizer.ggml.scores", std::vector<float>(words.size(), 0.5f));
  metadata.add("tokenizer.ggml.token_type", std::vector<int32_t>(words.size(), 1));
  GgufWriter(dir / "x.gguf", metadata, {}).finish();
  const auto start = std::chrono::steady_clock::now();
  const WeightFile file(dir / "x.gguf");
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EXPECT_EQ((*file.facts())["tokenizer.ggml.tokens"][149'999], "word149999");
  RecordProperty("seconds", std::to_string(seconds));
  std::cout << "seconds: " << seconds << '\n';
}

class GgufParts : public ::testing::Test {
 protected:
  /// Part `number` (from 0) of three, with one tensor named after it.
  void write(const std::string& name, int32_t number, uint32_t tensors = 3) {
    GgufMetadata metadata;
    if (number == 0) metadata.add("general.architecture", "none");
    metadata.add("split.no", static_cast<uint32_t>(number));
    metadata.add("split.count", 3u);
    metadata.add("split.tensors.count", tensors);
    GgufWriter writer(dir / name, metadata, {{"t" + std::to_string(number), DType::f32, {2}}});
    writer.add(std::vector<std::byte>(8, std::byte{1}));
    writer.finish();
  }
  std::string code(const std::string& name) {
    try {
      const Checkpoint model(dir / name);
      EXPECT_EQ(model.tensors().size(), 3u);
      EXPECT_EQ((*model.facts())["general.architecture"], "none");
    } catch (const Error& error) {
      return error.code();
    }
    return "none";
  }
  const TemporaryDirectory dir;
};

TEST_F(GgufParts, AreJoined) {
  for (int32_t i = 0; i < 3; ++i) write("m-0000" + std::to_string(i + 1) + "-of-00003.gguf", i);
  EXPECT_EQ(code("m-00001-of-00003.gguf"), "none");
  EXPECT_EQ(code("m-00002-of-00003.gguf"), "none");
  EXPECT_EQ(code("."), "none");
  EXPECT_EQ(Checkpoint(dir.path()).path(), dir / "m-00001-of-00003.gguf");
  EXPECT_EQ(Checkpoint(dir / "m-00002-of-00003.gguf").path(), dir / "m-00001-of-00003.gguf");
  std::filesystem::copy(dir / "m-00001-of-00003.gguf", dir / "renamed.gguf");
  EXPECT_EQ(code("renamed.gguf"), "missing-shard");
  write("m-00001-of-00003.gguf", 0, 4);
  EXPECT_EQ(code("m-00001-of-00003.gguf"), "missing-tensor");
  std::filesystem::remove(dir / "m-00003-of-00003.gguf");
  EXPECT_EQ(code("m-00001-of-00003.gguf"), "missing-shard");
}

std::filesystem::path golden_files() { return test::shared_dir() / "golden" / "gguf_file"; }

// Files that ggml's own code wrote.
TEST(Golden, gguf_file) {
  const auto files = test::files_in(golden_files(), ".gguf");
  if (files.empty()) GTEST_SKIP() << "no golden cases here";
  for (const auto& path : files) {
    SCOPED_TRACE(path.filename());
    const std::string bytes = read_file(path);
    const GgufContents contents = parse_gguf(std::as_bytes(std::span(bytes)), path.string());
    GgufMetadata metadata;
    for (const GgufEntry& entry : contents.metadata) metadata.add(entry);
    std::vector<ArraySpec> specs;
    for (const StoredArray& array : contents.arrays)
      specs.push_back({array.name, array.dtype, array.shape, array.block});
    const TemporaryDirectory dir;
    GgufWriter writer(dir / "x.gguf", metadata, specs);
    for (const StoredArray& array : contents.arrays) writer.add(array.data);
    writer.finish();
    EXPECT_TRUE(read_file(dir / "x.gguf") == bytes);
  }
  std::cout << "cases: " << files.size() << '\n';
}

TEST(Golden, gguf_file_values) {
  const auto path = golden_files() / "tiny_align32.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "no golden cases here";
  const Json facts = *WeightFile(path).facts();
  EXPECT_EQ(facts["general.name"], "golden tiny \u00e9\u20ac");
  EXPECT_EQ(facts["t.u8"], 255);
  EXPECT_EQ(facts["t.i8"], -128);
  EXPECT_EQ(facts["t.u16"], 65535);
  EXPECT_EQ(facts["t.i16"], -32768);
  EXPECT_EQ(facts["t.u32"], UINT32_MAX);
  EXPECT_EQ(facts["t.i32"], INT32_MIN);
  EXPECT_EQ(facts["t.f32"], 1.5);
  EXPECT_EQ(facts["t.u64"], UINT64_MAX);
  EXPECT_EQ(facts["t.i64"], INT64_MIN);
  EXPECT_EQ(facts["t.f64"], 3.141592653589793);
  EXPECT_EQ(facts["t.bool"], true);
  EXPECT_EQ(facts["t.arr_str"], (Json{"a", "", "b\u00e9"}));
  EXPECT_EQ(facts["t.arr_i32"], (Json{1, -2, 3}));
  EXPECT_EQ(facts["t.arr_f32"], (Json{0.5, -1.0}));
  EXPECT_EQ(facts["t.arr_bool"], (Json{true, false, true}));
  EXPECT_EQ(facts["t.arr_u64"], (Json{7}));
  const Checkpoint model(path);
  const WeightFile reference(golden_files() / "reference.safetensors");
  size_t compared = 0;
  for (const StoredArray& original : reference.arrays()) {
    const TensorEntry* entry = model.find(original.name.substr(0, original.name.rfind('.')));
    ASSERT_NE(entry, nullptr) << original.name;
    EXPECT_EQ(entry->shape, original.shape) << original.name;
    if (entry->quantized() || entry->undecoded != nullptr) continue;
    std::vector<float> expected(static_cast<size_t>(element_count(original.shape)));
    to_f32(original.dtype, original.data, expected);
    for (float& value : expected) value = round_to(entry->dtype, value);
    EXPECT_EQ(model.read_f32(*entry), expected) << original.name;
    ++compared;
  }
  EXPECT_EQ(model.tensors().size(), reference.arrays().size());
  EXPECT_EQ(compared, 3u);  // F32, F16, BF16
}

// Mutated files with ggml's verdict; ours must name the same reason.
TEST(Golden, gguf_file_bad) {
  const auto list = golden_files() / "negative_ggml.json";
  if (!std::filesystem::exists(list)) GTEST_SKIP() << "no golden cases here";
  const std::map<std::string, std::string> reasons = {
      {"bad_magic", "bad-gguf: it begins with 'GGUX'"},
      {"version4", "unsupported-gguf: GGUF version 4"},
      {"big_endian_version", "unsupported-gguf: its numbers are big-endian"},
      {"truncated_header", "bad-gguf: metadata key"},
      {"truncated_data", "tensor-outside-file: tensor 'output.weight'"},
      {"neg_tensor_count", "bad-gguf: it is said to hold -1 tensors"},
      {"empty", "bad-gguf: 0 bytes are too few"},
      {"unknown_kv_type", "bad-gguf: key 't.u8' has unknown value type 99"},
      {"dup_key", "bad-gguf: key 't.u8' is there twice"},
      {"bad_offset", "bad-gguf: tensor 'blk.0.ffn_up.weight' has offset 12345, expected 2176"},
      {"ne0_not_block_multiple", "bad-gguf: tensor 'blk.0.ffn_up.weight' of type Q4_K has 250 elements per row"}};
  size_t cases = 0;
  for (const Json& verdict : parse_json(read_file(list), "list")) {
    const std::string file = verdict["file"];
    SCOPED_TRACE(file);
    const std::string error = error_of(read_file(golden_files() / file));
    EXPECT_EQ(error == "none", verdict["result"] != "REJECTED") << error;
    const auto reason = reasons.find(std::filesystem::path(file).stem().string());
    ASSERT_NE(reason, reasons.end());
    EXPECT_EQ(error.substr(0, reason->second.size()), reason->second);
    try {
      Checkpoint model(golden_files() / file);
      ADD_FAILURE() << "it opens";
    } catch (const Error&) {
    }
    ++cases;
  }
  std::cout << "cases: " << cases << '\n';
}

}  // namespace
}  // namespace bitwright
