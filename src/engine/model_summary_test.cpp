#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

#include "base/error.hpp"
#include "checkpoint/safetensors.hpp"
#include "engine/detect.hpp"
#include "engine/precision.hpp"
#include "tests/gguf_models.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

/// A layer as AutoAWQ stores it: 4 bits, groups of 32.
void write_awq_layer(const std::filesystem::path& path) {
  const std::vector<ArraySpec> arrays = {{"model.layers.0.mlp.up_proj.qweight", DType::i32, {64, 16}},
                                         {"model.layers.0.mlp.up_proj.qzeros", DType::i32, {2, 16}},
                                         {"model.layers.0.mlp.up_proj.scales", DType::f16, {2, 128}}};
  SafetensorsWriter writer(path, arrays);
  for (const ArraySpec& array : arrays) writer.add(std::vector<std::byte>(array.bytes()));
  writer.finish();
}

TEST(DetectPath, ADirectoryAFileAndNothing) {
  const test::TemporaryDirectory directory;
  EXPECT_THROW(detect_model_quantization(directory.path()), Error);  // nothing in it
  EXPECT_THROW(detect_model_quantization((directory / "gone").string()), Error);
  test::write_file(directory / "config.json",
                   R"({"num_local_experts": 8, "quantization_config": {"quant_method": "awq", "bits": 4}})");
  const DetectedQuantization found = detect_model_quantization(directory.path());
  EXPECT_EQ(found.method, "awq");
  EXPECT_EQ(found.facts["bits"], 4);
  EXPECT_EQ(found.facts["moe"], true);  // all that planning needs
  test::write_file(directory / "model.safetensors", "a download that was cut off");
  EXPECT_EQ(detect_model_quantization(directory.path()).method, "awq");
  EXPECT_THROW(detect_model_quantization(directory / "model.safetensors"), Error);  // it is what was asked about
  write_awq_layer(directory / "model.safetensors");
  EXPECT_EQ(detect_model_quantization(directory / "model.safetensors").method, "awq");
}

TEST(DetectPath, TheDocumentsBesideAFileCount) {
  const test::TemporaryDirectory directory;
  test::write_file(directory / "config.json", "{}");
  test::write_file(directory / "hf_quant_config.json", R"({"quantization": {"quant_algo": "FP8"}})");
  write_awq_layer(directory / "model.safetensors");
  EXPECT_EQ(detect_model_quantization(directory / "model.safetensors").method, "modelopt");
  EXPECT_EQ(detect_model_quantization(directory.path()).method, "modelopt");
}

TEST(DetectPath, NamesOfTensorsTellWhatNoDocumentDeclares) {
  const test::TemporaryDirectory directory;
  test::write_file(directory / "config.json", R"({"hidden_size": 64})");
  write_awq_layer(directory / "model.safetensors");
  const DetectedQuantization found = detect_model_quantization(directory.path());
  EXPECT_EQ(found.method, "awq");
  EXPECT_EQ(found.bits, 4);
  EXPECT_EQ(found.group_size, 32);
  EXPECT_EQ(found.facts["hidden_size"], 64);
  EXPECT_NE(found.evidence.find("up_proj.qweight"), std::string::npos) << found.evidence;
}

TEST(DetectPath, AGgufFileSpeaksForItself) {
  const test::TemporaryDirectory directory;
  test::write_gguf_model(test::example_model(), directory / "m.gguf", "Q8_0");
  for (const auto& model : {directory.path(), directory / "m.gguf"}) {
    const DetectedQuantization found = detect_model_quantization(model);
    EXPECT_EQ(found.method, "gguf");
    EXPECT_GT(found.facts["layers"], 0);
    EXPECT_FALSE(should_apply_dynamic_fp8({{"gemm_dtype", "fp8"}}, found));
  }
  test::write_file(directory / "config.json", R"({"quantization_config": {"quant_method": "awq"}})");
  EXPECT_EQ(detect_model_quantization(directory / "m.gguf").method, "gguf");  // that is another model's
}

TEST(DetectPath, PlainModelsAreNotQuantized) { EXPECT_EQ(detect_model_quantization(test::example_model()).method, ""); }

}  // namespace
}  // namespace bitwright
