#include "engine/precision.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"

namespace bitwright {
namespace {

OrderedJson json(const char* text) { return OrderedJson::parse(text); }

std::string code_of(const auto& action) {
  try {
    action();
  } catch (const Error& e) {
    return e.code();
  }
  return "";
}

const Argument* find(const EnginePlan& plan, std::string_view flag) {
  const auto found = std::ranges::find(plan.args, flag, &Argument::flag);
  return found == plan.args.end() ? nullptr : &*found;
}
bool says(const EnginePlan& plan, std::string_view code) {
  return std::ranges::find(plan.diagnostics, code, &Diagnostic::code) != plan.diagnostics.end();
}

TEST(Presets, AreTheSpecificationsTable) {
  struct Row {
    const char *name, *gemm, *kv, *attention, *moe;
  };
  for (const Row& row : std::initializer_list<Row>{{"default", "auto", "auto", "auto", "auto"},
                                                   {"kv-cache-fp8", "auto", "fp8_e5m2", "auto", "auto"},
                                                   {"dynamic-fp8", "fp8", "fp8_e5m2", "fp8", "fp8"},
                                                   {"bf16-stable", "bfloat16", "fp8_e5m2", "auto", "auto"},
                                                   {"aggressive-moe", "bfloat16", "fp8_e5m2", "fp8", "w4afp8"}}) {
    const PrecisionFields expected = {{"gemm_dtype", row.gemm},
                                      {"kvcache_dtype", row.kv},
                                      {"attention_dtype", row.attention},
                                      {"moe_dtype", row.moe}};
    EXPECT_EQ(expand_preset(row.name), expected) << row.name;
  }
  EXPECT_EQ(Facts::standard().all("presets").size(), 5U);
}

TEST(Presets, ExplicitFieldsOverrideThem) {
  const auto fields =
      resolve_fields(json(R"({"preset": "dynamic-fp8", "kvcache_dtype": "fp8_e4m3", "moe_dtype": "auto"})"));
  EXPECT_EQ(fields,
            (PrecisionFields{{"gemm_dtype", "fp8"}, {"kvcache_dtype", "fp8_e4m3"}, {"attention_dtype", "fp8"}}));
}

TEST(Presets, SeveralMakeSeveralConfigurations) {
  const auto expanded =
      expand_quantization_presets(json(R"({"presets": ["default", "kv-cache-fp8"], "gemm_dtype": "bfloat16"})"));
  ASSERT_EQ(expanded.size(), 2U);
  EXPECT_EQ(expanded[1], json(R"({"preset": "kv-cache-fp8", "gemm_dtype": "bfloat16"})"));
  EXPECT_EQ(expand_quantization_presets(json(R"({"gemm_dtype": "fp8"})")).size(), 1U);
  EXPECT_EQ(expand_quantization_presets(OrderedJson()).size(), 1U);
  EXPECT_EQ(expand_quantization_presets(json(R"({"presets": []})")).front(), OrderedJson::object());
  EXPECT_EQ(code_of([] { resolve_fields(json(R"({"presets": ["default", "kv-cache-fp8"]})")); }), "bad-value");
  EXPECT_EQ(code_of([] { validate_quant_config(json(R"({"preset": "default", "presets": ["default"]})")); }),
            "bad-value");
}

TEST(QuantConfig, WrongOnesAreRefusedByName) {
  EXPECT_NO_THROW(validate_quant_config(OrderedJson()));
  EXPECT_NO_THROW(validate_quant_config(OrderedJson::object()));
  EXPECT_EQ(code_of([] { validate_quant_config(json(R"({"preset": "kv-cache-fp9"})")); }), "unknown-preset");
  EXPECT_EQ(code_of([] { validate_quant_config(json(R"({"presets": ["default", "x"]})")); }), "unknown-preset");
  EXPECT_EQ(code_of([] { validate_quant_config(json(R"({"gem_dtype": "fp8"})")); }), "unknown-key");
  EXPECT_EQ(code_of([] { validate_quant_config(json(R"({"gemm_dtype": ["fp8"]})")); }), "bad-value");
  for (const std::string& field : field_names()) {
    for (const std::string& value : field_values(field))
      EXPECT_NO_THROW(validate_quant_config({{field, value}})) << field << value;
    EXPECT_EQ(code_of([&] { validate_quant_config({{field, "fp7"}}); }), "bad-value") << field;
  }
}

TEST(QuantConfig, SummaryIsOneLine) {
  EXPECT_EQ(get_quant_config_summary(OrderedJson()), "No quantization");
  EXPECT_EQ(get_quant_config_summary(json(R"({"presets": ["default", "kv-cache-fp8"]})")),
            "Presets: default, kv-cache-fp8");
  EXPECT_EQ(get_quant_config_summary(json(R"({"gemm_dtype": "fp8"})")),
            "GEMM: fp8, KV Cache: auto, Attention: auto, MoE: auto");
  EXPECT_EQ(get_quant_config_summary(json(R"({"preset": "default", "moe_dtype": "int8"})")),
            "Preset: default; MoE: int8");
}

TEST(QuantConfig, DynamicFp8IsForUnquantizedModels) {
  EXPECT_TRUE(should_apply_dynamic_fp8({{"gemm_dtype", "fp8"}}, {}));
  EXPECT_TRUE(should_apply_dynamic_fp8({{"preset", "dynamic-fp8"}}, {}));
  EXPECT_FALSE(should_apply_dynamic_fp8({{"gemm_dtype", "fp8"}}, {.method = "awq"}));
  EXPECT_FALSE(should_apply_dynamic_fp8({{"preset", "dynamic-fp8"}, {"gemm_dtype", "auto"}}, {}));
  EXPECT_FALSE(should_apply_dynamic_fp8({{"gemm_dtype", "bfloat16"}}, {}));
}

TEST(Parameters, TheUsersWin) {
  const OrderedJson merged = merge_parameters(
      json(R"({"--kv-cache-dtype": "fp8", "--dtype": "auto"})"),
      json(R"({"kv_cache_dtype": "auto", "tp-size": 2, "enable-x": true, "list": ["a", "b"], "none": []})"));
  EXPECT_EQ(
      merged,
      json(R"({"--kv-cache-dtype": "auto", "--dtype": "auto", "--tp-size": "2", "--enable-x": true, "--list": "a"})"));
}

TEST(Parameters, BooleansStayFlagsAndSingleLettersTheirCase) {
  EXPECT_EQ(merge_parameters(json(R"({"--enable-x": true, "-c": 1})"), json(R"({"enable_x": false, "-C": 2})")),
            json(R"({"--enable-x": false, "-c": "1", "-C": "2"})"));
  EXPECT_EQ(merge_parameters(json(R"({"a": 1})"), OrderedJson()), json(R"({"--a": "1"})"));
  EXPECT_EQ(merge_parameters(json(R"({"a": 1})"), json(R"({"--a": null, "b": {"c": 1}, "d": 0.5})")),
            json(R"({"--a": "1", "--b": "{\"c\":1}", "--d": "0.5"})"));
}

TEST(RuntimeArgs, TheThreeMapsAreTheirRuntimes) {
  const OrderedJson config = json(R"({"preset": "kv-cache-fp8"})"), own = json(R"({"max_num_seqs": 8})");
  const auto same = [&](const EnginePlan& plan, std::string_view runtime) {
    EXPECT_EQ(plan.engine, runtime);
    EXPECT_EQ(plan_json(plan, "M"), plan_json(get_runtime_args(runtime, config, own), "M"));
  };
  same(map_to_vllm_args(config, own), "vllm");
  same(map_to_sglang_args(config, own), "sglang");
  same(map_to_tensorrt_llm_args(config, own), "tensorrt_llm");
}

TEST(RuntimeArgs, WhatAnEngineCannotSetSeparatelyFallsBackWithAWarning) {
  const EnginePlan attention = map_to_vllm_args(json(R"({"attention_dtype": "bfloat16"})"));
  EXPECT_EQ(attention.outcome, "warning");
  EXPECT_TRUE(says(attention, "NO_ENGINE_FLAG"));
  const EnginePlan experts =
      map_to_tensorrt_llm_args(json(R"({"moe_dtype": "bfloat16"})"), {}, {}, {.model = {{"moe", true}}});
  EXPECT_EQ(experts.outcome, "warning");
  EXPECT_TRUE(says(experts, "NO_ENGINE_FLAG"));
}

TEST(RuntimeArgs, AQuantizedModelKeepsItsWeightsButNotItsCache) {
  for (const char* method : {"awq", "gptq", "bitsandbytes", "compressed-tensors", "modelopt"}) {
    const EnginePlan plan =
        map_to_vllm_args(json(R"({"gemm_dtype": "int8", "kvcache_dtype": "fp8"})"), {}, {.method = method});
    EXPECT_TRUE(says(plan, "ALREADY_QUANTIZED")) << method;
    EXPECT_EQ(find(plan, "--quantization"), nullptr) << method;
    ASSERT_NE(find(plan, "--kv-cache-dtype"), nullptr) << method;
  }
}

TEST(RuntimeArgs, TheUsersEnvironmentWins) {
  PlanRequest request = {.engine = "sglang",
                         .hardware = {{"vendor", "nvidia"}, {"sm", 90}},
                         .intent = {.method = "fp8", .weight_only = true}};
  EXPECT_EQ(plan_engine(request).environment["SGLANG_FORCE_FP8_MARLIN"], "1");
  request.environment["SGLANG_FORCE_FP8_MARLIN"] = "0";
  EXPECT_FALSE(plan_engine(request).environment.contains("SGLANG_FORCE_FP8_MARLIN"));
}

TEST(RuntimeArgs, ACommandIsSafeToPaste) {
  const OrderedJson own = {{"x; rm -rf /", "$(id)"}};
  EXPECT_EQ(engine_command(map_to_vllm_args({}, own), "a b"), "vllm serve 'a b' '--x; rm -rf /' '$(id)'");
  const std::string call = engine_command(get_runtime_args("transformers", {}, own), "M");
  EXPECT_NE(call.find(R"x(**{"x; rm _rf /": "$(id)"})x"), std::string::npos) << call;
}

TEST(RuntimeArgs, EveryNameOfARuntimeIsOne) {
  for (const char* name : {"tensorrt_llm", "tensorrt-llm", "trtllm", "TRTLLM"})
    EXPECT_EQ(get_runtime_args(name, json(R"({"kvcache_dtype": "fp8"})")).args.at(0).flag, "--kv_cache_dtype") << name;
  EXPECT_EQ(code_of([] { get_runtime_args("vlm", OrderedJson()); }), "unknown-engine");
}

TEST(RuntimeArgs, FlagsAreTheSameHoweverTheyAreWritten) {
  for (const char* flag :
       {"--kv-cache-dtype", "kv-cache-dtype", "kv_cache_dtype", "--kv_cache_dtype", "KV_CACHE_DTYPE"}) {
    const EnginePlan plan = map_to_vllm_args(json(R"({"kvcache_dtype": "fp8_e5m2"})"), {{flag, "fp8"}});
    ASSERT_EQ(plan.args.size(), 1U) << flag;
    EXPECT_EQ(plan.args[0].value, "fp8") << flag;
    ASSERT_EQ(plan.overrides.size(), 1U) << flag;
  }
}

TEST(RuntimeArgs, UnrelatedParametersPassThrough) {
  const EnginePlan plan = map_to_sglang_args(
      OrderedJson(),
      json(R"({"mem-fraction-static": 0.8, "enable-torch-compile": true, "schedule": ["lpm", "fcfs"]})"));
  EXPECT_EQ(find(plan, "--mem-fraction-static")->value, "0.8");
  EXPECT_EQ(find(plan, "--enable-torch-compile")->value, true);
  EXPECT_EQ(find(plan, "--schedule")->value, "lpm");
  EXPECT_EQ(plan.outcome, "ok");
}

TEST(RuntimeArgs, TextOfTheUsersStaysAsItWasTyped) {
  const char* const typed = R"({ "moe" : {"activation":"mxfp8"} })";
  const EnginePlan plan = map_to_vllm_args(OrderedJson(), {{"quantization-config", typed}}, {.method = "mxfp4"});
  EXPECT_EQ(find(plan, "--quantization-config")->value, typed);
  EXPECT_EQ(plan.outcome, "ok");
}

TEST(RuntimeArgs, TensorParallelismCutsNeitherHeadsNorGroups) {
  const Json model = {{"heads", 32}, {"intermediate_size", 11008}, {"group_size", 128}};
  const auto plan = [&](int parts, const char* checkpoint) {
    return map_to_vllm_args(OrderedJson(), {{"tensor-parallel-size", parts}}, {.method = checkpoint}, {.model = model});
  };
  EXPECT_EQ(plan(2, "awq").outcome, "ok");  // 11008 = 86 groups of 128: two devices take 43 each
  EXPECT_EQ(plan(2, "awq").tensor_parallel, 2);
  EXPECT_TRUE(says(plan(4, "awq"), "PARALLEL_SPLIT"));
  EXPECT_EQ(plan(4, "").outcome, "ok");
  EXPECT_TRUE(says(plan(3, ""), "PARALLEL_SPLIT"));
}

TEST(RuntimeArgs, TheVersionIsSaid) {
  EXPECT_TRUE(says(map_to_vllm_args(OrderedJson(), {}, {}, {.version = "0.31.0"}), "VERSION_UNVERIFIED"));
  EXPECT_FALSE(says(map_to_vllm_args(OrderedJson()), "VERSION_UNVERIFIED"));
}

TEST(Grid, IsPresetsTimesParameters) {
  const auto grid = prepare_experiment_parameters(json(R"({"presets": ["default", "kv-cache-fp8", "dynamic-fp8"]})"),
                                                  json(R"({"tp-size": [1, 2], "max-num-seqs": 64, "none": []})"));
  ASSERT_EQ(grid.size(), 6U);
  EXPECT_EQ(grid[3].quant_config, json(R"({"preset": "kv-cache-fp8"})"));
  EXPECT_EQ(grid[3].parameters, json(R"({"tp-size": 2, "max-num-seqs": 64})"));
  EXPECT_EQ(code_of([] { prepare_experiment_parameters(OrderedJson(), json(R"({"a": [1,2,3], "b": [1,2,3]})"), 8); }),
            "too-many-experiments");
}

TEST(Intents, OneBlockServesSeveralEngines) {
  const OrderedJson study = json(
      R"({"quantization": {"method": "int4"}, "engines": {"sglang": {"quantization": {"backend_method": "awq"}}}})");
  const EnginePlan vllm = to_backend_params(study, "vllm");
  EXPECT_TRUE(says(vllm, "NO_RUNTIME_QUANT"));
  const EnginePlan sglang = to_backend_params(study, "SGLang", {.method = "awq"});
  EXPECT_EQ(find(sglang, "--quantization")->value, "awq");
  EXPECT_EQ(to_backend_params(study, "transformers").api["class"], "BitsAndBytesConfig");
  EXPECT_EQ(code_of([] { to_backend_params(json(R"({"engines": {"vlm": {}}})"), "vllm"); }), "unknown-engine");
}

TEST(Intents, SayWhetherTheyAskForAnything) {
  EXPECT_FALSE(intent_of(OrderedJson()).enabled());
  EXPECT_FALSE(intent_of(json(R"({"method": "none"})")).enabled());
  for (const char* method : {"int8", "int4", "fp8", "auto"}) EXPECT_TRUE(intent_of({{"method", method}}).enabled());
  EXPECT_TRUE(intent_of(json(R"({"backend_method": "awq"})")).enabled());
  EXPECT_EQ(bits_of("fp8"), 8);
  EXPECT_EQ(bits_of("auto"), 0);
}

TEST(Intents, AnEnginesSectionOverridesMemberByMember) {
  const OrderedJson study = json(R"({
    "engine": {"name": "vllm", "version": "0.27.0"}, "hardware": "h100",
    "quant_config": {"kvcache_dtype": "fp8", "gemm_dtype": "bfloat16"}, "parameters": {"tp-size": 2},
    "engines": {"SGLang": {"quant_config": {"kvcache_dtype": "fp8_e5m2"}, "parameters": {"tp-size": 4}}, "vllm": null}})");
  const EnginePlan vllm = to_backend_params(study, "vllm"), sglang = to_backend_params(study, "sglang");
  EXPECT_EQ(vllm.version, "0.27.0");
  EXPECT_NE(sglang.version, "0.27.0");  // the version is the other engine's
  EXPECT_EQ(find(vllm, "--kv-cache-dtype")->value, "fp8");
  EXPECT_EQ(find(sglang, "--kv-cache-dtype")->value, "fp8_e5m2");
  EXPECT_EQ(find(sglang, "--dtype")->value, "bfloat16");
  EXPECT_EQ(settings_of_engine(study, "sglang")["parameters"], json(R"({"tp-size": 4})"));
  EXPECT_FALSE(settings_of_engine(study, "vllm").contains("engines"));
  EXPECT_EQ(code_of([&] { to_backend_params(json(R"({"hardware": "h1000x"})"), "vllm"); }), "unknown-hardware");
}

/// A section's way of naming presets takes the place of the other; a version is that of the engine it stands beside.
TEST(SettingsOfEngine, OneChoiceOfPresetsAndAVersionOfItsOwn) {
  const OrderedJson study = json(R"({"engine": {"name": "vllm", "version": "0.28.0"},
    "quant_config": {"presets": ["default", "kv-cache-fp8"]},
    "engines": {"vLLM": {}, "sglang": {"quant_config": {"preset": "default"}}, "trtllm": {"engine": {"version": "1.2"}}}})");
  EXPECT_EQ(settings_of_engine(study, "vllm")["engine"]["version"], "0.28.0");
  EXPECT_EQ(settings_of_engine(study, "sglang")["quant_config"], json(R"({"preset": "default"})"));
  EXPECT_FALSE(settings_of_engine(study, "sglang")["engine"].contains("version"));
  EXPECT_EQ(settings_of_engine(study, "tensorrt_llm")["engine"]["version"], "1.2");
  OrderedJson one = json(R"({"quant_config": {"preset": "default"},
    "engines": {"sglang": {"quant_config": {"presets": ["kv-cache-fp8", "dynamic-fp8"]}}}})");
  EXPECT_FALSE(settings_of_engine(one, "sglang")["quant_config"].contains("preset"));
}

TEST(Intents, OldSpellingsStayAccepted) {
  EXPECT_EQ(intent_of(json(R"({"load_in_4bit": true})")).method, "int4");
  EXPECT_EQ(intent_of(json(R"({"load_in_8bit": true})")).method, "int8");
  EXPECT_EQ(bits_of("int8"), 8);
  EXPECT_EQ(bits_of("nf4"), 4);
  EXPECT_EQ(bits_of("none"), 0);
}

}  // namespace
}  // namespace bitwright
