#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include "base/error.hpp"
#include "bitwright/torch/finetuning.hpp"
#include "bitwright/torch/trainer.hpp"
#include "recipe/recipe.hpp"
#include "tests/support.hpp"
#include "train/adamw.hpp"
#include "train/data_parallel.hpp"
#include "train/quantized_linear.hpp"
#include "train/training_run.hpp"

extern char** environ;

namespace bitwright::train {
namespace {

using std::chrono::steady_clock;
using torch::Tensor;

// ---- Where a process stands ----

using Variables = std::map<std::string, std::string>;

ProcessPlace place_of(const Variables& variables) {
  return place_from_environment([&](const char* name) {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

TEST(ProcessPlace, OneProcessIsAlone) {
  EXPECT_EQ(place_of({}).size, 1);
  EXPECT_EQ(place_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}}).size, 1);
  // A batch script of Slurm that runs the program without srun.
  EXPECT_EQ(place_of({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "8"}, {"SLURM_JOB_ID", "7"}}).size, 1);
}

TEST(ProcessPlace, Torchrun) {
  const ProcessPlace place = place_of({{"RANK", "3"},
                                       {"WORLD_SIZE", "4"},
                                       {"LOCAL_RANK", "1"},
                                       {"LOCAL_WORLD_SIZE", "2"},
                                       {"MASTER_ADDR", "10.0.0.1"},
                                       {"MASTER_PORT", "1234"}});
  EXPECT_EQ(place.rank, 3);
  EXPECT_EQ(place.size, 4);
  EXPECT_EQ(place.local_rank, 1);
  EXPECT_EQ(place.local_size, 2);
  EXPECT_EQ(place.address, "10.0.0.1");
  EXPECT_EQ(place.port, 1234);
}

TEST(ProcessPlace, Mpirun) {
  Variables open = {{"OMPI_COMM_WORLD_RANK", "1"},
                    {"OMPI_COMM_WORLD_SIZE", "2"},
                    {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                    {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                    {"PMIX_NAMESPACE", "1742405633"},
                    {"SLURM_STEP_ID", "0"},
                    {"SLURM_PROCID", "0"},
                    {"SLURM_NTASKS", "1"}};
  const ProcessPlace place = place_of(open);  // inside of a Slurm job, whose variables are mpirun's own process's
  EXPECT_EQ(place.rank, 1);
  EXPECT_EQ(place.size, 2);
  EXPECT_EQ(place.address, "127.0.0.1");
  open["PMIX_NAMESPACE"] = "1742405634";
  EXPECT_NE(place_of(open).port, place.port);  // two jobs do not meet
  const ProcessPlace mpich =
      place_of({{"PMI_RANK", "0"}, {"PMI_SIZE", "3"}, {"MPI_LOCALRANKID", "0"}, {"MPI_LOCALNRANKS", "3"}});
  EXPECT_EQ(mpich.size, 3);
  EXPECT_EQ(mpich.address, "127.0.0.1");
}

TEST(ProcessPlace, Slurm) {
  const ProcessPlace place = place_of({{"SLURM_PROCID", "5"},
                                       {"SLURM_NTASKS", "8"},
                                       {"SLURM_LOCALID", "1"},
                                       {"SLURM_STEP_ID", "0"},
                                       {"SLURM_STEP_NUM_NODES", "2"},
                                       {"SLURM_NODELIST", "gpu[07-08]"},
                                       {"SLURM_JOB_ID", "4242"}});
  EXPECT_EQ(place.rank, 5);
  EXPECT_EQ(place.size, 8);
  EXPECT_EQ(place.local_rank, 1);
  EXPECT_EQ(place.address, "gpu07");
  EXPECT_GE(place.port, 61000);
  EXPECT_LE(place.port, 65535);
  EXPECT_EQ(first_slurm_node("login"), "login");
  EXPECT_EQ(first_slurm_node("a,b"), "a");
  EXPECT_EQ(first_slurm_node("gpu[3,5-7],cpu1"), "gpu3");
  EXPECT_EQ(first_slurm_node("rack[1-2]-eth0,x"), "rack1-eth0");
}

TEST(ProcessPlace, HalfSetIsRefused) {
  const auto why = [](const Variables& variables) -> std::string {
    try {
      place_of(variables);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), "processes-environment");
      EXPECT_EQ(error.status(), ExitStatus::usage);
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
      return error.report().why;
    }
    return "accepted";
  };
  EXPECT_EQ(why({{"RANK", "0"}}), "RANK is set, but WORLD_SIZE is not");
  EXPECT_EQ(why({{"WORLD_SIZE", "2"}}), "WORLD_SIZE is set, but RANK is not");
  EXPECT_EQ(why({{"RANK", "0"}, {"WORLD_SIZE", "2"}}), "RANK is set, but MASTER_ADDR is not");
  EXPECT_EQ(why({{"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "x"}}), "RANK is set, but MASTER_PORT is not");
  EXPECT_EQ(why({{"RANK", "2"}, {"WORLD_SIZE", "2"}}), "rank 2 of 2 processes: ranks count from 0");
  EXPECT_EQ(why({{"RANK", "one"}, {"WORLD_SIZE", "2"}}), "'one' is not a number from 0 to 1048576");
  EXPECT_EQ(why({{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "2"}}),
            "mpirun does not say where rank 0 runs, and MASTER_ADDR is not set");
}

TEST(ProcessGroup, NobodyElseComes) {
  try {
    ProcessGroup::join({.rank = 1, .size = 2, .local_size = 2, .address = "127.0.0.1", .port = 1},
                       {.join = std::chrono::seconds(1)});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), "processes-join");
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
  }
}

// ---- What several processes do: this program again, with BITWRIGHT_TEST_WORKER in its environment ----

int free_port() {
  const int handle = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  EXPECT_EQ(bind(handle, reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(handle, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(handle);
  return ntohs(address.sin_port);
}

class Processes {
 public:
  Processes(const std::string& work, int size, std::filesystem::path folder) : folder_(std::move(folder)) {
    std::filesystem::create_directories(folder_);
    const int port = free_port();
    for (int rank = 0; rank < size; ++rank) start(work, rank, size, port);
  }
  ~Processes() {
    for (const pid_t process : running_)
      if (process != 0) {
        kill(process, SIGKILL);
        waitpid(process, nullptr, 0);
      }
  }
  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  void kill_rank(size_t rank) const { kill(running_.at(rank), SIGKILL); }
  /// The exit status, or -signal.
  int wait(size_t rank) {
    int status = 0;
    EXPECT_EQ(waitpid(running_.at(rank), &status, 0), running_.at(rank));
    running_.at(rank) = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  std::string output(size_t rank) const {
    std::ifstream in(folder_ / std::to_string(rank));
    return {std::istreambuf_iterator<char>(in), {}};
  }

 private:
  void start(const std::string& work, int rank, int size, int port) {
    std::vector<std::string> variables = {"BITWRIGHT_TEST_WORKER=" + work,
                                          "BITWRIGHT_TEST_FOLDER=" + folder_.string(),
                                          "RANK=" + std::to_string(rank),
                                          "WORLD_SIZE=" + std::to_string(size),
                                          "MASTER_ADDR=127.0.0.1",
                                          "MASTER_PORT=" + std::to_string(port),
                                          "OMP_NUM_THREADS=1"};
    for (char** variable = environ; *variable != nullptr; ++variable) variables.emplace_back(*variable);
    std::vector<std::string> words = {"worker", "--gtest_also_run_disabled_tests",
                                      "--gtest_filter=ProcessesWorker.DISABLED_Works", "--gtest_catch_exceptions=0"};
    std::vector<char*> arguments, environment;
    for (std::string& word : words) arguments.push_back(word.data());
    for (std::string& variable : variables) environment.push_back(variable.data());
    arguments.push_back(nullptr);
    environment.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    const std::string to = (folder_ / std::to_string(rank)).string();
    posix_spawn_file_actions_addopen(&actions, 1, to.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t process = 0;
    EXPECT_EQ(posix_spawn(&process, "/proc/self/exe", &actions, nullptr, arguments.data(), environment.data()), 0);
    posix_spawn_file_actions_destroy(&actions);
    running_.push_back(process);
  }

  std::filesystem::path folder_;
  std::vector<pid_t> running_;
};

std::filesystem::path scratch(const std::string& name) {
  const auto folder = std::filesystem::temp_directory_path() / fmt::format("bitwright-{}-{}", name, getpid());
  std::filesystem::remove_all(folder);
  return folder;
}

void expect_success(const std::string& work, int size) {
  const auto folder = scratch(work);
  Processes processes(work, size, folder);
  for (size_t rank = 0; rank < static_cast<size_t>(size); ++rank)
    EXPECT_EQ(processes.wait(rank), 0) << processes.output(rank);
  std::filesystem::remove_all(folder);
}

// ---- Operations ----

void operations(const std::shared_ptr<ProcessGroup>& group) {
  const int rank = group->rank(), size = group->size();
  for (const torch::ScalarType type : {torch::kFloat, torch::kDouble, torch::kBFloat16, torch::kLong, torch::kUInt8}) {
    const Tensor mine = torch::full({5, 2}, rank + 1, type);
    group->all_reduce(mine);
    EXPECT_TRUE(mine.eq(size * (size + 1) / 2).all().item<bool>()) << mine;
    const Tensor of_last = torch::full({3}, rank, type);
    group->broadcast(of_last, size - 1);
    EXPECT_TRUE(of_last.eq(size - 1).all().item<bool>());
    const Tensor whole = torch::empty({4 * size}, type);
    group->all_gather(torch::full({4}, rank, type), whole);
    EXPECT_TRUE(whole.view({size, 4}).select(1, 3).eq(torch::arange(size)).all().item<bool>());
    const Tensor part = torch::empty({4}, type);
    group->reduce_scatter(whole, part);
    EXPECT_TRUE(part.eq(rank * size).all().item<bool>());
  }
  // The sum is taken in the order of ranks: (0 + 1e8) + ... drops what another order would keep.
  const float values[] = {1.0F, 1e8F, -1e8F};
  const Tensor order = torch::full({1}, values[rank % 3]);
  group->all_reduce(order);
  float expected = values[0];
  for (int other = 1; other < size; ++other) expected += values[other % 3];
  EXPECT_EQ(order.item<float>(), expected);
  EXPECT_EQ(group->broadcast_text(rank == 0 ? "run 7" : "mine"), "run 7");
  group->barrier();
  const Rows rows = rows_of(*group, 4 * size);
  EXPECT_EQ(rows.first, 4 * rank);
  EXPECT_THROW(rows_of(*group, 4 * size + 1), Error);
}

// ---- A network whose layers are computed again in backward() ----

constexpr int64_t kWidth = 32, kWords = 40, kLayers = 3;

struct Block : torch::nn::Module {
  Block() {
    up = register_module("up", torch::nn::Linear(kWidth, 4 * kWidth));
    down = register_module("down", torch::nn::Linear(4 * kWidth, kWidth));
  }
  Tensor forward(const Tensor& x) { return x + down(torch::gelu(up(torch::layer_norm(x, {kWidth})))); }
  torch::nn::Linear up{nullptr}, down{nullptr};
};

struct Use : torch::CustomClassHolder {
  std::shared_ptr<Block> block;
  ParallelModel* parallel = nullptr;
  size_t unit = 0;
};

struct Recomputed : torch::autograd::Function<Recomputed> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x,
                        const c10::intrusive_ptr<Use>& use) {
    context->save_for_backward({x});
    context->saved_data["use"] = torch::IValue::make_capsule(use);
    use->parallel->before(use->unit);
    const Tensor y = use->block->forward(x);
    use->parallel->after(use->unit);
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto capsule = context->saved_data["use"].toCapsule();
    auto& use = static_cast<Use&>(*capsule);
    const Tensor x = context->get_saved_variables()[0].detach().requires_grad_();
    use.parallel->before(use.unit);
    {
      const at::AutoGradMode recorded(true);
      torch::autograd::backward({use.block->forward(x)}, {gradients[0]});
    }
    use.parallel->after_backward(use.unit);
    return {x.grad(), Tensor()};
  }
};

struct Network : torch::nn::Module {
  explicit Network(uint64_t seed) {
    torch::manual_seed(seed);
    words = register_module("words", torch::nn::Embedding(kWords, kWidth));
    for (int64_t i = 0; i < kLayers; ++i)
      blocks.push_back(register_module(fmt::format("block{}", i), std::make_shared<Block>()));
    head = register_module("head", torch::nn::Linear(kWidth, kWords));
  }
  Tensor loss(ParallelModel& parallel, const Tensor& tokens) {
    Tensor x = words(tokens.narrow(1, 0, tokens.size(1) - 1));
    for (size_t i = 0; i < blocks.size(); ++i) {
      const auto use = c10::make_intrusive<Use>();
      use->block = blocks[i];
      use->parallel = &parallel;
      use->unit = i;
      x = Recomputed::apply(x, use);
    }
    return torch::nn::functional::cross_entropy(head(x).flatten(0, 1),
                                                tokens.narrow(1, 1, tokens.size(1) - 1).flatten());
  }
  static std::vector<std::string> units() { return {"block0", "block1", "block2"}; }
  int64_t bytes() const {
    int64_t sum = 0;
    for (const Tensor& p : parameters()) sum += static_cast<int64_t>(p.storage().nbytes());
    return sum;
  }

  torch::nn::Embedding words{nullptr};
  std::vector<std::shared_ptr<Block>> blocks;
  torch::nn::Linear head{nullptr};
};

constexpr int64_t kBatch = 12, kLength = 9;  // 12: for two, three and four processes

/// The sequences of a step, which every process can name.
Tensor sequences(int64_t step) {
  std::mt19937_64 random(static_cast<uint64_t>(step));
  const Tensor tokens = torch::empty({kBatch, kLength}, torch::kLong);
  auto* const data = tokens.data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens.numel(); ++i)
    data[i] = i % kLength == 0 ? static_cast<int64_t>(random() % kWords) : (data[i - 1] * 7 + 3) % kWords;
  return tokens;
}

/// One step on the global batch, in `micro` pieces. Returns the mean loss of all processes.
double step(Network& network, ParallelModel& parallel, AdamW& optimizer, int64_t number, int64_t micro = 1) {
  const Rows rows = rows_of(parallel.group(), kBatch);
  const Tensor mine = sequences(number).narrow(0, rows.first, rows.count);
  optimizer.zero_grad();
  const Tensor sum = torch::zeros({1}, torch::kDouble);
  for (const Tensor& piece : mine.chunk(micro)) {
    const Tensor loss = network.loss(parallel, piece) / micro;
    loss.backward();
    sum.add_(loss.detach());
  }
  parallel.finish_gradients();
  const double norm = parallel.gradient_norm();
  optimizer.step(norm > 1 ? 1 / norm : 1);  // clipping is part of what must agree
  parallel.after_step();
  parallel.group().all_reduce(sum);
  return sum.item<double>() / parallel.group().size();
}

struct Trial {
  explicit Trial(const std::shared_ptr<ProcessGroup>& group, Sharding sharding, uint64_t seed = 1)
      : network(std::make_shared<Network>(seed)), parallel(group, network, sharding, Network::units()) {
    for (const bool matrices : {true, false}) {
      std::vector<Tensor> parameters;
      for (const Trained& trained : parallel.trained())
        if ((trained.treatment == Treatment::matrix) == matrices) parameters.push_back(trained.tensor);
      optimizer.add_group(parameters, {.lr = 3e-3, .weight_decay = matrices ? 0.1 : 0});
    }
  }
  std::shared_ptr<Network> network;
  ParallelModel parallel;
  AdamW optimizer;
};

std::shared_ptr<ProcessGroup> alone() { return ProcessGroup::join({}); }

/// 50 steps of several processes against one with all their sequences.
void curves(const std::shared_ptr<ProcessGroup>& group) {
  Trial whole(alone(), Sharding::none);
  // Another seed: what rank 0 begins with is what counts.
  Trial copies(group, Sharding::none, static_cast<uint64_t>(1 + group->rank()));
  Trial shards(group, Sharding::parameters, static_cast<uint64_t>(1 + group->rank()));
  double worst = 0, first = 0, last = 0;
  for (int64_t i = 0; i < 50; ++i) {
    const double expected = step(*whole.network, whole.parallel, whole.optimizer, i);
    const double copied = step(*copies.network, copies.parallel, copies.optimizer, i);
    const double sharded = step(*shards.network, shards.parallel, shards.optimizer, i, 2);
    worst = std::max({worst, std::abs(copied / expected - 1), std::abs(sharded / expected - 1)});
    if (i == 0) first = expected;
    last = expected;
  }
  std::cout << "loss " << first << " to " << last << ", relative difference at most " << worst << '\n';
  EXPECT_LE(worst, 1e-5);
  EXPECT_LT(last, 0.7 * first);
}

/// What a process holds between steps, and that a layer is whole only while it is used.
void memory(const std::shared_ptr<ProcessGroup>& group) {
  Trial whole(alone(), Sharding::none), shards(group, Sharding::parameters);
  int64_t of_optimizer = 0, of_whole = 0;
  for (auto* const trial : {&whole, &shards}) step(*trial->network, trial->parallel, trial->optimizer, 0);
  for (const Trained& t : shards.parallel.trained()) of_optimizer += t.tensor.numel();
  for (const Trained& t : whole.parallel.trained()) of_whole += t.tensor.numel();
  // Half of it, but for padding.
  EXPECT_LE(of_optimizer * group->size(), of_whole * 103 / 100);
  Block& block = *shards.network->blocks[1];
  const auto bytes = [&] { return block.up->weight.storage().nbytes(); };
  EXPECT_EQ(bytes(), 0U);
  shards.parallel.before(1);
  EXPECT_EQ(bytes(), sizeof(float) * 4 * kWidth * kWidth);
  EXPECT_EQ(shards.network->blocks[2]->up->weight.storage().nbytes(), 0U);
  shards.parallel.after(1);
  EXPECT_EQ(bytes(), 0U);
  shards.parallel.join_on_first();
  EXPECT_EQ(bytes(), group->rank() == 0 ? sizeof(float) * 4 * kWidth * kWidth : 0U);
  if (group->rank() == 0) {
    EXPECT_TRUE(torch::allclose(block.up->weight, whole.network->blocks[1]->up->weight, 1e-4, 1e-5));
    EXPECT_TRUE(torch::allclose(shards.network->head->weight, whole.network->head->weight, 1e-4, 1e-5));
  }
}

void quantize_blocks(Network& network) {
  for (const auto& block : network.blocks) {
    const Tensor weight = block->up->weight.detach().clone();
    const Shape shape = weight.sizes().vec();
    const TensorFacts facts = {
        .name = "model.layers.0.mlp.up_proj.weight", .shape = shape, .bytes = 4, .dtype = DType::f32};
    QuantizationRequest request;
    request.settings.method = "nf4";
    const Recipe recipe = resolve(request, std::span(&facts, 1), find_container("bitsandbytes"));
    const TensorPlan& plan = recipe.tensors.at(0);
    const std::span<const float> values(weight.data_ptr<float>(), static_cast<size_t>(weight.numel()));
    QuantizedTensor codes =
        plan.algorithm->quantize(plan.scheme.value(), shape, {DType::f32, std::as_bytes(values)}, plan.options);
    attach_quantized(*block->up, std::make_shared<QuantizedLinearBehaviour>(std::move(codes)));
  }
}

/// Frozen layers in nf4 whose codes are split, beside others that learn.
void quantized_base(const std::shared_ptr<ProcessGroup>& group) {
  Trial whole(alone(), Sharding::none);
  quantize_blocks(*whole.network);
  ParallelModel reference(alone(), whole.network);
  const auto network = std::make_shared<Network>(1);
  quantize_blocks(*network);
  const auto base = behaviour_as<QuantizedLinearBehaviour>(*network->blocks[0]->up);
  const uint64_t before = base->bytes();
  ParallelModel shards(group, network, Sharding::parameters, Network::units());
  const uint64_t codes = 4 * kWidth * kWidth / 2;
  EXPECT_EQ(base->bytes(), before - codes);
  AdamW optimizer, expected_optimizer;
  const auto trained = [](const ParallelModel& model) {
    std::vector<Tensor> out;
    for (const Trained& t : model.trained()) out.push_back(t.tensor);
    return out;
  };
  optimizer.add_group(trained(shards), {});
  expected_optimizer.add_group(trained(reference), {});
  for (int64_t i = 0; i < 5; ++i) {
    const double expected = step(*whole.network, reference, expected_optimizer, i);
    EXPECT_NEAR(step(*network, shards, optimizer, i) / expected, 1, 1e-5);
  }
  EXPECT_EQ(base->bytes(), before - codes);
  shards.join_on_first();
  if (group->rank() != 0) return;
  EXPECT_EQ(base->bytes(), before);
  EXPECT_TRUE(base->decoded().equal(behaviour_as<QuantizedLinearBehaviour>(*whole.network->blocks[0]->up)->decoded()));
  EXPECT_TRUE(parameter_of(*network->blocks[0]->up).equal(parameter_of(*whole.network->blocks[0]->up)));
}

// ---- A run that goes on from its checkpoint, on any number of processes ----

constexpr int64_t kSteps = 40, kEvery = 5;

ParallelModel::States states(Trial& trial) {
  ParallelModel::States out;
  for (const Trained& trained : trial.parallel.trained())
    for (const AdamW::Parameter& p : trial.optimizer.parameters())
      if (p.weight.is_same(trained.tensor)) {
        out["weight." + trained.name] = p.weight;
        out["m." + trained.name] = p.m;
        out["v." + trained.name] = p.v;
      }
  return out;
}

/// Whole tensors by name, as every number of processes can read them.
void save(Trial& trial, int64_t steps, const std::filesystem::path& path) {
  torch::serialize::OutputArchive archive;
  archive.write("steps", torch::tensor(steps));
  for (const auto& [name, tensor] : trial.parallel.whole(states(trial), trial.parallel.group().rank() == 0))
    archive.write(name, tensor.clone());
  if (trial.parallel.group().rank() != 0) return;
  archive.save_to(path.string() + ".partial");
  std::filesystem::rename(path.string() + ".partial", path);
}

int64_t load(Trial& trial, const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return 0;
  torch::serialize::InputArchive archive;
  archive.load_from(path.string());
  ParallelModel::States whole;
  for (const std::string& name : archive.keys()) archive.read(name, whole[name]);
  trial.parallel.take(whole, states(trial));
  trial.parallel.after_step();  // what is whole everywhere
  const auto steps = whole.at("steps").item<int64_t>();
  for (AdamW::Parameter& p : trial.optimizer.parameters()) p.step = steps;
  return steps;
}

/// Appends a line "STEP LOSS" for each step to FOLDER/log.
void run(const std::shared_ptr<ProcessGroup>& group, Sharding sharding, const std::filesystem::path& folder,
         std::chrono::milliseconds pause) {
  Trial trial(group, sharding);
  std::ofstream log;
  if (group->rank() == 0) log.open(folder / "log", std::ios::app);
  for (int64_t i = load(trial, folder / "checkpoint"); i < kSteps; ++i) {
    const double loss = step(*trial.network, trial.parallel, trial.optimizer, i);
    log << fmt::format("{} {:.9g}\n", i, loss) << std::flush;
    if ((i + 1) % kEvery == 0) save(trial, i + 1, folder / "checkpoint");
    std::this_thread::sleep_for(pause);
  }
}

std::vector<std::pair<int64_t, double>> read_log(const std::filesystem::path& folder) {
  std::ifstream in(folder / "log");
  std::vector<std::pair<int64_t, double>> out;
  for (std::pair<int64_t, double> line; in >> line.first >> line.second;) out.push_back(line);
  return out;
}

// ---- What learns in other ways than floats ----

/// Gradients that are used up in backward() cannot be averaged.
void update_in_backward(const std::shared_ptr<ProcessGroup>& group) {
  const auto network = std::make_shared<Network>(1);
  const auto tuning = enable_quantized_finetuning(*network, {.update_in_backward = true});
  const auto parallel = std::make_shared<ParallelModel>(group, network);
  TrainingConfig config;
  config.max_grad_norm = 0;
  const TrainableModel model = {.module = network, .logits = [](const Tensor& tokens) { return tokens; }};
  try {
    Trainer(model, config, tuning, parallel);
    ADD_FAILURE() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("update_in_backward: 2 processes average gradients"), std::string::npos)
        << error.what();
  }
  group->barrier();
}

/// A configuration of `bitwright train` in a folder of its own.
void write_config(const std::filesystem::path& folder, const std::string& how) {
  std::filesystem::create_directories(folder);
  const std::string text = test::read_file(test::example_model() / "tinystories_valid.txt").substr(0, 12000);
  test::write_file(folder / "text", text);
  test::write_file(folder / "config.yaml", fmt::format(R"(
architecture: {{architectures: [LlamaForCausalLM], model_type: llama, hidden_size: 64, intermediate_size: 128,
  num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, vocab_size: 4096, max_position_embeddings: 64,
  rms_norm_eps: 1.0e-5, hidden_act: silu, tie_word_embeddings: true}}
tokenizer: {}
data: {{text: {}, sequence_length: 16}}
max_steps: 6
batch_size: 4
learning_rate: 1.0e-3
eval_windows: 4
output: {}
{}
)",
                                                       test::example_model().string(), (folder / "text").string(),
                                                       (folder / "out").string(), how));
}

struct Curve {
  std::vector<double> losses;
  double validation = 0;
};
Curve curve_of(const std::filesystem::path& folder) {
  Curve curve;
  std::istringstream file(test::read_file(folder / "out" / "loss.jsonl"));
  for (std::string line; std::getline(file, line);) {
    const Json json = Json::parse(line);
    curve.losses.push_back(json["loss"]);
    curve.validation = json.value("val_loss", 0.0);
  }
  return curve;
}

/// Two processes learn what one does, each way of dividing the model.
void expect_same_learning(const std::string& name, const std::string& how, const std::string& made) {
  const auto alone = scratch(name + "-alone");
  write_config(alone, how);
  std::vector<Warning> warnings;
  run_training({.config = alone / "config.yaml"}, warnings);
  const Curve expected = curve_of(alone);
  ASSERT_EQ(expected.losses.size(), 6U);
  for (const char* sharding : {"none", "parameters"}) {
    SCOPED_TRACE(sharding);
    const auto folder = scratch(name + "-" + sharding);
    write_config(folder, how + fmt::format("sharding: {}\n", sharding));
    Processes processes("run", 2, folder);
    for (size_t rank = 0; rank < 2; ++rank) ASSERT_EQ(processes.wait(rank), 0) << processes.output(rank);
    const Curve curve = curve_of(folder);
    ASSERT_EQ(curve.losses.size(), 6U);
    for (size_t i = 0; i < 6; ++i) EXPECT_NEAR(curve.losses[i], expected.losses[i], 2e-4 * expected.losses[i]) << i;
    EXPECT_NEAR(curve.validation, expected.validation, 1e-3 * expected.validation);
    EXPECT_TRUE(std::filesystem::exists(folder / "out" / made));
    std::filesystem::remove_all(folder);
  }
  std::filesystem::remove_all(alone);
}

TEST(ProcessesLearning, Qat) {
  expect_same_learning("qat", "quantization_mode: qat\nquantization: {method: int8, weight_only: true}\n",
                       "model/model.safetensors");
}
TEST(ProcessesLearning, Lora) { expect_same_learning("lora", "lora: {r: 4}\n", "adapter/adapter_model.safetensors"); }
TEST(ProcessesLearning, Qlora) {
  expect_same_learning("qlora", "quantization: {method: nf4}\nlora: {r: 4, merge: requantize}\n",
                       "model/model.safetensors");
}
TEST(ProcessesLearning, UpdatesInBackwardAreRefused) { expect_success("update_in_backward", 2); }

TEST(ProcessesWorker, DISABLED_Works) {
  const char* const work = std::getenv("BITWRIGHT_TEST_WORKER");
  if (work == nullptr) GTEST_SKIP() << "started by the tests of several processes";
  const std::string name = work;
  const std::filesystem::path folder = std::getenv("BITWRIGHT_TEST_FOLDER");
  if (name == "run") {  // which joins the others itself
    std::vector<Warning> warnings;
    run_training({.config = folder / "config.yaml"}, warnings);
    return;
  }
  const auto group = ProcessGroup::join(place_from_environment(), {.join = std::chrono::seconds(120)});
  if (name == "operations") return operations(group);
  if (name == "update_in_backward") return update_in_backward(group);
  if (name == "training") {
    curves(group);
    memory(group);
    return quantized_base(group);
  }
  try {
    group->barrier();
    if (name == "error" && group->rank() == 1) {
      group->leave("loss is not a number");
      std::exit(3);
    }
    if (name == "error") group->barrier();
    run(group, name == "copies" ? Sharding::none : Sharding::parameters, folder, std::chrono::milliseconds(10));
  } catch (const Error& error) {
    ADD_FAILURE() << error.what();  // and so the exit status is 1
  }
}

TEST(Processes, OperationsOfThree) { expect_success("operations", 3); }
TEST(Processes, SameCurveAsOneWithAllSequences) { expect_success("training", 2); }

TEST(Processes, ErrorOfOneIsToldByTheOthers) {
  const auto folder = scratch("error");
  Processes processes("error", 2, folder);
  EXPECT_EQ(processes.wait(1), 3) << processes.output(1);
  EXPECT_EQ(processes.wait(0), 1) << processes.output(0);
  EXPECT_NE(processes.output(0).find("rank 1 stopped: loss is not a number"), std::string::npos) << processes.output(0);
  std::filesystem::remove_all(folder);
}

/// BITWRIGHT_KILLS: how often (default 1); tests/train_processes_test.sh asks for more.
TEST(Processes, KilledOneEndsAllAndTheRunGoesOn) {
  const char* const asked = std::getenv("BITWRIGHT_KILLS");
  const int kills = asked == nullptr ? 1 : std::stoi(asked);
  const auto reference = scratch("uninterrupted"), folder = scratch("killed");
  std::filesystem::create_directories(reference);
  run(alone(), Sharding::none, reference, {});
  const auto expected = read_log(reference);
  std::mt19937 random(std::random_device{}());
  double slowest = 0;
  for (int round = 0; round < kills; ++round) {
    const size_t size = asked == nullptr ? 2 : std::array{2, 3, 4}[random() % 3], victim = random() % size;
    const size_t lines = read_log(folder).size();
    Processes processes(round % 2 == 0 ? "shards" : "copies", static_cast<int>(size), folder);
    // At a random moment after the next steps, while some are left.
    const size_t more = 2 + random() % 5;
    while (read_log(folder).size() < lines + more) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    processes.kill_rank(victim);
    const auto killed = steady_clock::now();
    EXPECT_EQ(processes.wait(victim), -SIGKILL);
    for (size_t rank = 0; rank < size; ++rank) {
      if (rank == victim) continue;
      EXPECT_EQ(processes.wait(rank), 1);
      EXPECT_NE(processes.output(rank).find(fmt::format("rank {} ended without a word", victim)), std::string::npos)
          << "rank " << rank << " of " << size << ", killed " << victim << ": " << processes.output(rank);
    }
    slowest = std::max(slowest, std::chrono::duration<double>(steady_clock::now() - killed).count());
  }
  EXPECT_LE(slowest, 30);
  run(alone(), Sharding::none, folder, {});  // on one process to the end
  const auto log = read_log(folder);
  int64_t next = 0;
  for (const auto& [number, loss] : log) {
    EXPECT_LE(number, next);
    EXPECT_GT(number + kEvery, next - 1) << "more than the steps since the last checkpoint was lost";
    EXPECT_NEAR(loss / expected.at(static_cast<size_t>(number)).second, 1, 1e-5);
    next = number + 1;
  }
  EXPECT_EQ(next, kSteps);
  std::cout << kills << " killed, the others ended within " << slowest << " s\n";
  for (const auto& f : {reference, folder}) std::filesystem::remove_all(f);
}

}  // namespace
}  // namespace bitwright::train
