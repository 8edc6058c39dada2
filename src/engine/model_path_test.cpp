#include <gtest/gtest.h>

#include "base/error.hpp"
#include "engine/detect.hpp"
#include "engine/precision.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

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
  test::write_file(directory / "model.safetensors", "not read");
  EXPECT_EQ(detect_model_quantization(directory / "model.safetensors").method, "awq");
  test::write_file(directory / "m.gguf", std::string("GGUF") + std::string(60, '\0'));
  EXPECT_EQ(detect_model_quantization(directory / "m.gguf").method, "gguf");
  EXPECT_EQ(detect_model_quantization(directory.path()).method, "awq");  // the documents say more
  std::filesystem::remove(directory / "config.json");
  EXPECT_EQ(detect_model_quantization(directory.path()).method, "gguf");
  EXPECT_FALSE(should_apply_dynamic_fp8({{"gemm_dtype", "fp8"}}, detect_model_quantization(directory.path())));
}

TEST(DetectPath, PlainModelsAreNotQuantized) { EXPECT_EQ(detect_model_quantization(test::example_model()).method, ""); }

}  // namespace
}  // namespace bitwright
