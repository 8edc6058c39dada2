#include "train/optimizer.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "train/adamw8.hpp"
#include "train/fake_quantized_linear.hpp"

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
  Named(std::vector<NamedParameter> parameters, const AdamWOptions& options, double scale_rate)
      : Optimizer(std::move(parameters)), scale_rate_(scale_rate) {
    std::ranges::stable_sort(parameters_, {}, &NamedParameter::treatment);
    for (const Treatment treatment : kTreatments) {
      std::vector<torch::Tensor> group;
      for (const NamedParameter& parameter : parameters_)
        if (parameter.treatment == treatment) group.push_back(parameter.tensor);
      AdamWOptions own = options;
      if (treatment != Treatment::matrix) own.weight_decay = 0;
      adam_.add_group(group, own);
    }
    BW_ASSERT(adam_.parameters().size() == parameters_.size());
  }
  void step(double learning_rate, double gradient_scale) override {
    for (size_t i = 0; i < std::size(kTreatments); ++i)
      adam_.groups()[i].options.lr = learning_rate * (kTreatments[i] == Treatment::scale ? scale_rate_ : 1);
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
  static constexpr Treatment kTreatments[] = {Treatment::matrix, Treatment::vector, Treatment::scale};
  Adam adam_;
  double scale_rate_;
};

}  // namespace

Treatment treatment_of(std::string_view name, const torch::Tensor& parameter) {
  if (is_learned_scale(name)) return Treatment::scale;
  return parameter.dim() >= 2 && name.ends_with("weight") ? Treatment::matrix : Treatment::vector;
}

std::unique_ptr<Optimizer> make_optimizer(std::string_view name, std::vector<NamedParameter> parameters,
                                          const AdamWOptions& options, double scale_rate) {
  if (name == "adamw8bit") return std::make_unique<Named<AdamW8>>(std::move(parameters), options, scale_rate);
  BW_ASSERT(name == "adamw");
  return std::make_unique<Named<AdamW>>(std::move(parameters), options, scale_rate);
}

}  // namespace bitwright::train
