#include "engine/lint.hpp"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace bitwright {
namespace {

const WeightForm kInt4 = {.type = "int", .bits = 4, .group = 128};
const WeightForm kBlockFp8 = {.type = "float", .bits = 8, .block_rows = 128, .block_columns = 128};

using Modules = std::vector<LinearModule>;

/// A decoder layer as transformers names it: attention and a gated feed-forward of these sizes.
Modules decoder_layer(const std::string& prefix, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head,
                      int64_t inner, const std::optional<WeightForm>& form) {
  return {{prefix + ".self_attn.q_proj", heads * head, hidden, form},
          {prefix + ".self_attn.k_proj", kv_heads * head, hidden, form},
          {prefix + ".self_attn.v_proj", kv_heads * head, hidden, form},
          {prefix + ".self_attn.o_proj", hidden, heads * head, form},
          {prefix + ".mlp.gate_proj", inner, hidden, form},
          {prefix + ".mlp.up_proj", inner, hidden, form},
          {prefix + ".mlp.down_proj", hidden, inner, form}};
}
/// Llama-3-8B's layers.
Modules llama(const std::optional<WeightForm>& form, int layers = 2) {
  Modules all;
  for (int i = 0; i < layers; ++i)
    std::ranges::move(decoder_layer("model.layers." + std::to_string(i), 4096, 32, 8, 128, 14336, form),
                      std::back_inserter(all));
  all.push_back({"lm_head", 128256, 4096, std::nullopt});
  return all;
}
/// Qwen2-7B's: 28 heads, 18944 = 148 x 128 inner ones.
Modules qwen2(const WeightForm& form) { return decoder_layer("model.layers.0", 3584, 28, 4, 128, 18944, form); }
/// Experts one by one, as Mixtral ("w1", "w2", "w3") or Qwen3-MoE call them.
Modules experts(const std::string& prefix, std::array<const char*, 3> names, int64_t hidden, int64_t inner, int count,
                const std::optional<WeightForm>& form) {
  Modules all;
  for (int e = 0; e < count; ++e) {
    const std::string expert = prefix + ".experts." + std::to_string(e) + ".";
    all.push_back({expert + names[0], inner, hidden, form});
    all.push_back({expert + names[1], hidden, inner, form});
    all.push_back({expert + names[2], inner, hidden, form});
  }
  return all;
}

LinearModule& at(Modules& modules, std::string_view name) {
  const auto found = std::ranges::find(modules, name, &LinearModule::name);
  EXPECT_NE(found, modules.end()) << name;
  return *found;
}

std::vector<Diagnostic> lint(const Modules& modules, const std::string& engine, const std::string& checkpoint,
                             int64_t tp = 1, Json model = Json::object()) {
  PlanRequest request{.engine = engine};
  request.checkpoint = checkpoint;
  request.hardware = {{"vendor", "nvidia"}, {"sm", 90}};
  request.model = std::move(model);
  if (!request.model.contains("kv_heads")) request.model["kv_heads"] = 8;
  EnginePlan plan;
  plan.engine = engine;
  plan.tensor_parallel = tp;
  return lint_modules(modules, request, plan);
}
std::vector<std::string> codes(const std::vector<Diagnostic>& diagnostics) {
  std::vector<std::string> all;
  for (const Diagnostic& d : diagnostics) all.push_back(d.code);
  return all;
}
using Codes = std::vector<std::string>;

TEST(Lint, WhatEnginesLoadPassesWithoutAWord) {
  for (const char* engine : {"vllm", "sglang", "tensorrt-llm", "lmdeploy", "mlx", "llamacpp", "transformers", "native"})
    for (const int64_t tp : {1, 2, 4, 8})
      for (const auto& form : {std::optional<WeightForm>(kInt4), std::optional<WeightForm>(kBlockFp8),
                               std::optional<WeightForm>(std::nullopt)}) {
        const auto said = lint(llama(form), engine, form == kBlockFp8 ? "fp8" : "gptq", tp);
        EXPECT_TRUE(said.empty()) << engine << ' ' << tp << ": " << said[0].message;
      }
}

TEST(Lint, FusedLayersNeedOneScheme) {
  Modules modules = llama(kInt4);
  at(modules, "model.layers.1.self_attn.v_proj").form->bits = 8;  // more bits for the values, as people like to have
  for (const char* engine : {"vllm", "sglang", "tensorrt-llm"}) {
    const auto said = lint(modules, engine, "gptq");
    ASSERT_EQ(codes(said), Codes{"FUSED_MISMATCH"}) << engine;
    EXPECT_EQ(said[0].severity, Severity::error);
    EXPECT_NE(said[0].message.find("model.layers.1.self_attn.v_proj (8-bit int, groups of 128)"), std::string::npos)
        << said[0].message;
    EXPECT_FALSE(said[0].instead.empty());
  }
  for (const char* engine : {"llamacpp", "mlx", "transformers", "native"})
    EXPECT_TRUE(lint(modules, engine, "gptq").empty()) << engine;  // nothing is fused there
}

TEST(Lint, LayersThatAreNotFusedMayDiffer) {
  Modules modules = llama(kInt4);
  at(modules, "model.layers.0.mlp.down_proj").form->bits = 8;
  at(modules, "model.layers.1.self_attn.o_proj").form.reset();
  for (const char* name : {"q_proj", "k_proj", "v_proj"})  // all three of one layer
    at(modules, std::string("model.layers.1.self_attn.") + name).form.reset();
  for (const char* engine : {"vllm", "sglang", "tensorrt-llm", "lmdeploy"})
    EXPECT_TRUE(lint(modules, engine, "gptq").empty()) << engine;
}

TEST(Lint, PartOfAFusedLayerCannotBeIgnored) {
  Modules modules = llama(kInt4, 3);
  for (const char* layer : {"0", "1", "2"})
    at(modules, std::string("model.layers.") + layer + ".mlp.up_proj").form.reset();
  for (const char* engine : {"vllm", "sglang", "tensorrt-llm", "lmdeploy"}) {
    const auto said = lint(modules, engine, "awq");
    ASSERT_EQ(codes(said), Codes{"CANNOT_IGNORE"}) << engine;
    EXPECT_NE(said[0].message.find("model.layers.0.mlp.up_proj (floating point)"), std::string::npos);
    EXPECT_NE(said[0].message.find("2 more layers"), std::string::npos) << said[0].message;
  }
}

TEST(Lint, TurboMindDecodesAttentionItCannotFuse) {
  Modules modules = llama(kInt4, 1);
  at(modules, "model.layers.0.self_attn.k_proj").form.reset();
  EXPECT_EQ(lint(modules, "lmdeploy", "awq").at(0).severity, Severity::warning);  // becomes 16 bits
  EXPECT_EQ(lint(modules, "lmdeploy", "gptq").at(0).severity, Severity::error);   // which it cannot do with GPTQ
}

TEST(Lint, ExpertsOfALayerAreOne) {
  Modules mixtral = experts("model.layers.0.block_sparse_moe", {"w1", "w2", "w3"}, 4096, 14336, 8, kInt4);
  mixtral.push_back({"model.layers.0.self_attn.q_proj", 4096, 4096, std::nullopt});
  EXPECT_TRUE(lint(mixtral, "vllm", "gptq", 2).empty());
  EXPECT_TRUE(lint(mixtral, "mlx", "mlx").empty());
  at(mixtral, "model.layers.0.block_sparse_moe.experts.5.w2").form.reset();
  EXPECT_EQ(codes(lint(mixtral, "vllm", "gptq")), Codes{"CANNOT_IGNORE"});
  EXPECT_EQ(codes(lint(mixtral, "mlx", "mlx")), Codes{"CANNOT_IGNORE"});
  at(mixtral, "model.layers.0.block_sparse_moe.experts.5.w2").form = {.type = "int", .bits = 8, .group = 128};
  EXPECT_EQ(codes(lint(mixtral, "sglang", "gptq")), Codes{"FUSED_MISMATCH"});

  Modules qwen3 = experts("model.layers.3.mlp", {"gate_proj", "down_proj", "up_proj"}, 2048, 768, 128, kInt4);
  EXPECT_TRUE(lint(qwen3, "vllm", "gptq", 2).empty());
  for (int e = 0; e < 128; ++e)  // every down_proj with more bits: one tensor each in MLX, one layer in vLLM
    at(qwen3, "model.layers.3.mlp.experts." + std::to_string(e) + ".down_proj").form->bits = 8;
  EXPECT_TRUE(lint(qwen3, "mlx", "mlx").empty());
  EXPECT_EQ(codes(lint(qwen3, "vllm", "gptq")), Codes{"FUSED_MISMATCH"});
}

TEST(Lint, DeepSeeksLatentProjectionsAreFused) {
  Modules modules = {{"model.layers.0.self_attn.q_a_proj", 1536, 7168, kBlockFp8},
                     {"model.layers.0.self_attn.q_b_proj", 24576, 1536, kBlockFp8},
                     {"model.layers.0.self_attn.kv_a_proj_with_mqa", 576, 7168, kBlockFp8},  // 4.5 blocks
                     {"model.layers.0.self_attn.kv_b_proj", 32768, 512, kBlockFp8},
                     {"model.layers.0.self_attn.o_proj", 7168, 16384, kBlockFp8}};
  std::ranges::move(experts("model.layers.3.mlp", {"gate_proj", "down_proj", "up_proj"}, 7168, 2048, 4, kBlockFp8),
                    std::back_inserter(modules));
  for (const char* engine : {"vllm", "sglang", "tensorrt-llm"})
    for (const int64_t tp : {1, 8, 16}) EXPECT_TRUE(lint(modules, engine, "fp8", tp).empty()) << engine << tp;
  EXPECT_EQ(codes(lint(modules, "vllm", "fp8", 32)), Codes{"GROUP_CUT"});  // 2048 / 32 = 64
  modules[0].form.reset();
  EXPECT_EQ(codes(lint(modules, "vllm", "fp8")), Codes{"CANNOT_IGNORE"});
  EXPECT_EQ(codes(lint(modules, "sglang", "fp8")), Codes{"CANNOT_IGNORE"});
}

TEST(Lint, WhatIsFusedAlreadyCannotDiffer) {
  const Modules neox = {{"gpt_neox.layers.0.attention.query_key_value", 18432, 6144, kInt4},
                        {"gpt_neox.layers.0.attention.dense", 6144, 6144, std::nullopt},
                        {"gpt_neox.layers.0.mlp.dense_h_to_4h", 24576, 6144, kInt4},
                        {"gpt_neox.layers.0.mlp.dense_4h_to_h", 6144, 24576, kInt4}};
  for (const int64_t tp : {1, 2, 8}) EXPECT_TRUE(lint(neox, "vllm", "gptq", tp).empty());
  WeightForm wide = kInt4;
  wide.group = 1024;
  Modules coarse = neox;
  for (LinearModule& m : coarse) m.form = wide;
  // of 6144 / 4 = 1536 and 24576 / 4 = 6144 inputs only the first is no multiple
  const auto said = lint(coarse, "vllm", "gptq", 4);
  ASSERT_EQ(codes(said), Codes{"GROUP_CUT"});
  EXPECT_NE(said[0].message.find("attention.dense"), std::string::npos);
  EXPECT_EQ(said[0].message.find("more layer"), std::string::npos) << said[0].message;
}

TEST(Lint, TensorParallelismMayNotCutGroups) {
  // 18944 inputs are 148 groups: 37 on each of 4 devices, 18.5 on each of 8 (where 28 heads do not go either)
  EXPECT_TRUE(lint(qwen2(kInt4), "vllm", "awq", 2, {{"kv_heads", 4}}).empty());
  EXPECT_TRUE(lint(qwen2(kInt4), "vllm", "awq", 4, {{"kv_heads", 4}}).empty());
  for (const char* engine : {"vllm", "sglang", "tensorrt-llm"}) {
    const auto said = lint(qwen2(kInt4), engine, "awq", 8, {{"kv_heads", 4}});
    ASSERT_FALSE(said.empty());
    const auto cut = std::ranges::find(said, "GROUP_CUT", &Diagnostic::code);
    ASSERT_NE(cut, said.end());
    EXPECT_NE(cut->message.find("o_proj: 3584 inputs on 8 devices are 448 each"), std::string::npos) << cut->message;
  }
  WeightForm fine = kInt4;
  fine.group = 64;  // 296 groups: 37 on each of 8
  const auto said = codes(lint(qwen2(fine), "sglang", "awq", 8, {{"kv_heads", 4}}));
  EXPECT_EQ(std::ranges::count(said, "GROUP_CUT"), 0);  // 448 = 7 x 64, 2368 = 37 x 64
}

TEST(Lint, AScaleARowOrAMatrixIsNeverCut) {
  for (const int64_t group : {-1, 0}) {
    WeightForm form = kInt4;
    form.group = group;
    for (const int64_t tp : {2, 4, 8}) EXPECT_TRUE(lint(llama(form), "vllm", "gptq", tp).empty());
  }
}

TEST(Lint, BlocksDivideWhatIsMerged) {
  Modules modules = decoder_layer("model.layers.0", 2048, 16, 8, 128, 5504 + 64, kBlockFp8);  // 43.5 blocks
  EXPECT_EQ(codes(lint(modules, "vllm", "fp8")), Codes{"TILE_SIZE"});  // gate_proj's end, before up_proj
  const auto said = lint(modules, "sglang", "fp8");
  ASSERT_EQ(codes(said), Codes{"TILE_SIZE"});
  EXPECT_NE(said[0].message.find("1 more layer"), std::string::npos);  // gate_proj and up_proj
  EXPECT_TRUE(lint(modules, "transformers", "fp8").empty());
}

TEST(Lint, MarlinsTiles) {
  // 1000 inputs: no multiple of 128 or 64
  const Modules odd = {{"model.layers.0.mlp.down_proj", 2048, 1000, WeightForm{.group = -1}}};
  const auto vllm = lint(odd, "vllm", "gptq");
  ASSERT_EQ(codes(vllm), Codes{"TILE_SIZE"});
  EXPECT_EQ(vllm[0].severity, Severity::note);  // padded since 2026-06
  EXPECT_EQ(lint(odd, "sglang", "gptq").at(0).severity, Severity::error);
  EXPECT_EQ(lint(odd, "sglang", "awq").at(0).severity, Severity::warning);  // other kernels take it
  // either family of tiles will do: 128 outputs by 64 inputs
  const Modules narrow = {{"model.layers.0.mlp.down_proj", 2048, 448, WeightForm{.group = 64}}};
  EXPECT_TRUE(lint(narrow, "vllm", "gptq").empty());
  EXPECT_TRUE(lint(narrow, "sglang", "gptq").empty());
  // a device of another maker has no Marlin
  PlanRequest amd{.engine = "vllm", .hardware = {{"vendor", "amd"}}, .checkpoint = "gptq"};
  EXPECT_TRUE(lint_modules(odd, amd, plan_engine(amd)).empty());
}

TEST(Lint, ActOrderWithCutInputs) {
  WeightForm ordered = kInt4;
  ordered.act_order = true;
  EXPECT_TRUE(lint(llama(ordered), "vllm", "gptq", 8).empty());  // Marlin keeps all scales on every device
  const Modules odd = {{"model.layers.0.mlp.down_proj", 2048, 2 * 5536, [&] {
                          WeightForm form = ordered;
                          form.group = 32;
                          return form;
                        }()}};
  EXPECT_TRUE(lint(odd, "vllm", "gptq", 1).empty());
  EXPECT_EQ(codes(lint(odd, "vllm", "gptq", 2)), Codes{"DESC_ACT"});  // 5536 = 43.25 x 128
  EXPECT_EQ(codes(lint(llama(ordered, 1), "lmdeploy", "gptq")), Codes{"DESC_ACT"});
  EXPECT_EQ(codes(lint(llama(ordered, 1), "mlx", "gptq")), Codes{"DESC_ACT"});
  EXPECT_TRUE(lint(llama(ordered, 1), "transformers", "gptq").empty());
  EXPECT_TRUE(lint(llama(ordered, 1), "sglang", "gptq", 2).empty());
}

TEST(Lint, GptqExpertsOfSglangRunOnMarlinOnly) {
  WeightForm form = kInt4;
  EXPECT_TRUE(
      lint(experts("model.layers.0.mlp", {"gate_proj", "down_proj", "up_proj"}, 2048, 768, 4, form), "sglang", "gptq")
          .empty());
  form.symmetric = false;
  EXPECT_EQ(codes(lint(experts("model.layers.0.mlp", {"gate_proj", "down_proj", "up_proj"}, 2048, 768, 4, form),
                       "sglang", "gptq")),
            Codes{"TILE_SIZE"});
}

TEST(Lint, SchemesAsForms) {
  const Scheme int4 = {.element = &integer_element(4, false),
                       .scale = parameter(Grouping::along(128), plain(DType::f16)),
                       .offset_kind = OffsetKind::zero_point,
                       .offset = parameter(Grouping::along(128), plain(DType::f16))};
  EXPECT_EQ(form_of(int4), (WeightForm{.type = "int", .bits = 4, .group = 128, .symmetric = false}));
  EXPECT_EQ(describe(*form_of(int4)), "4-bit int, groups of 128, asymmetric");
  EXPECT_FALSE(form_of(plain(DType::bf16)).has_value());
  EXPECT_FALSE(linear_module("model.embed_tokens.weight", {1000, 64}, nullptr).has_value());
  EXPECT_FALSE(linear_module("model.layers.0.mlp.gate.weight", {8, 64}, nullptr).has_value());
  EXPECT_FALSE(linear_module("model.norm.weight", {64}, nullptr).has_value());
  const auto module = linear_module("model.layers.0.mlp.up_proj.weight", {256, 64}, &int4);
  ASSERT_TRUE(module.has_value());
  EXPECT_EQ(module->name, "model.layers.0.mlp.up_proj");
  EXPECT_EQ(module->columns, 64);
}

TEST(Lint, RecipesBeforeAByteIsWritten) {
  const std::vector<TensorFacts> tensors = {{.name = "model.embed_tokens.weight", .shape = {1000, 256}},
                                            {.name = "model.layers.0.self_attn.q_proj.weight", .shape = {256, 256}},
                                            {.name = "model.layers.0.self_attn.k_proj.weight", .shape = {128, 256}},
                                            {.name = "model.layers.0.self_attn.v_proj.weight", .shape = {128, 256}},
                                            {.name = "model.layers.0.self_attn.o_proj.weight", .shape = {256, 256}}};
  const auto plan_of = [&](const char* layer_configs) {
    const auto request = read_request(OrderedJson::parse(
        std::string(R"({"quantization": {"method": "int4", "scheme": {"group_size": 64}, "layer_configs": )") +
        layer_configs + "}}"));
    return planned_modules(resolve(request, tensors), tensors);
  };
  const PlanRequest request{.engine = "vllm", .checkpoint = "compressed-tensors"};
  EnginePlan plan = plan_engine(request);
  add_diagnostics(lint_modules(plan_of("{}"), request, plan), plan);
  EXPECT_NE(plan.outcome, "error");
  const auto wide = plan_of(R"({"*.v_proj": {"bits": 8}})");
  ASSERT_EQ(wide.size(), 4U);  // no embedding
  add_diagnostics(lint_modules(wide, request, plan), plan);
  EXPECT_EQ(plan.outcome, "error");
  EXPECT_EQ(plan.diagnostics.back().code, "FUSED_MISMATCH");
}

/// What the rules say of any mixture of layers: nothing crashes, each code is documented, each message names a layer of
/// the list, and the order of the layers does not matter to what is found.
TEST(Lint, AnyMixtureOfLayers) {
  std::mt19937 random(20);
  const auto pick = [&](auto&& list) { return std::data(list)[random() % std::size(list)]; };
  const std::set<std::string> documented = {"FUSED_MISMATCH", "CANNOT_IGNORE", "GROUP_CUT", "TILE_SIZE", "DESC_ACT"};
  size_t said_something = 0;
  for (int round = 0; round < 3000; ++round) {
    const int64_t sizes[] = {64, 96, 576, 1000, 1024, 4096, 11008};
    const int64_t groups[] = {-1, 0, 32, 64, 100, 128, 1024};
    Modules modules = decoder_layer("model.layers.0", pick(sizes), 8, 2, 64, pick(sizes), kInt4);
    if (round % 2 != 0)
      std::ranges::move(
          experts("model.layers.1.mlp", {"gate_proj", "down_proj", "up_proj"}, pick(sizes), pick(sizes), 3, kInt4),
          std::back_inserter(modules));
    for (LinearModule& m : modules) {
      if (random() % 4 == 0) m.form.reset();
      if (m.form && random() % 2 != 0)
        m.form = WeightForm{.bits = static_cast<int>(2 + random() % 7),
                            .group = pick(groups),
                            .block_rows = random() % 4 == 0 ? 128 : 0,
                            .block_columns = 128,
                            .symmetric = random() % 2 != 0,
                            .act_order = random() % 2 != 0};
    }
    const char* engines[] = {"vllm", "sglang", "tensorrt-llm", "lmdeploy", "mlx", "llamacpp", "native", "transformers"};
    const char* kinds[] = {"gptq", "awq", "fp8", "compressed-tensors", ""};
    const char *engine = pick(engines), *kind = pick(kinds);
    const int64_t tp = int64_t{1} << random() % 5;
    const auto said = lint(modules, engine, kind, tp);
    said_something += said.empty() ? 0 : 1;
    for (const Diagnostic& d : said) {
      EXPECT_TRUE(documented.contains(d.code)) << d.code;
      EXPECT_TRUE(std::ranges::any_of(modules, [&](const LinearModule& m) { return d.message.starts_with(m.name); }))
          << d.message;
      EXPECT_EQ(d.message.find("unknown"), std::string::npos) << d.message;
      EXPECT_TRUE(d.severity != Severity::error || !d.instead.empty()) << d.message;
    }
    std::ranges::reverse(modules);
    std::set<std::string> forth, back;
    for (const Diagnostic& d : said)
      if (d.code == "GROUP_CUT" || d.code == "CANNOT_IGNORE") forth.insert(d.code);
    for (const Diagnostic& d : lint(modules, engine, kind, tp))
      if (d.code == "GROUP_CUT" || d.code == "CANNOT_IGNORE") back.insert(d.code);
    EXPECT_EQ(forth, back);
  }
  EXPECT_GT(said_something, 1000U);
}

}  // namespace
}  // namespace bitwright
