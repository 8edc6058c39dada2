#include "engine/parallel.hpp"

#include <gtest/gtest.h>

#include <random>

#include "base/error.hpp"
#include "engine/detect.hpp"

namespace bitwright {
namespace {

constexpr double kGib = 1024.0 * 1024 * 1024;

const char* const kLlama70 = R"({"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192,
  "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256,
  "max_position_embeddings": 131072, "tie_word_embeddings": false})";
const char* const kQwen7 = R"({"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584,
  "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
  "max_position_embeddings": 32768, "tie_word_embeddings": false})";
const char* const kQwen235 = R"({"model_type": "qwen3_moe", "num_hidden_layers": 94, "hidden_size": 4096,
  "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 12288,
  "moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
  "max_position_embeddings": 40960, "tie_word_embeddings": false})";

PlanRequest request_for(const char* engine, const char* config, std::vector<std::pair<std::string, Json>> parameters) {
  return {.engine = engine,
          .hardware = {{"vendor", "nvidia"}, {"sm", 90}, {"memory_gib", 80}},
          .model = model_facts(Json::parse(config)),
          .parameters = std::move(parameters)};
}
Deployed on_gpus(double gib, int64_t devices = 0, double bytes = 0) {
  return {.weight_bytes = bytes, .deployment = {.context = 8192, .memory_bytes = gib * kGib}, .devices = devices};
}
/// The engine's arguments about devices, in their order: "--tensor-parallel-size 4".
std::string devices_of(const PlanRequest& request) {
  std::string text;
  for (const Argument& a : plan_engine(request).args)
    if (a.flag.find("parallel") != std::string::npos || a.flag.find("p_size") != std::string::npos ||
        a.flag.find("p-size") != std::string::npos || a.flag == "--tp")
      text += (text.empty() ? "" : " ") + a.flag + (a.value == true ? "" : " " + a.value.get<std::string>());
  return text;
}
std::string derived(PlanRequest request, const Deployed& deployed, std::vector<Diagnostic>* said = nullptr) {
  std::vector<Diagnostic> own;
  return devices_of(derive_parallel(std::move(request), deployed, said != nullptr ? *said : own));
}

TEST(Parallel, TheFewestDevicesOnWhichItFits) {
  // 70 billion parameters: 141 GB in 16 bits; two devices of 80 GiB leave 92 % - 66 GiB - activations each
  for (const auto& [engine, flag] : std::map<const char*, std::string>{{"vllm", "--tensor-parallel-size"},
                                                                       {"sglang", "--tp-size"},
                                                                       {"tensorrt-llm", "--tp_size"},
                                                                       {"lmdeploy", "--tp"}}) {
    const auto asked = request_for(engine, kLlama70, {{"tensor_parallel", "auto"}});
    const std::string two = derived(asked, on_gpus(80));
    EXPECT_EQ(two, std::string(engine) == "sglang" ? flag + " 4" : flag + " 2") << engine;  // SGLang keeps 13.5 GiB
    EXPECT_EQ(derived(asked, on_gpus(24)), flag + " 8") << engine;
    EXPECT_EQ(derived(asked, on_gpus(192)), "") << engine;          // one: nothing to say
    EXPECT_EQ(derived(asked, on_gpus(80, 0, 40e9)), "") << engine;  // 4 bits
  }
}

TEST(Parallel, TheDerivedArgumentSaysWhy) {
  std::vector<Diagnostic> said;
  const EnginePlan plan = plan_engine(
      derive_parallel(request_for("vllm", kLlama70, {{"-tp", "auto"}, {"max-model-len", 8192}}), on_gpus(80), said));
  const auto found = std::ranges::find(plan.args, "--tensor-parallel-size", &Argument::flag);
  ASSERT_NE(found, plan.args.end());
  EXPECT_FALSE(found->given);
  EXPECT_NE(found->rule.find("tensor_parallel auto"), std::string::npos);
  EXPECT_EQ(plan.tensor_parallel, 2);
  EXPECT_EQ(parallelism_of(plan).tensor, 2);
  EXPECT_NE(std::ranges::find(plan.args, "--max-model-len", &Argument::flag), plan.args.end());  // kept
}

TEST(Parallel, HeadsDecideWhichDegreesThereAre) {
  // 28 heads, 4 of keys: 1, 2, 4 and 7 divide the heads, of these 1, 2 and 4 suit the keys
  const auto asked = request_for("vllm", kQwen7, {{"tensor_parallel", "auto"}});
  EXPECT_EQ(derived(asked, on_gpus(24)), "");
  EXPECT_EQ(derived(asked, on_gpus(12)), "--tensor-parallel-size 2");
  EXPECT_EQ(derived(asked, on_gpus(7)), "--tensor-parallel-size 4");
  std::vector<Diagnostic> said;
  EXPECT_EQ(derived(asked, on_gpus(4), &said), "");
  ASSERT_EQ(said.size(), 1U);
  EXPECT_EQ(said[0].code, "DOES_NOT_FIT");
  EXPECT_EQ(said[0].severity, Severity::error);
}

TEST(Parallel, PipelinesComeAfterTensors) {
  const std::vector<std::pair<std::string, Json>> both = {{"tensor_parallel", "auto"}, {"pipeline_parallel", "auto"}};
  EXPECT_EQ(derived(request_for("vllm", kQwen7, both), on_gpus(12)), "--tensor-parallel-size 2");
  // more than 4 devices share no layer: 28 layers in two
  EXPECT_EQ(derived(request_for("vllm", kQwen7, both), on_gpus(4)),
            "--tensor-parallel-size 4 --pipeline-parallel-size 2");
  EXPECT_EQ(derived(request_for("sglang", kLlama70, {{"tp", 2}, {"pipeline_parallel", "auto"}}), on_gpus(80)),
            "--tp-size 2 --pp-size 2");  // what is given stays
  std::vector<Diagnostic> said;
  EXPECT_EQ(derived(request_for("vllm", kLlama70, both), on_gpus(24, 4), &said), "");
  ASSERT_EQ(said.size(), 1U);
  EXPECT_NE(said[0].message.find("4 such devices"), std::string::npos);
}

TEST(Parallel, GroupsMustStayWhole) {
  // 18944 inputs are 148 groups of 128: 37 on 4 devices; groups of 512 are 37, which 2 devices would cut
  PlanRequest asked = request_for("vllm", kQwen7, {{"tensor_parallel", "auto"}, {"pipeline_parallel", "auto"}});
  asked.checkpoint = "gptq";
  asked.model["group_size"] = 512;
  asked.model["bits"] = 4;
  asked.model["sym"] = true;
  const std::vector<LinearModule> modules = {
      {"model.layers.0.mlp.down_proj", 3584, 18944, WeightForm{.bits = 4, .group = 512}}};
  Deployed deployed = on_gpus(5, 0, 5.5e9);
  deployed.modules = modules;
  EXPECT_EQ(derived(asked, deployed), "--pipeline-parallel-size 2");
}

TEST(Parallel, ExpertsWholeWhereTheirBlocksWouldBeCut) {
  // 1536 / 8 = 192 is no multiple of 128; 128 experts on 8 devices are 16 each
  PlanRequest asked = request_for("vllm", kQwen235, {{"tensor_parallel", 8}, {"expert_parallel", "auto"}});
  asked.checkpoint = "fp8";
  const WeightForm blocks = {.type = "float", .bits = 8, .block_rows = 128, .block_columns = 128};
  const std::vector<LinearModule> modules = {{"model.layers.0.mlp.experts.0.gate_proj", 1536, 4096, blocks},
                                             {"model.layers.0.mlp.experts.0.down_proj", 4096, 1536, blocks},
                                             {"model.layers.0.self_attn.o_proj", 4096, 8192, blocks}};
  Deployed deployed = on_gpus(80, 8, 236e9);
  deployed.modules = modules;
  EXPECT_EQ(derived(asked, deployed), "--tensor-parallel-size 8 --enable-expert-parallel");
  asked.parameters = {{"tensor_parallel", 4}, {"expert_parallel", "auto"}};  // 384 = 3 x 128: nothing is cut
  EXPECT_EQ(derived(asked, deployed), "--tensor-parallel-size 4");
  asked.engine = "sglang";
  asked.parameters = {{"tensor_parallel", 8}, {"expert_parallel", "auto"}};
  EXPECT_EQ(derived(asked, deployed), "--tp-size 8 --ep-size 8");
}

TEST(Parallel, WhatIsGivenStaysAndIsChecked) {
  const auto codes = [](const char* engine, const char* config, std::vector<std::pair<std::string, Json>> parameters,
                        int64_t devices = 0) {
    std::vector<Diagnostic> said;
    const PlanRequest request = derive_parallel(request_for(engine, config, std::move(parameters)), {}, said);
    std::vector<std::string> all;
    for (const Diagnostic& d : check_parallel(request, plan_engine(request), devices)) all.push_back(d.code);
    return all;
  };
  using Codes = std::vector<std::string>;
  EXPECT_EQ(codes("vllm", kLlama70, {{"tensor-parallel-size", 8}}), Codes{});
  EXPECT_EQ(codes("vllm", kLlama70, {{"tensor-parallel-size", 16}}), Codes{});  // each key head on two devices
  EXPECT_EQ(codes("vllm", kQwen7, {{"tensor-parallel-size", 7}}), (Codes{"PARALLEL_SPLIT", "PARALLEL_SPLIT"}));
  EXPECT_EQ(codes("vllm", kLlama70, {{"pipeline_parallel", 81}}), Codes{"PARALLEL_SPLIT"});
  EXPECT_EQ(codes("sglang", kQwen235, {{"tp", 12}, {"ep-size", 12}}), (Codes{"PARALLEL_SPLIT"}));
  EXPECT_EQ(codes("sglang", kQwen235, {{"tp", 4}, {"ep-size", 8}}), Codes{"PARALLEL_SPLIT"});
  EXPECT_EQ(codes("vllm", kLlama70, {{"-tp", 4}, {"-pp", 2}}, 4), Codes{"TOO_FEW_DEVICES"});
  EXPECT_EQ(codes("vllm", kLlama70, {{"-tp", 4}, {"-pp", 2}}, 8), Codes{});
}

TEST(Parallel, WhatCannotBeDerivedIsSaidBeforehand) {
  std::vector<Diagnostic> said;
  const auto code = [&](const char* engine, const char* parameter, const Deployed& deployed) {
    try {
      derive_parallel(request_for(engine, kLlama70, {{parameter, "auto"}}), deployed, said);
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), ExitStatus::usage);
      return error.code();
    }
    return std::string();
  };
  EXPECT_EQ(code("vllm", "tensor_parallel", {}), "bad-value");          // no memory known
  EXPECT_EQ(code("mlx", "tensor_parallel", on_gpus(80)), "bad-value");  // no such flag
  EXPECT_EQ(code("lmdeploy", "pipeline_parallel", on_gpus(80)), "bad-value");
  EXPECT_EQ(code("vllm", "tensor_parallel", on_gpus(80)), "");
}

/// Whatever is asked: what is derived fits, is allowed, and no degree below it would do.
TEST(Parallel, AnySizeOfDeviceAndDeployment) {
  std::mt19937 random(4);
  const auto pick = [&](auto&& list) { return std::data(list)[random() % std::size(list)]; };
  size_t answers = 0;
  for (int round = 0; round < 400; ++round) {
    const char* engines[] = {"vllm", "sglang", "tensorrt-llm"};
    const char* configs[] = {kLlama70, kQwen7, kQwen235};
    const double sizes[] = {8, 16, 24, 40, 48, 80, 96, 141, 192};
    const int64_t counts[] = {0, 1, 2, 4, 8};
    PlanRequest asked = request_for(pick(engines), pick(configs), {{"tensor_parallel", "auto"}});
    Deployed deployed = on_gpus(pick(sizes), pick(counts));
    deployed.deployment.batch = int64_t{1} << random() % 8;
    std::vector<Diagnostic> said;
    const PlanRequest found = derive_parallel(asked, deployed, said);
    const auto fits = [&](int64_t tensor) {
      Deployment d = deployed.deployment;
      d.tensor_parallel = tensor;
      return *estimate_memory(asked.model, 0, plan_engine(found), d).fits;
    };
    if (!said.empty()) {
      EXPECT_FALSE(fits(1));
      continue;
    }
    ++answers;
    const EnginePlan plan = plan_engine(found);
    const int64_t tensor = plan.tensor_parallel;
    EXPECT_TRUE(fits(tensor));
    EXPECT_TRUE(check_parallel(found, plan, deployed.devices).empty());
    EXPECT_EQ(asked.model["heads"].get<int64_t>() % tensor, 0);
    if (tensor % 2 == 0) {
      EXPECT_FALSE(fits(tensor / 2));
    }
  }
  EXPECT_GT(answers, 100U);
}

}  // namespace
}  // namespace bitwright
