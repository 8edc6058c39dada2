#include "train/process_group.hpp"

#include <fmt/format.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif
#include <charconv>
#include <cstdlib>
#include <exception>
#include <thread>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "base/error.hpp"

namespace bitwright::train {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
#if TORCH_VERSION_MAJOR >= 2
using Backend = c10d::Backend;
#else
using Backend = c10d::ProcessGroup;
#endif
using Works = c10::intrusive_ptr<c10d::Work>;

constexpr int kDefaultPort = 29500;  // torchrun's

[[noreturn]] void fail_environment(const std::string& where, const std::string& why) {
  throw Error({.code = "processes-environment",
               .what = "cannot find the other processes",
               .where = where,
               .why = why,
               .fix = "a launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset them all to run alone",
               .status = ExitStatus::usage});
}

/// The variables of one process.
struct Variables {
  const Environment& environment;

  std::optional<std::string> text(const char* name) const {
    const char* const value = environment(name);
    return value == nullptr || *value == '\0' ? std::nullopt : std::optional<std::string>(value);
  }
  std::optional<int> number(const char* name, int least, int most) const {
    const auto value = text(name);
    if (!value) return std::nullopt;
    int result = 0;
    const char* const end = value->data() + value->size();
    const auto [stop, error] = std::from_chars(value->data(), end, result);
    if (error != std::errc() || stop != end || result < least || result > most)
      fail_environment(name, fmt::format("'{}' is not a number from {} to {}", printable(*value), least, most));
    return result;
  }
};

constexpr int kMostProcesses = 1 << 20;

/// The names that a launcher gives to its four numbers; local ones may be missing.
struct Launcher {
  const char* name;
  const char* rank;
  const char* size;
  const char* local_rank;
  const char* local_size;
  const char* needs;  ///< the launcher is not asked unless this is set
  const char* job;    ///< what tells two jobs on one machine apart
};
constexpr Launcher kLaunchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", nullptr, nullptr},
    {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", nullptr, "PMIX_NAMESPACE"},
    // A batch script has SLURM_PROCID too, but is no step.
    {"srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", nullptr, "SLURM_STEP_ID", "SLURM_JOB_ID"},
    {"mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", nullptr, "PMI_ID"},
};

/// Two jobs of one machine should not meet: a port from the job's number, above those that Linux hands out itself.
int port_of_job(const std::string& job) {
  uint32_t hash = 2166136261U;  // FNV-1a: the same in every process
  for (const char c : job) hash = (hash ^ static_cast<uint8_t>(c)) * 16777619U;
  return 61000 + static_cast<int>(hash % 4500);
}

void find_first_rank(const Variables& variables, const Launcher& launcher, ProcessPlace& place) {
  const auto address = variables.text("MASTER_ADDR");
  const auto port = variables.number("MASTER_PORT", 1, 65535);
  const bool named = std::string_view(launcher.name) == "torchrun";
  if (named && !(address && port))
    fail_environment(launcher.rank,
                     fmt::format("{} is set, but {} is not", launcher.rank, address ? "MASTER_PORT" : "MASTER_ADDR"));
  const bool slurm = variables.text("SLURM_STEP_ID").has_value();
  auto nodes = variables.text("SLURM_STEP_NODELIST");
  if (!nodes) nodes = variables.text("SLURM_NODELIST");
  if (address) {
    place.address = *address;
  } else if (place.local_size == place.size) {
    place.address = "127.0.0.1";
  } else if (slurm && nodes) {
    place.address = first_slurm_node(*nodes);
  } else {
    fail_environment("MASTER_ADDR",
                     fmt::format("{} does not say where rank 0 runs, and MASTER_ADDR is not set", launcher.name));
  }
  const auto job = launcher.job == nullptr ? std::nullopt : variables.text(launcher.job);
  place.port = port  ? *port
               : job ? port_of_job(*job + "." + variables.text("SLURM_STEP_ID").value_or(""))
                     : kDefaultPort;
}

}  // namespace

std::string first_slurm_node(const std::string& nodes) {
  const size_t bracket = nodes.find_first_of("[,");
  if (bracket == std::string::npos || nodes[bracket] == ',') return nodes.substr(0, bracket);
  const size_t end = nodes.find_first_of("-,]", bracket);
  const size_t close = nodes.find(']', bracket);
  if (close == std::string::npos) fail_environment("SLURM_NODELIST", fmt::format("'{}' has no ]", printable(nodes)));
  const size_t next = std::min(nodes.find(',', close), nodes.size());  // "rack[1-2]-eth0": what follows the numbers
  return nodes.substr(0, bracket) + nodes.substr(bracket + 1, end - bracket - 1) +
         nodes.substr(close + 1, next - close - 1);
}

ProcessPlace place_from_environment(const Environment& environment) {
  const Variables variables{environment};
  for (const Launcher& launcher : kLaunchers) {
    if (launcher.needs != nullptr && !variables.text(launcher.needs)) continue;
    const auto size = variables.number(launcher.size, 1, kMostProcesses);
    const auto rank = variables.number(launcher.rank, 0, kMostProcesses);
    if (!size && !rank) continue;
    if (!size || !rank)
      fail_environment(size ? launcher.size : launcher.rank,
                       fmt::format("{} is set, but {} is not", size ? launcher.size : launcher.rank,
                                   size ? launcher.rank : launcher.size));
    if (*rank >= *size)
      fail_environment(launcher.rank, fmt::format("rank {} of {} processes: ranks count from 0", *rank, *size));
    ProcessPlace place{.rank = *rank, .size = *size, .launcher = launcher.name};
    place.local_size = 0;
    if (launcher.local_size != nullptr)
      place.local_size = variables.number(launcher.local_size, 1, *size).value_or(0);
    else if (variables.number("SLURM_STEP_NUM_NODES", 1, kMostProcesses) == 1)
      place.local_size = *size;
    place.local_rank = variables.number(launcher.local_rank, 0, *size - 1).value_or(0);
    if (*size == 1) return {.launcher = launcher.name};
    find_first_rank(variables, launcher, place);
    return place;
  }
  return {};
}

ProcessPlace place_from_environment() {
  return place_from_environment([](const char* name) -> const char* { return std::getenv(name); });
}

namespace {

/// libtorch's exceptions bring their stack and many lines.
std::string first_line(const std::exception& error) {
  const auto* const torch_error = dynamic_cast<const c10::Error*>(&error);
  const std::string text = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
  return printable(text.substr(0, text.find('\n')));
}

torch::Tensor bytes_of(const torch::Tensor& tensor) {
  BW_ASSERT(tensor.is_contiguous());
  return tensor.detach().view({-1}).view(torch::kUInt8);
}

}  // namespace

/// What is empty in a group of one.
struct ProcessGroup::Connections {
  ProcessPlace place{};
  GroupTimeouts timeouts{};
  torch::Device device{torch::kCPU};
  c10::intrusive_ptr<c10d::Store> store{};  ///< the words of those that leave
  c10::intrusive_ptr<Backend> backend{};
  bool left = false;

  void open();
  void open_backend();
  void say(const char* kind, int rank, const std::string& text) const {
    store->set(fmt::format("{}/{}", kind, rank), std::vector<uint8_t>(text.begin(), text.end()));
  }
  std::optional<std::string> heard(const char* kind, int rank) const {
    const std::string key = fmt::format("{}/{}", kind, rank);
    if (!store->check({key})) return std::nullopt;
    const auto bytes = store->get(key);
    return std::string(bytes.begin(), bytes.end());
  }
  std::string verdict(const std::string& reason);
  [[noreturn]] void lost(const std::string& operation, const std::string& message);
  template <class Start>
  void run(const std::string& operation, const Start& start);
};

void ProcessGroup::Connections::open() {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(place.port);
  options.isServer = place.rank == 0;
  options.numWorkers = static_cast<size_t>(place.size);
  options.timeout = timeouts.join;
  const std::string where = fmt::format("rank {} of {}", place.rank, place.size);
  try {
    store = c10::make_intrusive<c10d::TCPStore>(place.address, options);
    open_backend();
  } catch (const std::exception& error) {
    throw Error({.code = "processes-join",
                 .what = "the processes did not come together",
                 .where = where,
                 .why = fmt::format("at {}:{}, within {} s: {}", place.address, place.port, timeouts.join.count(),
                                    first_line(error)),
                 .fix = "all must run, with the same MASTER_ADDR and MASTER_PORT, and that port must be free",
                 .resumable = true});
  }
}

void ProcessGroup::Connections::open_backend() {
  const auto inner = c10::make_intrusive<c10d::PrefixStore>("bitwright", store);
#ifdef USE_C10D_NCCL
  if (torch::cuda::is_available()) {
    device = torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(place.local_rank));
    const auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = timeouts.operation;
    backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(inner, place.rank, place.size, options);
    return;
  }
#endif
  const auto options = c10d::ProcessGroupGloo::Options::create(timeouts.operation);
  const char* const interface = std::getenv("GLOO_SOCKET_IFNAME");  // as PyTorch has it
  const bool one_machine =
      place.local_size == place.size || place.address == "localhost" || place.address.starts_with("127.");
  options->devices.push_back(one_machine            ? c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1")
                             : interface != nullptr ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                                                    : c10d::ProcessGroupGloo::createDefaultDevice());
  options->threads = 1;  // operations run in the order of calls
  backend = c10::make_intrusive<c10d::ProcessGroupGloo>(inner, place.rank, place.size, options);
}

/// Leaves this process's reason where the others find it. Returns what can be said of who failed first, which rank 0
/// decides and tells: a reason that somebody gave, else who has gone without a word. Empty: nothing.
std::string ProcessGroup::Connections::verdict(const std::string& reason) {
  constexpr milliseconds kSilence(3000);  // all others fail at once when connections close
  try {
    say("left", place.rank, reason);
    if (place.rank != 0) {
      store->wait({"verdict"}, 3 * kSilence);
      const auto bytes = store->get("verdict");
      store->add("read", 1);
      return {bytes.begin(), bytes.end()};
    }
    std::string found;
    std::vector<int> silent;
    int64_t mute = 0;
    const auto deadline = steady_clock::now() + kSilence;
    for (bool all = false; !all && found.empty() && steady_clock::now() < deadline;) {
      std::this_thread::sleep_for(milliseconds(20));
      silent.clear();
      for (int rank = 0; rank < place.size && found.empty(); ++rank)
        if (const auto said = heard("left", rank); !said) {
          silent.push_back(rank);
        } else if (!said->empty()) {
          found = fmt::format("rank {} stopped: {}", rank, *said);
        }
      all = silent.empty();
    }
    if (found.empty() && !silent.empty()) {
      mute = static_cast<int64_t>(silent.size());
      found = fmt::format("rank {} ended without a word: killed, out of memory, or its machine is gone",
                          fmt::join(silent, ", "));
    }
    store->set("verdict", std::vector<uint8_t>(found.begin(), found.end()));
    // The words are in this process's memory: it goes last. Who leaves by itself does not read them.
    const auto gone = [&] {
      int64_t count = store->add("read", 0);
      for (int rank = 1; rank < place.size; ++rank) count += !heard("left", rank).value_or("").empty();
      return count;
    };
    while (gone() + mute < place.size - 1 && steady_clock::now() < deadline + kSilence)
      std::this_thread::sleep_for(milliseconds(20));
    return found;
  } catch (const std::exception& error) {
    if (first_line(error).find("imeout") != std::string::npos) return "";  // rank 0 is at work and has not noticed yet
    return "rank 0 ended without a word: killed, out of memory, or its machine is gone";
  }
}

void ProcessGroup::Connections::lost(const std::string& operation, const std::string& message) {
  const bool parted = std::exchange(left, true);
  backend.reset();  // closes the connections, which ends what others are waiting for
  std::string why = parted ? "" : verdict("");
  if (why.empty()) why = fmt::format("{}: {}", operation, message);
  throw Error({.code = "process-lost",
               .what = "training cannot go on without all processes",
               .where = fmt::format("rank {} of {}", place.rank, place.size),
               .why = why,
               .fix = "--resume goes on from the last checkpoint, with any number of processes",
               .resumable = true});
}

template <class Start>
void ProcessGroup::Connections::run(const std::string& operation, const Start& start) {
  if (left) lost(operation, "the processes have parted");
  std::string message;
  try {
    const Works works = start(*backend);
    works->wait();
    return;
  } catch (const std::exception& error) {
    message = first_line(error);
  }
  lost(operation, message);
}

ProcessGroup::ProcessGroup(std::unique_ptr<Connections> connections) : connections_(std::move(connections)) {}

std::shared_ptr<ProcessGroup> ProcessGroup::join(const ProcessPlace& place, const GroupTimeouts& timeouts) {
  auto connections = std::make_unique<Connections>();
  connections->place = place;
  connections->timeouts = timeouts;
  if (place.size > 1) connections->open();
  return std::shared_ptr<ProcessGroup>(new ProcessGroup(std::move(connections)));
}

ProcessGroup::~ProcessGroup() {
  if (std::uncaught_exceptions() > 0) leave("an error, see its output");
}

void ProcessGroup::leave(const std::string& reason) noexcept {
  Connections& c = *connections_;
  if (c.left || !c.backend) return;
  c.left = true;
  try {
    c.say("left", c.place.rank, reason);  // before connections close: who then asks finds it
    c.backend.reset();
    if (c.place.rank == 0) c.verdict(reason);
  } catch (const std::exception&) {  // rank 0 has gone already, and with it those who would read this
  }
}

int ProcessGroup::rank() const { return connections_->place.rank; }
int ProcessGroup::size() const { return connections_->place.size; }
torch::Device ProcessGroup::device() const { return connections_->device; }

void ProcessGroup::broadcast(const torch::Tensor& tensor, int root) {
  if (size() == 1 || tensor.numel() == 0) return;
  const torch::Tensor contiguous = tensor.detach().contiguous();
  std::vector<torch::Tensor> tensors{bytes_of(contiguous)};
  c10d::BroadcastOptions options;
  options.rootRank = root;
  connections_->run("broadcast", [&](Backend& backend) { return backend.broadcast(tensors, options); });
  if (!tensor.is_contiguous()) tensor.detach().copy_(contiguous);
}

void ProcessGroup::all_gather(const torch::Tensor& part, const torch::Tensor& whole) {
  BW_ASSERT(whole.numel() == part.numel() * size() && whole.scalar_type() == part.scalar_type());
  if (part.numel() == 0) return;
  torch::Tensor from = bytes_of(part.contiguous()), to = bytes_of(whole);
  if (size() == 1) {
    to.copy_(from);
    return;
  }
  std::vector<std::vector<torch::Tensor>> parts{to.chunk(size())};
  std::vector<torch::Tensor> inputs{from};
  connections_->run("all-gather", [&](Backend& backend) { return backend.allgather(parts, inputs); });
}

void ProcessGroup::reduce_scatter(const torch::Tensor& whole, const torch::Tensor& part) {
  BW_ASSERT(whole.numel() == part.numel() * size() && whole.scalar_type() == part.scalar_type());
  if (part.numel() == 0) return;
  if (size() == 1) {
    part.detach().view({-1}).copy_(whole.detach().view({-1}));
    return;
  }
  // Everyone sends each its part and adds what comes in the order of ranks; Gloo has no reduce-scatter.
  const torch::Tensor contiguous = whole.detach().contiguous(), parts = torch::empty_like(contiguous);
  torch::Tensor from = bytes_of(contiguous), to = bytes_of(parts);
  std::vector<int64_t> equal;
  connections_->run("reduce-scatter", [&](Backend& backend) { return backend.alltoall_base(to, from, equal, equal); });
  const torch::Tensor rows = parts.view({size(), -1});
  const bool narrow = part.scalar_type() == torch::kBFloat16 || part.scalar_type() == torch::kHalf;
  const torch::Tensor sum = narrow ? rows[0].to(torch::kFloat) : rows[0];
  for (int rank = 1; rank < size(); ++rank) sum.add_(rows[rank]);
  part.detach().view({-1}).copy_(sum);
}

void ProcessGroup::all_reduce(const torch::Tensor& tensor) {
  if (size() == 1 || tensor.numel() == 0) return;
  const int64_t n = tensor.numel(), each = (n + size() - 1) / size();
  torch::Tensor flat = torch::zeros({each * size()}, tensor.options().requires_grad(false));
  flat.narrow(0, 0, n).copy_(tensor.detach().reshape({-1}));
  const torch::Tensor part = torch::empty({each}, flat.options());
  reduce_scatter(flat, part);
  all_gather(part, flat);
  tensor.detach().copy_(flat.narrow(0, 0, n).view(tensor.sizes()));
}

void ProcessGroup::barrier() {
  const torch::Tensor one = torch::ones({1}, torch::TensorOptions(device()));
  all_reduce(one);
}

double ProcessGroup::mean(double mine) {
  if (size() == 1) return mine;
  const torch::Tensor sum = torch::full({1}, mine, torch::kDouble).to(device());
  all_reduce(sum);
  return sum.item<double>() / size();
}

bool ProcessGroup::any(bool mine) { return mean(mine ? 1 : 0) > 0; }

std::string ProcessGroup::broadcast_text(const std::string& text) {
  if (size() == 1) return text;
  const torch::Tensor length = torch::full({1}, static_cast<int64_t>(text.size()), torch::kLong).to(device());
  broadcast(length);
  torch::Tensor bytes = torch::zeros({length.item<int64_t>()}, torch::kUInt8);
  if (rank() == 0) std::copy(text.begin(), text.end(), bytes.data_ptr<uint8_t>());
  bytes = bytes.to(device());
  broadcast(bytes);
  bytes = bytes.cpu();
  return {bytes.data_ptr<uint8_t>(), bytes.data_ptr<uint8_t>() + bytes.numel()};
}

}  // namespace bitwright::train
