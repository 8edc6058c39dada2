#include "bitwright/torch/trainer.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "base/error.hpp"
#include "tests/support.hpp"
#include "train/dataset.hpp"
#include "train/training_checkpoint.hpp"

namespace bitwright {
namespace {

using test::TemporaryDirectory;
using torch::Tensor;
using train::TokenDataset;

constexpr int64_t kVocabulary = 23;

/// Has all that a checkpoint must carry: matrices and a bias, dropout's random numbers, a buffer that changes.
struct Net : torch::nn::Module {
  Net() {
    embedding = register_module("embedding", torch::nn::Embedding(kVocabulary, 12));
    hidden = register_module("hidden", torch::nn::Linear(12, 20));
    dropout = register_module("dropout", torch::nn::Dropout(0.3));
    head = register_module("head", torch::nn::Linear(torch::nn::LinearOptions(20, kVocabulary).bias(false)));
    largest = register_buffer("largest", torch::zeros({}));
  }
  Tensor forward(const Tensor& tokens) {
    const Tensor x = torch::relu(hidden(embedding(tokens)));
    if (is_training()) largest.copy_(torch::maximum(largest, x.detach().abs().max()) * 0.99);
    return head(dropout(x));
  }
  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear hidden{nullptr}, head{nullptr};
  torch::nn::Dropout dropout{nullptr};
  Tensor largest;
};

std::shared_ptr<Net> make_net(uint64_t seed = 1) {
  torch::manual_seed(seed);
  return std::make_shared<Net>();
}
TrainableModel trainable(const std::shared_ptr<Net>& net) {
  return {.module = net, .logits = [net](const Tensor& inputs) { return net->forward(inputs); }};
}

TrainingConfig config_for(const std::filesystem::path& output) {
  TrainingConfig c;
  c.output = output;
  c.max_steps = 10;
  c.batch_size = 3;
  c.gradient_accumulation_steps = 2;
  c.learning_rate = 1e-2;
  c.warmup_steps = 2;
  c.max_grad_norm = 0.5;
  c.eval_every = 4;
  return c;
}

std::vector<int32_t> tokens_of(int64_t count) {
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>(i * i % kVocabulary));
  return tokens;
}
Trainer::Texts texts() {
  return {.training = tokens_of(500), .validation = tokens_of(90), .sequence_length = 8, .vocabulary = kVocabulary};
}

template <class Action>
Error error_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error;
  }
  ADD_FAILURE() << "no error";
  return Error({});
}

/// The loss curve without times.
std::vector<Json> curve(const std::filesystem::path& output) {
  std::vector<Json> lines;
  std::istringstream file(test::read_file(output / "loss.jsonl"));
  for (std::string line; std::getline(file, line);) {
    lines.push_back(Json::parse(line));
    EXPECT_GT(lines.back().at("tokens_per_second").get<double>(), 0);
    lines.back().erase("tokens_per_second");
  }
  return lines;
}

void expect_same(const torch::nn::Module& a, const torch::nn::Module& b) {
  for (const auto& item : a.named_parameters())
    EXPECT_TRUE(torch::equal(item.value(), b.named_parameters()[item.key()])) << item.key();
  for (const auto& item : a.named_buffers())
    EXPECT_TRUE(torch::equal(item.value(), b.named_buffers()[item.key()])) << item.key();
}

TEST(TokenDataset, EveryEpochHasEachWindowOnce) {
  const std::vector<int32_t> tokens = [] {
    std::vector<int32_t> t(103);
    for (size_t i = 0; i < t.size(); ++i) t[i] = static_cast<int32_t>(i);
    return t;
  }();
  const TokenDataset data(tokens, 10, 5);
  ASSERT_EQ(data.windows(), 9);
  std::set<int64_t> offsets;
  for (int64_t epoch = 0; epoch < 12; ++epoch) {
    const Tensor windows = data.batch(epoch * 9, 9);
    std::set<int64_t> starts;
    for (int64_t i = 0; i < 9; ++i) {
      starts.insert(windows[i][0].item<int64_t>());
      for (int64_t t = 0; t < 10; ++t) EXPECT_EQ(windows[i][t].item<int64_t>() + 1, windows[i][t + 1].item<int64_t>());
    }
    ASSERT_EQ(starts.size(), 9u);
    offsets.insert(*starts.begin());
    EXPECT_LT(*starts.begin(), 10);
    EXPECT_EQ(*starts.rbegin() - *starts.begin(), 80);
  }
  EXPECT_GT(offsets.size(), 3u);  // texts are cut at other places each time
}

TEST(TokenDataset, PositionsDependOnSeedAndNumberAlone) {
  const TokenDataset data(tokens_of(200), 7, 3), same(tokens_of(200), 7, 3), other(tokens_of(200), 7, 4);
  const Tensor all = data.batch(0, 60);  // over two ends of epochs
  EXPECT_TRUE(torch::equal(same.batch(31, 20), all.narrow(0, 31, 20)));
  EXPECT_TRUE(torch::equal(data.batch(3, 5), all.narrow(0, 3, 5)));
  EXPECT_FALSE(torch::equal(other.batch(0, 60), all));
  EXPECT_EQ(data.digest(), same.digest());
}

TEST(TokenDataset, RefusesWhatIsNoText) {
  const std::vector<int32_t> tokens = {1, 2, 70000, 3};
  EXPECT_EQ(error_of([&] { TokenDataset(tokens, 4, 0); }).code(), "text-too-short");
  EXPECT_EQ(error_of([&] { TokenDataset(tokens, 2, 0, 100); }).code(), "vocabulary-mismatch");
  EXPECT_EQ(error_of([&] { TokenDataset(std::vector<int32_t>{1, -1, 1}, 2, 0); }).code(), "vocabulary-mismatch");
  EXPECT_EQ(TokenDataset(tokens, 3, 0).batch(0, 1)[0][2].item<int64_t>(), 70000);
  EXPECT_EQ(TokenDataset(tokens, 3, 0).windows(), 1);
}

// Equal to libtorch's own AdamW with clipping, on the mean loss over the whole step.
TEST(SpecificationC, C7_StepIsAdamWOnTheMeanNextTokenCrossEntropy) {
  const TemporaryDirectory directory;
  const auto net = make_net(), reference = make_net();
  net->dropout->options.p(0);
  reference->dropout->options.p(0);
  TrainingConfig c = config_for(directory.path());
  c.schedule = "constant";
  c.warmup_steps = 0;
  Trainer trainer(trainable(net), c);
  std::vector<Tensor> decayed, others;
  for (const auto& item : reference->named_parameters())
    (item.value().dim() == 2 ? decayed : others).push_back(item.value());
  const auto options = [](double decay) {
    return std::make_unique<torch::optim::AdamWOptions>(
        torch::optim::AdamWOptions(1e-2).betas({0.9, 0.95}).eps(1e-8).weight_decay(decay));
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(decayed, options(0.1));
  groups.emplace_back(others, options(0));
  torch::optim::AdamW adamw(groups);
  const TokenDataset data(tokens_of(500), 8, 0);
  for (int64_t step = 0; step < 4; ++step) {
    const Tensor batch = data.batch(step * 7, 7);  // 3 + 3 + 1
    const StepResult result = trainer.training_step(batch);
    adamw.zero_grad();
    const Tensor logits = reference->forward(batch.narrow(1, 0, 8));
    const Tensor loss = torch::nn::functional::cross_entropy(logits.flatten(0, 1), batch.narrow(1, 1, 8).flatten());
    loss.backward();
    EXPECT_NEAR(result.loss, loss.item<double>(), 1e-5);
    EXPECT_NEAR(result.grad_norm, torch::nn::utils::clip_grad_norm_(reference->parameters(), 0.5), 1e-4);
    EXPECT_EQ(result.step, step + 1);
    EXPECT_EQ(result.tokens, 56);
    adamw.step();
  }
  for (const auto& item : net->named_parameters())
    EXPECT_TRUE(torch::allclose(item.value(), reference->named_parameters()[item.key()], 1e-4, 1e-5)) << item.key();
}

TEST(SpecificationC, C7_RunsHaveAnIdAConfigHashAndALossCurve) {
  const TemporaryDirectory directory;
  TrainingConfig c = config_for(directory / "out");
  c.max_steps = 150;
  c.eval_every = 50;
  Trainer trainer(trainable(make_net()), c);
  std::vector<double> observed;
  trainer.after_step([&](const StepResult& step) { observed.push_back(step.loss); });
  const TrainingResult result = trainer.train(texts());
  EXPECT_EQ(result.steps, 150);
  EXPECT_EQ(trainer.step(), 150);
  const std::vector<Json> lines = curve(directory / "out");
  ASSERT_EQ(lines.size(), 150u);
  ASSERT_EQ(observed.size(), 150u);
  for (size_t i = 0; i < 150; ++i) {
    EXPECT_EQ(lines[i]["step"], i + 1);
    EXPECT_EQ(lines[i]["loss"], observed[i]);
    EXPECT_EQ(lines[i]["tokens"], (i + 1) * 48);
    EXPECT_EQ(lines[i].contains("val_loss"), (i + 1) % 50 == 0);
  }
  EXPECT_LT(*result.loss, lines[0]["loss"].get<double>() - 0.5);
  EXPECT_LT(*result.val_loss, lines[49]["val_loss"].get<double>());
  const Json run = Json::parse(test::read_file(directory / "out" / "run.json"));
  EXPECT_EQ(run["run_id"], trainer.run_id());
  EXPECT_EQ(run["config_hash"], c.hash());
  EXPECT_EQ(run["bitwright"], BITWRIGHT_VERSION);
  EXPECT_EQ(run["libtorch"], TORCH_VERSION);
}

// SPECIFICATION C7: evaluation and sampling cadence.
TEST(SpecificationC, C7_EvaluatesAndSamplesAtTheirCadence) {
  const TemporaryDirectory directory;
  TrainingConfig c = config_for(directory / "out");
  c.eval_every = 3;
  c.sample_every = 4;
  c.sample_tokens = 5;
  Trainer::Texts t = texts();
  t.encode = [](const std::string& text) { return std::vector<int32_t>{static_cast<int32_t>(text.size())}; };
  t.decode = [](std::span<const int32_t> ids) {
    std::string text;
    for (const int32_t id : ids) text += static_cast<char>('a' + id);
    return text;
  };
  Trainer(trainable(make_net()), c).train(t);
  std::vector<int64_t> evaluated, sampled;
  for (const Json& line : curve(directory / "out"))
    if (line.contains("val_loss")) evaluated.push_back(line["step"]);
  std::istringstream file(test::read_file(directory / "out" / "samples.jsonl"));
  for (std::string line; std::getline(file, line);) {
    const Json sample = Json::parse(line);
    sampled.push_back(sample["step"]);
    EXPECT_EQ(sample["prompt"], c.sample_prompt);
    EXPECT_EQ(sample["text"].get<std::string>().size(), 5u);
  }
  EXPECT_EQ(evaluated, (std::vector<int64_t>{3, 6, 9, 10}));
  EXPECT_EQ(sampled, (std::vector<int64_t>{4, 8}));
}

TEST(Trainer, WarmsUpThenFollowsACosine) {
  const TemporaryDirectory directory;
  TrainingConfig c = config_for(directory.path());
  c.learning_rate = 1;
  Trainer trainer(trainable(make_net()), c);
  const TokenDataset data(tokens_of(100), 8, 0);
  std::vector<double> rates;
  for (int i = 0; i < 11; ++i) rates.push_back(trainer.training_step(data.batch(i, 1)).lr);
  EXPECT_DOUBLE_EQ(rates[0], 0.5);
  EXPECT_DOUBLE_EQ(rates[1], 1);
  EXPECT_DOUBLE_EQ(rates[2], 1);
  EXPECT_NEAR(rates[6], 0.55, 1e-12);  // half way from 1 to a tenth
  EXPECT_NEAR(rates[10], 0.1, 1e-12);
  EXPECT_GT(rates[8], rates[9]);
}

TEST(Trainer, EvaluatesFullWindowsThatDoNotOverlap) {
  const TemporaryDirectory directory;
  const auto net = make_net();
  Trainer trainer(trainable(net), config_for(directory.path()));
  const std::vector<int32_t> tokens = tokens_of(60);
  const double loss = trainer.evaluate(tokens, 8);
  net->eval();
  double sum = 0;
  for (int64_t begin = 0; begin < 56; ++begin) {  // 7 windows; position i is scored on token i + 1
    const int64_t window = begin / 8 * 8;
    const Tensor inputs = torch::tensor(std::vector<int64_t>(tokens.begin() + window, tokens.begin() + begin + 1));
    const Tensor logits = net->forward(inputs.unsqueeze(0))[0][-1];
    sum -= torch::log_softmax(logits, 0)[tokens[static_cast<size_t>(begin) + 1]].item<double>();
  }
  EXPECT_NEAR(loss, sum / 56, 1e-5);
  EXPECT_EQ(error_of([&] { trainer.evaluate(tokens_of(8), 8); }).code(), "text-too-short");
}

TEST(Trainer, HooksSeeActivationsAndChangeGradients) {
  const TemporaryDirectory directory;
  const auto net = make_net(), unobserved = make_net();
  const TokenDataset data(tokens_of(500), 8, 0);
  TrainingConfig c = config_for(directory.path());
  Trainer trainer(trainable(net), c);
  std::map<std::string, int64_t> seen;
  trainer.observe_activations([&](const std::string& path, const Tensor& input, const Tensor& output) {
    EXPECT_EQ(input.size(-1), path == "hidden" ? 12 : 20);
    EXPECT_EQ(output.size(-1), path == "hidden" ? 20 : kVocabulary);
    EXPECT_FALSE(output.requires_grad());
    seen[path] += input.size(0) * input.size(1);
  });
  trainer.training_step(data.batch(0, 6));
  EXPECT_EQ(seen, (std::map<std::string, int64_t>{{"hidden", 48}, {"head", 48}}));
  Trainer plain(trainable(unobserved), c);
  // The generator was seeded again by the second trainer: both drew the same dropout masks.
  plain.training_step(data.batch(0, 6));
  expect_same(*net, *unobserved);

  std::set<std::string> names;
  trainer.transform_gradients([&](std::map<std::string, Tensor>& gradients) {
    for (auto& [name, gradient] : gradients) {
      names.insert(name);
      gradient.zero_();
    }
  });
  const StepResult result = trainer.training_step(data.batch(6, 6));
  EXPECT_EQ(result.grad_norm, 0);
  EXPECT_EQ(names, (std::set<std::string>{"embedding.weight", "hidden.weight", "hidden.bias", "head.weight"}));
}

TEST(Trainer, StopsAtNaNWithGoodWeights) {
  const TemporaryDirectory directory;
  const auto net = make_net();
  TrainingConfig c = config_for(directory / "out");
  c.checkpoint_every = 2;
  Trainer trainer(trainable(net), c);
  std::vector<Tensor> good;
  trainer.transform_gradients([&](std::map<std::string, Tensor>& gradients) {
    if (trainer.step() != 5) return;
    for (const Tensor& parameter : net->parameters()) good.push_back(parameter.clone());
    gradients.begin()->second.view(-1)[3] = std::nanf("");
  });
  const Error error = error_of([&] { trainer.train(texts()); });
  EXPECT_EQ(error.code(), "not-finite");
  EXPECT_NE(std::string(error.what()).find("step 6: the gradients' norm is NaN or infinite"), std::string::npos);
  EXPECT_NE(std::string(error.what()).find("step-00000004"), std::string::npos) << error.what();
  for (size_t i = 0; i < good.size(); ++i) EXPECT_TRUE(torch::equal(good[i], net->parameters()[i]));
  const auto checkpoints = train::list_checkpoints(directory / "out");
  ASSERT_EQ(checkpoints.size(), 2u);

  const auto resumed = make_net(9);
  Trainer again(trainable(resumed), c);
  EXPECT_TRUE(again.resume());
  EXPECT_EQ(again.step(), 4);
  {
    const torch::NoGradGuard no_gradients;
    resumed->hidden->weight.view(-1)[0] = INFINITY;
  }
  EXPECT_EQ(error_of([&] { again.train(texts()); }).code(), "not-finite");
  EXPECT_EQ(error_of([&] { again.save_checkpoint(directory / "bad"); }).code(), "not-finite");
  EXPECT_FALSE(std::filesystem::exists(directory / "bad"));
}

TEST(Trainer, WrongTokensAreRefused) {
  const TemporaryDirectory directory;
  Trainer trainer(trainable(make_net()), config_for(directory.path()));
  for (const Tensor& tokens : {torch::zeros({4}, torch::kInt64), torch::zeros({2, 1}, torch::kInt64),
                               torch::zeros({2, 5}, torch::kInt32), torch::zeros({0, 5}, torch::kInt64)})
    EXPECT_EQ(error_of([&] { trainer.training_step(tokens); }).code(), "wrong-shape");
  const auto frozen = make_net();
  for (Tensor& parameter : frozen->parameters()) parameter.requires_grad_(false);
  EXPECT_EQ(error_of([&] { Trainer(trainable(frozen), config_for(directory.path())); }).code(), "nothing-to-train");
}

// SPECIFICATION C6: 10 steps are 5, a checkpoint, another process, 5.
TEST(SpecificationC, C6_TrainerStateResumesExactly) {
  const TemporaryDirectory directory;
  const auto straight = make_net(), first = make_net(), second = make_net(77);
  TrainingConfig c = config_for(directory / "straight");
  Trainer(trainable(straight), c).train(texts());

  c.output = directory / "parts";
  c.checkpoint_every = 5;
  {
    Trainer trainer(trainable(first), c);
    trainer.after_step([&](const StepResult& step) {
      if (step.step == 7) throw std::runtime_error("the machine goes down");
    });
    EXPECT_THROW(trainer.train(texts()), std::runtime_error);
  }
  torch::manual_seed(123);
  Trainer trainer(trainable(second), c);
  ASSERT_TRUE(trainer.resume());
  EXPECT_EQ(trainer.step(), 5);
  torch::rand({3});  // what a program does before train() goes on is its own business, but here nothing may
  Trainer again(trainable(second), c);
  ASSERT_TRUE(again.resume());
  const TrainingResult result = again.train(texts());
  EXPECT_EQ(result.steps, 10);
  expect_same(*straight, *second);
  EXPECT_EQ(curve(directory / "straight"), curve(directory / "parts"));
  const auto state = [&](const char* run) {
    return train::read_training_state(train::checkpoint_path(directory / run, 10));
  };
  const auto one = state("straight"), other = state("parts");
  for (const auto& [name, tensor] : one.optimizer) EXPECT_TRUE(torch::equal(tensor, other.optimizer.at(name))) << name;
  EXPECT_EQ(one.facts["windows"], 60);
  EXPECT_EQ(again.run_id(), trainer.run_id());
}

TEST(TrainingCheckpoint, OldOnesAreRemovedAndUnfinishedOnesNotSeen) {
  const TemporaryDirectory directory;
  TrainingConfig c = config_for(directory.path());
  c.checkpoint_every = 2;
  c.keep_checkpoints = 3;
  std::filesystem::create_directories(directory / "checkpoints" / ".step-00000099.partial");
  Trainer(trainable(make_net()), c).train(texts());
  std::vector<std::string> names;
  for (const auto& path : train::list_checkpoints(directory.path())) names.push_back(path.filename());
  EXPECT_EQ(names, (std::vector<std::string>{"step-00000006", "step-00000008", "step-00000010"}));
}

TEST(SpecificationC, C6_DamagedNewerAndForeignCheckpointsAreRefused) {
  const TemporaryDirectory directory;
  TrainingConfig c = config_for(directory / "out");
  c.max_steps = 2;
  Trainer(trainable(make_net()), c).train(texts());
  const std::filesystem::path good = train::checkpoint_path(directory / "out", 2), bad = directory / "bad";
  Trainer trainer(trainable(make_net()), c);
  const auto load_with = [&](const std::string& file, const std::function<std::string(std::string)>& change) {
    std::filesystem::remove_all(bad);
    std::filesystem::copy(good, bad);
    test::write_file(bad / file, change(test::read_file(bad / file)));
    return error_of([&] { trainer.load_checkpoint(bad); });
  };
  const auto cut = [](std::string bytes) { return bytes.substr(0, bytes.size() - 3); };
  const auto flip = [](std::string bytes) {
    bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
    return bytes;
  };
  const auto replace = [](const std::string& from, const std::string& to) {
    return [=](std::string text) {
      EXPECT_NE(text.find(from), std::string::npos);
      return text.replace(text.find(from), from.size(), to);
    };
  };
  for (const char* file : {"model.safetensors", "trainer.safetensors"}) {
    EXPECT_EQ(load_with(file, cut).code(), "checkpoint-damaged");
    EXPECT_EQ(load_with(file, flip).code(), "checkpoint-damaged");
  }
  EXPECT_EQ(load_with("training.json", cut).code(), "bad-json");
  EXPECT_EQ(load_with("training.json", replace("\"format_version\": 1", "\"format_version\": 2")).code(),
            "newer-checkpoint");
  EXPECT_EQ(load_with("training.json", replace("bitwright-training", "other")).code(), "checkpoint-damaged");
  EXPECT_EQ(load_with("training.json", replace("\"windows\"", "\"window\"")).code(), "checkpoint-damaged");
  const Error seed = load_with("training.json", replace("\"seed\": 0", "\"seed\": 1"));
  EXPECT_EQ(seed.code(), "incompatible-checkpoint");
  EXPECT_NE(std::string(seed.what()).find("seed was 1, now it is 0"), std::string::npos) << seed.what();
  std::filesystem::remove(bad / "model.safetensors");
  EXPECT_EQ(error_of([&] { trainer.load_checkpoint(bad); }).code(), "checkpoint-damaged");
  EXPECT_EQ(error_of([&] { trainer.load_checkpoint(directory / "none"); }).code(), "no-checkpoint");
  EXPECT_EQ(trainer.step(), 0);

  const auto other = make_net();
  other->register_parameter("more", torch::zeros({2}));
  Trainer wider(trainable(other), c);
  const Error error = error_of([&] { wider.load_checkpoint(good); });
  EXPECT_EQ(error.code(), "incompatible-checkpoint");
  EXPECT_NE(std::string(error.what()).find("it has no tensor 'more'"), std::string::npos);
  trainer.load_checkpoint(good);
  auto other_text = texts();
  other_text.training[7] ^= 1;
  c.max_steps = 4;
  Trainer longer(trainable(make_net()), c);
  longer.load_checkpoint(good);
  EXPECT_EQ(error_of([&] { longer.train(other_text); }).code(), "incompatible-checkpoint");
  EXPECT_EQ(longer.train(texts()).steps, 4);
}

// Makes tests/training/format-N for a new format (--gtest_also_run_disabled_tests).
TEST(TrainingCheckpoint, DISABLED_WritesThisFormat) {
  const TemporaryDirectory directory;
  TrainingConfig c = config_for(directory / "out");
  Trainer trainer(trainable(make_net()), c);
  trainer.after_step([&](const StepResult& step) {
    if (step.step == 2) trainer.save_checkpoint(fmt::format("tests/training/format-{}", train::kTrainingFormat));
  });
  trainer.train(texts());
}

// tests/training/format-N: checkpoints that earlier versions wrote, of this file's Net after 2 steps.
TEST(SpecificationC, C6_OldFormatsAreRead) {
  for (int64_t format = 1; format <= train::kTrainingFormat; ++format) {
    const std::filesystem::path old = fmt::format("tests/training/format-{}", format);
    const TemporaryDirectory directory;
    TrainingConfig c = config_for(directory / "out");
    const auto net = make_net(5);
    Trainer trainer(trainable(net), c);
    trainer.load_checkpoint(old);
    EXPECT_EQ(trainer.step(), 2);
    EXPECT_EQ(train::read_training_state(old).facts["format_version"], format);
    EXPECT_EQ(trainer.train(texts()).steps, 10);
  }
}

}  // namespace
}  // namespace bitwright
