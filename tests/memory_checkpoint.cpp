#include "tests/memory_checkpoint.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "base/error.hpp"
#include "checkpoint/safetensors.hpp"
#include "container/rows.hpp"
#include "tests/support.hpp"

namespace bitwright::test {
namespace {

/// The bytes of a piece's array, where they belong in those of the whole.
template <class Move>
void for_each_run(const Placement& at, const Move& move) {
  for (uint64_t r = 0; r < at.runs; ++r) move(at.offset + r * at.stride, r * at.run, at.run);
}

const Container* container_of(const CheckpointView& view) {
  for (const Container* container : all_containers())
    if (container->detect(view)) return container;
  return nullptr;
}

}  // namespace

MemoryCheckpoint::MemoryCheckpoint(std::vector<NamedArray> named) {
  for (NamedArray& array : named) add(array.spec, std::move(array.data));
}

void MemoryCheckpoint::add(const ArraySpec& spec, std::vector<std::byte> bytes) {
  arrays[spec.name] = spec;
  data[spec.name] = std::move(bytes);
}

CheckpointView MemoryCheckpoint::view() const {
  return {.arrays = arrays,
          .config = config,
          .quantization_metadata = metadata,
          .documents = &documents,
          .bytes = [this](const std::string& name) { return std::span<const std::byte>(data.at(name)); },
          .where = "memory"};
}

void MemoryCheckpoint::write(const std::filesystem::path& directory) const {
  write_file(directory / "config.json", config.dump());
  for (const auto& [name, json] : documents) write_file(directory / name, json.dump());
  std::vector<ArraySpec> specs;
  for (const auto& [name, spec] : arrays) specs.push_back(spec);
  SafetensorsWriter writer(directory / "model.safetensors", specs);
  for (const auto& [name, spec] : arrays) writer.add(data.at(name));
  writer.finish();
}

std::vector<float> random_values(const Shape& shape, float zero_share) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> values(static_cast<size_t>(element_count(shape)));
  for (float& value : values) value = uniform(random) < zero_share ? 0.0f : normal(random);
  if (!values.empty() && zero_share < 1) values[values.size() / 2] *= 40;
  return values;
}

std::vector<std::byte> as_dtype(DType dtype, std::span<const float> values) {
  std::vector<std::byte> bytes(values.size() * size_bytes(dtype));
  from_f32(dtype, values, bytes);
  return bytes;
}

QuantizedTensor encoded(const Container& container, const StoredTensor& tensor, std::span<const float> values) {
  const std::vector<std::byte> bytes = as_dtype(tensor.value_dtype, values);
  if (container.encode != nullptr) return container.encode(tensor.scheme, tensor.shape, {tensor.value_dtype, bytes});
  std::vector<float> as_stored(values.size());
  to_f32(tensor.value_dtype, bytes, as_stored);
  return encode(tensor.scheme, tensor.shape, as_stored);
}

MemoryCheckpoint written_model(const Container& container, const StoredTensor& tensor, const QuantizedTensor& values) {
  MemoryCheckpoint files(container.pack(tensor, values));
  OrderedJson config = {{"torch_dtype", info(tensor.value_dtype).name}};
  const OrderedJson record = OrderedJson::object();
  std::map<std::string, OrderedJson> others;
  container.write_metadata({.tensors = std::span(&tensor, 1), .kept = {}, .record = record},
                           {.config = config, .files = others});
  files.config = Json::parse(config.dump());
  for (const auto& [name, json] : others) files.documents[name] = Json::parse(json.dump());
  const auto native = files.documents.find("quantization_metadata.json");
  if (native != files.documents.end()) files.metadata = native->second;
  return files;
}

MemoryCheckpoint written_by(const Container& container, const StoredTensor& tensor, std::span<const float> values) {
  return written_model(container, tensor, encoded(container, tensor, values));
}

void check_comes_back(const Container& container, const StoredTensor& tensor, const QuantizedTensor& values) {
  const MemoryCheckpoint files = written_model(container, tensor, values);
  const CheckpointView view = files.view();
  ASSERT_EQ(container_of(view), &container);
  const std::vector<StoredTensor> listed = container.list(view);
  ASSERT_EQ(listed.size(), 1u);
  EXPECT_EQ(listed[0].name, tensor.name);
  EXPECT_EQ(listed[0].arrays.size(), files.arrays.size());
  const QuantizedTensor read = container.unpack(listed[0], view);
  check_sizes(read, "test");
  EXPECT_TRUE(read == values);
  MemoryCheckpoint again = written_model(container, listed[0], read);
  again.config["torch_dtype"] = files.config["torch_dtype"];  // which some read as that of their scales
  EXPECT_TRUE(again.data == files.data);
  EXPECT_EQ(again.config, files.config);
  EXPECT_EQ(again.documents, files.documents);
  for (const auto& [name, spec] : files.arrays) {
    ASSERT_TRUE(again.arrays.contains(name)) << name;
    EXPECT_EQ(again.arrays.at(name).dtype, spec.dtype) << name;
    EXPECT_EQ(again.arrays.at(name).shape, spec.shape) << name;
  }
}

void check_pieces(const Container& container, const StoredTensor& whole, WeightView weight, int64_t step) {
  ASSERT_TRUE(container.by_rows);
  const int64_t rows = row_count(whole.shape);
  const auto row_bytes = static_cast<size_t>(whole.shape.back()) * size_bytes(weight.dtype);
  const QuantizedTensor all = container.encode(whole.scheme, whole.shape, weight);
  const std::vector<NamedArray> expected = container.pack(whole, all);
  MemoryCheckpoint placed = written_model(container, whole, all);
  for (auto& [name, bytes] : placed.data) bytes.assign(bytes.size(), std::byte{0});
  for (int64_t begin = 0; begin < rows; begin += step) {
    const StoredTensor piece = rows_of(whole, begin, std::min(rows, begin + step));
    const auto bytes =
        weight.bytes.subspan(static_cast<size_t>(begin) * row_bytes, static_cast<size_t>(piece.shape[0]) * row_bytes);
    const std::vector<ArraySpec> before = container.layout(rows_of(whole, 0, begin));
    size_t a = 0;
    for (const NamedArray& array :
         container.pack(piece, container.encode(whole.scheme, piece.shape, {weight.dtype, bytes}))) {
      std::vector<std::byte>& to = placed.data.at(array.spec.name);
      for_each_run(place(expected[a].spec, before[a], array.spec),
                   [&](uint64_t in_whole, uint64_t in_piece, uint64_t n) {
                     std::memcpy(&to[in_whole], &array.data[in_piece], n);
                   });
      ++a;
    }
  }
  for (const NamedArray& array : expected)
    EXPECT_TRUE(placed.data.at(array.spec.name) == array.data) << array.spec.name;

  const StoredTensor read = container.list(placed.view()).at(0);
  std::vector<std::byte> codes;
  for (int64_t begin = 0; begin < rows; begin += step) {
    const StoredTensor piece = rows_of(read, begin, std::min(rows, begin + step));
    const std::vector<ArraySpec> before = container.layout(rows_of(read, 0, begin)), wanted = container.layout(piece);
    MemoryCheckpoint part;
    for (size_t a = 0; a < wanted.size(); ++a) {
      std::vector<std::byte> bytes(wanted[a].bytes());
      const std::vector<std::byte>& from = placed.data.at(wanted[a].name);
      for_each_run(
          place(expected[a].spec, before[a], wanted[a]),
          [&](uint64_t in_whole, uint64_t in_piece, uint64_t n) { std::memcpy(&bytes[in_piece], &from[in_whole], n); });
      part.add(wanted[a], std::move(bytes));
    }
    const QuantizedTensor t = container.unpack(piece, part.view());
    check_sizes(t, "piece");
    codes.insert(codes.end(), t.codes.begin(), t.codes.end());
  }
  EXPECT_TRUE(codes == all.codes);
}

namespace {

/// Packed again it has the same arrays and means the same; bits that only fill a byte up may differ.
void check_understood(const Container& container, const MemoryCheckpoint& files, const StoredTensor& tensor) {
  const QuantizedTensor values = container.unpack(tensor, files.view());
  check_sizes(values, "test");
  MemoryCheckpoint again = files;
  for (NamedArray& array : container.pack(tensor, values)) {
    ASSERT_TRUE(files.arrays.contains(array.spec.name)) << array.spec.name;
    const ArraySpec& spec = files.arrays.at(array.spec.name);
    EXPECT_EQ(array.spec.dtype, spec.dtype) << array.spec.name;
    EXPECT_EQ(element_count(array.spec.shape), element_count(spec.shape)) << array.spec.name;
    again.data.at(array.spec.name) = std::move(array.data);
  }
  EXPECT_TRUE(container.unpack(tensor, again.view()) == values);
}

/// Refused, or of no container: what a checkpoint refuses that says how it is quantized.
bool is_refused(const MemoryCheckpoint& files) {
  const CheckpointView view = files.view();
  try {
    const Container* const container = container_of(view);
    if (container == nullptr) return true;
    container->list(view);
    if (container->model != nullptr) container->model(view);
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return true;
  }
  return false;
}

void change(MemoryCheckpoint& files, const std::string& name, const std::function<void(ArraySpec&)>& how) {
  ArraySpec& spec = files.arrays.at(name);
  how(spec);
  files.data.at(name).resize(spec.bytes());
}

void for_each_value(const Json& json, const Json::json_pointer& at,
                    const std::function<void(const Json::json_pointer&)>& visit) {
  if (!at.empty()) visit(at);
  if (json.is_object())
    for (const auto& [key, value] : json.items()) for_each_value(value, at / key, visit);
  if (json.is_array())
    for (size_t i = 0; i < json.size(); ++i) for_each_value(json[i], at / i, visit);
}

}  // namespace

void check_refused_or_understood(const MemoryCheckpoint& damaged) {
  if (is_refused(damaged)) return;
  const CheckpointView view = damaged.view();
  const Container& container = *container_of(view);
  for (const StoredTensor& tensor : container.list(view)) check_understood(container, damaged, tensor);
}

void check_damage(const Container& container, const MemoryCheckpoint& files) {
  const StoredTensor tensor = container.list(files.view()).at(0);
  const auto is_note = [&](const std::string& name) {
    return std::ranges::any_of(tensor.notes, [&](const NamedArray& note) { return note.spec.name == name; });
  };
  for (const auto& [name, spec] : files.arrays) {
    SCOPED_TRACE(name);
    MemoryCheckpoint retyped = files, larger = files, missing = files;
    change(retyped, name, [](ArraySpec& s) { s.dtype = DType::f64; });
    change(larger, name, [](ArraySpec& s) { s.shape.push_back(2); });
    missing.arrays.erase(name);
    check_refused_or_understood(missing);
    EXPECT_TRUE(is_note(name) || (is_refused(retyped) && is_refused(larger)));
    EXPECT_TRUE(name != tensor.arrays.front() || is_refused(missing));
    for (size_t axis = 0; axis < spec.shape.size(); ++axis)
      for (const int64_t more : {-1, 1}) {
        MemoryCheckpoint resized = files;
        change(resized, name, [&](ArraySpec& s) { s.shape[axis] += more; });
        check_refused_or_understood(resized);
      }
    for (const auto& [other, with] : files.arrays) {
      MemoryCheckpoint types = files, names = files;
      change(types, name, [&](ArraySpec& s) { s.dtype = with.dtype; });
      change(types, other, [&, type = spec.dtype](ArraySpec& s) { s.dtype = type; });
      check_refused_or_understood(types);
      std::swap(names.arrays.at(name), names.arrays.at(other));
      std::swap(names.arrays.at(name).name, names.arrays.at(other).name);
      std::swap(names.data.at(name), names.data.at(other));
      check_refused_or_understood(names);
    }
  }
}

void check_damaged_json(const MemoryCheckpoint& files) {
  const std::vector<Json> others = {nullptr,
                                    "",
                                    "x",
                                    -1,
                                    0,
                                    1,
                                    7,
                                    int64_t{1} << 62,
                                    0.5,
                                    true,
                                    false,
                                    Json::array(),
                                    Json::object(),
                                    Json::array({nullptr}),
                                    Json::array({1, "x"})};
  const auto check = [&](const Json& json, const std::function<void(MemoryCheckpoint&, Json)>& put) {
    for_each_value(json, Json::json_pointer(), [&](const Json::json_pointer& at) {
      SCOPED_TRACE(at.to_string());
      const auto damaged = [&](const Json& with) {
        MemoryCheckpoint changed = files;
        put(changed, with);
        check_refused_or_understood(changed);
      };
      Json copy = json;
      if (Json& parent = copy[at.parent_pointer()]; parent.is_object()) {
        parent.erase(at.back());
        damaged(copy);
      }
      for (const Json& other : others) {
        copy = json;
        copy[at] = other;
        SCOPED_TRACE(other.dump());
        damaged(copy);
      }
    });
  };
  check(files.config, [](MemoryCheckpoint& changed, Json json) { changed.config = std::move(json); });
  for (const auto& document : files.documents)
    check(document.second, [&](MemoryCheckpoint& changed, const Json& json) {
      changed.documents[document.first] = json;
      if (!files.metadata.empty()) changed.metadata = json;
    });
}

std::string code_of_listing(const Container& container, const MemoryCheckpoint& files) {
  try {
    container.list(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.code();
  }
  return "none";
}

}  // namespace bitwright::test
