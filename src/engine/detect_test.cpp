#include "engine/detect.hpp"

#include <gtest/gtest.h>

#include <iostream>
#include <sstream>

#include "base/json.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

/// A file of the folder as what it was called in its repository.
std::string own_name(const std::string& file) {
  for (const char* name : {"hf_quant_config.json", "quantize_config.json", "quant_config.json", "mlc-chat-config.json"})
    if (file.ends_with(name)) return name;
  if (file.find("/hqq_") != std::string::npos || file.starts_with("hqq_")) return "quantization_config.json";
  return "config.json";
}

/// What MANIFEST.md says of each file: "gptq", "bitsandbytes:4bit-nf4", "modelopt:NVFP4"; by path in quant_configs.
std::map<std::string, std::string> manifest() {
  std::map<std::string, std::string> said;
  std::istringstream lines(test::read_file(test::shared_dir() / "data/MANIFEST.md"));
  for (std::string line; std::getline(lines, line);) {
    constexpr std::string_view kFolder = "| quant_configs/";
    const size_t bold = line.find("**");
    if (!line.starts_with(kFolder) || bold == std::string::npos) continue;
    const size_t end = line.find(" |", kFolder.size());
    said[line.substr(kFolder.size(), end - kFolder.size())] =
        line.substr(bold + 2, line.find("**", bold + 2) - bold - 2);
  }
  return said;
}

/// The first number under any of these names, depth first: an independent way to the bits and the group size.
const Json* find_number(const Json& document, const std::set<std::string>& names) {
  if (!document.is_structured()) return nullptr;
  for (const auto& [name, value] : document.items())
    if (document.is_object() && names.contains(name) && value.is_number()) return &value;
  for (const Json& inner : document)
    if (const Json* found = find_number(inner, names)) return found;
  return nullptr;
}
size_t count_skipped(const Json& document) {
  size_t count = 0;
  for (const auto& [name, value] : document.items()) {
    static const std::set<std::string> kLists = {
        "ignore",         "exclude_modules",       "exclude",      "modules_to_not_convert",
        "ignored_layers", "llm_int8_skip_modules", "skip_modules", "linear_weights_not_to_quantize"};
    if (name == "sparsity_config") continue;
    if (value.is_array() && kLists.contains(name))
      count += value.size();
    else if (value.is_structured() && (document.is_object() || document.is_array()))
      count += count_skipped(value);
  }
  return count;
}

void check_file(const std::string& name, const Json& document, const std::string& said) {
  const DetectedQuantization found = detect_model_quantization({{own_name(name), document}});
  const std::string method = said.substr(0, said.find_first_of(":("));
  const std::string detail = said.find(':') == std::string::npos ? "" : said.substr(said.find(':') + 1);
  EXPECT_FALSE(found.evidence.empty());
  if (method == "FP8") {  // ModelOpt's block in a config.json, without a quant_method
    EXPECT_EQ(found.method, "modelopt");
    EXPECT_EQ(found.scheme, "FP8");
  } else {
    EXPECT_EQ(found.method, method);
  }
  if (detail.starts_with("4bit")) {
    EXPECT_EQ(found.bits, 4);
  }
  if (detail.starts_with("8bit")) {
    EXPECT_EQ(found.bits, 8);
  }
  if (detail == "4bit-nf4") {
    EXPECT_EQ(found.scheme, "nf4");
  }
  if (detail == "block") {
    EXPECT_EQ(found.bits, 8);
    EXPECT_EQ(found.group_size, 128);
  }
  if (method == "modelopt") {
    EXPECT_EQ(found.scheme, detail);
  }
  if (detail == "NVFP4") {
    EXPECT_EQ(found.bits, 4);
  }
  if (detail == "NVFP4") {
    EXPECT_EQ(found.group_size, 16);
  }
  if (method == "mxfp4") {
    EXPECT_EQ(found.group_size, 32);
  }
  if (method == "mlc") {
    EXPECT_EQ(found.bits, 4);
  }
  if (method == "aqlm") {
    EXPECT_EQ(found.bits, 2);
  }
  const bool integers =
      std::set<std::string>{"gptq", "awq", "mlx", "auto-round", "openvino", "compressed-tensors"}.contains(method);
  if (integers) {
    const Json* bits = find_number(document, {"bits", "w_bit", "num_bits"});
    const Json* group = find_number(document, {"group_size", "q_group_size"});
    if (found.scheme != "mixed") {
      EXPECT_EQ(found.bits, bits != nullptr ? bits->get<double>() : 0);
    }
    const int64_t whole = found.facts.value("strategy", "") == "channel" ? -1 : 0;
    if (found.scheme != "mixed" && found.facts.value("strategy", "") != "block") {
      EXPECT_EQ(found.group_size, group != nullptr ? group->get<int64_t>() : whole);
    }
  }
  // layers that GPTQModel, AutoRound and MLX leave out are named by keys, not in lists
  const bool by_key = std::set<std::string>{"gptq", "auto-round", "mlx"}.contains(method);
  if (!by_key || count_skipped(document) > 0) {
    EXPECT_EQ(found.skipped.size(), count_skipped(document));
  }
}

TEST(Configs, EveryRealConfigIsRead) {
  const auto folder = test::shared_dir() / "data/quant_configs";
  if (!std::filesystem::is_directory(folder)) GTEST_SKIP() << "no real configs here";
  const auto said = manifest();
  size_t cases = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file() || entry.path().extension() != ".json") continue;
    const std::string name = std::filesystem::relative(entry.path(), folder).generic_string();
    SCOPED_TRACE(name);
    const auto row = said.find(name);
    const Json document = parse_json(test::read_file(entry.path()), name);
    if (row == said.end())
      EXPECT_FALSE(detect_model_quantization({{own_name(name), document}}).method.empty());
    else
      check_file(name, document, row->second);
    ++cases;
  }
  std::cout << "cases: " << cases << '\n';
}

/// Blocks as known models and tools write them, each with what it says: tests/vectors/configs/known.jsonl.
TEST(Detect, KnownConfigs) {
  std::istringstream lines(test::read_file("tests/vectors/configs/known.jsonl"));
  size_t cases = 0;
  for (std::string line; std::getline(lines, line); ++cases) {
    const Json known = Json::parse(line);
    const Json& expect = known["expect"];
    SCOPED_TRACE(known["name"].get<std::string>());
    const DetectedQuantization found =
        detect_model_quantization({{known["file"].get<std::string>(), known["document"]}});
    EXPECT_EQ(found.method, expect["method"]);
    EXPECT_EQ(found.bits, expect["bits"].get<double>());
    EXPECT_EQ(found.group_size, expect["group_size"]);
    EXPECT_EQ(Json(found.skipped), expect["skipped"]);
    if (expect.contains("scheme")) {
      EXPECT_EQ(found.scheme, expect["scheme"]);
    }
    const Json facts = expect.value("facts", Json::object());
    for (const auto& [name, value] : facts.items()) EXPECT_EQ(found.facts.value(name, Json()), value) << name;
  }
  EXPECT_GT(cases, 0);
  std::cout << "cases: " << cases << '\n';
}

TEST(Detect, ANameIsAHintAndNoEvidence) {
  const auto found =
      detect_model_quantization({{"config.json", Json::parse(R"({"model_type": "llama"})")}}, "Llama-3-8B-AWQ");
  EXPECT_EQ(found.method, "");
  EXPECT_EQ(found.hint, "awq");
  const auto declared = detect_model_quantization(
      {{"config.json", Json::parse(R"({"quantization_config": {"quant_method": "gptq", "bits": 4}})")}}, "x-awq");
  EXPECT_EQ(declared.method, "gptq");
  EXPECT_EQ(declared.hint, "");
}

TEST(Detect, ConfigComesBeforeModelOptsFile) {
  const Json config = Json::parse(R"({"quantization_config": {"quant_method": "awq", "bits": 4}})");
  const Json modelopt = Json::parse(R"({"quantization": {"quant_algo": "NVFP4"}})");
  EXPECT_EQ(detect_model_quantization({{"config.json", config}, {"hf_quant_config.json", modelopt}}).method, "awq");
  EXPECT_EQ(detect_model_quantization({{"config.json", Json::object()}, {"hf_quant_config.json", modelopt}}).method,
            "modelopt");
}

TEST(Detect, MembersOfTheWrongTypeAreAbsent) {
  for (
      const char* config :
      {R"([])", R"(7)", R"({"quantization_config": []})", R"({"quantization_config": {"quant_method": 7}})",
       R"({"quantization_config": {"quant_method": "gptq", "bits": "four", "group_size": {}, "dynamic": 3}})",
       R"({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": 3}, "ignore": {"x": 1}}})",
       R"({"quantization_config": {"quant_method": "fp8", "weight_block_size": "x"}})",
       R"({"quantization_config": {"quant_method": "gptq", "group_size": 1e300}})",
       R"({"quantization_config": {"quant_method": "auto-round", "bits": 1e300, "extra_config": [1, {"bits": 16}]}})",
       R"({"quantization_config": {"quant_method": "vptq", "config_for_layers": [3, {"vector_lens": [1e300]}]}})",
       R"({"quantization_config": {"quant_method": "vptq", "config_for_layers": "x"}})",
       R"({"quantization_config": {"quant_method": "quark", "global_quant_config": 3, "layer_quant_config": "x"}})",
       R"({"quantization_config": {"quant_method": "torchao", "quant_type": {"default": 4}, "quant_type_kwargs": 1}})",
       R"({"quantization_config": {"quant_method": "torchao", "quant_type": "weight"}})",
       R"({"quip_params": {"codebook": 3, "K": "x"}, "text_config": {"a_config": {"b_config": {"c_config": [1]}}}})",
       R"({"quantization": {"bits": 1e300}, "text_config": 4, "architectures": "x", "num_hidden_layers": -4})"}) {
    SCOPED_TRACE(config);
    EXPECT_NO_THROW(detect_model_quantization({{"config.json", Json::parse(config)}}));
    EXPECT_NO_THROW(model_facts(Json::parse(config)));
  }
}

}  // namespace
}  // namespace bitwright
