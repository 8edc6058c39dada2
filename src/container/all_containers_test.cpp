// What holds of every container. A new one is covered by its line in containers.def: its table of choices says what
// to write.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "checkpoint/checkpoint.hpp"
#include "checkpoint/safetensors.hpp"
#include "container/container.hpp"
#include "quantize/quantize.hpp"
#include "recipe/recipe.hpp"
#include "tests/golden_cases.hpp"
#include "tests/memory_checkpoint.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using namespace test;

/// A weight as a container stores it, by the request that leads to it.
struct Case {
  const Container* container;
  QuantizationSettings settings;
  StoredTensor tensor;
};

/// Ragged, wide, small; of 3 dimensions, as experts are. The smaller come first.
const std::vector<Shape> kShapes = {{1, 1},   {1, 16},   {3, 5},   {8, 64},  {32, 32},  {1, 32, 2},
                                    {5, 128}, {32, 128}, {33, 72}, {2, 136}, {130, 16}, {2, 64, 32}};

/// Of a container that has none of its own.
constexpr auto kCommon = std::to_array<SchemeChoice>(
    {{.granularity = "group", .group_size = 32, .scale_dtype = "float16"},
     {.symmetric = true, .granularity = "channel", .scale_dtype = "bfloat16"},
     {.granularity = "tensor", .scale_dtype = "float32"},
     {.granularity = "flat", .group_size = 24, .scale_dtype = "float16"},
     {.granularity = "block", .group_size = 16, .scale_dtype = "float32"},
     {.quant_type = "nf4", .symmetric = true, .group_size = 64, .scale_dtype = "float32"},
     {.quant_type = "fp4", .symmetric = true, .group_size = 64, .scale_dtype = "float32"},
     {.quant_type = "e4m3", .bits = 8, .symmetric = true, .granularity = "channel", .scale_dtype = "float32"},
     {.quant_type = "e5m2", .bits = 8, .symmetric = true, .granularity = "tensor", .scale_dtype = "float16"}});

std::span<const SchemeChoice> choices_of(const Container& container) {
  return container.choices.empty() ? std::span<const SchemeChoice>(kCommon) : container.choices;
}

QuantizationSettings settings_of(const SchemeChoice& choice) {
  if (!choice.name.empty()) return {.gguf_type = std::string(choice.name)};
  QuantizationSettings s = {.range = "minmax",
                            .granularity = std::string(choice.granularity),
                            .quant_type = std::string(choice.quant_type),
                            .bits = choice.bits,
                            .symmetric = choice.symmetric,
                            .nested_scales = choice.nested_scales,
                            .weight_only = choice.weight_only};
  if (choice.scale_dtype != SchemeChoice::kWeightDtype && !choice.nested_scales)
    s.scale_dtype = std::string(choice.scale_dtype);
  if (choice.group_size != 0 &&
      (choice.granularity == "group" || choice.granularity == "flat" || choice.granularity == "block"))
    s.group_size = choice.group_size;
  return s;
}

/// The choice with other bits, group sizes and nested scales.
std::vector<QuantizationSettings> varied(const SchemeChoice& choice) {
  std::set<int> bits = {choice.bits};
  if (choice.quant_type == "int") bits.insert({1, 2, 3, 4, 5, 6, 7, 8});
  const QuantizationSettings given = settings_of(choice);
  std::set<int64_t> sizes = {choice.group_size};
  if (given.group_size) sizes.insert({16, 32, 64, 128});
  std::vector<QuantizationSettings> all;
  for (const int b : bits)
    for (const int64_t size : sizes)
      for (const bool nested : {choice.nested_scales, true}) {
        QuantizationSettings s = given;
        s.bits = b;
        if (s.group_size) s.group_size = size;
        s.nested_scales = nested;
        if (nested) s.scale_dtype.reset();
        all.push_back(std::move(s));
      }
  return all;
}

/// What the settings make of a weight; nothing where they cannot be or the container does not take it.
std::optional<Case> find_case(const Container& container, const QuantizationSettings& settings, const Shape& shape,
                              DType dtype) {
  for (const char* name : {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"}) {
    const TensorFacts facts = {.name = name, .shape = shape, .bytes = size_bytes(dtype), .dtype = dtype};
    try {
      const Recipe recipe =
          resolve({.settings = settings, .skip_modules = {}, .rules = {}}, std::span(&facts, 1), &container);
      const TensorPlan& plan = recipe.tensors.at(0);
      if (!plan.scheme || container.fit(*plan.scheme, shape).verdict == Verdict::impossible) continue;
      const StoredTensor tensor = {
          .name = name, .shape = shape, .scheme = *plan.scheme, .value_dtype = dtype, .linear = plan.linear};
      return Case{&container, settings, tensor};
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
      EXPECT_EQ(error.status(), ExitStatus::usage) << error.what();
    }
  }
  return std::nullopt;
}

/// Is it a model by itself? Others need what comes from data, or have no loader.
bool is_model(const Case& c) {
  const auto fit = c.container->fit_model;
  return fit == nullptr || fit(std::span(&c.tensor, 1)).verdict != Verdict::impossible;
}

std::vector<const Container*> written_containers() {
  std::vector<const Container*> all;
  for (const Container* container : all_containers())
    if (container->write_metadata != nullptr) all.push_back(container);
  return all;
}

/// Those whose arrays stand in safetensors. A file that is a whole model has its own names, and tests.
std::vector<const Container*> in_safetensors() {
  std::vector<const Container*> all = written_containers();
  std::erase_if(all, [](const Container* container) { return !container->model_file.empty(); });
  return all;
}

std::string kind_of(const Case& c) {
  return to_json(c.tensor.scheme).dump() + (c.tensor.linear.input ? " with inputs" : "") +
         std::string(info(c.tensor.value_dtype).name);
}

/// The smallest weight for each way of laying one out: which arrays of which types.
std::vector<Case> small_cases(const Container& container) {
  std::vector<Case> all;
  std::set<std::string> seen;
  for (const SchemeChoice& choice : choices_of(container))
    for (const QuantizationSettings& settings : varied(choice)) {
      std::optional<Case> found;
      for (size_t i = 0; i < kShapes.size() && !found; ++i)
        found = find_case(container, settings, kShapes[i], DType::bf16);
      if (!found || !is_model(*found)) continue;
      std::string arrays = found->tensor.linear.input ? "with inputs " : "";
      for (const ArraySpec& spec : container.layout(found->tensor))
        arrays += fmt::format("{} {} {},", spec.name, info(spec.dtype).name, spec.shape.size());
      if (seen.insert(arrays).second) all.push_back(std::move(*found));
    }
  return all;
}

/// Of them the first of each kind of code.
std::vector<Case> kinds_of_code(const Container& container) {
  std::vector<Case> all;
  for (Case& c : small_cases(container))
    if (std::ranges::none_of(all, [&](const Case& o) { return o.settings.quant_type == c.settings.quant_type; }))
      all.push_back(std::move(c));
  return all;
}

MemoryCheckpoint written(const Case& c) { return written_by(*c.container, c.tensor, random_values(c.tensor.shape)); }

/// Normal numbers with an outlier, the first row zeros, the last row one number.
std::vector<float> hard_values(const Shape& shape) {
  std::vector<float> values = random_values(shape, 0.1f);
  const auto row = static_cast<size_t>(shape.back());
  if (values.size() <= 2 * row) return values;
  std::ranges::fill(std::span(values).first(row), 0.0f);
  std::ranges::fill(std::span(values).last(row), 0.25f);
  return values;
}

/// Nothing: of a scheme that only a search finds codes for.
std::optional<QuantizedTensor> try_to_encode(const Case& c) {
  try {
    return encoded(*c.container, c.tensor, hard_values(c.tensor.shape));
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), "bad-scheme") << error.what();
    return std::nullopt;
  }
}

TEST(AllContainers, WhatFitsComesBackToTheByte) {
  size_t cases = 0;
  for (const Container* container : written_containers()) {
    std::set<const SchemeChoice*> used;
    for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
      for (const Shape& shape : kShapes) {
        std::set<std::string> seen;
        for (const SchemeChoice& choice : choices_of(*container))
          for (const QuantizationSettings& settings : varied(choice)) {
            const auto c = find_case(*container, settings, shape, dtype);
            if (!c) continue;
            used.insert(&choice);
            if (c->tensor.scheme.is_plain()) continue;  // a file type of floats
            if (!is_model(*c) || !seen.insert(kind_of(*c)).second) continue;
            SCOPED_TRACE(fmt::format("{} {} {} {}", container->name, describe(c->tensor.scheme), to_string(shape),
                                     info(dtype).name));
            const auto t = try_to_encode(*c);
            if (!t) continue;
            check_comes_back(*container, c->tensor, *t);
            ASSERT_FALSE(HasFailure());
            ++cases;
          }
      }
    for (const SchemeChoice& choice : choices_of(*container))
      EXPECT_TRUE(used.contains(&choice) || !choice.weight_only) << fmt::format(
          "{} writes no {} of {} bits by {}", container->name, choice.quant_type, choice.bits, choice.granularity);
  }
  std::cout << "cases: " << cases << '\n';
}

TEST(AllContainers, DamagedArraysAreRefusedOrUnderstood) {
  for (const Container* container : in_safetensors())
    for (const Case& c : small_cases(*container)) {
      SCOPED_TRACE(fmt::format("{} {} {}", container->name, describe(c.tensor.scheme), to_string(c.tensor.shape)));
      check_damage(*container, written(c));
    }
}

TEST(AllContainers, DamagedConfigurationsAreRefusedOrUnderstood) {
  for (const Container* container : in_safetensors())
    for (const Case& c : small_cases(*container)) {
      SCOPED_TRACE(fmt::format("{} {} {}", container->name, describe(c.tensor.scheme), to_string(c.tensor.shape)));
      check_damaged_json(written(c));
    }
}

TEST(AllContainers, TruncatedFilesAreRefused) {
  for (const Container* container : in_safetensors())
    for (const Case& c : kinds_of_code(*container)) {
      SCOPED_TRACE(fmt::format("{} {}", container->name, describe(c.tensor.scheme)));
      const TemporaryDirectory directory;
      written(c).write(directory.path());
      const std::filesystem::path file = directory / "model.safetensors";
      EXPECT_TRUE(Checkpoint(directory.path()).tensors().front().quantized());
      for (auto length = std::filesystem::file_size(file); length-- > 0;) {
        std::filesystem::resize_file(file, length);
        check_refused([&] { const Checkpoint refused(directory.path()); });
      }
    }
}

/// A model of the one weight, and a norm.
void write_plain_model(const std::filesystem::path& directory, const StoredTensor& weight,
                       std::span<const float> values) {
  std::filesystem::create_directory(directory);
  write_file(directory / "config.json", fmt::format(R"({{"torch_dtype": "{}"}})", info(weight.value_dtype).name));
  SafetensorsWriter writer(directory / "model.safetensors",
                           {{weight.name, weight.value_dtype, weight.shape}, {"norm.weight", DType::f32, {4}}});
  writer.add(as_dtype(weight.value_dtype, values));
  writer.add(std::vector<std::byte>(4 * sizeof(float)));
  writer.finish();
}

void run_quantize(const std::filesystem::path& model, const std::filesystem::path& output, const Case& c) {
  std::vector<Warning> warnings;
  quantize(Checkpoint(model), {.settings = c.settings, .skip_modules = {}, .rules = {}},
           {.output = {.output = output}, .container = c.container}, warnings);
}

TEST(AllContainers, QuantizedModelsHoldWhatWasEncoded) {
  for (const Container* container : in_safetensors())
    for (const Case& c : kinds_of_code(*container)) {
      SCOPED_TRACE(fmt::format("{} {} {}", container->name, describe(c.tensor.scheme), to_string(c.tensor.shape)));
      const TemporaryDirectory directory;
      const std::vector<float> values = hard_values(c.tensor.shape);
      write_plain_model(directory / "model", c.tensor, values);
      run_quantize(directory / "model", directory / "out", c);
      const Checkpoint written(directory / "out");
      EXPECT_EQ(written.container(), container);
      const TensorEntry* const entry = written.find(c.tensor.name);
      ASSERT_NE(entry, nullptr);
      EXPECT_TRUE(written.read(*entry) == encoded(*container, c.tensor, values));
    }
}

TEST(AllContainers, NotFiniteIsRefusedWithTheTensorsName) {
  for (const Container* container : in_safetensors())
    for (const Case& c : kinds_of_code(*container))
      for (const float bad : {NAN, INFINITY, -INFINITY}) {
        SCOPED_TRACE(fmt::format("{} {} {}", container->name, describe(c.tensor.scheme), bad));
        const TemporaryDirectory directory;
        std::vector<float> values = random_values(c.tensor.shape);
        values[values.size() / 3] = bad;
        write_plain_model(directory / "model", c.tensor, values);
        try {
          run_quantize(directory / "model", directory / "out", c);
          ADD_FAILURE() << "not refused";
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), "not-finite");
          EXPECT_NE(std::string(error.what()).find(c.tensor.name), std::string::npos) << error.what();
        }
        EXPECT_FALSE(std::filesystem::exists(directory / "out"));
      }
}

}  // namespace
}  // namespace bitwright
