#include "tests/golden_cases.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright::test {

const StoredArray* GoldenCase::find(const std::string& array) const {
  for (const StoredArray& a : file.arrays())
    if (a.name == array) return &a;
  return nullptr;
}

const StoredArray& GoldenCase::at(const std::string& array) const {
  const StoredArray* found = find(array);
  if (found == nullptr) throw std::runtime_error(name + " has no array " + array);
  return *found;
}

std::vector<float> GoldenCase::floats(const std::string& array) const {
  const StoredArray& a = at(array);
  std::vector<float> values(static_cast<size_t>(element_count(a.shape)));
  to_f32(a.dtype, a.data, values);
  return values;
}

std::vector<GoldenCase> golden_cases(const std::string& format, const std::string& needs) {
  std::vector<GoldenCase> cases;
  for (const auto& path : files_in(shared_dir() / "golden" / format, ".safetensors")) {
    GoldenCase c{.name = path.stem().string(), .file = WeightFile(path), .params = {}, .backend = {}};
    uint64_t header = 0;
    std::memcpy(&header, c.file.bytes().data(), sizeof header);
    const std::string_view text(reinterpret_cast<const char*>(c.file.bytes().data()) + sizeof header, header);
    const Json metadata = parse_json(text, c.name).value("__metadata__", Json::object());
    c.params = parse_json(metadata.value("params", "{}"), c.name);
    c.backend = metadata.value("backend", "");
    if (needs.empty() || c.find(needs) != nullptr) cases.push_back(std::move(c));
  }
  return cases;
}

std::vector<std::filesystem::path> golden_models(const std::string& format) {
  std::vector<std::filesystem::path> models;
  const auto folder = shared_dir() / "golden" / format;
  if (!std::filesystem::is_directory(folder)) return models;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.is_directory() && entry.path().filename().string().starts_with("model_")) models.push_back(entry.path());
  std::ranges::sort(models);
  return models;
}

void check_model(const std::filesystem::path& path, std::vector<float> (*values)(const QuantizedTensor&)) {
  SCOPED_TRACE(path.string());
  constexpr std::string_view kSuffix = ".dequantized";
  const Checkpoint model(path);
  const WeightFile reference(path / "reference.safetensors");
  size_t compared = 0;
  for (const StoredArray& array : reference.arrays()) {
    if (!array.name.ends_with(kSuffix)) continue;
    const std::string name = array.name.substr(0, array.name.size() - kSuffix.size());
    const TensorEntry* entry = model.find(name + ".weight");
    if (entry == nullptr) entry = model.find(name);
    ASSERT_NE(entry, nullptr) << array.name;
    EXPECT_TRUE(entry->quantized()) << array.name;
    std::vector<float> expected(static_cast<size_t>(element_count(array.shape)));
    to_f32(array.dtype, array.data, expected);
    std::vector<float> found = values(model.read(*entry));
    for (float& value : found) value = round_to(array.dtype, value);
    EXPECT_TRUE(found == expected) << array.name;
    ++compared;
  }
  EXPECT_GT(compared, 0u);
}

std::vector<NegativeCase> negative_cases(const std::string& format) {
  std::vector<NegativeCase> cases;
  for (const auto& path : files_in(shared_dir() / "golden" / format, ".json")) {
    if (!path.filename().string().starts_with("negative_")) continue;
    for (const Json& item : parse_json(read_file(path), path.string()))
      cases.push_back({.name = item.at("name"),
                       .function = item.value("function", ""),
                       .params = item.value("params", Json::object()),
                       .raised = item.at("raised"),
                       .message = item.value("message", "")});
  }
  return cases;
}

void check_refused(const std::function<void()>& refuse) {
  try {
    refuse();
  } catch (const Error& error) {
    const std::string line = error.what();
    EXPECT_FALSE(line.empty());
    EXPECT_EQ(line.find('\n'), std::string::npos) << line;
    return;
  }
  ADD_FAILURE() << "it was not refused";
}

QuantizedTensor check_container(const Container& container, const GoldenCase& c, const std::vector<std::string>& arrays,
                                const std::string& prefix, const Json& config) {
  std::map<std::string, ArraySpec, std::less<>> specs;
  for (const std::string& name : arrays) {
    const StoredArray& a = c.at(name);
    specs[prefix + name] = {prefix + name, a.dtype, a.shape};
  }
  const Json no_metadata = Json::object();
  const CheckpointView view = {.arrays = specs,
                               .config = config,
                               .quantization_metadata = no_metadata,
                               .bytes = [&](const std::string& name) { return c.at(name.substr(prefix.size())).data; },
                               .where = c.name};
  return check_view(container, view);
}

QuantizedTensor check_view(const Container& container, const CheckpointView& view, Verdict fit) {
  EXPECT_TRUE(container.detect(view));
  const std::vector<StoredTensor> stored = container.list(view);
  EXPECT_EQ(stored.size(), 1u);
  QuantizedTensor t = container.unpack(stored[0], view);
  check_sizes(t, view.where);
  EXPECT_EQ(container.fit(t.scheme, t.shape).verdict, fit);

  const std::vector<NamedArray> packed = container.pack(stored[0], t);
  EXPECT_EQ(packed.size(), view.arrays.size());
  for (const NamedArray& array : packed) {
    const ArraySpec& original = view.arrays.at(array.spec.name);
    EXPECT_EQ(array.spec.dtype, original.dtype) << array.spec.name;
    EXPECT_EQ(array.spec.shape, original.shape) << array.spec.name;
    EXPECT_EQ(array.spec.block, original.block) << array.spec.name;
    EXPECT_TRUE(std::ranges::equal(array.data, view.bytes(array.spec.name))) << array.spec.name << " differs";
  }
  return t;
}

void check_values(const GoldenCase& c, std::vector<float> decoded) {
  const std::vector<float> expected = c.floats("dequantized");
  ASSERT_EQ(decoded.size(), expected.size());
  size_t different = 0;
  for (size_t i = 0; i < decoded.size(); ++i)
    different += round_to(c.at("dequantized").dtype, decoded[i]) != expected[i];
  EXPECT_EQ(different, 0u) << "decoded values";
}

std::vector<float> decode_in_scale_dtype(const QuantizedTensor& t) {
  const DType dtype = *dtype_of(*t.scheme.scale->scheme->element);
  const std::vector<float> scale = decode(*t.scale), bias = decode(*t.offset);
  const GroupMap groups(t.scheme.scale->grouping, t.shape);
  std::vector<float> values;
  for (size_t i = 0; i < t.codes.size(); ++i) {
    const auto g = static_cast<size_t>(groups.group_of(static_cast<int64_t>(i)));
    const float product = round_to(dtype, static_cast<float>(std::to_integer<int>(t.codes[i])) * scale[g]);
    values.push_back(round_to(dtype, product + bias[g]));
  }
  return values;
}

}  // namespace bitwright::test
