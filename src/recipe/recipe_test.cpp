#include "recipe/recipe.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "recipe/config.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

std::vector<TensorFacts> model() {
  return {{.name = "model.embed_tokens.weight", .shape = {512, 64}},
          {.name = "model.layers.0.self_attn.q_proj.weight", .shape = {64, 64}},
          {.name = "model.layers.0.input_layernorm.weight", .shape = {64}},
          {.name = "model.layers.1.mlp.down_proj.weight", .shape = {64, 172}},
          {.name = "model.layers.11.mlp.down_proj.weight", .shape = {64, 172}},
          {.name = "model.layers.0.experts.weight", .shape = {4, 64, 172}},
          {.name = "conv1.weight", .shape = {64, 64, 3}},
          {.name = "vision.patch_embedding.weight", .shape = {64, 3, 14, 14}},
          {.name = "vision.pos_embed.weight", .shape = {257, 64}},
          {.name = "vision.class_embedding", .shape = {1, 64}},
          {.name = "model.layers.1.mlp.gate.weight", .shape = {8, 64}},
          {.name = "position_ids.weight", .shape = {1, 64}, .is_float = false},
          {.name = "lm_head.weight", .shape = {512, 64}}};
}

OrderedJson config(const std::string& yaml) {
  OrderedJson json = parse_config_value(yaml, "test");
  check_config(json, "test");
  return json;
}

Recipe resolve_yaml(const std::string& yaml) { return resolve(read_request(config(yaml)), model()); }

std::string scheme_of(const Recipe& recipe, const std::string& name) {
  for (const TensorPlan& plan : recipe.tensors)
    if (plan.name.find(name) != std::string::npos) return plan.scheme ? describe(*plan.scheme) : plan.reason;
  return "none";
}

Error error_of(const std::string& yaml) {
  try {
    resolve_yaml(yaml);
  } catch (const Error& error) {
    return error;
  }
  return Error({.code = "none"});
}

TEST(Recipe, IntentFillsInWhatIsLeftOpen) {
  const Recipe int8 = resolve_yaml("quantization: {method: int8}");
  EXPECT_EQ(scheme_of(int8, "q_proj"), "int8 symmetric, per channel, float16 scales");
  EXPECT_EQ(scheme_of(int8, "experts"), "int8 symmetric, per channel, float16 scales");
  EXPECT_EQ(scheme_of(int8, "embed_tokens"), "embedding");
  EXPECT_EQ(scheme_of(int8, "lm_head"), "skip_modules");
  EXPECT_EQ(scheme_of(int8, "layernorm"), "not a matrix");
  EXPECT_EQ(scheme_of(int8, "conv1"), "three dimensions, and not experts");
  EXPECT_EQ(scheme_of(int8, "patch"), "a kernel of 4 dimensions");
  EXPECT_EQ(scheme_of(int8, "pos_embed"), "embedding");
  EXPECT_EQ(scheme_of(int8, "mlp.gate"), "router of experts");
  EXPECT_EQ(scheme_of(int8, "class_embedding"), "not a module's weight");
  EXPECT_EQ(scheme_of(int8, "position_ids"), "not floating point");
  EXPECT_EQ(scheme_of(resolve_yaml("quantization: {method: int4}"), "q_proj"),
            "int4 asymmetric, group 64, float16 scales");
  EXPECT_EQ(scheme_of(resolve_yaml("quantization: {method: nf4}"), "q_proj"), "nf4, blocks of 64, float32 scales");
  EXPECT_EQ(scheme_of(resolve_yaml("quantization: {scheme: {bits: 5}}"), "q_proj"),
            "int5 asymmetric, group 64, float16 scales");
  EXPECT_TRUE(int8.warnings.empty());
}

TEST(Recipe, RoutersAndHeadsOfEveryNameAreKept) {
  const std::vector<TensorFacts> tensors = {{.name = "model.layers.0.mlp.gate.weight", .shape = {4, 64}},
                                            {.name = "model.layers.0.block_sparse_moe.gate.weight", .shape = {4, 64}},
                                            {.name = "model.layers.0.mlp.gate_proj.weight", .shape = {64, 64}},
                                            {.name = "embed_out.weight", .shape = {512, 64}}};
  const Recipe kept = resolve(read_request(config("quantization: {method: int8}")), tensors);
  EXPECT_EQ(scheme_of(kept, "mlp.gate."), "router of experts");
  EXPECT_EQ(scheme_of(kept, "block_sparse_moe.gate"), "router of experts");
  EXPECT_EQ(scheme_of(kept, "gate_proj"), "int8 symmetric, per channel, float16 scales");
  EXPECT_EQ(scheme_of(kept, "embed_out"), "skip_modules");
  const Recipe named = resolve(
      read_request(config("quantization: {method: int8, skip_modules: [], layer_configs: {mlp.gate: {bits: 8}}}")),
      tensors);
  EXPECT_EQ(scheme_of(named, "mlp.gate."), "int8 symmetric, per channel, float16 scales");
  EXPECT_EQ(scheme_of(named, "embed_out"), "int8 symmetric, per channel, float16 scales");
}

TEST(Recipe, ExplicitValuesWin) {
  const std::string yaml =
      "quantization: {method: int4, scheme: {bits: 3, symmetric: true, group_size: 32, scale_dtype: bfloat16}}";
  EXPECT_EQ(scheme_of(resolve_yaml(yaml), "q_proj"), "int3 symmetric, group 32, bfloat16 scales");
  EXPECT_EQ(scheme_of(resolve_yaml("quantization: {method: int4, scheme: {granularity: tensor}}"), "q_proj"),
            "int4 asymmetric, per tensor, float16 scales");
}

TEST(Recipe, FlatGroupsCrossRows) {
  const Recipe recipe = resolve_yaml(
      "quantization: {method: int8, scheme: {granularity: flat, group_size: 8, scale_dtype: float32}, "
      "layer_configs: {down_proj: {group_size: 16}, embed_tokens: {granularity: channel}}}");
  EXPECT_EQ(scheme_of(recipe, "q_proj"), "int8 symmetric, blocks of 8, float32 scales");
  EXPECT_EQ(scheme_of(recipe, "down_proj"), "int8 symmetric, blocks of 16, float32 scales");
  EXPECT_EQ(scheme_of(recipe, "embed_tokens"), "int8 symmetric, per channel, float32 scales");
  EXPECT_EQ(scheme_of(resolve_yaml("quantization: {method: int4, scheme: {granularity: flat}}"), "q_proj"),
            "int4 asymmetric, blocks of 64, float16 scales");
}

TEST(Recipe, FirstRuleThatMatchesWinsInTheOrderWritten) {
  const Recipe recipe = resolve_yaml(
      "quantization: {method: int4, skip_modules: [q_proj], layer_configs: {z_unused: {bits: 2}, "
      "model.layers.1: {bits: 8}, '*.down_proj': {group_size: 32}, model.layers.11: {bits: 2}, embed_tokens: {method: "
      "int8}}}");
  EXPECT_EQ(scheme_of(recipe, "layers.1.mlp"), "int8 symmetric, per channel, float16 scales");
  EXPECT_EQ(scheme_of(recipe, "layers.11.mlp"), "int4 asymmetric, group 32, float16 scales");
  EXPECT_EQ(scheme_of(recipe, "q_proj"), "skip_modules");
  EXPECT_EQ(scheme_of(recipe, "embed_tokens"), "int8 symmetric, per channel, float16 scales");
  EXPECT_EQ(scheme_of(recipe, "lm_head"), "int4 asymmetric, group 64, float16 scales");
  ASSERT_EQ(recipe.warnings.size(), 2u);
  EXPECT_EQ(recipe.warnings[0].code, "UNUSED_PATTERN");
  EXPECT_NE(recipe.warnings[0].message.find("z_unused"), std::string::npos);
}

TEST(Recipe, LayersCanBeExemptedOrChosen) {
  const Recipe exempt = resolve_yaml("quantization: {method: int8, layer_configs: {model.layers.0: {method: none}}}");
  EXPECT_EQ(scheme_of(exempt, "q_proj"), "method none");
  const Recipe own = resolve_yaml(
      "quantization: {method: int4, scheme: {group_size: 32, symmetric: false}, layer_configs: {q_proj: {method: nf4}, "
      "down_proj: {granularity: channel}}}");
  EXPECT_EQ(scheme_of(own, "q_proj"), "nf4, blocks of 64, float32 scales");
  EXPECT_EQ(scheme_of(own, "down_proj"), "int4 asymmetric, per channel, float16 scales");
  EXPECT_EQ(scheme_of(own, "experts"), "int4 asymmetric, group 32, float16 scales");
  const Recipe chosen = resolve_yaml("quantization: {layer_configs: {q_proj: {method: nf4}}}");
  EXPECT_EQ(scheme_of(chosen, "q_proj"), "nf4, blocks of 64, float32 scales");
  EXPECT_EQ(scheme_of(chosen, "down_proj"), "method none");
}

TEST(Recipe, PatternsMatchWholeComponents) {
  EXPECT_TRUE(matches("model.layers.1", "model.layers.1.mlp.down_proj.weight"));
  EXPECT_FALSE(matches("model.layers.1", "model.layers.11.mlp.down_proj.weight"));
  EXPECT_TRUE(matches("down_proj", "model.layers.11.mlp.down_proj.weight"));
  EXPECT_FALSE(matches("own_proj", "model.layers.11.mlp.down_proj.weight"));
  EXPECT_TRUE(matches("*.down_proj", "model.layers.11.mlp.down_proj.weight"));
  EXPECT_FALSE(matches("", "a.weight"));
}

TEST(Recipe, ContradictionsAndNothingToDo) {
  for (const char* yaml :
       {"quantization: {method: int4, scheme: {granularity: channel, group_size: 32}}",
        "quantization: {method: nf4, scheme: {bits: 8}}", "quantization: {method: nf4, scheme: {symmetric: false}}",
        "quantization: {method: int4, scheme: {nested_scales: true, scale_dtype: float16}}"}) {
    EXPECT_EQ(error_of(yaml).code(), "bad-value") << yaml;
    EXPECT_EQ(error_of(yaml).status(), ExitStatus::usage);
  }
  EXPECT_EQ(error_of("{}").code(), "nothing-to-quantize");
  EXPECT_EQ(error_of("quantization: {method: none}").code(), "nothing-to-quantize");
  EXPECT_EQ(error_of("quantization: {method: int8, skip_modules: ['*']}").code(), "nothing-to-quantize");
}

TEST(Config, UnknownKeysNameTheNearest) {
  EXPECT_NE(std::string(error_of("quantisation: {method: int8}").what()).find("did you mean 'quantization'?"),
            std::string::npos);
  EXPECT_NE(std::string(error_of("quantization: {scheme: {groupsize: 32}}").what()).find("'group_size'"),
            std::string::npos);
  EXPECT_NE(std::string(error_of("quantization: {layer_configs: {a: {bit: 8}}}").what()).find("did you mean 'bits'?"),
            std::string::npos);
  EXPECT_NE(std::string(error_of("quantization: {method: int5}").what()).find("valid: none, int8"), std::string::npos);
}

TEST(Config, NullIsAsIfItWereNotThere) {
  const Recipe recipe = resolve_yaml(
      "{quantization: {method: int8, algorithm: null, scheme: null, layer_configs: {a: {bits: null}}}, model: null}");
  EXPECT_EQ(scheme_of(recipe, "q_proj"), "int8 symmetric, per channel, float16 scales");
}

TEST(Config, ValuesAreChecked) {
  for (const char* yaml :
       {"quantization: int8", "quantization: {method: 8}", "quantization: {method: int8, scheme: {bits: 9}}",
        "quantization: {method: int8, scheme: {bits: '8'}}", "quantization: {method: int8, scheme: {symmetric: 1}}",
        "quantization: {skip_modules: lm_head}", "quantization: {layer_configs: [a]}",
        "quantization: {layer_configs: {a: 8}}", "quantization: {weight_only: 1}", "quantization: {algorithm: magic}",
        "quantization: {scheme: {group_size: 0}}"}) {
    EXPECT_EQ(error_of(yaml).code(), "bad-value") << yaml;
    EXPECT_EQ(error_of(yaml).status(), ExitStatus::usage) << yaml;
  }
}

TEST(Config, FilesAreYamlOrJson) {
  const test::TemporaryDirectory dir;
  test::write_file(dir / "a.yaml", "quantization:\n  method: int4   # comment\n  skip_modules: [lm_head, 'a.b']\n");
  test::write_file(dir / "a.json", R"({"quantization": {"method": "int4", "skip_modules": ["lm_head", "a.b"]}})");
  EXPECT_EQ(read_config_file(dir / "a.yaml"), read_config_file(dir / "a.json"));
  const auto code = [&](const std::string& text) {
    test::write_file(dir / "b.yaml", text);
    try {
      read_config_file(dir / "b.yaml");
    } catch (const Error& error) {
      return error.code();
    }
    return std::string("none");
  };
  EXPECT_EQ(code(""), "none");
  EXPECT_EQ(code("a: 1\n---\nb: 2"), "bad-config");
  EXPECT_EQ(code(","), "bad-config") << "yaml-cpp finds documents in it without end";
  EXPECT_EQ(code("a: \xff"), "bad-config");
  EXPECT_EQ(code("- a"), "bad-config");
  EXPECT_EQ(code("a: [1"), "bad-config");
  EXPECT_EQ(code("a: 1\na: 2"), "bad-config");
  // Each line stands for nine of the one before: 9^9 values.
  std::string bomb = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n";
  for (int i = 1; i < 9; ++i) {
    const std::string last = "*a" + std::to_string(i - 1), name = "a" + std::to_string(i);
    bomb += name + ": &" + name + " [" + last;
    for (int j = 0; j < 8; ++j) bomb += "," + last;
    bomb += "]\n";
  }
  EXPECT_EQ(code(bomb), "bad-config");
}

TEST(Config, SetReachesEveryKey) {
  OrderedJson json = OrderedJson::object();
  set_config_value(json, "quantization.scheme.bits", 4);
  set_config_value(json, "quantization.layer_configs.model.layers.0.bits", 8);
  EXPECT_EQ(json.dump(), R"({"quantization":{"scheme":{"bits":4},"layer_configs":{"model.layers.0":{"bits":8}}}})");
  EXPECT_THROW(set_config_value(json, "quantization.scheme.bits.x", 1), Error);
  for (const char* path : {"quantization.layer_configs", "quantization"}) {
    OrderedJson plain = OrderedJson::object();
    set_config_value(plain, path, 5);
    EXPECT_THROW(set_config_value(plain, "quantization.layer_configs.a.bits", 4), Error);
  }
}

// A container's table fills in what is left open, the method too; what is said wins, and none is none.
TEST(Recipe, ContainersChooseWhatIsLeftOpen) {
  const Container* const bitsandbytes = find_container("bitsandbytes");
  std::vector<TensorFacts> tensors = model();
  std::erase_if(tensors, [](const TensorFacts& t) { return t.shape.size() != 2; });
  const auto scheme = [&](const std::string& yaml) {
    return scheme_of(resolve(read_request(config(yaml)), tensors, bitsandbytes), "q_proj");
  };
  EXPECT_EQ(scheme("{}"), "nf4, blocks of 64, float32 scales");
  EXPECT_EQ(scheme("quantization: {method: fp4, scheme: {group_size: 128}}"), "fp4, blocks of 128, float32 scales");
  EXPECT_EQ(scheme("quantization: {scheme: {nested_scales: true}}"),
            "nf4, blocks of 64, double-quantized (dynamic8) scales");
  EXPECT_EQ(scheme("quantization: {method: int8}"), "int8 symmetric, per channel, float32 scales");
  EXPECT_EQ(scheme("quantization: {layer_configs: {\"*.q_proj\": {method: none}}}"), "method none");
  EXPECT_THROW(scheme("quantization: {method: nvfp4}"), Error);
  EXPECT_THROW(scheme("quantization: {method: none}"), Error);
}

}  // namespace
}  // namespace bitwright
