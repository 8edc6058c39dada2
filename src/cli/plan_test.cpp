#include <gtest/gtest.h>

#include <iostream>

#include "cli/command.hpp"
#include "container/container.hpp"
#include "model/model.hpp"
#include "model/open_model.hpp"
#include "quantize/quantize.hpp"
#include "recipe/config.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

namespace fs = std::filesystem;

OrderedJson config_of(const std::string& yaml) {
  OrderedJson config = parse_config_value(yaml, "test");
  check_config(config, "test");
  return config;
}

/// What `bitwright COMMAND MODEL --json` prints.
OrderedJson run(const std::string& command, const fs::path& model, const std::string& yaml = "{}",
                std::map<std::string, std::vector<std::string>, std::less<>> values = {}) {
  Arguments arguments;
  arguments.model = model;
  arguments.config = config_of(yaml);
  arguments.json = true;
  arguments.values = std::move(values);
  std::vector<Warning> warnings;
  for (const Command* row : all_commands())
    if (row->name == command) {
      OrderedJson result = row->run(arguments, warnings);
      for (const Warning& warning : warnings) result["warnings"].push_back(warning.code);
      return result;
    }
  return nullptr;
}

uint64_t bytes_of_weights(const fs::path& directory) {
  uint64_t bytes = 0;
  for (const fs::path& file : test::files_in(directory, ".safetensors")) bytes += fs::file_size(file);
  return bytes;
}

struct Recipe {
  const char* name;
  const char* yaml;
};
void PrintTo(const Recipe& recipe, std::ostream* out) { *out << recipe.name; }

std::string recipe_name(const testing::TestParamInfo<Recipe>& info) { return info.param.name; }

class PlanRecipe : public testing::TestWithParam<Recipe> {};

/// The plan's bytes are those that are written; the tensors' too.
TEST_P(PlanRecipe, BytesAreThoseWritten) {
  const test::TemporaryDirectory directory;
  const OrderedJson plan = run("plan", test::example_model(), GetParam().yaml);
  std::vector<Warning> warnings;
  const OrderedJson written = quantize(
      open_model(test::example_model()), read_request(config_of(GetParam().yaml)),
      {.output = {.output = directory / "out"}, .verify = false, .container = find_container("native")}, warnings);
  EXPECT_EQ(plan["predicted"]["bytes"], bytes_of_weights(directory / "out"));
  EXPECT_EQ(plan["scheme"], written["scheme"]);
  EXPECT_EQ(plan["algorithm"], written["algorithm"]);
  EXPECT_EQ(plan["container"], "native");
  const OrderedJson inspected = run("inspect", directory / "out");
  ASSERT_EQ(plan["tensors"].size(), inspected["tensors"].size());
  for (const OrderedJson& tensor : plan["tensors"]) {
    const auto found = std::ranges::find_if(inspected["tensors"],
                                            [&](const OrderedJson& other) { return other["name"] == tensor["name"]; });
    ASSERT_NE(found, inspected["tensors"].end()) << tensor["name"];
    EXPECT_EQ(tensor["bytes"], (*found)["bytes"]) << tensor["name"];
    EXPECT_EQ(tensor["scheme"], (*found)["scheme"]) << tensor["name"];
    EXPECT_EQ(tensor["scheme"].is_null(), tensor.contains("reason")) << tensor["name"];
  }
  // The output is planned as what it is, and takes what was foretold.
  const OrderedJson again = run("plan", directory / "out");
  EXPECT_EQ(again["scheme"], plan["scheme"]);
  EXPECT_EQ(again["container"], "native");
  EXPECT_EQ(again["predicted"]["bytes"], plan["predicted"]["bytes"]);
  EXPECT_EQ(again["predicted"]["weights_bytes"], plan["predicted"]["weights_bytes"]);
}
INSTANTIATE_TEST_SUITE_P(
    Recipes, PlanRecipe,
    testing::Values(
        Recipe{"int8", "quantization: {method: int8}"}, Recipe{"int4", "quantization: {method: int4}"},
        Recipe{"int4g32", "quantization: {method: int4, scheme: {group_size: 32}}"},
        Recipe{"int4g128", "quantization: {method: int4, scheme: {group_size: 128, symmetric: true}}"},
        Recipe{"int3", "quantization: {method: int3}"},
        Recipe{"int2g16", "quantization: {method: int2, scheme: {group_size: 16}}"},
        Recipe{"nf4nested", "quantization: {method: nf4, scheme: {nested_scales: true}}"},
        Recipe{"fp4", "quantization: {method: fp4, scheme: {group_size: 128}}"},
        Recipe{"int6flat", "quantization: {scheme: {bits: 6, granularity: flat, group_size: 32}}"},
        Recipe{"mixed",
               "quantization: {method: int4, scheme: {group_size: 32}, skip_modules: [lm_head, model.layers.0], "
               "layer_configs: {'*.down_proj': {bits: 8}, embed_tokens: {method: int8}}}"}),
    recipe_name);

/// The container follows the engine.
TEST(PlanContainer, IsOneThatTheEngineLoads) {
  const auto container = [](const char* engine, const char* method) {
    return run("plan", test::example_model(),
               std::string("engine: ") + engine + "\nquantization: {method: " + method + "}");
  };
  EXPECT_EQ(container("native", "int4")["container"], "native");
  EXPECT_EQ(container("vllm", "int4")["container"], "compressed-tensors");
  EXPECT_EQ(container("llamacpp", "int4")["container"], "gguf");
  EXPECT_EQ(container("mlx", "int4")["container"], "mlx");
  const OrderedJson at_load = container("transformers", "nf4");  // bitsandbytes, by the engine itself
  EXPECT_TRUE(at_load["container"].is_null());
  EXPECT_EQ(at_load["tensors"][0]["reason"], "quantized by the engine while it loads");
}

TEST(PlanEngines, EachOfThemHasAPlan) {
  const char* const yaml = "engine: vllm\nengines: {sglang: {quant_config: {preset: kv-cache-fp8}}, vLLM: {}}";
  const OrderedJson both = run("plan", test::example_model(), yaml);
  ASSERT_EQ(both["plans"].size(), 2U);
  EXPECT_EQ(both["plans"][0]["engine"]["name"], "vllm");
  EXPECT_EQ(both["plans"][1]["engine"]["args"], OrderedJson({"--kv-cache-dtype", "fp8_e5m2"}));
}

/// What the native runtime takes, as it is planned and as it is.
void expect_memory(const fs::path& path, int64_t context) {
  const OrderedJson plan = run("plan", path, "{}", {{"--context", {std::to_string(context)}}});
  const Checkpoint checkpoint = open_model(path);
  const Model model(checkpoint);
  const KvCache cache(model.config(), context);
  EXPECT_NEAR(plan["predicted"]["weights_bytes"].get<double>() / static_cast<double>(model.weight_bytes()), 1, 0.05);
  EXPECT_NEAR(plan["predicted"]["kv_cache_bytes"].get<double>() / static_cast<double>(cache.bytes()), 1, 0.05);
}
TEST(PlanMemory, IsWhatTheNativeRuntimeTakes) {
  for (const int64_t context : {1, 100, 256}) expect_memory(test::example_model(), context);
}
TEST(ModelsPlanMemory, IsWhatTheNativeRuntimeTakes) {
  size_t cases = 0;
  const fs::path models = test::shared_dir() / "data/models";
  if (!fs::is_directory(models)) GTEST_SKIP() << "no models here";
  for (const auto& entry : fs::directory_iterator(models)) {
    if (!fs::exists(entry.path() / "hf/config.json")) continue;
    SCOPED_TRACE(entry.path());
    expect_memory(entry.path() / "hf", 200);
    ++cases;
  }
  std::cout << "cases: " << cases << '\n';
}

/// A file of the folder as what it was called in its repository.
std::string own_name(const std::string& file) {
  for (const char* name : {"hf_quant_config.json", "quantize_config.json", "quant_config.json", "mlc-chat-config.json"})
    if (file.ends_with(name)) return name;
  return file.find("hqq_") != std::string::npos ? "quantization_config.json" : "config.json";
}

/// A directory that holds nothing but what says how a model is quantized.
TEST(Configs, EveryRealConfigIsInspectedAndPlannedAlone) {
  const fs::path folder = test::shared_dir() / "data/quant_configs";
  if (!fs::is_directory(folder)) GTEST_SKIP() << "no real configs here";
  size_t cases = 0;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file() || entry.path().extension() != ".json") continue;
    SCOPED_TRACE(entry.path());
    const test::TemporaryDirectory directory;
    fs::copy_file(entry.path(), directory / own_name(fs::relative(entry.path(), folder).generic_string()));
    const OrderedJson inspected = run("inspect", directory.path()), plan = run("plan", directory.path());
    const OrderedJson& quantization = inspected["quantization"];
    EXPECT_EQ(quantization["quantized"], true);
    EXPECT_FALSE(quantization["method"].get<std::string>().empty());
    EXPECT_TRUE(inspected["format"].is_null() && inspected["bytes"].is_null());
    EXPECT_TRUE(inspected["parameters"].is_null() || inspected["parameters"] > 1'000'000) << inspected["parameters"];
    for (const char* key : {"bits", "mode", "symmetric", "affected_layers", "skipped_layers", "container"})
      EXPECT_TRUE(quantization.contains(key)) << key;
    EXPECT_EQ(plan["scheme"], quantization["scheme"]);
    EXPECT_EQ(plan["checkpoint"]["method"], quantization["method"]);
    EXPECT_EQ(plan["tensors"], OrderedJson::array());
    EXPECT_EQ(plan["predicted"]["bytes"].is_null(), inspected["parameters"].is_null());
    ++cases;
  }
  std::cout << "cases: " << cases << '\n';
}

}  // namespace
}  // namespace bitwright
