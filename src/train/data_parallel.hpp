#pragma once

#include <torch/torch.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "train/optimizer.hpp"
#include "train/process_group.hpp"

namespace bitwright::train {

enum class Sharding {
  none,        ///< every process has the whole model
  parameters,  ///< parameters, gradients and optimizer state are split; a layer is whole only while it computes
};

/// What an optimizer updates in this process: a parameter of the module, or this process's part of several.
struct Trained {
  std::string name{};
  torch::Tensor tensor{};
  Treatment treatment = Treatment::matrix;
};

/// A module that several processes train on different sequences, such that each step is what one process would do with
/// all of them (sums differ in their order). In each step every process calls, in the same order:
///   forward and backward, as often as gradients are accumulated; finish_gradients(); the optimizer's step on
///   trained(); after_step().
/// Parameters and buffers must be on the group's device. What of them is trained must be so from the beginning.
class ParallelModel {
 public:
  /// units: paths of the modules that are split (a model's layers), each with parameters of its own; what belongs to
  /// none is whole everywhere, and only its gradients and optimizer state are split. Whoever runs a unit calls before()
  /// and after(), and computes it again in backward(). Of linear layers with quantized weights the packed codes are
  /// split; their scales, a few hundredths of them, are not.
  /// All processes take the weights of rank 0.
  ParallelModel(std::shared_ptr<ProcessGroup> group, std::shared_ptr<torch::nn::Module> module,
                Sharding sharding = Sharding::none, const std::vector<std::string>& units = {});
  ~ParallelModel();
  ParallelModel(const ParallelModel&) = delete;
  ParallelModel& operator=(const ParallelModel&) = delete;

  ProcessGroup& group() { return *group_; }
  Sharding sharding() const { return sharding_; }
  const std::vector<Trained>& trained() const { return trained_; }

  // Around each use of a unit; nothing happens where nothing is split.
  void before(size_t unit);          ///< its parameters are whole
  void after(size_t unit);           ///< and gone again
  void after_backward(size_t unit);  ///< the gradients they got are added to trained(), and they are gone again

  /// Gradients of trained() become the mean over all processes of what backward() left.
  void finish_gradients();
  /// Of all trained parameters, the same number in every process.
  double gradient_norm() const;
  /// What the optimizer changed reaches all processes.
  void after_step();

  /// The parameters that trained()[index] is, or is a part of.
  std::vector<std::string> names(size_t index) const;
  /// Tensors of the shapes of trained(), by a prefix and their names ("m." + name: a moment).
  using States = std::map<std::string, torch::Tensor>;
  /// The same of whole parameters, by the prefix and the parameters' names, copied. All processes call it; those that
  /// do not `keep` it get none.
  States whole(const States& parts, bool keep) const;
  /// The inverse, from any number of processes' whole: this process's parts are copied into `parts`.
  void take(const States& whole, const States& parts) const;
  /// Of parameters that are not trained and of the others: use(name, tensor), unit by unit, in every process. The
  /// tensor is gone afterwards. Packed codes are no parameters here.
  void for_each_parameter(const std::function<void(const std::string& name, const torch::Tensor& whole)>& use);
  /// Ends the splitting: the module of rank 0 is whole, with its quantized layers; those of others are left empty.
  void join_on_first();

 private:
  struct Flat;
  struct Codes;
  struct Split;
  using Named = std::vector<std::pair<std::string, torch::Tensor>>;

  const Flat& flat_of(size_t index) const;
  size_t index_of(const std::string& state) const;
  void split_unit(const std::string& path, Named parameters);
  void add_flat(Split& unit, bool resident, Named parameters);
  void reduce(Flat& flat);

  std::shared_ptr<ProcessGroup> group_;
  std::shared_ptr<torch::nn::Module> module_;
  Sharding sharding_;
  std::vector<Trained> trained_;
  std::vector<std::unique_ptr<Split>> units_;  ///< the last: what belongs to none
};

/// Which sequences of a step are this process's: [first, first + count). The step's batch is the same for every number
/// of processes. Throws Error{"batch-not-divisible"} (exit status 2).
struct Rows {
  int64_t first, count;
};
Rows rows_of(const ProcessGroup& group, int64_t global_batch);

}  // namespace bitwright::train
