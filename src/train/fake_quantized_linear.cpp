#include "train/fake_quantized_linear.hpp"

#include <torch/csrc/autograd/graph_task.h>

#include "base/error.hpp"
#include "scheme/range.hpp"
#include "train/ops.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;
using Inputs = InputQuantization::Scales;

/// Is this backward(), where activations that were not kept are computed again? What they were is not to change then.
bool within_backward() { return torch::autograd::get_current_graph_task_exec_info() != nullptr; }

constexpr const char* kLearned = "fake_quantize";

Tensor from_floats(const std::vector<float>& values) { return torch::tensor(values, torch::kFloat); }

Tensor decoded(const std::shared_ptr<const QuantizedTensor>& stored) {
  return stored == nullptr ? Tensor() : from_floats(decode(*stored));
}

/// Searched ranges leave out what is far away; owners' own rounding takes the extremes.
bool clips(const TensorPlan& plan) { return plan.options.range == RangeRule::mse && plan.options.owner == nullptr; }

}  // namespace

FakeQuantizedLinear::FakeQuantizedLinear(torch::nn::LinearImpl& layer, TensorPlan plan, bool learned_scales,
                                         Start start, InputQuantization input)
    : layer_(layer), plan_(std::move(plan)), input_(std::move(input)), weight_(layer.weight) {
  if (learned_scales) start_weight(start);
  start_input();
}

/// What is learned has one dimension, so that no weight decay pulls at it where matrices alone have one.
void FakeQuantizedLinear::start_weight(Start start) {
  const auto grid = integer_grid(scheme());
  BW_ASSERT(grid.has_value());
  TensorPlan search = plan_;
  search.options.range = RangeRule::mse;
  const bool has_zero = scheme().offset_kind == OffsetKind::zero_point;
  const bool from_paper = start == Start::lsq && !has_zero;
  const QuantizedTensor found = from_paper ? QuantizedTensor() : quantize_weight(search, weight_);
  const auto learn = [&](const std::string& name, const Tensor& value) {
    return learned_->register_parameter(name, value.flatten());
  };
  scale_ = learn("weight_scale", from_paper ? lsq_scales(weight_, *grid) : decoded(found.scale));
  if (has_zero) zero_ = learn("weight_zero", decoded(found.offset));
}

/// Learned ones begin with the first batch that is seen: 0 until then.
void FakeQuantizedLinear::start_input() {
  if (input_.scales == Inputs::learned) {
    input_scale_ = learned_->register_parameter("input_scale", torch::zeros({1}));
    if (input_.scheme.offset_kind == OffsetKind::zero_point)
      input_zero_ = learned_->register_parameter("input_zero", torch::zeros({1}));
  } else if (input_.scales == Inputs::observed) {
    observer_ = std::make_unique<Observer>(input_.observer);
    learned_->register_buffer("input_range", observer_->state());
  }
}

Tensor FakeQuantizedLinear::forward(const Tensor& input, const Tensor& bias) {
  const Tensor x = quantize_input(input);
  if (input.scalar_type() != torch::kFloat) return torch::linear(x, fake_weight(input.scalar_type()), bias);
  const Compute compute = compute_type();
  return train::linear(x, fake_weight(compute == Compute::bf16 ? torch::kBFloat16 : torch::kFloat), bias, compute);
}

Tensor FakeQuantizedLinear::fake_weight(torch::ScalarType type) const {
  if (!scale_.defined())
    return fake_quantize(
        weight_, [this](const Tensor& w) { return quantize_weight(plan_, w); }, clips(plan_), type);
  const IntegerGrid grid = *integer_grid(scheme());
  const Tensor scale = stored_scale(scale_, *bitwright::dtype_of(*scheme().scale->scheme->element));
  const Tensor zero = zero_.defined() ? stored_zero(zero_, grid) : Tensor();
  return fake_quantize(weight_, scale, zero, grid, lsq_factor(grid, weight_.sizes()), type);
}

Tensor FakeQuantizedLinear::quantize_input(const Tensor& x) {
  const bool learning = layer_.is_training() && !within_backward();
  switch (input_.scales) {
    case Inputs::none:
      return x;
    case Inputs::dynamic:
      return fake_quantize_activation(x, {.scheme = input_.scheme});
    case Inputs::observed:
      if (learning) observer_->update(x);
      return fake_quantize_activation(x, fixed_input());
    case Inputs::learned:
      break;
  }
  const IntegerGrid grid = *integer_grid(input_.scheme);
  const Tensor rows = x.reshape({-1, x.size(-1)});
  if (learning && rows.numel() > 0 && input_scale_.item<float>() == 0) {
    const torch::NoGradGuard no_gradient;
    const ActivationScheme first =
        fixed_activation(input_.scheme, {rows.min().item<float>(), rows.max().item<float>()});
    input_scale_.copy_(input_zero_.defined() ? decoded(first.scale) : lsq_scales(rows, grid));
    if (input_zero_.defined()) input_zero_.copy_(decoded(first.offset));
  }
  const Tensor zero = input_zero_.defined() ? stored_zero(input_zero_, grid) : Tensor();
  // N: the values of one token (Esser et al. count features, not the batch).
  const double factor = lsq_factor(grid, {1, x.size(-1)});
  return fake_quantize(rows, input_scale(), zero, grid, factor).reshape(x.sizes());
}

ActivationScheme FakeQuantizedLinear::fixed_input() const {
  return fixed_activation(input_.scheme, observer_->range());
}

ActivationScheme FakeQuantizedLinear::learned_input() const {
  if (input_scale_.item<float>() == 0)
    throw Error({.code = "no-data",
                 .what = "activation range is unknown",
                 .why = "nothing was learned yet",
                 .fix = "train at least one step first"});
  const auto store = [&](const Parameter& p, const Tensor& value) {
    const std::vector<float> number = {value.item<float>()};
    return std::make_shared<QuantizedTensor>(encode(*p.scheme, parameter_shape(p.grouping, {1, 1}), number));
  };
  ActivationScheme out = {.scheme = input_.scheme, .dynamic = false};
  out.scale = store(*input_.scheme.scale, input_scale());
  if (input_zero_.defined())
    out.offset = store(*input_.scheme.offset, stored_zero(input_zero_, *integer_grid(input_.scheme)));
  return out;
}

QuantizedTensor FakeQuantizedLinear::quantized() const {
  const torch::NoGradGuard no_gradient;
  if (!scale_.defined()) return quantize_weight(plan_, weight_);
  return quantize_with(scheme(), weight_, stored_scale(scale_, *bitwright::dtype_of(*scheme().scale->scheme->element)),
                       zero_.defined() ? stored_zero(zero_, *integer_grid(scheme())) : Tensor());
}

QuantizedLinear FakeQuantizedLinear::linear() const {
  const torch::NoGradGuard no_gradient;
  QuantizedLinear out = plan_.linear;
  out.input.reset();
  if (input_.scales == Inputs::dynamic) out.input = ActivationScheme{.scheme = input_.scheme};
  if (input_.scales == Inputs::observed) out.input = fixed_input();
  if (input_.scales == Inputs::learned) out.input = learned_input();
  return out;
}

void attach_fake_quantized(torch::nn::LinearImpl& layer, const std::shared_ptr<FakeQuantizedLinear>& behaviour) {
  layer.register_module(kLearned, behaviour->learned());
  attach(layer, behaviour, behaviour->floats());
}

void detach_fake_quantized(torch::nn::LinearImpl& layer) {
  const auto behaviour = behaviour_as<FakeQuantizedLinear>(layer);
  BW_ASSERT(behaviour != nullptr);
  layer.unregister_module(kLearned);
  detach(layer, behaviour->floats());
}

}  // namespace bitwright::train
