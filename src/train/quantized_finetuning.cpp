#include "train/quantized_finetuning.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "base/bits.hpp"
#include "base/error.hpp"
#include "kernels/encode.hpp"

namespace bitwright::train {

/// Held by a graph for each use of a layer in it.
struct LearningLinear::Use : torch::CustomClassHolder {
  std::shared_ptr<LearningLinear> layer;
  std::shared_ptr<char> pending;
};

/// The identity; its backward pass sees what the gradient of a weight is made of.
struct LearningLinear::Tap : torch::autograd::Function<Tap> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& output,
                               const torch::Tensor& input, const torch::Tensor& /*anchor*/,
                               const c10::intrusive_ptr<Use>& use) {
    context->save_for_backward({input});
    context->saved_data["use"] = torch::IValue::make_capsule(use);
    return output.variable_data();  // no view: what uses it may change it in place
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto capsule = context->saved_data["use"].toCapsule();
    auto& use = static_cast<Use&>(*capsule);
    if (!gradients[0].defined()) return {torch::Tensor(), torch::Tensor(), torch::Tensor(), torch::Tensor()};
    TORCH_CHECK(use.pending != nullptr, "layer ", use.layer->path(), " learns once from each use of it in a graph");
    use.layer->add_gradient(context->get_saved_variables()[0], gradients[0]);
    use.pending = nullptr;
    if (use.layer->uses_.use_count() == 1 && use.layer->when_complete_) use.layer->when_complete_(*use.layer);
    return {gradients[0], torch::Tensor(), torch::Tensor(), torch::Tensor()};
  }
};

LearningLinear::LearningLinear(std::string path, QuantizedTensor weight, QuantizedLinear linear,
                               torch::ScalarType gradient_type)
    : QuantizedLinearBehaviour(std::move(weight), std::move(linear)),
      path_(std::move(path)),
      gradient_type_(gradient_type),
      anchor_(torch::zeros({0}, torch::requires_grad())),
      uses_(std::make_shared<char>()) {}

torch::Tensor LearningLinear::forward(const torch::Tensor& input, const torch::Tensor& bias) {
  torch::Tensor output = multiply_quantized(input, weight());
  if (torch::GradMode::is_enabled()) {
    auto use = c10::make_intrusive<Use>();
    use->layer = shared_from_this();
    use->pending = uses_;
    output = Tap::apply(output, input, anchor_, use);
  }
  return bias.defined() ? output + bias : output;
}

StoredLinear LearningLinear::stored() const {
  return {.weight = std::make_shared<const QuantizedTensor>(weight()->unpacked()), .activations = linear()};
}

void LearningLinear::add_gradient(const torch::Tensor& input, const torch::Tensor& output_gradient) {
  const torch::NoGradGuard no_gradients;
  const torch::Tensor x = input.reshape({-1, input.size(-1)});
  const torch::Tensor dy = output_gradient.reshape({-1, output_gradient.size(-1)}).to(x.scalar_type());
  const torch::Tensor product = at::mm(dy.t(), x);
  if (gradient_.defined())
    gradient_.add_(product);
  else
    gradient_ = product.to(gradient_type_);
}

namespace {

[[noreturn]] void bad_config(const std::string& why, const std::string& fix) {
  throw Error({.code = "bad-config",
               .what = "cannot fine-tune quantized layers",
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

void check(const QuantizedFinetuningConfig& c) {
  if (c.bits != 8 && c.bits != 4) bad_config(fmt::format("there are no {} bits", c.bits), "bits: 8 or 4");
  if (c.granularity != "tensor" && c.granularity != "channel" && c.granularity != "group")
    bad_config(fmt::format("granularity '{}' is not known", printable(c.granularity)), "tensor, channel or group");
  if (c.group_size < 1) bad_config(fmt::format("group_size is {}", c.group_size), "1 or more");
  if (!(c.beta1 >= 0 && c.beta1 < 1 && c.beta2 >= 0 && c.beta2 < 1))
    bad_config(fmt::format("betas are {} and {}", c.beta1, c.beta2), "from 0 to below 1");
  if (!(c.epsilon > 0)) bad_config(fmt::format("epsilon is {}", c.epsilon), "more than 0");
  if (!(c.weight_decay >= 0)) bad_config(fmt::format("weight_decay is {}", c.weight_decay), "0 or more");
  if (c.gradient_type != torch::kBFloat16 && c.gradient_type != torch::kFloat32)
    bad_config("gradients cannot be of this type", "kBFloat16 or kFloat32");
}

ContainerRequest request_for(const QuantizedFinetuningConfig& c) {
  ContainerRequest out;
  QuantizationSettings& s = out.request.settings;
  s.quant_type = "int";
  s.bits = c.bits;
  s.granularity = c.granularity;
  if (c.granularity == "group") s.group_size = c.group_size;
  s.symmetric = c.symmetric;
  out.request.skip_modules = c.skip_modules;
  out.request.skips_given = true;
  return out;
}

/// Of the matrices that several modules own (an embedding and a head): learning in codes would part them.
bool is_shared(const torch::nn::Module& module, const torch::Tensor& weight) {
  int owners = 0;
  for (const auto& each : module.modules())
    for (const auto& parameter : each->parameters(/*recurse=*/false)) owners += parameter.is_same(weight);
  return owners > 1;
}

/// Bytes as a tensor, not copied: it is gone when `bytes` are.
torch::Tensor view_of(std::span<const std::byte> bytes, torch::ScalarType type) {
  const auto count = static_cast<int64_t>(bytes.size() / torch::elementSize(type));
  return torch::from_blob(const_cast<std::byte*>(bytes.data()), {count}, type);
}
torch::ScalarType type_of(const QuantizedTensor& parameter) {
  const auto dtype = dtype_of(*parameter.scheme.element);
  return dtype && info(*dtype).is_float ? scalar_type_of(*dtype) : torch::kUInt8;
}

/// One layer and what makes it learn.
struct Layer {
  std::shared_ptr<torch::nn::LinearImpl> linear;
  std::shared_ptr<LearningLinear> learning;
  Moments moments;
  torch::Tensor residual{};  ///< int8; of error_compensated
  int64_t learned = 0;       ///< the step that it learned from last

  int64_t elements() const { return element_count(learning->weight()->shape()); }
};

/// PATH.name -> tensor, for everything but the weight.
template <class Use>
void for_each_tensor(Layer& layer, const Use& use) {
  const std::string path = layer.learning->path() + ".";
  use(path + "first_moment", layer.moments.first);
  use(path + "second_moment", layer.moments.second);
  if (layer.moments.first_scale.defined()) {
    use(path + "first_moment_scale", layer.moments.first_scale);
    use(path + "second_moment_scale", layer.moments.second_scale);
  }
  if (layer.residual.defined()) use(path + "residual", layer.residual);
}

/// The same of the weight's parameters. The tensors are views of `weight`.
template <class Use>
void for_each_parameter(const std::string& path, const QuantizedTensor& weight, const Use& use) {
  use(path + ".scales", view_of(weight.scale->codes, type_of(*weight.scale)));
  if (weight.offset != nullptr) use(path + ".zeros", view_of(weight.offset->codes, torch::kUInt8));
}

/// Codes as CompactTensor has them.
std::vector<std::byte> unpacked_codes(const torch::Tensor& given, const QuantizedTensor& weight) {
  const torch::Tensor packed = given.contiguous();
  const std::span<const std::byte> bytes(static_cast<const std::byte*>(packed.data_ptr()), packed.nbytes());
  if (bytes.size() == weight.codes.size()) return {bytes.begin(), bytes.end()};
  return unpack_bits(bytes, weight.scheme.element->bits, weight.codes.size());
}

torch::Tensor text_tensor(const std::string& text) {
  return view_of(std::as_bytes(std::span(text)), torch::kUInt8).clone();
}

class Finetuning : public QuantizedFinetuning {
 public:
  Finetuning(torch::nn::Module& module, const QuantizedFinetuningConfig& config, const ContainerRequest& request)
      : config_(config) {
    check(config);
    const ModulePlan plan = plan_module(module, request.request, request.container);
    // Nothing is changed before all layers are known to be fit for it.
    for (const LayerPlan& each : plan.layers)
      if (auto weight = weight_of(module, each)) add(each, std::move(*weight));
    if (layers_.empty())
      throw Error({.code = "nothing-to-quantize",
                   .what = "cannot fine-tune quantized layers",
                   .why = "every linear layer is skipped",
                   .fix = "skip_modules",
                   .status = ExitStatus::usage});
    for (Layer& layer : layers_) attach_quantized(*layer.linear, layer.learning);
  }

  ~Finetuning() override {
    for (Layer& layer : layers_) layer.learning->when_complete(nullptr);  // it calls this object
  }

  std::vector<std::string> layers() const override {
    std::vector<std::string> paths;
    for (const Layer& layer : layers_) paths.push_back(layer.learning->path());
    return paths;
  }

  bool updates_in_backward() const override { return config_.update_in_backward; }

  std::vector<torch::Tensor> gradients() override {
    std::vector<torch::Tensor> all;
    for (Layer& layer : layers_)
      if (layer.learning->gradient().defined()) all.push_back(layer.learning->gradient());
    return all;
  }

  void zero_grad() override {
    for (Layer& layer : layers_) layer.learning->gradient() = torch::Tensor();
  }

  void set_learning_rate(double rate) override {
    if (!(rate >= 0) || std::isinf(rate)) bad_config(fmt::format("the learning rate is {}", rate), "0 or more");
    rate_ = rate;
  }

  void step() override {
    const torch::NoGradGuard no_gradients;
    for (Layer& layer : layers_)
      if (layer.learning->gradient().defined()) check_gradient(*layer.learning);
    for (Layer& layer : layers_)
      if (layer.learning->gradient().defined()) learn(layer);
    ++step_;
  }

  std::map<std::string, torch::Tensor> state() const override {
    std::map<std::string, torch::Tensor> all;
    const auto keep = [&](const std::string& name, const torch::Tensor& tensor) { all[name] = tensor.clone(); };
    for (const Layer& layer : layers_) {
      const std::string& path = layer.learning->path();
      keep(path + ".codes", view_of(layer.learning->weight()->codes(), torch::kUInt8));
      for_each_parameter(path, layer.learning->weight()->unpacked(), keep);
      all[path + ".scheme"] = text_tensor(describe(layer.learning->scheme()));
      for_each_tensor(const_cast<Layer&>(layer), keep);
    }
    all["step"] = torch::tensor(step_);
    all["seed"] = torch::tensor(static_cast<int64_t>(config_.seed));
    return all;
  }

  void load_state(const std::map<std::string, torch::Tensor>& given) override {
    check_state(given);
    for (Layer& layer : layers_) {
      QuantizedTensor weight = layer.learning->weight()->unpacked();
      auto scale = std::make_shared<QuantizedTensor>(*weight.scale);
      weight.scale = scale;
      if (weight.offset != nullptr) weight.offset = std::make_shared<QuantizedTensor>(*weight.offset);
      weight.codes = unpacked_codes(given.at(layer.learning->path() + ".codes"), weight);
      for_each_parameter(layer.learning->path(), weight,
                         [&](const std::string& name, torch::Tensor tensor) { tensor.copy_(given.at(name)); });
      set_weight(layer, std::move(weight));
      for_each_tensor(layer, [&](const std::string& name, torch::Tensor& tensor) { tensor.copy_(given.at(name)); });
    }
    step_ = given.at("step").item<int64_t>();
    config_.seed = static_cast<uint64_t>(given.at("seed").item<int64_t>());
    for (Layer& layer : layers_) layer.learned = step_;
    zero_grad();
  }

  Sizes sizes() const override {
    Sizes sizes;
    for (const Layer& layer : layers_) {
      sizes.elements += layer.elements();
      sizes.quantized_bytes += static_cast<int64_t>(layer.learning->bytes());
      sizes.optimizer_bytes += layer.moments.bytes();
      if (layer.residual.defined()) sizes.residual_bytes += static_cast<int64_t>(layer.residual.nbytes());
      if (layer.learning->gradient().defined())
        sizes.gradient_bytes += static_cast<int64_t>(layer.learning->gradient().nbytes());
    }
    return sizes;
  }

 private:
  /// Its codes, if it is to learn: those that it has, or of its floats.
  static std::optional<QuantizedTensor> weight_of(const torch::nn::Module& module, const LayerPlan& each) {
    if (!each.plan.scheme) return std::nullopt;
    const auto refuse = [&](const std::string& why) {
      throw Error({.code = "not-trainable",
                   .what = "cannot fine-tune a quantized layer",
                   .where = each.path,
                   .why = why,
                   .fix = "skip_modules leaves it as it is",
                   .status = ExitStatus::usage});
    };
    std::optional<QuantizedTensor> weight;
    if (const auto quantized = behaviour_as<QuantizedLinearBehaviour>(*each.layer))
      weight = quantized->weight()->unpacked();
    else if (behaviour_of(*each.layer) != nullptr)
      refuse("something else computes it already (fake quantization, an adapter)");
    else if (is_shared(module, parameter_of(*each.layer)))
      return std::nullopt;
    else
      weight = quantize_weight(each.plan, parameter_of(*each.layer));
    if (!can_requantize(weight->scheme, weight->shape))
      refuse(fmt::format("{} is no grid of integers with one scale a group", describe(weight->scheme)));
    return weight;
  }

  void add(const LayerPlan& each, QuantizedTensor weight) {
    const auto count = element_count(weight.shape);
    QuantizedLinear activations = each.plan.linear;
    if (const auto quantized = behaviour_as<QuantizedLinearBehaviour>(*each.layer)) activations = quantized->linear();
    Layer layer = {
        .linear = std::dynamic_pointer_cast<torch::nn::LinearImpl>(each.layer->shared_from_this()),
        .learning = std::make_shared<LearningLinear>(each.path, std::move(weight), activations, config_.gradient_type),
        .moments = Moments(count, config_.eight_bit_optimizer)};
    if (config_.requantization == Requantization::error_compensated)
      layer.residual = torch::zeros({count}, torch::kInt8);
    if (config_.update_in_backward)
      layer.learning->when_complete([this, at = layers_.size()](LearningLinear&) { learn_in_backward(layers_[at]); });
    layers_.push_back(std::move(layer));
  }

  void learn_in_backward(Layer& layer) {
    const torch::NoGradGuard no_gradients;
    if (layer.learned == step_ + 1)
      throw Error({.code = "bad-config",
                   .what = "cannot update in backward",
                   .where = layer.learning->path(),
                   .why = "it has learned from another backward() of this step",
                   .fix = "one backward() and then step(), or update_in_backward: false"});
    check_gradient(*layer.learning);
    learn(layer);
  }

  static void check_gradient(LearningLinear& layer) {
    const torch::Tensor& gradient = layer.gradient();
    BW_ASSERT(gradient.is_contiguous());
    const WeightView view = {.dtype = dtype_of(gradient.scalar_type()),
                             .bytes = {static_cast<const std::byte*>(gradient.data_ptr()), gradient.nbytes()}};
    if (const auto bad = find_non_finite(view))
      throw Error({.code = "gradient-not-finite",
                   .what = "cannot learn from a gradient",
                   .where = layer.path(),
                   .why = fmt::format("its element {} is {}", bad->position, bad->value),
                   .fix = "the weights are as they were; a lower learning rate, or other data"});
  }

  /// The gradient is used up: it becomes the change, which becomes places on the grid.
  void learn(Layer& layer) {
    const int64_t step = step_ + 1;
    const AdamWStep factors =
        AdamWStep::make(rate_, config_.beta1, config_.beta2, config_.epsilon, config_.weight_decay, step);
    torch::Tensor change = std::exchange(layer.learning->gradient(), {}).to(torch::kFloat32).contiguous();
    const std::span<float> changes(change.data_ptr<float>(), static_cast<size_t>(change.numel()));
    layer.moments.update(factors, changes);
    QuantizedTensor weight = layer.learning->weight()->unpacked();
    const uint64_t stream = static_cast<uint64_t>(step) << 32 | static_cast<uint64_t>(&layer - layers_.data()) << 1;
    const Requantize how = {.rounding = layer.residual.defined() ? Rounding::error_compensated : Rounding::stochastic,
                            .decay = factors.decay,
                            .first = {config_.seed, stream},
                            .second = {config_.seed, stream + 1}};
    std::span<int8_t> residual;
    if (layer.residual.defined()) residual = {layer.residual.data_ptr<int8_t>(), changes.size()};
    add_to_quantized(how, changes, residual, weight);
    set_weight(layer, std::move(weight));
    layer.learned = step;
  }

  static void set_weight(Layer& layer, QuantizedTensor weight) {
    layer.learning->set_weight(std::move(weight));
    attach_quantized(*layer.linear, layer.learning);
  }

  void check_state(const std::map<std::string, torch::Tensor>& given) const {
    const auto refuse = [](const std::string& name, const std::string& why) {
      throw Error({.code = "incompatible-state",
                   .what = "cannot resume quantized fine-tuning",
                   .where = printable(name),
                   .why = why,
                   .fix = "resume with the model and the configuration that the checkpoint was made with"});
    };
    const std::map<std::string, torch::Tensor> own = state();
    for (const auto& [name, tensor] : own) {
      const auto found = given.find(name);
      if (found == given.end()) refuse(name, "the checkpoint has no such tensor");
      if (found->second.scalar_type() != tensor.scalar_type() || found->second.sizes() != tensor.sizes())
        refuse(name, fmt::format("it is {} of {} elements, {} of {} are needed", toString(found->second.scalar_type()),
                                 found->second.numel(), toString(tensor.scalar_type()), tensor.numel()));
      if (name.ends_with(".scheme") && !found->second.equal(tensor)) refuse(name, "it is quantized in another scheme");
    }
    for (const auto& [name, tensor] : given)
      if (!own.contains(name)) refuse(name, "this model has no such tensor");
  }

  QuantizedFinetuningConfig config_;
  std::vector<Layer> layers_;  ///< fixed once all are added
  double rate_ = 1e-4;
  int64_t step_ = 0;
};

}  // namespace

std::shared_ptr<QuantizedFinetuning> enable_quantized_finetuning(torch::nn::Module& module,
                                                                 const QuantizedFinetuningConfig& config,
                                                                 const ContainerRequest& request) {
  return std::make_shared<Finetuning>(module, config, request);
}

}  // namespace bitwright::train

namespace bitwright {

std::shared_ptr<QuantizedFinetuning> enable_quantized_finetuning(torch::nn::Module& module,
                                                                 const QuantizedFinetuningConfig& config) {
  return train::enable_quantized_finetuning(module, config, train::request_for(config));
}

}  // namespace bitwright
