#pragma once

#include <torch/torch.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>

namespace bitwright::train {

/// Where this process stands among those of a job, as its launcher says in the environment.
struct ProcessPlace {
  int rank = 0;
  int size = 1;
  int local_rank = 0;     ///< among the processes of this machine: the number of its GPU
  int local_size = 1;     ///< 0: the launcher does not say
  std::string address{};  ///< where rank 0 can be reached
  int port = 0;
  std::string launcher{};  ///< "torchrun", "mpirun", "srun"; empty: one process alone
};

using Environment = std::function<const char*(const char* name)>;  ///< null: not set
/// The first of these that is there:
///  - RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and LOCAL_RANK, LOCAL_WORLD_SIZE if set (torchrun, a shell loop);
///  - OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE (Open MPI's mpirun);
///  - SLURM_PROCID, SLURM_NTASKS and what else srun sets. A batch script that runs the program without srun is one
///    process alone, however many tasks it has been given;
///  - PMI_RANK, PMI_SIZE (mpirun of MPICH and Intel).
/// Where MASTER_ADDR is not set, it is the first of Slurm's nodes, or this machine if all processes run on it; the port
/// is then derived from the job's number. Throws Error for variables that are half set or contradict each other.
ProcessPlace place_from_environment(const Environment& environment);
ProcessPlace place_from_environment();

/// "gpu[07-12,20],login" -> "gpu07".
std::string first_slurm_node(const std::string& nodes);

struct GroupTimeouts {
  std::chrono::seconds join{300};  ///< until all processes have come
  /// How long one waits for another that lives and does not answer; a process that has died is noticed at once. Must
  /// exceed what one does alone, as writing a checkpoint.
  std::chrono::seconds operation{1800};
};

/// The processes of a job, which call the same operations in the same order. Over c10d: NCCL if this libtorch has it
/// and finds a GPU, otherwise Gloo. Sums are taken in the order of ranks, so that all processes hold the same bits, and
/// the same in every run. Tensors of every type, bytes as well as floats. An operation that fails because another
/// process has ended throws Error "process-lost", which names that process and, if it said so, its reason.
class ProcessGroup {
 public:
  /// Returns when all have come; throws Error if they have not in time. A group of one needs no network.
  static std::shared_ptr<ProcessGroup> join(const ProcessPlace& place, const GroupTimeouts& timeouts = {});
  ProcessGroup(const ProcessGroup&) = delete;
  ProcessGroup& operator=(const ProcessGroup&) = delete;
  /// If an exception is under way, leave().
  ~ProcessGroup();

  int rank() const;
  int size() const;
  /// Of the tensors that the operations take.
  torch::Device device() const;

  /// `tensor` becomes that of rank `root`.
  void broadcast(const torch::Tensor& tensor, int root = 0);
  /// `tensor` becomes the sum of all. 16-bit floats are added as float32 and rounded once.
  void all_reduce(const torch::Tensor& tensor);
  /// whole: [size * n]; part: [n], becomes the sum of all processes' n numbers from rank * n on.
  void reduce_scatter(const torch::Tensor& whole, const torch::Tensor& part);
  /// part: [n]; whole: [size * n], becomes all parts in the order of ranks.
  void all_gather(const torch::Tensor& part, const torch::Tensor& whole);
  void barrier();
  bool any(bool mine);       ///< is it so in one process at least?
  double mean(double mine);  ///< over the processes
  /// The text of rank 0.
  std::string broadcast_text(const std::string& text);

  /// This process ends before the others, who will fail and say why: `reason` is one line.
  void leave(const std::string& reason) noexcept;

 private:
  struct Connections;
  explicit ProcessGroup(std::unique_ptr<Connections> connections);
  std::unique_ptr<Connections> connections_;
};

}  // namespace bitwright::train
