#include "bitwright/torch/training_config.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "base/error.hpp"
#include "tests/support.hpp"

namespace bitwright {
namespace {

struct Configs {
  TrainingConfig read(std::string_view yaml, const std::vector<std::string>& set = {}) const {
    test::write_file(directory / "train.yaml", yaml);
    return TrainingConfig::read(directory / "train.yaml", set);
  }
  /// What is said of it.
  std::string error(std::string_view yaml, const std::vector<std::string>& set = {}) const {
    try {
      read(yaml, set);
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), ExitStatus::usage);
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      return error.what();
    }
    return "no error";
  }
  test::TemporaryDirectory directory;
};

void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text << "\nlacks: " << part;
}

// SPECIFICATION C4
TEST(SpecificationC, C4_MissingFieldsMeanDisabledAndOldFilesLoad) {
  const Configs configs;
  for (const char* yaml :
       {"", "model: m\n", "quantization_mode: null\n", "quantization_mode: ~\n", "model: m\nlearning_rate: 0.001\n"}) {
    const TrainingConfig c = configs.read(yaml);
    EXPECT_EQ(c.quantization_mode, "none") << yaml;
    EXPECT_EQ(c.quantization_bits, 8);
    EXPECT_EQ(c.quantization_type, "static");
    EXPECT_FALSE(c.enable_quantized_finetuning);
    EXPECT_TRUE(c.quantization.empty());
    EXPECT_EQ(c.lora.r, 0);
  }
}

// SPECIFICATION C4
TEST(SpecificationC, C4_FieldsAreReadFromYaml) {
  const Configs configs;
  for (const char* mode : {"ptq", "qat"})
    for (const int bits : {8, 4})
      for (const char* type : {"static", "dynamic"}) {
        const TrainingConfig c = configs.read(
            fmt::format("quantization_mode: {}\nquantization_bits: {}\nquantization_type: {}\n", mode, bits, type));
        EXPECT_EQ(c.quantization_mode, mode);
        EXPECT_EQ(c.quantization_bits, bits);
        EXPECT_EQ(c.quantization_type, type);
      }
  EXPECT_TRUE(configs.read("enable_quantized_finetuning: true\n").enable_quantized_finetuning);
  expect_contains(configs.error("quantization_mode: qta\n"), "'qta' is not known; valid: none, ptq, qat");
  expect_contains(configs.error("quantization_bits: 5\n"), "'5' is not known; valid: 8, 4");
  expect_contains(configs.error("quantization_type: fixed\n"), "valid: static, dynamic");
  expect_contains(configs.error("enable_quantized_finetuning: 1\n"), "'1' is neither true nor false");
}

// SPECIFICATION C7
TEST(SpecificationC, C7_DefaultsAreThoseOfAdamW) {
  const TrainingConfig c = Configs().read("");
  EXPECT_EQ(c.optimizer, "adamw");
  EXPECT_EQ(c.learning_rate, 3e-4);
  EXPECT_EQ(c.weight_decay, 0.1);
  EXPECT_EQ(c.betas, (std::vector<double>{0.9, 0.95}));
}

TEST(TrainingConfig, SetReplacesWhatTheFileSays) {
  const Configs configs;
  const TrainingConfig c =
      configs.read("max_steps: 5\ndata: {text: a.txt, split: '<end>'}\n",
                   {"max_steps=7", "data.text=b.txt", "lora.target_modules=[q_proj, v_proj]",
                    "quantization.method=int4", "architecture.hidden_size=64", "betas=[0.8, 0.9]"});
  EXPECT_EQ(c.max_steps, 7);
  EXPECT_EQ(c.data.text, "b.txt");
  EXPECT_EQ(c.data.split, "<end>");
  EXPECT_EQ(c.lora.target_modules, (std::vector<std::string>{"q_proj", "v_proj"}));
  EXPECT_EQ(c.quantization, R"({"method":"int4"})");
  EXPECT_EQ(c.architecture, R"({"hidden_size":64})");
  EXPECT_EQ(c.betas, (std::vector<double>{0.8, 0.9}));
  expect_contains(configs.error("", {"max_steps"}), "'max_steps' is not KEY=VALUE");
  expect_contains(configs.error("", {"data=x"}), "data: 'x' is no section of keys");
}

TEST(TrainingConfig, WrongKeysAndValuesAreOneClearLine) {
  const Configs configs;
  expect_contains(configs.error("learning_rat: 1\n"), "unknown key 'learning_rat'; did you mean 'learning_rate'?");
  expect_contains(configs.error("data: {txet: a}\n"), "unknown key 'data.txet'; did you mean 'text'?");
  expect_contains(configs.error("lora: {rank: 8}\n"), "unknown key 'lora.rank'");
  expect_contains(configs.error("quantization: {metod: int4}\n"), "did you mean 'method'?");
  expect_contains(configs.error("quantization: {method: int5}\n"), "'int5' is not known; valid: none, int8");
  expect_contains(configs.error("qat: {scale: lsq}\n"), "unknown key 'qat.scale'; did you mean 'scales'?");
  expect_contains(configs.error("qat: {scales: clever}\n"), "'clever' is not known; valid: auto, learned, computed");
  expect_contains(configs.error("qat: {initial_scales: max}\n"), "valid: search, lsq");
  expect_contains(configs.error("qat: {activation_type: int2}\n"), "valid: int8, int4, e4m3, e5m2");
  expect_contains(configs.error("qat: {activation_ranges: ema}\n"),
                  "valid: minmax, moving_average, percentile, learned");
  expect_contains(configs.error("qat: {scale_lr: -1}\n"), "qat.scale_lr: '-1' is not between 0 and");
  expect_contains(configs.error("qat: {averaging: 0}\n"), "qat.averaging: '0' is not between");
  expect_contains(configs.error("qat: {percentile: 50}\n"), "qat.percentile: '50' is not between");
  expect_contains(configs.error("batch_size: 0\n"), "batch_size: '0' is not between 1 and");
  expect_contains(configs.error("batch_size: 1.5\n"), "is no whole number");
  expect_contains(configs.error("learning_rate: nan\n"), "is not between 0 and");
  expect_contains(configs.error("learning_rate: -1\n"), "is not between 0 and");
  expect_contains(configs.error("betas: [0.9]\n"), "is no list of 2 numbers");
  expect_contains(configs.error("betas: [0.9, 1.5]\n"), "is not between 0 and");
  expect_contains(configs.error("data: 3\n"), "data: '3' is no section of keys");
  expect_contains(configs.error("- a\n"), "it is no mapping of keys to values");
  EXPECT_THROW(TrainingConfig::read("no/such/file.yaml"), Error);
}

TEST(TrainingConfig, ContradictionsAreRefused) {
  const Configs configs;
  expect_contains(configs.error("model: a\narchitecture: b\n"), "both 'model' and 'architecture' are given");
  expect_contains(configs.error("quantization_mode: qat\nenable_quantized_finetuning: true\n"),
                  "contradict each other");
  expect_contains(configs.error("quantization_mode: ptq\nenable_quantized_finetuning: true\n"),
                  "contradict each other");
  expect_contains(configs.error("lora: {r: 8}\nquantization_mode: qat\n"), "lora.r 8 and quantization_mode qat");
  expect_contains(configs.error("lora: {r: 8}\nenable_quantized_finetuning: true\n"), "contradict each other");
  expect_contains(configs.error("lora: {r: 8, init: loftq}\n"), "lora.init loftq needs a section 'quantization'");
  expect_contains(configs.error("architecture: {hidden_size: 8}\nquantization_mode: qat\nqat: {distill: true}\n"),
                  "qat.distill needs a 'model'");
  expect_contains(configs.error("max_steps: 0\nepochs: 0\n"), "both max_steps and epochs are 0");
}

TEST(TrainingConfig, PrintedConfigurationReadsBackAndNamesTheRun) {
  const Configs configs;
  const TrainingConfig c = configs.read(
      "architecture: {hidden_size: 64, tie_word_embeddings: true}\nlora: {r: 0, alpha: 3.5}\nbetas: [0.5, 0.25]\n"
      "quantization: {method: int4, scheme: {bits: 2, group_size: 32}}\nseed: 9\n");
  const TrainingConfig again = TrainingConfig::from_json(c.to_json());
  EXPECT_EQ(again.to_json(), c.to_json());
  EXPECT_EQ(again.hash(), c.hash());
  EXPECT_EQ(c.hash().size(), 16u);
  EXPECT_NE(configs.read("seed: 10\n").hash(), configs.read("seed: 9\n").hash());
}

TEST(TrainingConfig, WhatMayChangeBetweenACheckpointAndNow) {
  const Configs configs;
  const TrainingConfig before = configs.read("model: m\n");
  EXPECT_EQ(incompatible_key(before, configs.read("model: m\nmax_steps: 9\nlearning_rate: 1\noutput: o\n")), "");
  EXPECT_EQ(incompatible_key(before, configs.read("model: n\n")), "model");
  EXPECT_EQ(incompatible_key(before, configs.read("model: m\nseed: 1\n")), "seed");
  EXPECT_EQ(incompatible_key(before, configs.read("model: m\nquantization_mode: qat\n")), "quantization_mode");
  EXPECT_EQ(incompatible_key(before, configs.read("model: m\nquantization: {method: int4}\n")), "quantization");
  EXPECT_EQ(incompatible_key(before, configs.read("model: m\nqat: {scale_lr: 0.5}\n")), "");
  EXPECT_EQ(incompatible_key(before, configs.read("model: m\nqat: {scales: computed}\n")), "qat.scales");
}

}  // namespace
}  // namespace bitwright
