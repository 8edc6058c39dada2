#include "train/optimizer.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "train/adamw8.hpp"

namespace bitwright::train {
namespace {

using Tensors = std::map<std::string, torch::Tensor>;

void add_state(const std::string& name, const AdamW::Parameter& parameter, Tensors& state) {
  state["m." + name] = parameter.m;
  state["v." + name] = parameter.v;
}
void add_state(const std::string& name, const AdamW8::Parameter& parameter, Tensors& state) {
  const Moments& moments = parameter.moments;
  state["m." + name] = moments.first;
  state["v." + name] = moments.second;
  if (!moments.first_scale.defined()) return;
  state["m_scale." + name] = moments.first_scale;
  state["v_scale." + name] = moments.second_scale;
}

template <class Adam>
class Named : public Optimizer {
 public:
  Named(std::vector<NamedParameter> parameters, const AdamWOptions& options) : Optimizer(std::move(parameters)) {
    std::ranges::stable_partition(parameters_, &NamedParameter::decays);
    for (const bool decays : {true, false}) {
      std::vector<torch::Tensor> group;
      for (const NamedParameter& parameter : parameters_)
        if (parameter.decays == decays) group.push_back(parameter.tensor);
      AdamWOptions own = options;
      if (!decays) own.weight_decay = 0;
      adam_.add_group(group, own);
    }
    BW_ASSERT(adam_.parameters().size() == parameters_.size());
  }
  void step(double learning_rate, double gradient_scale) override {
    for (auto& group : adam_.groups()) group.options.lr = learning_rate;
    adam_.step(gradient_scale);
  }
  void zero_grad() override { adam_.zero_grad(); }
  Tensors state() override {
    Tensors state;
    for (size_t i = 0; i < parameters_.size(); ++i) add_state(parameters_[i].name, adam_.parameters()[i], state);
    return state;
  }
  std::map<std::string, int64_t*> steps() override {
    std::map<std::string, int64_t*> steps;
    for (size_t i = 0; i < parameters_.size(); ++i) steps[parameters_[i].name] = &adam_.parameters()[i].step;
    return steps;
  }

 private:
  Adam adam_;
};

}  // namespace

std::unique_ptr<Optimizer> make_optimizer(std::string_view name, std::vector<NamedParameter> parameters,
                                          const AdamWOptions& options) {
  if (name == "adamw8bit") return std::make_unique<Named<AdamW8>>(std::move(parameters), options);
  BW_ASSERT(name == "adamw");
  return std::make_unique<Named<AdamW>>(std::move(parameters), options);
}

}  // namespace bitwright::train
