#include "container/container.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "base/bits.hpp"
#include "base/error.hpp"

namespace bitwright {
namespace {

TEST(Bits, StreamsRoundTrip) {
  std::mt19937 random(1);
  for (int bits = 1; bits <= 8; ++bits)
    for (const size_t count : {0u, 1u, 7u, 8u, 33u, 256u, 600'001u}) {
      std::vector<std::byte> codes(count);
      for (std::byte& code : codes) code = static_cast<std::byte>(random() & ((1u << bits) - 1));
      const std::vector<std::byte> packed = pack_bits(codes, bits);
      EXPECT_EQ(packed.size(), packed_bytes(count, bits));
      const auto width = static_cast<size_t>(bits);
      for (size_t bit = 0; bit < packed.size() * 8; ++bit) {
        const unsigned stored = std::to_integer<unsigned>(packed[bit / 8]) >> bit % 8 & 1;
        const unsigned meant =
            bit < count * width ? std::to_integer<unsigned>(codes[bit / width]) >> bit % width & 1 : 0;
        ASSERT_EQ(stored, meant) << bits << " bits, bit " << bit;
      }
      EXPECT_TRUE(unpack_bits(packed, bits, count) == codes);
    }
  EXPECT_EQ(pack_bits(std::vector{std::byte{1}, std::byte{2}}, 4), std::vector{std::byte{0x21}});
}

constexpr const char* kNativeFile = "quantization_metadata.json";

/// A checkpoint in memory.
struct Memory {
  std::map<std::string, ArraySpec, std::less<>> arrays;
  std::map<std::string, std::vector<std::byte>> data;
  Json config = Json::object(), metadata = Json::object();
  std::map<std::string, Json, std::less<>> documents;

  CheckpointView view() const {
    return {.arrays = arrays,
            .config = config,
            .quantization_metadata = metadata,
            .documents = &documents,
            .bytes = [this](const std::string& name) { return std::span<const std::byte>(data.at(name)); },
            .where = "memory"};
  }
};

Scheme integers(int bits, bool symmetric, const Grouping& grouping, DType scale) {
  Scheme scheme = {.element = &integer_element(bits, symmetric), .scale = parameter(grouping, plain(scale))};
  if (symmetric) return scheme;
  scheme.offset_kind = OffsetKind::zero_point;
  scheme.offset = parameter(grouping, {.element = scheme.element});
  return scheme;
}

std::vector<Scheme> schemes() {
  std::vector<Scheme> all;
  for (int bits = 2; bits <= 8; ++bits)
    for (const bool symmetric : {true, false})
      for (const Grouping& grouping :
           {Grouping::tensor(), Grouping::channel(), Grouping::along(32), Grouping::flat(64)})
        all.push_back(integers(bits, symmetric, grouping, bits % 2 == 0 ? DType::f16 : DType::bf16));
  const Scheme nested = {.element = find_element("dynamic8"),
                         .scale = parameter(Grouping::flat(256), plain(DType::f32)),
                         .offset_kind = OffsetKind::bias,
                         .offset = parameter(Grouping::tensor(), plain(DType::f32))};
  for (const char* type : {"nf4", "fp4"}) {
    all.push_back({.element = find_element(type), .scale = parameter(Grouping::flat(64), plain(DType::f32))});
    all.push_back({.element = find_element(type), .scale = parameter(Grouping::flat(64), nested)});
  }
  return all;
}

QuantizedTensor random_tensor(const Scheme& scheme, const Shape& shape) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(element_count(shape)));
  for (float& value : values) value = normal(random);
  return encode(scheme, shape, values);
}

void write_metadata(const Container& container, const StoredTensor& stored, Memory& memory) {
  OrderedJson config = OrderedJson::object();
  std::map<std::string, OrderedJson> files;
  const OrderedJson record = OrderedJson::object();
  container.write_metadata({.tensors = std::span(&stored, 1), .kept = {}, .record = record},
                           {.config = config, .files = files});
  memory.config = Json::parse(config.dump());
  for (const auto& [name, json] : files) memory.documents[name] = Json::parse(json.dump());
  if (memory.documents.contains(kNativeFile)) memory.metadata = memory.documents.at(kNativeFile);
}

Memory write_native(const StoredTensor& stored, const QuantizedTensor& t) {
  const Container& native = *find_container("native");
  Memory memory;
  const std::vector<ArraySpec> layout = native.layout(stored);
  size_t next = 0;
  for (NamedArray& array : native.pack(stored, t)) {
    EXPECT_EQ(array.spec.name, layout.at(next).name);
    EXPECT_EQ(array.spec.bytes(), layout.at(next++).bytes());
    EXPECT_EQ(array.data.size(), array.spec.bytes());
    memory.arrays[array.spec.name] = array.spec;
    memory.data[array.spec.name] = std::move(array.data);
  }
  EXPECT_EQ(next, layout.size());
  write_metadata(native, stored, memory);
  return memory;
}

TEST(Native, EverySchemeComesBackBitForBit) {
  const Container& native = *find_container("native");
  for (const Scheme& scheme : schemes())
    for (const Shape& shape : {Shape{4, 64}, Shape{5, 33}, Shape{1, 1}, Shape{2, 3, 40}}) {
      SCOPED_TRACE(describe(scheme) + " " + to_string(shape));
      const QuantizedTensor t = random_tensor(scheme, shape);
      const StoredTensor stored = {.name = "w", .shape = shape, .scheme = scheme};
      const Memory memory = write_native(stored, t);
      ASSERT_TRUE(native.detect(memory.view()));
      const auto listed = native.list(memory.view());
      ASSERT_EQ(listed.size(), 1u);
      EXPECT_TRUE(native.unpack(listed[0], memory.view()) == t);
    }
}

TEST(Native, RefusesWhatDoesNotAgree) {
  const Container& native = *find_container("native");
  const Scheme scheme = integers(4, false, Grouping::along(32), DType::f16);
  const StoredTensor stored = {.name = "w", .shape = {4, 64}, .scheme = scheme};
  const Memory good = write_native(stored, random_tensor(scheme, stored.shape));
  const auto code = [&](const std::function<void(Memory&)>& damage) {
    Memory memory = good;
    damage(memory);
    memory.metadata = Json::parse(memory.metadata.dump());  // as it would be read
    try {
      native.list(memory.view());
    } catch (const Error& error) {
      return error.code();
    }
    return std::string("none");
  };
  EXPECT_EQ(code([](Memory&) {}), "none");
  for (const auto& array : good.arrays) {
    const std::string& name = array.first;
    EXPECT_EQ(code([&](Memory& m) { m.arrays.erase(name); }), "bad-container") << name;
    EXPECT_EQ(code([&](Memory& m) { m.arrays[name].dtype = DType::f64; }), "bad-container") << name;
    EXPECT_EQ(code([&](Memory& m) { m.arrays[name].shape.push_back(2); }), "bad-container") << name;
  }
  EXPECT_EQ(code([](Memory& m) { m.metadata["format_version"] = "2.0"; }), "bad-metadata");
  EXPECT_EQ(code([](Memory& m) { m.metadata["format_version"] = "1.7"; }),
            "none");  // a newer minor adds, never changes
  EXPECT_EQ(code([](Memory& m) { m.metadata["format_version"] = "one"; }), "bad-metadata");
  EXPECT_EQ(code([](Memory& m) { m.metadata.erase("tensors"); }), "bad-metadata");
  EXPECT_EQ(code([](Memory& m) { m.metadata["tensors"]["w"]["shape"] = {-4, 64}; }), "bad-metadata");
  EXPECT_EQ(code([](Memory& m) {
              m.metadata["tensors"]["w"]["shape"] = {int64_t{1} << 40, int64_t{1} << 40};
            }),
            "bad-metadata");
  EXPECT_EQ(code([](Memory& m) { m.metadata["tensors"]["w"]["shape"] = {64, 4}; }), "bad-container");
  EXPECT_EQ(code([](Memory& m) { m.metadata["tensors"]["w"]["scheme"]["element"] = "uint9"; }), "bad-scheme");
  EXPECT_EQ(code([](Memory& m) { m.metadata["tensors"]["w"]["scheme"]["element"] = "uint8"; }), "bad-container");
}

// fit is asked before a byte is written; what it accepts must come back.
TEST(Containers, FitKeepsItsWord) {
  for (const Container* container : all_containers())
    for (const Scheme& scheme : schemes()) {
      const Shape shape = {4, 64};
      const Fit fit = container->fit(scheme, shape);
      EXPECT_EQ(fit.verdict == Verdict::exact, fit.reason.empty());
      if (fit.verdict == Verdict::impossible) continue;
      SCOPED_TRACE(std::string(container->name) + ": " + describe(scheme));
      const QuantizedTensor t = random_tensor(scheme, shape);
      Memory memory;
      const StoredTensor stored = {.name = "w.weight", .shape = shape, .scheme = scheme};
      for (NamedArray& array : container->pack(stored, t)) {
        memory.arrays[array.spec.name] = array.spec;
        memory.data[array.spec.name] = std::move(array.data);
      }
      if (container->write_metadata != nullptr) write_metadata(*container, stored, memory);
      const auto listed = container->list(memory.view());
      ASSERT_EQ(listed.size(), 1u);
      EXPECT_TRUE(container->unpack(listed[0], memory.view()) == t);
    }
}

}  // namespace
}  // namespace bitwright
