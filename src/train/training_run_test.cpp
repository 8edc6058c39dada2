#include "train/training_run.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "evaluate/evaluate.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"
#include "tests/support.hpp"

namespace bitwright::train {
namespace {

namespace fs = std::filesystem;

constexpr const char* kText = "examples/tinystories-4m/tinystories_valid.txt";
constexpr int64_t kLength = 64, kWindows = 2;

/// What a file says of quantization, in its own words.
struct Mode {
  const char* name;
  const char* yaml;
  bool activations = false;  ///< inputs of layers are quantized, too
};

const Mode kModes[] = {
    {"FieldsAlone", "quantization_mode: qat\n", true},
    {"FieldsAloneInt4Dynamic", "quantization_mode: qat\nquantization_bits: 4\nquantization_type: dynamic\n", true},
    {"Int8", "quantization_mode: qat\nquantization: {method: int8}\n"},
    {"Int4Channel",
     "quantization_mode: qat\nquantization_bits: 4\nquantization: {scheme: {granularity: channel, symmetric: true}}\n"},
    {"Int4Tensor",
     "quantization_mode: qat\nquantization_bits: 4\nquantization: {scheme: {granularity: tensor, symmetric: true}}\n"},
    {"Int4Group", "quantization_mode: qat\nquantization: {method: int4, scheme: {group_size: 64}}\n"},
    {"Int4Lsq",
     "quantization_mode: qat\nquantization: {method: int4, scheme: {group_size: 32, symmetric: true}}\n"
     "qat: {initial_scales: lsq, scale_lr: 0.1}\n"},
    {"Int4Distilled",
     "quantization_mode: qat\nquantization: {method: int4, scheme: {granularity: channel}}\nqat: {distill: true}\n"},
    {"Int4Computed", "quantization_mode: qat\nquantization: {method: int4}\nqat: {scales: computed}\n"},
    {"Int3", "quantization_mode: qat\nquantization: {method: int3, scheme: {group_size: 32}}\n"},
    {"Int2", "quantization_mode: qat\nquantization: {method: int2, scheme: {group_size: 32}}\n"},
    {"Nf4", "quantization_mode: qat\nquantization: {method: nf4}\n"},
    {"Nf4Nested", "quantization_mode: qat\nquantization: {method: nf4, scheme: {nested_scales: true}}\n"},
    {"Fp8", "quantization_mode: qat\nquantization: {method: fp8}\n"},
    {"StaticAverage", "quantization_mode: qat\nquantization: {method: int8, weight_only: false}\n", true},
    {"StaticLearned",
     "quantization_mode: qat\nquantization: {method: int8, weight_only: false}\nqat: {activation_ranges: learned}\n",
     true},
    {"StaticPercentileZeroPoint",
     "quantization_mode: qat\nquantization: {method: int4, weight_only: false}\n"
     "qat: {activation_ranges: percentile, symmetric_activations: false}\n",
     true},
    {"DynamicFloats",
     "quantization_mode: qat\nquantization_type: dynamic\nquantization: {method: fp8, weight_only: false}\n"
     "qat: {activation_type: e4m3}\n",
     true},
};

struct QatModes : testing::TestWithParam<Mode> {
  OrderedJson run(const std::string& output, int64_t steps, bool resume = false) {
    const std::string all = fmt::format(
        "{}model: examples/tinystories-4m\ndata: {{text: {}, validation: {}, split: <|endoftext|>, "
        "sequence_length: {}}}\nmax_steps: {}\nschedule: constant\nlearning_rate: 1.0e-4\nbatch_size: 1\n"
        "eval_windows: {}\noutput: {}\n",
        GetParam().yaml, kText, kText, kLength, steps, kWindows, (directory / output).string());
    test::write_file(directory / "train.yaml", all);
    return run_training({.config = directory / "train.yaml", .resume = resume}, warnings);
  }
  /// As `bitwright eval` measures it.
  static double evaluated(const OrderedJson& result) {
    const Checkpoint checkpoint = open_model(result["model"].get<std::string>());
    const Model model(checkpoint);
    const Tokenizer tokenizer(tokenizer_path(checkpoint));
    const Protocol protocol = {.context = kLength,
                               .stride = kLength,
                               .bos = tokenizer.adds_bos() ? Protocol::Bos::document : Protocol::Bos::none,
                               .split = "<|endoftext|>",
                               .max_windows = kWindows};
    const std::vector<int32_t> tokens = token_stream(tokenizer, test::read_file(kText), protocol);
    return evaluate(model, nullptr, tokens, protocol, tokenizer.bos_id()).nll;
  }
  test::TemporaryDirectory directory;
  std::vector<Warning> warnings;
};

// SPECIFICATION C2, C4: what learned through the quantization is what is exported, and what other commands read.
TEST_P(QatModes, ExportsWhatItLearned) {
  const OrderedJson result = run("run", 2);
  EXPECT_EQ(result["mode"], "qat");
  EXPECT_EQ(result["quantized_layers"], 28);
  const auto loss = [&](const char* name) { return result["qat"][name].get<double>(); };
  EXPECT_GT(std::fabs(loss("loss_rounded") - loss("loss_floats")), 1e-5);
  EXPECT_GT(std::fabs(loss("loss_learned") - loss("loss_floats")), 1e-5);
  EXPECT_NEAR(result["val_loss"].get<double>(), loss("loss_learned"), 1e-4);
  // The runtime sums in another order: an input of a layer that lies at the edge of two codes may get the other one.
  EXPECT_NEAR(evaluated(result), loss("loss_learned"), GetParam().activations ? 3e-3 : 1e-4);
}

// SPECIFICATION C6; of what keeps more than weights from step to step (the other modes: SpecificationC4).
struct QatResumes : QatModes {};
TEST_P(QatResumes, GoesOnBitForBit) {
  const OrderedJson straight = run("straight", 3);
  run("parts", 1);
  const OrderedJson rest = run("parts", 3, /*resume=*/true);
  EXPECT_EQ(rest["loss"], straight["loss"]);
  EXPECT_EQ(rest["qat"], straight["qat"]);
  EXPECT_EQ(rest["val_loss"], straight["val_loss"]);
  EXPECT_EQ(test::read_file(directory / "straight/model/model.safetensors"),
            test::read_file(directory / "parts/model/model.safetensors"));
}

INSTANTIATE_TEST_SUITE_P(All, QatModes, testing::ValuesIn(kModes),
                         [](const auto& item) { return std::string(item.param.name); });

INSTANTIATE_TEST_SUITE_P(All, QatResumes, testing::ValuesIn([] {
                           std::vector<Mode> some;
                           for (const Mode& mode : kModes)
                             for (const char* name : {"Int4Lsq", "Int4Distilled", "StaticLearned", "StaticAverage"})
                               if (std::string_view(mode.name) == name) some.push_back(mode);
                           return some;
                         }()),
                         [](const auto& item) { return std::string(item.param.name); });

}  // namespace
}  // namespace bitwright::train
