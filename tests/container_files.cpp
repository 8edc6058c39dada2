#include "tests/container_files.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "checkpoint/safetensors.hpp"
#include "container/rows.hpp"
#include "tests/golden_cases.hpp"
#include "tests/support.hpp"

namespace bitwright::test {

void ContainerFiles::add(const ArraySpec& spec, std::vector<std::byte> bytes) {
  arrays[spec.name] = spec;
  data[spec.name] = std::move(bytes);
}

void ContainerFiles::add(std::vector<NamedArray> named) {
  for (NamedArray& array : named) add(array.spec, std::move(array.data));
}

CheckpointView ContainerFiles::view() const {
  return {.arrays = arrays,
          .config = config,
          .quantization_metadata = metadata,
          .documents = &documents,
          .bytes = [this](const std::string& name) { return std::span<const std::byte>(data.at(name)); },
          .where = "memory"};
}

std::vector<float> random_weights(const Shape& shape, float zero_share) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> values(static_cast<size_t>(element_count(shape)));
  for (float& value : values) value = uniform(random) < zero_share ? 0.0f : normal(random);
  if (!values.empty()) values[values.size() / 2] *= 40;
  return values;
}

std::vector<std::byte> as_dtype(DType dtype, std::span<const float> values) {
  std::vector<std::byte> bytes(values.size() * size_bytes(dtype));
  from_f32(dtype, values, bytes);
  return bytes;
}

ContainerFiles written_by(const Container& container, const StoredTensor& tensor, std::span<const float> values) {
  const std::vector<std::byte> bytes = as_dtype(tensor.value_dtype, values);
  ContainerFiles files;
  files.add(container.pack(tensor, container.encode(tensor.scheme, tensor.shape, {tensor.value_dtype, bytes})));
  OrderedJson config = {{"torch_dtype", info(tensor.value_dtype).name}};
  const OrderedJson record = OrderedJson::object();
  std::map<std::string, OrderedJson> documents;
  container.write_metadata({.tensors = std::span(&tensor, 1), .kept = {}, .record = record},
                           {.config = config, .files = documents});
  files.config = Json(config);
  for (const auto& [name, json] : documents) files.documents[name] = Json(json);
  return files;
}

QuantizedTensor check_round_trip(const Container& container, const StoredTensor& tensor,
                                 std::span<const float> values) {
  EXPECT_EQ(container.fit(tensor.scheme, tensor.shape).verdict, Verdict::exact);
  const std::vector<std::byte> bytes = as_dtype(tensor.value_dtype, values);
  QuantizedTensor t = container.encode(tensor.scheme, tensor.shape, {tensor.value_dtype, bytes});
  check_sizes(t, "test");
  const ContainerFiles files = written_by(container, tensor, values);
  EXPECT_TRUE(check_view(container, files.view()) == t);
  EXPECT_EQ(container.list(files.view()).at(0).value_dtype, tensor.value_dtype);
  return t;
}

void check_pieces_are_parts(const Container& container, const StoredTensor& whole, std::span<const float> values,
                            int64_t begin, int64_t end) {
  ASSERT_TRUE(container.by_rows);
  const auto step = row_step(whole.scheme, whole.shape);
  ASSERT_TRUE(step);
  ASSERT_EQ(begin % *step, 0);
  const auto packed = [&](const StoredTensor& t, std::span<const std::byte> bytes) {
    return container.pack(t, container.encode(t.scheme, t.shape, {t.value_dtype, bytes}));
  };
  const std::vector<std::byte> bytes = as_dtype(whole.value_dtype, values);
  const StoredTensor piece = rows_of(whole, begin, end);
  const size_t row = static_cast<size_t>(whole.shape.back()) * size_bytes(whole.value_dtype);
  const auto part = std::span(bytes).subspan(static_cast<size_t>(begin) * row, static_cast<size_t>(end - begin) * row);
  const std::vector<NamedArray> all = packed(whole, bytes), some = packed(piece, part);
  const std::vector<ArraySpec> before = container.layout(rows_of(whole, 0, begin));
  ASSERT_EQ(some.size(), all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    const Placement p = place(all[i].spec, before[i], some[i].spec);
    ASSERT_EQ(p.runs, 1u) << all[i].spec.name;
    EXPECT_TRUE(std::ranges::equal(some[i].data, std::span(all[i].data).subspan(p.offset, p.run))) << all[i].spec.name;
  }
}

std::string code_of_listing(const Container& container, const ContainerFiles& files) {
  try {
    container.list(files.view());
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.code();
  }
  return "none";
}

void check_damage_is_refused(const Container& container, const ContainerFiles& files) {
  EXPECT_EQ(code_of_listing(container, files), "none");
  for (const auto& [name, spec] : files.arrays) {
    SCOPED_TRACE(name);
    ContainerFiles retyped = files, larger = files, missing = files;
    retyped.arrays.at(name).dtype = DType::f64;
    EXPECT_EQ(code_of_listing(container, retyped), "bad-container");
    larger.arrays.at(name).shape.push_back(2);
    EXPECT_EQ(code_of_listing(container, larger), "bad-container");
    missing.arrays.erase(name);
    EXPECT_EQ(code_of_listing(container, missing), "bad-container");
    for (const auto& [other, with] : files.arrays) {
      if (with.dtype == spec.dtype && with.shape == spec.shape) continue;
      ContainerFiles swapped = files;
      std::swap(swapped.arrays.at(name).dtype, swapped.arrays.at(other).dtype);
      std::swap(swapped.arrays.at(name).shape, swapped.arrays.at(other).shape);
      EXPECT_EQ(code_of_listing(container, swapped), "bad-container") << other;
    }
  }
}

void check_truncation_is_refused(const ContainerFiles& files) {
  TemporaryDirectory directory;
  write_file(directory / "config.json", files.config.dump());
  for (const auto& [name, json] : files.documents) write_file(directory / name, json.dump());
  std::vector<ArraySpec> specs;
  for (const auto& [name, spec] : files.arrays) specs.push_back(spec);
  SafetensorsWriter writer(directory / "model.safetensors", specs);
  for (const auto& [name, spec] : files.arrays) writer.add(files.data.at(name));
  writer.finish();
  EXPECT_TRUE(Checkpoint(directory.path()).tensors().front().quantized());
  for (auto length = std::filesystem::file_size(directory / "model.safetensors"); length-- > 0;) {
    std::filesystem::resize_file(directory / "model.safetensors", length);
    check_refused([&] { const Checkpoint refused(directory.path()); });
  }
}

}  // namespace bitwright::test
