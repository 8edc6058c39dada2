#include <gtest/gtest.h>

#include <algorithm>
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
using Entry = test::ZipMember;

const WeightFormat& torch_format() {
  for (const WeightFormat* format : all_weight_formats())
    if (format->name == "torch") return *format;
  throw std::runtime_error("no row for torch");
}

/// Files that PyTorch wrote (tests/golden/torch/make.py).
std::filesystem::path fixture(const std::string& name) { return "tests/golden/torch/" + name; }

// The opcodes of a pickle, as pickletools.py describes them.
std::string number(uint32_t value) { return "J" + little(value, 4); }
std::string text(const std::string& value) { return "X" + little(value.size(), 4) + value; }
std::string global(const std::string& module, const std::string& name) { return "c" + module + "\n" + name + "\n"; }
std::string tuple(const std::string& items) { return "(" + items + "t"; }
std::string numbers(const std::vector<uint32_t>& values) {
  std::string out;
  for (const uint32_t v : values) out += number(v);
  return tuple(out);
}
std::string storage(uint32_t count, const std::string& type = "FloatStorage", const std::string& key = "0") {
  return tuple(text("storage") + global("torch", type) + text(key) + text("cpu") + number(count)) + "Q";
}
std::string tensor(const std::vector<uint32_t>& size, const std::vector<uint32_t>& stride, uint32_t offset = 0,
                   const std::string& from = storage(4)) {
  return global("torch._utils", "_rebuild_tensor_v2") +
         tuple(from + number(offset) + numbers(size) + numbers(stride) + "\x89" + "N") + "R";
}
std::string dict(const std::string& items) { return "}(" + items + "u"; }
std::string pickle(const std::string& body) { return "\x80\x02" + body + "."; }
std::string file(const std::string& body, const std::string& data = std::string(16, '\0')) {
  return zip({{"m/data.pkl", pickle(body)}, {"m/byteorder", "little"}, {"m/data/0", data}});
}
std::string one(const std::string& value) { return file(dict(text("a") + value)); }

WeightContents parsed(const std::string& bytes) {
  // A copy of exact size on the heap: a read past the end is seen by the address sanitizer.
  const std::vector<char> exact(bytes.begin(), bytes.end());
  WeightContents contents = torch_format().parse(std::as_bytes(std::span(exact)), "file");
  uint64_t sum = 0;
  for (const StoredArray& array : contents.arrays)
    for (const std::byte b : array.data) sum += std::to_integer<uint64_t>(b);
  EXPECT_NE(sum, UINT64_MAX);
  return contents;
}

/// The error's code, and its message where `message` is wanted.
std::string code_of(const std::string& bytes, std::string* message = nullptr) {
  try {
    parsed(bytes);
  } catch (const Error& error) {
    if (message != nullptr) *message = error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("file"), std::string::npos) << error.what();
    return error.code();
  }
  return "none";
}

std::vector<float> values(const Checkpoint& checkpoint, std::string_view name) {
  const TensorEntry* entry = checkpoint.find(name);
  EXPECT_NE(entry, nullptr) << name;
  return entry == nullptr ? std::vector<float>() : checkpoint.read_f32(*entry);
}

std::vector<float> counted(size_t count, float first = 0) {
  std::vector<float> out(count);
  for (float& v : out) v = first++;
  return out;
}

void expect_views(const Checkpoint& c) {
  using Floats = std::vector<float>;
  EXPECT_EQ(c.tensors().size(), 20u);
  EXPECT_EQ(values(c, "plain"), counted(24));
  Floats transposed, permuted;
  for (int row = 0; row < 6; ++row)
    for (int column = 0; column < 4; ++column) transposed.push_back(static_cast<float>(column * 6 + row));
  EXPECT_EQ(values(c, "transposed"), transposed);
  EXPECT_EQ(c.find("transposed")->shape, (Shape{6, 4}));
  for (int last = 0; last < 4; ++last)
    for (int other = 0; other < 6; ++other) permuted.push_back(static_cast<float>(last + other * 4));
  EXPECT_EQ(values(c, "permuted"), permuted);
  EXPECT_EQ(values(c, "tied.a"), counted(6, 100));
  EXPECT_EQ(c.plain_bytes(*c.find("tied.a")).data(), c.plain_bytes(*c.find("tied.b")).data()) << "mapped, not copied";
  EXPECT_EQ(values(c, "slice"), counted(6, 5));
  EXPECT_EQ(values(c, "columns"), (Floats{10, 11, 12, 18, 19, 20, 26, 27, 28}));
  EXPECT_EQ(values(c, "expanded"), Floats(6, 7.0F));
  for (const auto& [name, dtype] : {std::pair("half", DType::f16), {"bfloat16", DType::bf16}, {"double", DType::f64}}) {
    EXPECT_EQ(values(c, name), (Floats{1.5F, -2})) << name;
    EXPECT_EQ(c.find(name)->dtype, dtype);
  }
  for (const auto& [name, dtype] : {std::pair("int64", DType::i64), {"int16", DType::i16}, {"int8", DType::i8}}) {
    EXPECT_EQ(values(c, name), (Floats{1, -2})) << name;
    EXPECT_EQ(c.find(name)->dtype, dtype);
  }
  EXPECT_EQ(values(c, "uint8"), (Floats{1, 254}));
  EXPECT_EQ(values(c, "bool"), (Floats{1, 0}));
  EXPECT_EQ(values(c, "scalar"), Floats{3});
  EXPECT_EQ(c.find("scalar")->shape, Shape{});
  EXPECT_EQ(c.find("empty")->shape, (Shape{0, 4}));
  EXPECT_EQ(values(c, "empty"), Floats{});
  EXPECT_EQ(c.find("five")->shape, Shape(5, 2));
  EXPECT_EQ(values(c, "five"), counted(32));
  EXPECT_EQ(values(c, "parameter"), Floats{9});
}

TEST(TorchFile, ReadsWhatPyTorchWrote) {
  expect_views(Checkpoint(fixture("views.pt")));
  expect_views(Checkpoint(fixture("views_legacy.pt")));
}

TEST(TorchFile, ReadsTheModelOfATrainingRun) {
  const Checkpoint c(fixture("training.pt"));
  EXPECT_EQ(c.tensors().size(), 4u);
  EXPECT_EQ(values(c, "0.weight"), counted(6));
  EXPECT_EQ(values(c, "1.bias"), counted(3, 30));
}

TEST(TorchFile, RefusesAModuleByName) {
  std::string message;
  EXPECT_EQ(code_of(test::read_file(fixture("module.pt")), &message), "unsafe-pickle");
  EXPECT_NE(message.find("'torch.nn.modules.container.Sequential'"), std::string::npos) << message;
}

TEST(TorchFile, IsToldByItsContents) {
  const TemporaryDirectory dir;
  std::filesystem::copy_file(fixture("training.pt"), dir / "weights");
  EXPECT_EQ(Checkpoint(dir / "weights").format(), "torch");
}

TEST(TorchFile, EveryTruncationIsRefused) {
  for (const char* name : {"views.pt", "views_legacy.pt"}) {
    const std::string good = test::read_file(fixture(name));
    for (size_t size = 0; size < good.size(); ++size) EXPECT_NE(code_of(good.substr(0, size)), "none") << name << size;
    EXPECT_NE(code_of(good + "x"), "none");
  }
}

TEST(TorchFile, EveryByteMayBeWrong) {
  for (const char* name : {"views.pt", "views_legacy.pt"}) {
    const std::string good = test::read_file(fixture(name));
    for (size_t i = 0; i < good.size(); ++i)
      for (const int change : {1, 0x80, 0xff}) {
        std::string bad = good;
        bad[i] = static_cast<char>(bad[i] ^ change);
        code_of(bad);  // data may change unseen; nothing may crash or read outside
      }
  }
}

TEST(TorchFile, RefusesWhatIsNoTensorByName) {
  const auto refused = [](const std::string& body, const std::string& name) {
    std::string message;
    EXPECT_EQ(code_of(file(body), &message), "unsafe-pickle") << name;
    EXPECT_NE(message.find(name), std::string::npos) << message;
  };
  refused(global("os", "system") + tuple(text("true")) + "R", "'os.system'");
  refused(global("posix", "system"), "'posix.system'");
  refused(text("builtins") + text("eval") + "\x93", "'builtins.eval'");
  refused(global("torch", "load"), "'torch.load'");
  refused(global("torch._utils", "_rebuild_tensor_v2.__globals__"), "__globals__'");
  refused(global("collections", "OrderedDict") + ")\x81", "opcode 0x81");  // NEWOBJ
  refused("(ios\nsystem\n", "opcode 0x69");                                // INST
  refused("\x82\x01", "opcode 0x82");                                      // EXT1
  refused(tensor({2}, {1}) + dict("") + "b", "an object with attributes");
  EXPECT_EQ(code_of(one(tensor({2}, {1}))), "none");
  EXPECT_EQ(code_of(file(global("collections", "OrderedDict") + ")R" + dict(text("_metadata") + "N") + "b")),
            "bad-torch-file")
      << "attributes of a dict say nothing; it is empty";
}

TEST(TorchFile, RefusesDamagedPickles) {
  const std::string t = tensor({2}, {1});
  for (const std::string& body :
       {std::string(""), std::string("t"), std::string("u"), std::string("}u"), std::string("}(Nu"),
        std::string("]") + text("a") + t + "s", std::string("h\1"), std::string("q\1"), std::string("NR"),
        global("collections", "OrderedDict") + tuple("N") + "R", text("a") + text("b") + "R",
        std::string("X\xff\xff\xff\xff"), std::string("\x8a\x09"), std::string("cos"), std::string("\x80\x01N"),
        "\x95" + little(99999, 8) + "N", std::string("N\x93"), std::string("(0")})
    EXPECT_TRUE(code_of(file(body)) == "bad-pickle" || code_of(file(body)) == "unsafe-pickle") << body;
  for (const std::string& body : {std::string("N"), std::string("}"), t, "]" + t + "a", dict("N" + t),
                                  dict(text("a") + t + text("a") + t), dict(text("\xff") + t), dict(t + t)})
    EXPECT_EQ(code_of(file(body)), "bad-torch-file") << body;
}

TEST(TorchFile, ChecksEveryView) {
  const auto code = [](const std::vector<uint32_t>& size, const std::vector<uint32_t>& stride, uint32_t offset = 0,
                       const std::string& from = storage(4)) {
    return code_of(one(tensor(size, stride, offset, from)));
  };
  EXPECT_EQ(code({4}, {1}), "none");
  EXPECT_EQ(code({2, 2}, {1, 2}), "none");
  EXPECT_EQ(code({2}, {3}), "none");
  EXPECT_EQ(code({}, {}, 3), "none");
  EXPECT_EQ(code({0}, {1}, 9), "none") << "no element is outside";
  EXPECT_EQ(code({1}, {0x7fffffff}, 3), "none") << "nor does a stride of nothing lead there";
  EXPECT_EQ(code({3, 2}, {1, 1}), "none") << "overlapping rows";
  for (const auto& [size, stride, offset] :
       std::vector<std::tuple<std::vector<uint32_t>, std::vector<uint32_t>, uint32_t>>{
           {{5}, {1}, 0},
           {{4}, {1}, 1},
           {{2}, {4}, 0},
           {{1}, {1}, 4},
           {{}, {}, 4},
           {{}, {}, 0xffffffff},
           {{2, 2}, {1, 3}, 0},
           {{2}, {0x7fffffff}, 0},
           {{0x7fffffff, 0x7fffffff}, {0x7fffffff, 0x7fffffff}, 0},
           {{0x7fffffff, 0x7fffffff, 4}, {0, 0, 0}, 0},
           {{2, 2}, {1}, 0},
           {{0xffffffff}, {1}, 0},
           {{2}, {0xffffffff}, 1},
           {{1, 1, 1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1, 1}, 0}})
    EXPECT_EQ(code(size, stride, offset), "bad-torch-file");
  EXPECT_EQ(code({4}, {1}, 0, storage(5)), "bad-torch-file") << "16 bytes are there";
  EXPECT_EQ(code({4}, {1}, 0, storage(3)), "bad-torch-file");
  EXPECT_EQ(code({4}, {1}, 0, storage(0xffffffff)), "bad-torch-file");
  EXPECT_EQ(code({4}, {1}, 0, storage(4, "FloatStorage", "1")), "bad-torch-file");
  EXPECT_EQ(code({4}, {1}, 0, storage(4, "float32")), "bad-torch-file") << "no storage";
  EXPECT_EQ(code({4}, {1}, 0, storage(4, "ComplexFloatStorage")), "unsafe-pickle");
  EXPECT_EQ(code({4}, {1}, 0, text("x") + "Q"), "bad-torch-file");
}

TEST(TorchFile, RepeatsNoMoreThanTheFileHolds) {
  EXPECT_EQ(code_of(one(tensor({60}, {0}))), "none");
  EXPECT_EQ(code_of(one(tensor({4096}, {0}))), "bad-torch-file");
  EXPECT_EQ(code_of(one(tensor({0x7fffffff, 0x7fffffff}, {0, 0}))), "bad-torch-file");
  std::string many, tied;  // gathered once however often it is named
  for (int i = 0; i < 200; ++i) {
    many += text(std::to_string(i)) + "h\1";
    tied += text(std::to_string(i)) + tensor({2, 2}, {1, 2});
  }
  EXPECT_EQ(code_of(file(tensor({60}, {0}) + "q\1" + dict(many))), "none");
  EXPECT_EQ(parsed(file(dict(tied))).owned.size(), 1u);
}

TEST(TorchFile, AnotherKindOfFileIsToldFromADamagedOne) {
  std::string message;
  EXPECT_EQ(code_of(std::string(3000, 'x'), &message), "bad-torch-file");  // llama2.c's model.bin and the like
  EXPECT_NE(message.find("begins neither"), std::string::npos) << message;
  EXPECT_EQ(code_of("PK\3\4" + std::string(3000, 'x')), "bad-zip");
}

// Each dict holds the one before by reference, so that a look from the top meets only known ones.
TEST(TorchFile, ChainsOfDictsAndLongNamesAreRefused) {
  constexpr uint32_t kTensor = 1u << 30, kLength = 200'000;
  const auto put = [](uint32_t at) { return "r" + little(at, 4); };
  const auto got = [](uint32_t at) { return "j" + little(at, 4); };
  std::string items = text("a") + dict(text("t") + tensor({4}, {1}) + put(kTensor)) + put(0);
  for (uint32_t k = 1; k < kLength; ++k)
    items += text(k + 1 == kLength ? "model" : "b") +
             dict(text("w") + dict(text("t") + got(kTensor)) + text("z") + got(k - 1)) + put(k);
  std::string message;
  EXPECT_EQ(code_of(file(dict(items)), &message), "bad-torch-file");
  EXPECT_NE(message.find("nested more than 16 deep"), std::string::npos) << message;

  const auto named = [&](size_t size) { return file(dict(text(std::string(size, 'n')) + tensor({4}, {1}))); };
  EXPECT_EQ(code_of(named(1024)), "none");
  EXPECT_EQ(code_of(named(1025), &message), "bad-torch-file");
  EXPECT_NE(message.find("1025 bytes, the most are 1024"), std::string::npos) << message;
}

TEST(TorchFile, NestedDicts) {
  const std::string t = tensor({2}, {1});
  const auto names = [](const std::string& body) {
    std::vector<std::string> out;
    for (const StoredArray& array : parsed(file(body)).arrays) out.push_back(array.name);
    std::ranges::sort(out);
    return out;
  };
  using Names = std::vector<std::string>;
  const std::string weights = dict(text("a") + t + text("step") + number(3));
  EXPECT_EQ(names(weights), Names{"a"});
  EXPECT_EQ(names(dict(text("x") + dict(text("y") + weights))), Names{"a"});
  EXPECT_EQ(names(dict(text("opt") + dict(number(0) + dict(text("m") + t)) + text("model") + weights)), Names{"a"});
  EXPECT_EQ(names(dict(text("left") + weights + text("right") + dict(number(0) + t))), (Names{"left.a", "right.0"}));
  EXPECT_EQ(names(dict(text("b") + t + text("inner") + weights)), (Names{"b", "inner.a"}));
  EXPECT_EQ(code_of(file(dict(text("a.b") + t + text("a") + dict(text("b") + t)))), "bad-torch-file");
  EXPECT_EQ(code_of(file(dict(text("l") + weights + "q\1" + text("r") + "h\1"))), "bad-torch-file") << "twice";
  EXPECT_EQ(code_of(file("}q\1(" + text("me") + "h\1" + text("a") + t + "u")), "bad-torch-file") << "in itself";
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "}" + text("d");
  deep += weights + std::string(100000, 's');
  EXPECT_EQ(code_of(file(deep)), "bad-torch-file");
}

TEST(TorchFile, ParametersAndNewDtypes) {
  const std::string t = tensor({2}, {1});
  const auto call = [](const std::string& name, const std::string& arguments) {
    return global("torch._utils", name) + tuple(arguments) + "R";
  };
  EXPECT_EQ(code_of(one(call("_rebuild_parameter", t + "\x88" + "N"))), "none");
  EXPECT_EQ(code_of(one(call("_rebuild_parameter", ""))), "bad-torch-file");
  EXPECT_EQ(code_of(one(call("_rebuild_parameter", "N"))), "bad-torch-file");
  EXPECT_EQ(code_of(one(call("_rebuild_parameter", call("_rebuild_parameter", t)))), "bad-torch-file");
  // Types without a storage class of their own: bytes, and the type beside them.
  const std::string untyped =
      tuple(text("storage") + global("torch.storage", "UntypedStorage") + text("0") + text("cpu") + number(16)) + "Q";
  const auto v3 = [&](const std::string& dtype, uint32_t count) {
    return call("_rebuild_tensor_v3", untyped + number(0) + numbers({count}) + numbers({1}) + "\x89N" + dtype);
  };
  const WeightContents fp8 = parsed(one(v3(global("torch", "float8_e4m3fn"), 16)));
  EXPECT_EQ(fp8.arrays.at(0).dtype, DType::f8_e4m3);
  EXPECT_EQ(parsed(one(v3(global("torch", "uint32"), 4))).arrays.at(0).dtype, DType::u32);
  EXPECT_EQ(code_of(one(v3(global("torch", "uint32"), 5))), "bad-torch-file");
  EXPECT_EQ(code_of(one(v3("N", 4))), "bad-torch-file");
  EXPECT_EQ(code_of(one(v3(global("torch", "float8_e4m3fnuz"), 4))), "unsafe-pickle");
}

TEST(TorchFile, Archives) {
  const std::string good = pickle(dict(text("a") + tensor({4}, {1}))), data(16, '\1');
  const std::vector<Entry> entries = {{"m/data.pkl", good}, {"m/data/0", data}};
  EXPECT_EQ(code_of(zip(entries)), "none");
  EXPECT_EQ(code_of(zip(entries, true)), "none") << "zip64";
  const std::string large = zip(entries, true);
  for (size_t size = 0; size < large.size(); ++size) EXPECT_NE(code_of(large.substr(0, size)), "none");
  for (size_t i = 0; i < large.size(); ++i)
    for (const char to : {'\0', '\1', '\x7f', '\xff'}) {
      std::string bad = large;
      bad[i] = to;
      code_of(bad);
    }
  EXPECT_EQ(code_of(zip({{"m/data.pkl", good}, {"m/data/0", data, 8}})), "bad-zip") << "compressed";
  EXPECT_EQ(code_of(zip({{"m/data.pkl", good}, {"m/data/0", data, 0, 1}})), "bad-zip") << "encrypted";
  EXPECT_EQ(code_of(zip({{"m/data.pkl", good}, {"m/data/0", data}, {"m/data/0", data}})), "bad-zip");
  EXPECT_EQ(code_of(zip({{"m/data/0", data}})), "bad-torch-file");
  EXPECT_EQ(code_of(zip({{"m/data.pkl", good}})), "bad-torch-file") << "no storage";
  EXPECT_EQ(code_of(zip({{"m/data.pkl", good}, {"m/data/0", data.substr(1)}})), "bad-torch-file");
  EXPECT_EQ(code_of(zip({{"m/data.pkl", good}, {"m/data/0", data}, {"m/byteorder", "big"}})), "bad-torch-file");
  EXPECT_EQ(code_of(zip({})), "bad-torch-file");
  std::string renamed = zip(entries);
  renamed.replace(renamed.find("m/data/0"), 8, "m/data/1");
  EXPECT_EQ(code_of(renamed), "bad-zip") << "two names for one entry";
}

}  // namespace
}  // namespace bitwright
