#include "train/adamw8.hpp"

#include <array>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright::train {
namespace {

constexpr size_t kTask = 32 * kMomentBlock;  ///< elements: whole blocks, in the first-level caches

Moments8 blocks_of(Moments& m, size_t begin) {
  const Moments8 all = {.first = m.first.data_ptr<uint8_t>(),
                        .second = m.second.data_ptr<uint8_t>(),
                        .first_scale = m.first_scale.data_ptr<float>(),
                        .second_scale = m.second_scale.data_ptr<float>()};
  return all.from_block(begin / kMomentBlock);
}

/// Of elements begin, begin + 1 …; begin is a block's first.
void changes_of(const AdamWStep& step, Moments& m, size_t begin, std::span<float> change) {
  if (m.first_scale.defined()) return adamw_changes(step, blocks_of(m, begin), change);
  adamw_changes(step, Moments32{m.first.data_ptr<float>() + begin, m.second.data_ptr<float>() + begin}, change);
}

/// weight += its changes for this gradient, a piece at a time: the changes of all are never in memory.
void update_weight(const AdamWStep& step, Moments& moments, std::span<const float> gradient, float* weight) {
  parallel_ranges(gradient.size(), kTask, [&](size_t begin, size_t end) {
    std::array<float, kTask> piece;
    const std::span change = std::span(piece).first(end - begin);
    std::copy(gradient.begin() + static_cast<std::ptrdiff_t>(begin),
              gradient.begin() + static_cast<std::ptrdiff_t>(end), change.begin());
    changes_of(step, moments, begin, change);
    apply_changes(step, change, weight + begin);
  });
}

}  // namespace

Moments::Moments(int64_t count, bool eight_bit) {
  const auto type = eight_bit ? torch::kUInt8 : torch::kFloat32;
  first = torch::zeros({count}, type);
  second = torch::zeros({count}, type);
  if (!eight_bit) return;
  const auto blocks = static_cast<int64_t>(moment_blocks(static_cast<size_t>(count)));
  first_scale = torch::zeros({blocks}, torch::kFloat32);
  second_scale = torch::zeros({blocks}, torch::kFloat32);
}

int64_t Moments::bytes() const {
  int64_t bytes = 0;
  for (const torch::Tensor* tensor : {&first, &second, &first_scale, &second_scale})
    if (tensor->defined()) bytes += static_cast<int64_t>(tensor->nbytes());
  return bytes;
}

void Moments::update(const AdamWStep& step, std::span<float> change) {
  BW_ASSERT(static_cast<int64_t>(change.size()) == first.numel());
  parallel_ranges(change.size(), kTask, [&](size_t begin, size_t end) {
    changes_of(step, *this, begin, change.subspan(begin, end - begin));
  });
}

void AdamW8::add_group(const std::vector<torch::Tensor>& parameters, const AdamWOptions& options) {
  for (const torch::Tensor& weight : parameters) {
    BW_ASSERT(weight.scalar_type() == torch::kFloat32 && weight.is_contiguous());
    parameters_.push_back({.weight = weight,
                           .moments = Moments(weight.numel(), weight.numel() >= kLeastElements),
                           .group = groups_.size()});
  }
  groups_.push_back({options});
}

void AdamW8::step(double gradient_scale) {
  const torch::NoGradGuard no_gradients;
  for (Parameter& p : parameters_) {
    const torch::Tensor given = p.weight.grad();
    if (!given.defined()) continue;
    const torch::Tensor gradient = given.to(torch::kFloat32).contiguous();
    const AdamWOptions& o = groups_[p.group].options;
    const AdamWStep factors =
        AdamWStep::make(o.lr, o.beta1, o.beta2, o.epsilon, o.weight_decay, ++p.step, gradient_scale);
    update_weight(factors, p.moments, {gradient.data_ptr<float>(), static_cast<size_t>(gradient.numel())},
                  p.weight.data_ptr<float>());
  }
}

void AdamW8::zero_grad() {
  for (Parameter& p : parameters_) p.weight.mutable_grad() = torch::Tensor();
}

}  // namespace bitwright::train
