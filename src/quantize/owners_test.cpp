// What owners' loaders expect of a whole model, beside each tensor's bytes.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <random>

#include "checkpoint/safetensors.hpp"
#include "container/container.hpp"
#include "quantize/fused.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"
#include "scheme/transposed.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

using test::TemporaryDirectory;
using test::write_file;

struct Matrix {
  std::string name;
  Shape shape;
  float spread;
};

class Owners : public ::testing::Test {
 protected:
  void write_model(const std::string& config, const std::vector<Matrix>& matrices) {
    std::filesystem::create_directory(dir / "model");
    write_file(dir / "model" / "config.json", config);
    std::vector<ArraySpec> specs;
    for (const Matrix& m : matrices) specs.push_back({m.name, DType::f32, m.shape});
    SafetensorsWriter writer(dir / "model" / "model.safetensors", specs);
    std::mt19937 random(5);
    for (const Matrix& m : matrices) {
      std::normal_distribution<float> normal(0, m.spread);
      std::vector<float> values(static_cast<size_t>(element_count(m.shape)));
      for (float& value : values) value = normal(random);
      writer.add(std::as_bytes(std::span(values)));
    }
    writer.finish();
  }

  void run(const char* container, const std::string& yaml) {
    std::filesystem::remove_all(dir / "out");
    QuantizeOptions options = {.output = {.output = dir / "out"}, .container = find_container(container)};
    std::vector<Warning> warnings;
    quantize(Checkpoint(dir / "model"), read_request(parse_config_value(yaml, "test")), options, warnings);
  }

  /// NVFP4's scale of the whole of a tensor that was written.
  float common_scale(const std::string& name) const {
    const Checkpoint written(dir / "out");
    return decode(*written.read(*written.find(name)).scale->scale).at(0);
  }
  const TemporaryDirectory dir;
};

// Matrices of GPT-2 are [inputs, outputs]; its owners quantize the transpose, whose rows are outputs.
TEST_F(Owners, InputsFirstAreStoredTransposedByThoseWhoDo) {
  write_model(R"({"model_type": "gpt2"})",
              {{"h.0.attn.c_attn.weight", {32, 96}, 0.1f}, {"h.0.attn.c_proj.weight", {64, 64}, 0.2f}});
  const Checkpoint source(dir / "model");
  for (const char* container : {"bitsandbytes", "gptq"}) {
    SCOPED_TRACE(container);
    run(container, "quantization: {method: int8, scheme: {granularity: channel}}");
    const Checkpoint written(dir / "out");
    std::filesystem::remove_all(dir / "plain");
    dequantize(written, {.output = dir / "plain"}, DType::f32);
    const Checkpoint plain(dir / "plain");
    for (const TensorEntry& entry : source.tensors()) {
      const TensorEntry& stored = *written.find(entry.name);
      EXPECT_TRUE(stored.transposed);
      EXPECT_EQ(stored.shape, (Shape{entry.shape[1], entry.shape[0]}));
      EXPECT_EQ(plain.find(entry.name)->shape, entry.shape);
      const std::vector<float> before = source.read_f32(entry), after = plain.read_f32(*plain.find(entry.name));
      const auto columns = static_cast<size_t>(entry.shape[1]);
      for (size_t c = 0; c < columns; ++c) {
        float largest = 0, error = 0;
        for (size_t i = c; i < before.size(); i += columns) {
          largest = std::max(largest, std::fabs(before[i]));
          error = std::max(error, std::fabs(before[i] - after[i]));
        }
        // Half a step of the output's own scale, and what the scale is rounded by: of a row's, many would exceed it.
        ASSERT_LE(error, largest * (0.5f / 127 + 1.0f / 2048)) << entry.name << " output " << c;
      }
    }
  }
}

TEST_F(Owners, InputsFirstAreRefusedForThoseWhoKnowLinearLayersAlone) {
  write_model(R"({"model_type": "gpt2"})", {{"h.0.attn.c_proj.weight", {128, 128}, 0.2f}});
  size_t refused = 0;
  for (const Container* container : all_containers()) {
    if (container->write_metadata == nullptr || container->choices.empty() || container->takes != nullptr) continue;
    if (container->inputs_first != InputsFirst::refused) continue;
    SCOPED_TRACE(container->name);
    try {
      run(std::string(container->name).c_str(), "{}");
      ADD_FAILURE() << "written";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), "does-not-fit");
      EXPECT_NE(std::string(error.what()).find("[inputs, outputs]"), std::string::npos) << error.what();
      ++refused;
    }
  }
  EXPECT_GE(refused, 7u);
  // The same name in another model is a linear layer's.
  write_model(R"({"model_type": "qwen"})", {{"h.0.attn.c_proj.weight", {128, 128}, 0.2f}});
  run("compressed-tensors", "{}");
}

// Engines make one matrix of q, k and v with one such scale; unequal ones would be wrong there.
TEST_F(Owners, WhatIsFusedSharesItsCommonScale) {
  write_model(R"({"model_type": "llama"})", {{"l.0.self_attn.q_proj.weight", {32, 64}, 0.1f},
                                             {"l.0.self_attn.k_proj.weight", {16, 64}, 0.7f},
                                             {"l.0.self_attn.v_proj.weight", {16, 64}, 0.3f},
                                             {"l.0.self_attn.o_proj.weight", {64, 32}, 0.1f},
                                             {"l.0.mlp.gate_proj.weight", {64, 64}, 0.2f},
                                             {"l.0.mlp.up_proj.weight", {64, 64}, 0.4f},
                                             {"l.1.mlp.gate_proj.weight", {64, 64}, 0.9f},
                                             {"l.2.experts.3.w1.weight", {64, 64}, 0.2f},
                                             {"l.2.experts.3.w3.weight", {64, 64}, 0.3f}});
  for (const char* container : {"compressed-tensors", "modelopt"}) {
    SCOPED_TRACE(container);
    run(container, "quantization: {method: nvfp4}");
    const float k = common_scale("l.0.self_attn.k_proj.weight");
    EXPECT_EQ(common_scale("l.0.self_attn.q_proj.weight"), k);
    EXPECT_EQ(common_scale("l.0.self_attn.v_proj.weight"), k);
    EXPECT_NE(common_scale("l.0.self_attn.o_proj.weight"), k);
    EXPECT_EQ(common_scale("l.0.mlp.gate_proj.weight"), common_scale("l.0.mlp.up_proj.weight"));
    EXPECT_NE(common_scale("l.0.mlp.gate_proj.weight"), common_scale("l.1.mlp.gate_proj.weight"));
    EXPECT_EQ(common_scale("l.2.experts.3.w1.weight"), common_scale("l.2.experts.3.w3.weight"));
    // That of the largest is what it would be alone: it has the whole range.
    const Checkpoint source(dir / "model"), written(dir / "out");
    const auto largest = [&](const Checkpoint& of) {
      float most = 0;
      for (const float v : of.read_f32(*of.find("l.0.self_attn.k_proj.weight"))) most = std::max(most, std::fabs(v));
      return most;
    };
    EXPECT_NEAR(largest(written), largest(source), 0.01f * largest(source));
  }
}

}  // namespace
}  // namespace bitwright
