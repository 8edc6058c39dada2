#include "train/data_parallel.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_set>

#include "base/error.hpp"
#include "train/export.hpp"
#include "train/linear.hpp"
#include "train/quantized_linear.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;

constexpr int64_t kBucketBytes = 32 << 20;  ///< gradients that are averaged together
constexpr int64_t kAligned = 16;            ///< elements: where a parameter begins within those it is kept with

/// Gradients in the order of `parameters` become their mean, many small ones at a time.
void average(ProcessGroup& group, const std::vector<Tensor>& parameters) {
  const torch::NoGradGuard no_gradients;
  // A parameter may have been of no use in one process and of use in another.
  Tensor used = torch::zeros({static_cast<int64_t>(parameters.size())}, torch::kInt);
  for (size_t i = 0; i < parameters.size(); ++i)
    if (parameters[i].grad().defined()) used[static_cast<int64_t>(i)] = 1;
  used = used.to(group.device());
  group.all_reduce(used);
  used = used.cpu();
  std::vector<Tensor> bucket;
  int64_t bytes = 0;
  const auto flush = [&] {
    if (bucket.empty()) return;
    std::vector<Tensor> flattened;
    for (const Tensor& gradient : bucket) flattened.push_back(gradient.reshape({-1}));
    const Tensor flat = torch::cat(flattened);
    group.all_reduce(flat);
    flat.div_(group.size());
    int64_t at = 0;
    for (const Tensor& gradient : bucket) {
      gradient.copy_(flat.narrow(0, at, gradient.numel()).view(gradient.sizes()));
      at += gradient.numel();
    }
    bucket.clear();
    bytes = 0;
  };
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (used[static_cast<int64_t>(i)].item<int>() == 0) continue;
    Tensor parameter = parameters[i];
    if (!parameter.grad().defined()) parameter.mutable_grad() = torch::zeros_like(parameter);
    const Tensor gradient = parameter.grad();
    if (!bucket.empty() && bucket.front().scalar_type() != gradient.scalar_type()) flush();
    bucket.push_back(gradient);
    bytes += gradient.numel() * static_cast<int64_t>(gradient.element_size());
    if (bytes >= kBucketBytes) flush();
  }
  flush();
}

/// The memory of `tensor`, and of all that share it, is that of `buffer` from element `begin` on; undefined: none.
void point(const Tensor& tensor, const Tensor& buffer, int64_t begin) {
  c10::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
  if (!buffer.defined()) {
    storage->set_data_ptr_noswap(at::DataPtr(nullptr, tensor.device()));
    storage->set_nbytes(0);
    return;
  }
  const size_t element = static_cast<size_t>(tensor.element_size());
  void* const first = static_cast<std::byte*>(buffer.data_ptr()) + static_cast<size_t>(begin) * element;
  storage->set_data_ptr_noswap(at::DataPtr(
      first, new Tensor(buffer), [](void* kept) { delete static_cast<Tensor*>(kept); }, buffer.device()));
  storage->set_nbytes(static_cast<size_t>(tensor.numel()) * element);
}

/// Has memory that is all its own, so that point() can replace it.
void own_memory(Tensor tensor) {
  const size_t bytes = static_cast<size_t>(tensor.numel()) * static_cast<size_t>(tensor.element_size());
  if (!tensor.is_contiguous() || tensor.storage_offset() != 0 || tensor.storage().nbytes() != bytes)
    tensor.set_data(tensor.detach().clone(at::MemoryFormat::Contiguous));
}

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

/// Parameters of one type, one behind the other, in equal parts.
struct ParallelModel::Flat {
  Named parameters{};
  std::vector<int64_t> begins{};
  int64_t each = 0;   ///< elements of a part
  Tensor shard{};     ///< this process's; of those that learn a leaf
  Tensor resident{};  ///< all parts, where they always are
  bool learns = false;
  size_t index = 0;  ///< in trained_

  Tensor empty_whole(int processes) const {
    return torch::empty({each * processes}, shard.options().requires_grad(false));
  }
  /// The parameters, wherever a flat tensor has them.
  Named cut(const Tensor& flat) const {
    Named out;
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Tensor& p = parameters[i].second;
      out.emplace_back(parameters[i].first, flat.narrow(0, begins[i], p.numel()).view(p.sizes()));
    }
    return out;
  }
};

/// Packed codes of a unit's quantized layers.
struct ParallelModel::Codes {
  struct Layer {
    torch::nn::LinearImpl* linear;
    std::shared_ptr<QuantizedLinearBehaviour> behaviour;
    std::shared_ptr<const CompactTensor> without_codes;
    int64_t begin, bytes;
  };
  std::vector<Layer> layers{};
  int64_t each = 0;
  Tensor shard{};
};

struct ParallelModel::Split {
  std::vector<Flat> flats{};
  Codes codes{};
  Named others{};  ///< neither trained nor split
  bool whole = false;

  void gather(ProcessGroup& group);
  void release();
};

void ParallelModel::Split::gather(ProcessGroup& group) {
  if (whole) return;
  whole = true;
  const torch::NoGradGuard no_gradients;
  for (const Flat& flat : flats) {
    if (flat.resident.defined()) continue;
    const Tensor buffer = flat.empty_whole(group.size());
    group.all_gather(flat.shard, buffer);
    for (size_t i = 0; i < flat.parameters.size(); ++i) point(flat.parameters[i].second, buffer, flat.begins[i]);
  }
  if (codes.layers.empty()) return;
  Tensor all = torch::empty({codes.each * group.size()}, codes.shard.options());
  group.all_gather(codes.shard, all);
  all = all.cpu();
  for (const Codes::Layer& layer : codes.layers) {
    const auto* const first = reinterpret_cast<const std::byte*>(all.data_ptr<uint8_t>()) + layer.begin;
    layer.behaviour->set_weight(
        std::make_shared<const CompactTensor>(layer.without_codes->with_codes({first, first + layer.bytes})));
  }
}

void ParallelModel::Split::release() {
  if (!whole) return;
  whole = false;
  for (const Flat& flat : flats)
    if (!flat.resident.defined())
      for (const auto& [name, parameter] : flat.parameters) point(parameter, {}, 0);
  for (const Codes::Layer& layer : codes.layers) layer.behaviour->set_weight(layer.without_codes);
}

ParallelModel::ParallelModel(std::shared_ptr<ProcessGroup> group, std::shared_ptr<torch::nn::Module> module,
                             Sharding sharding, const std::vector<std::string>& units)
    : group_(std::move(group)), module_(std::move(module)), sharding_(sharding) {
  const torch::NoGradGuard no_gradients;
  std::unordered_set<const void*> seen;  // tied weights have two names
  std::vector<Named> of_units(units.size() + 1);
  for (const auto& item : module_->named_parameters()) {
    const Tensor& parameter = item.value();
    if (!seen.insert(parameter.storage().unsafeGetStorageImpl()).second) continue;
    const auto unit = std::find_if(units.begin(), units.end(),
                                   [&](const std::string& path) { return item.key().starts_with(path + "."); });
    of_units[static_cast<size_t>(unit - units.begin())].emplace_back(item.key(), parameter);
  }
  for (const Tensor& buffer : module_->buffers()) group_->broadcast(buffer);
  if (sharding_ == Sharding::none) {
    for (const Named& parameters : of_units)
      for (const auto& [name, parameter] : parameters) {
        group_->broadcast(parameter);
        if (parameter.requires_grad()) trained_.push_back({name, parameter, treatment_of(name, parameter)});
      }
    return;
  }
  for (size_t i = 0; i <= units.size(); ++i) split_unit(i < units.size() ? units[i] : "", std::move(of_units[i]));
}

ParallelModel::~ParallelModel() = default;

/// path: empty for what belongs to no unit.
void ParallelModel::split_unit(const std::string& path, Named parameters) {
  Split& unit = *units_.emplace_back(std::make_unique<Split>());
  const bool resident = path.empty();
  int64_t bytes = 0;
  for_each_linear(*module_, [&](const std::string& name, torch::nn::LinearImpl& linear) {
    if (resident || !name.starts_with(path + ".") || behaviour_of(linear) == nullptr) return;
    const Tensor weight = parameter_of(linear);
    if (weight.is_floating_point()) return;
    const auto quantized = quantized_weight_of(linear);
    if (quantized == nullptr || std::dynamic_pointer_cast<StoresQuantized>(quantized) != nullptr)
      throw Error({.code = "cannot-shard",
                   .what = "cannot split the model between processes",
                   .where = name,
                   .why = "its quantized weights change while it is trained, which is done whole",
                   .fix = "sharding: none",
                   .status = ExitStatus::usage});
    std::erase_if(parameters, [&](const auto& p) { return p.second.is_same(weight); });
    const auto count = static_cast<int64_t>(quantized->weight()->codes().size());
    unit.codes.layers.push_back({&linear, quantized, nullptr, bytes, count});
    bytes += count;
  });
  Codes& codes = unit.codes;
  if (!codes.layers.empty()) {
    codes.each = rounded_up((bytes + group_->size() - 1) / group_->size(), kAligned);
    const Tensor all = torch::zeros({codes.each * group_->size()}, torch::kUInt8);
    for (Codes::Layer& layer : codes.layers) {
      const auto bytes_of_layer = layer.behaviour->weight()->codes();
      std::memcpy(all.data_ptr<uint8_t>() + layer.begin, bytes_of_layer.data(), bytes_of_layer.size());
      layer.without_codes = std::make_shared<const CompactTensor>(layer.behaviour->weight()->with_codes({}));
      layer.behaviour->set_weight(layer.without_codes);
      attach(*layer.linear, behaviour_of(*layer.linear), torch::empty({0}, torch::kUInt8));
    }
    codes.shard = all.narrow(0, codes.each * group_->rank(), codes.each).clone().to(group_->device());
  }
  // One flat tensor for each way in which parameters may be treated.
  for (const bool learns : {true, false})
    for (const Treatment treatment : {Treatment::matrix, Treatment::vector, Treatment::scale}) {
      std::vector<torch::ScalarType> types;
      for (const auto& [name, p] : parameters)
        if (std::find(types.begin(), types.end(), p.scalar_type()) == types.end()) types.push_back(p.scalar_type());
      for (const torch::ScalarType type : types) {
        Named chosen;
        for (const auto& parameter : parameters) {
          const Tensor& p = parameter.second;
          if (p.requires_grad() == learns && treatment_of(parameter.first, p) == treatment && p.scalar_type() == type &&
              p.numel() > 0)
            chosen.push_back(parameter);
        }
        if (chosen.empty()) continue;
        if (resident && !learns) {
          for (const auto& [name, p] : chosen) group_->broadcast(p);
          unit.others.insert(unit.others.end(), chosen.begin(), chosen.end());
        } else {
          add_flat(unit, resident, std::move(chosen));
        }
      }
    }
  unit.whole = true;
  if (!resident) unit.release();
}

void ParallelModel::add_flat(Split& unit, bool resident, Named parameters) {
  Flat flat{.parameters = std::move(parameters)};
  const Tensor& first = flat.parameters.front().second;
  flat.learns = first.requires_grad();
  int64_t end = 0;
  for (const auto& [name, p] : flat.parameters) {
    flat.begins.push_back(end);
    end += rounded_up(p.numel(), kAligned);
  }
  flat.each = rounded_up((end + group_->size() - 1) / group_->size(), kAligned);
  const Tensor whole = torch::zeros({flat.each * group_->size()}, first.options().requires_grad(false));
  const Named places = flat.cut(whole);
  for (size_t i = 0; i < places.size(); ++i) places[i].second.copy_(flat.parameters[i].second);
  group_->broadcast(whole);
  const Tensor mine = whole.narrow(0, flat.each * group_->rank(), flat.each);
  flat.shard = resident ? mine.detach() : mine.clone();
  flat.shard.requires_grad_(flat.learns);
  for (size_t i = 0; i < flat.parameters.size(); ++i) {
    own_memory(flat.parameters[i].second);
    point(flat.parameters[i].second, whole, flat.begins[i]);
  }
  if (resident) flat.resident = whole;
  if (flat.learns) {
    flat.index = trained_.size();
    const auto& [name, parameter] = flat.parameters.front();
    trained_.push_back({fmt::format("shard.{}", flat.index), flat.shard, treatment_of(name, parameter)});
  }
  unit.flats.push_back(std::move(flat));
}

void ParallelModel::before(size_t unit) {
  if (!units_.empty()) units_.at(unit)->gather(*group_);
}
void ParallelModel::after(size_t unit) {
  if (!units_.empty()) units_.at(unit)->release();
}

/// Adds the mean of the parameters' gradients to the shard's, and forgets them.
void ParallelModel::reduce(Flat& flat) {
  const torch::NoGradGuard no_gradients;
  const Tensor whole = flat.empty_whole(group_->size()).zero_();
  const Named places = flat.cut(whole);
  for (size_t i = 0; i < places.size(); ++i) {
    Tensor parameter = flat.parameters[i].second;
    if (!parameter.grad().defined()) continue;
    places[i].second.copy_(parameter.grad());
    parameter.mutable_grad().reset();
  }
  const Tensor mine = torch::empty({flat.each}, whole.options());
  group_->reduce_scatter(whole, mine);
  mine.div_(group_->size());
  if (flat.shard.grad().defined())
    flat.shard.mutable_grad().add_(mine);
  else
    flat.shard.mutable_grad() = mine;
}

void ParallelModel::after_backward(size_t unit) {
  if (units_.empty()) return;
  for (Flat& flat : units_.at(unit)->flats)
    if (flat.learns) reduce(flat);
  units_[unit]->release();
}

void ParallelModel::finish_gradients() {
  if (sharding_ == Sharding::parameters) {
    for (Flat& flat : units_.back()->flats) reduce(flat);
    return;
  }
  if (group_->size() == 1) return;
  std::vector<Tensor> parameters;
  for (const Trained& trained : trained_) parameters.push_back(trained.tensor);
  average(*group_, parameters);
}

double ParallelModel::gradient_norm() const {
  const torch::NoGradGuard no_gradients;
  double squares = 0;
  for (const Trained& trained : trained_) {
    const Tensor& gradient = trained.tensor.grad();
    if (gradient.defined()) squares += gradient.to(torch::kDouble).square().sum().item<double>();
  }
  if (sharding_ == Sharding::none) return std::sqrt(squares);
  const Tensor sum = torch::full({1}, squares, torch::kDouble).to(group_->device());
  group_->all_reduce(sum);
  return std::sqrt(sum.item<double>());
}

void ParallelModel::after_step() {
  const torch::NoGradGuard no_gradients;
  if (sharding_ == Sharding::parameters)
    for (const Flat& flat : units_.back()->flats) group_->all_gather(flat.shard, flat.resident);
  for (const Tensor& buffer : module_->buffers()) group_->broadcast(buffer);  // observed ranges
}

const ParallelModel::Flat& ParallelModel::flat_of(size_t index) const {
  for (const auto& unit : units_)
    for (const Flat& flat : unit->flats)
      if (flat.learns && flat.index == index) return flat;
  BW_ASSERT(false);
  return units_.front()->flats.front();
}

size_t ParallelModel::index_of(const std::string& state) const {
  size_t index = 0;
  while (index < trained_.size() && !state.ends_with(trained_[index].name)) ++index;
  BW_ASSERT(index < trained_.size());
  return index;
}

std::vector<std::string> ParallelModel::names(size_t index) const {
  if (sharding_ == Sharding::none) return {trained_.at(index).name};
  std::vector<std::string> names;
  for (const auto& [name, parameter] : flat_of(index).parameters) names.push_back(name);
  return names;
}

ParallelModel::States ParallelModel::whole(const States& parts, bool keep) const {
  const torch::NoGradGuard no_gradients;
  States out;
  for (const auto& [key, state] : parts) {
    if (sharding_ == Sharding::none) {
      if (keep) out[key] = state.detach().clone();
      continue;
    }
    const size_t index = index_of(key);
    const Flat& flat = flat_of(index);
    const Tensor all = torch::empty({flat.each * group_->size()}, state.options().requires_grad(false));
    group_->all_gather(state.detach(), all);
    if (!keep) continue;
    const std::string prefix = key.substr(0, key.size() - trained_[index].name.size());
    for (const auto& [name, tensor] : flat.cut(all)) out[prefix + name] = tensor;
  }
  return out;
}

void ParallelModel::take(const States& whole, const States& parts) const {
  const torch::NoGradGuard no_gradients;
  for (const auto& [key, state] : parts) {
    if (sharding_ == Sharding::none) {
      Tensor(state).copy_(whole.at(key));
      continue;
    }
    const size_t index = index_of(key);
    const Flat& flat = flat_of(index);
    const std::string prefix = key.substr(0, key.size() - trained_[index].name.size());
    const Tensor all = torch::zeros({flat.each * group_->size()}, state.options().requires_grad(false));
    for (const auto& [name, place] : flat.cut(all)) Tensor(place).copy_(whole.at(prefix + name));
    Tensor(state).copy_(all.narrow(0, flat.each * group_->rank(), flat.each));
  }
}

void ParallelModel::for_each_parameter(const std::function<void(const std::string&, const Tensor&)>& use) {
  const torch::NoGradGuard no_gradients;
  if (units_.empty()) {
    for (const auto& item : module_->named_parameters()) use(item.key(), item.value());
    return;
  }
  for (const auto& unit : units_) {
    unit->gather(*group_);
    for (const Flat& flat : unit->flats)
      for (const auto& [name, parameter] : flat.parameters) use(name, parameter);
    for (const auto& [name, parameter] : unit->others) use(name, parameter);
    unit->release();
  }
}

void ParallelModel::join_on_first() {
  for (const auto& unit : units_) {
    unit->gather(*group_);
    if (group_->rank() != 0) {
      unit->release();
      continue;
    }
    for (const Codes::Layer& layer : unit->codes.layers)
      attach(*layer.linear, behaviour_of(*layer.linear), layer.behaviour->codes());
  }
  units_.clear();
  trained_.clear();
}

Rows rows_of(const ProcessGroup& group, int64_t global_batch) {
  if (global_batch % group.size() != 0)
    throw Error({.code = "batch-not-divisible",
                 .what = "cannot split a step's sequences between processes",
                 .where = "batch_size",
                 .why = fmt::format("{} sequences, {} processes", global_batch, group.size()),
                 .fix = "choose a multiple of the number of processes",
                 .status = ExitStatus::usage});
  const int64_t each = global_batch / group.size();
  return {each * group.rank(), each};
}

}  // namespace bitwright::train
