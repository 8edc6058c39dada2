#include "train/lora.hpp"

#include <fnmatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/error.hpp"
#include "recipe/recipe.hpp"
#include "train/plan.hpp"
#include "train/quantized_linear.hpp"

namespace bitwright {
namespace {

using torch::Tensor;
using train::AdaptedLayer;
using train::LoraBehaviour;
using train::QuantizedLinearBehaviour;

constexpr const char* kAll = "all-linear";

[[noreturn]] void refuse(const std::string& code, const std::string& why, const std::string& fix) {
  throw Error({.code = code,
               .what = "cannot adapt the model",
               .where = "LoraConfig",
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

struct Layer {
  std::string path;
  torch::nn::LinearImpl* layer;
};

std::vector<Layer> targets_of(const torch::nn::Module& model, const LoraConfig& config) {
  std::vector<Layer> found;
  std::vector<bool> used(config.target_modules.size());
  train::for_each_linear(model, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    bool is_one = false;
    for (size_t t = 0; t < used.size(); ++t) {
      if (!train::is_target(config.target_modules[t], path)) continue;
      used[t] = is_one = true;
    }
    const auto excludes = [&](const std::string& target) { return train::is_target(target, path); };
    if (is_one && std::ranges::none_of(config.exclude_modules, excludes)) found.push_back({path, &layer});
  });
  for (size_t t = 0; t < used.size(); ++t)
    if (!used[t])
      refuse("no-target", fmt::format("no linear layer is called '{}'", printable(config.target_modules[t])),
             "target_modules takes the ends of paths (q_proj), globs or all-linear");
  if (found.empty()) refuse("no-target", "exclude_modules leaves no layer", "exclude fewer");
  for (const Layer& layer : found)
    if (train::behaviour_as<LoraBehaviour>(*layer.layer) != nullptr)
      refuse("already-adapted", fmt::format("{} has an adapter", layer.path), "merge it first");
  return found;
}

/// kaiming_uniform with a = sqrt(5), as torch::nn::Linear has it, or a normal distribution.
void initialise(Tensor& a, Tensor& b, const LoraConfig& config) {
  const torch::NoGradGuard no_gradients;
  if (config.init_lora_weights == "gaussian") {
    a.normal_(0, 1 / static_cast<double>(config.r));
  } else {
    torch::nn::init::kaiming_uniform_(a, std::sqrt(5.0));
  }
  b.zero_();
}

void adapt(torch::nn::LinearImpl& layer, const LoraConfig& config, const Tensor& a, const Tensor& b) {
  const auto make = [](const Tensor& weight) {
    torch::nn::Linear linear(torch::nn::LinearOptions(1, 1).bias(false));
    linear->options.in_features(weight.size(1)).out_features(weight.size(0));
    train::detach(*linear, weight.requires_grad_(true));
    return linear;
  };
  const auto lora_a = layer.register_module("lora_A", make(a)), lora_b = layer.register_module("lora_B", make(b));
  lora_a->train(layer.is_training());
  lora_b->train(layer.is_training());
  const auto base = train::behaviour_of(layer);
  const Tensor parameter = train::parameter_of(layer);
  const auto lora =
      std::make_shared<LoraBehaviour>(base, base == nullptr ? parameter : Tensor(), lora_a, lora_b, config);
  train::attach(layer, lora, parameter);
}

void freeze(const torch::nn::Module& model) {
  for (Tensor& parameter : model.parameters())
    if (parameter.is_floating_point()) parameter.requires_grad_(false);
}

void adapt_all(const std::vector<Layer>& targets, const LoraConfig& config) {
  for (const Layer& target : targets) {
    torch::nn::LinearImpl& layer = *target.layer;
    Tensor a = torch::empty({config.r, layer.weight.size(1)}), b = torch::empty({layer.weight.size(0), config.r});
    initialise(a, b, config);
    adapt(layer, config, a, b);
  }
}

std::vector<std::string> paths_of(const std::vector<Layer>& layers) {
  std::vector<std::string> paths;
  for (const Layer& layer : layers) paths.push_back(layer.path);
  return paths;
}

struct Factors {
  Tensor a, b;
};
/// The product b a of rank r that is nearest to a matrix, the singular values divided evenly between both.
Factors nearest_factors(const Tensor& matrix, int64_t r) {
  const auto [u, s, vh] = torch::linalg_svd(matrix, /*full_matrices=*/false, c10::nullopt);
  const int64_t rank = std::min(r, s.size(0));
  const Tensor root = s.narrow(0, 0, rank).sqrt();
  Factors f = {torch::zeros({r, matrix.size(1)}), torch::zeros({matrix.size(0), r})};
  f.a.narrow(0, 0, rank).copy_(root.unsqueeze(1) * vh.narrow(0, 0, rank));
  f.b.narrow(1, 0, rank).copy_(u.narrow(1, 0, rank) * root);
  return f;
}

/// Quantizes what the adapter leaves, adapts to what quantizing leaves, and so on; the nearest of all is kept, for with
/// few bits it is not always the last. The adapter's scaling is taken out.
struct LoftQ {
  QuantizedTensor codes;
  Factors factors;
};
LoftQ loftq(const TensorPlan& plan, const Tensor& weight, const LoraConfig& config) {
  const Tensor w = weight.detach().to(torch::kFloat32);
  LoftQ best;
  double least = std::numeric_limits<double>::infinity();
  Tensor rest = w;
  for (int64_t i = 0; i < config.loftq_iterations; ++i) {
    QuantizedTensor codes = train::quantize_weight(plan, rest);
    const Tensor left = w - train::decoded(codes);
    Factors factors = nearest_factors(left, config.r);
    const Tensor product = at::mm(factors.b, factors.a);
    const double error = (left - product).norm().item<double>();
    if (error < least) best = {std::move(codes), factors};
    least = std::min(least, error);
    rest = w - product;
  }
  best.factors.b = best.factors.b / config.scaling();
  return best;
}

/// The floats that a layer would become, made for each use: of all layers they would not fit.
class Merged : public train::LinearBehaviour {
 public:
  explicit Merged(std::shared_ptr<LoraBehaviour> lora) : lora_(std::move(lora)) {}
  Tensor forward(const Tensor& input, const Tensor& bias) override {
    return torch::linear(input, train::merged_weight(*lora_).to(input.scalar_type()), bias);
  }

 private:
  std::shared_ptr<LoraBehaviour> lora_;
};

}  // namespace

double LoraConfig::scaling() const {
  const auto rank = static_cast<double>(r);
  return lora_alpha / (use_rslora ? std::sqrt(rank) : rank);
}

void check_lora_config(const LoraConfig& c) {
  const auto bad = [](const std::string& why) { refuse("bad-config", why, ""); };
  if (c.r < 1) bad(fmt::format("r is {}, the least is 1", c.r));
  if (!std::isfinite(c.lora_alpha) || c.lora_alpha <= 0) bad(fmt::format("lora_alpha is {}", c.lora_alpha));
  if (!(c.lora_dropout >= 0 && c.lora_dropout < 1))
    bad(fmt::format("lora_dropout is {}, not in [0, 1)", c.lora_dropout));
  if (c.target_modules.empty()) bad("target_modules is empty");
  if (c.loftq_iterations < 1) bad(fmt::format("loftq_iterations is {}, the least is 1", c.loftq_iterations));
  constexpr std::array<std::string_view, 3> kInits = {"default", "gaussian", "loftq"};
  if (std::ranges::find(kInits, c.init_lora_weights) == kInits.end())
    bad(fmt::format("init_lora_weights is '{}', not {}", printable(c.init_lora_weights), fmt::join(kInits, ", ")));
}

std::vector<std::string> add_lora(torch::nn::Module& model, const LoraConfig& config) {
  check_lora_config(config);
  if (config.init_lora_weights == "loftq")
    refuse("bad-config", "loftq chooses the codes of the base too", "use prepare_qlora on a model in floats");
  const std::vector<Layer> targets = targets_of(model, config);
  freeze(model);
  adapt_all(targets, config);
  return paths_of(targets);
}

QuantizationConfig qlora_base() { return {.method = "bnb_nf4", .double_quant = true}; }

std::vector<std::string> prepare_qlora(torch::nn::Module& model, const LoraConfig& config,
                                       const QuantizationConfig& base) {
  const train::ContainerRequest wanted = train::request_of(base);
  return train::prepare_qlora(model, config, wanted.request, wanted.container);
}

LoraMergeReport merge_lora(torch::nn::Module& model, LoraMerge into, const std::function<double()>& loss) {
  const torch::NoGradGuard no_gradients;
  const std::vector<AdaptedLayer> layers = train::adapted_layers(model);
  if (layers.empty())
    throw Error({.code = "no-adapter", .what = "cannot merge", .where = "model", .why = "no layer has an adapter"});
  LoraMergeReport report = {.layers = static_cast<int64_t>(layers.size())};
  double difference = 0, norm = 0;
  const auto requantize = [&](const AdaptedLayer& l, const Tensor& merged) {
    const auto base = std::dynamic_pointer_cast<QuantizedLinearBehaviour>(l.lora->base());
    base->set_weight(base->requantized(merged));
    train::attach_quantized(*l.layer, base);
    difference += (base->decoded() - merged).square().sum(torch::kDouble).item<double>();
    norm += merged.square().sum(torch::kDouble).item<double>();
  };
  if (loss) report.loss_before = loss();
  if (loss && into == LoraMerge::requantize) {
    for (const AdaptedLayer& l : layers)
      train::attach(*l.layer, std::make_shared<Merged>(l.lora), train::parameter_of(*l.layer));
    report.loss_floats = loss();
  }
  for (const AdaptedLayer& l : layers) {
    const Tensor merged = train::merged_weight(*l.lora);
    l.layer->unregister_module("lora_A");
    l.layer->unregister_module("lora_B");
    if (into == LoraMerge::requantize && l.lora->base() != nullptr) {
      requantize(l, merged);
    } else {
      train::detach(*l.layer, merged);
    }
  }
  if (loss) report.loss = loss();
  if (!report.loss_floats) report.loss_floats = report.loss;
  report.relative_error = norm > 0 ? std::sqrt(difference / norm) : 0;
  return report;
}

}  // namespace bitwright

namespace bitwright::train {

LoraBehaviour::LoraBehaviour(std::shared_ptr<LinearBehaviour> base, Tensor weight, torch::nn::Linear a,
                             torch::nn::Linear b, const LoraConfig& config)
    : base_(std::move(base)),
      weight_(std::move(weight)),
      a_(std::move(a)),
      b_(std::move(b)),
      scaling_(config.scaling()),
      dropout_(config.lora_dropout) {}

Tensor LoraBehaviour::forward(const Tensor& input, const Tensor& bias) {
  const auto type = input.scalar_type();
  const Tensor y = base_ != nullptr ? base_->forward(input, bias) : torch::linear(input, weight_.to(type), bias);
  const Tensor x = dropout_ > 0 ? torch::dropout(input, dropout_, a_->is_training()) : input;
  const Tensor inner = torch::linear(x, a_->weight.to(type));
  return torch::add(y, torch::linear(inner, b_->weight.to(type)), scaling_);
}

Tensor LoraBehaviour::change() const {
  const torch::NoGradGuard no_gradients;
  return at::mm(b_->weight, a_->weight) * scaling_;
}

Tensor merged_weight(const LoraBehaviour& lora) {
  const torch::NoGradGuard no_gradients;
  if (lora.base() == nullptr)
    return (lora.weight().to(torch::kFloat32) + lora.change()).to(lora.weight().scalar_type());
  const auto base = std::dynamic_pointer_cast<QuantizedLinearBehaviour>(lora.base());
  if (base == nullptr)
    throw Error({.code = "no-adapter",
                 .what = "cannot merge",
                 .where = "model",
                 .why = "a layer below an adapter is neither floats nor a frozen quantized weight"});
  return base->decoded().add_(lora.change());
}

std::vector<std::string> prepare_qlora(torch::nn::Module& model, const LoraConfig& config,
                                       const QuantizationRequest& request, const Container* container) {
  check_lora_config(config);
  const std::vector<Layer> targets = targets_of(model, config);
  const ModulePlan plan = plan_module(model, request, container);
  const bool by_loftq = config.init_lora_weights == "loftq";
  const auto to_quantize = [](const LayerPlan& l) { return l.plan.scheme && behaviour_of(*l.layer) == nullptr; };
  const auto starts_by_loftq = [&](const LayerPlan& l) {
    return by_loftq && std::ranges::find(targets, l.layer, &Layer::layer) != targets.end();
  };
  for (const LayerPlan& l : plan.layers)
    if (starts_by_loftq(l) && !to_quantize(l))
      refuse("bad-config", fmt::format("loftq starts from floats that are quantized; {} is not such a layer", l.path),
             "use init_lora_weights default");
  freeze(model);
  const torch::NoGradGuard no_gradients;
  for (const LayerPlan& l : plan.layers) {
    if (!to_quantize(l)) continue;
    const auto attach = [&](QuantizedTensor weight) {
      attach_quantized(*l.layer,
                       std::make_shared<QuantizedLinearBehaviour>(std::move(weight), l.plan.linear, container));
    };
    const Tensor weight = l.layer->weight;
    if (!starts_by_loftq(l)) {
      attach(quantize_weight(l.plan, weight));
      continue;
    }
    LoftQ start = loftq(l.plan, weight, config);
    attach(std::move(start.codes));
    adapt(*l.layer, config, start.factors.a, start.factors.b);
  }
  if (!by_loftq) adapt_all(targets, config);
  return paths_of(targets);
}

std::vector<AdaptedLayer> adapted_layers(const torch::nn::Module& model) {
  std::vector<AdaptedLayer> found;
  for_each_linear(model, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    if (auto lora = behaviour_as<LoraBehaviour>(layer)) found.push_back({path, &layer, std::move(lora)});
  });
  return found;
}

bool is_target(const std::string& target, const std::string& path) {
  if (target == kAll) return !is_head(path + ".weight");
  if (target.find_first_of("*?[") != std::string::npos) return fnmatch(target.c_str(), path.c_str(), 0) == 0;
  return path == target || path.ends_with("." + target);
}

}  // namespace bitwright::train
