#include "train/linear.hpp"

#include <ATen/OpaqueTensorImpl.h>
#include <torch/library.h>

namespace bitwright::train {
namespace {

using Handle = std::shared_ptr<LinearBehaviour>;
using StandIn = at::OpaqueTensorImpl<Handle>;
/// Of the keys that are left to others the one that hardly anybody takes: a stand-in is of no device's kind, so every
/// operation on it comes here or nowhere.
constexpr c10::DispatchKey kKey = c10::DispatchKey::PrivateUse3;

torch::Tensor stand_in(const Handle& behaviour, torch::IntArrayRef sizes, caffe2::TypeMeta dtype) {
  const c10::InferenceMode normal(false);  // libtorch counts a view's versions with its base's
  return at::detail::make_tensor<StandIn>(c10::DispatchKeySet(kKey), dtype, c10::Device(c10::kCPU), behaviour, sizes);
}

/// Null for other tensors.
Handle behaviour_in(const torch::Tensor& tensor) {
  if (!tensor.defined() || !tensor.unsafeGetTensorImpl()->key_set().has(kKey)) return nullptr;
  auto* const impl = dynamic_cast<StandIn*>(tensor.unsafeGetTensorImpl());
  return impl == nullptr ? nullptr : impl->opaque_handle();
}

torch::Tensor compute(const torch::Tensor& input, const torch::Tensor& weight, const torch::Tensor& bias) {
  const Handle behaviour = behaviour_in(weight);
  TORCH_CHECK(behaviour != nullptr, "the weight of a linear layer can be multiplied with, and nothing else");
  return behaviour->forward(input, bias.defined() ? bias.to(input.scalar_type()) : bias);
}

torch::Tensor linear(const torch::Tensor& input, const torch::Tensor& weight,
                     const c10::optional<torch::Tensor>& bias) {
  return compute(input, weight, bias.value_or(torch::Tensor()));
}
torch::Tensor transpose(const torch::Tensor& weight) {
  return stand_in(behaviour_in(weight), {weight.size(1), weight.size(0)}, weight.dtype());
}
torch::Tensor matmul(const torch::Tensor& input, const torch::Tensor& weight) { return compute(input, weight, {}); }
torch::Tensor addmm(const torch::Tensor& bias, const torch::Tensor& input, const torch::Tensor& weight,
                    const at::Scalar& beta, const at::Scalar& alpha) {
  if (beta.equal(1) && alpha.equal(1)) return compute(input, weight, bias);
  return bias * beta + compute(input, weight, {}) * alpha;
}
torch::Tensor unchanged(const torch::Tensor& weight) { return weight; }

/// What computes with a stand-in chooses its own types (autocast casts weights).
torch::Tensor of_any_type(const torch::Tensor& weight, c10::ScalarType, bool, bool, c10::optional<at::MemoryFormat>) {
  return weight;
}

template <class Library>
void implement(Library& library) {
  library.impl("linear", linear);
  library.impl("t", transpose);
  library.impl("matmul", matmul);
  library.impl("mm", matmul);
  library.impl("addmm", addmm);
  library.impl("detach", unchanged);
  library.impl("alias", unchanged);
  library.impl("to.dtype", of_any_type);
}
TORCH_LIBRARY_IMPL(aten, PrivateUse3, library) { implement(library); }
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse3, library) { implement(library); }

/// The registry of a module's parameters, which libtorch shows to what is derived from it.
struct Registry : torch::nn::Module {
  static torch::OrderedDict<std::string, torch::Tensor>& of(torch::nn::Module& module) {
    return module.*(&Registry::parameters_);
  }
};

}  // namespace

const Handle& LinearBehaviour::base() const {
  static const Handle none;
  return none;
}

void attach(torch::nn::LinearImpl& linear, const std::shared_ptr<LinearBehaviour>& behaviour,
            const torch::Tensor& parameter) {
  Registry::of(linear)["weight"] = parameter;
  linear.weight = stand_in(behaviour, linear.weight.sizes(), linear.weight.dtype());
}

void detach(torch::nn::LinearImpl& linear, const torch::Tensor& weight) {
  Registry::of(linear)["weight"] = weight;
  linear.weight = weight;
}

std::shared_ptr<LinearBehaviour> behaviour_of(const torch::nn::LinearImpl& linear) {
  return behaviour_in(linear.weight);
}

torch::Tensor parameter_of(const torch::nn::LinearImpl& linear) {
  return linear.named_parameters(/*recurse=*/false)["weight"];
}

void for_each_linear(const torch::nn::Module& module,
                     const std::function<void(const std::string& path, torch::nn::LinearImpl& linear)>& use) {
  if (const auto* const self = module.as<torch::nn::LinearImpl>()) {
    use("", const_cast<torch::nn::LinearImpl&>(*self));
    return;
  }
  std::string inside;  // the path of the linear layer whose own modules follow
  // Not the module itself, which libtorch would ask for its shared_ptr: it may be a variable.
  for (const auto& item : module.named_modules("", /*include_self=*/false)) {
    if (!inside.empty() && item.key().starts_with(inside)) continue;
    auto* const linear = item.value()->as<torch::nn::LinearImpl>();
    if (linear == nullptr) continue;
    inside = item.key() + ".";
    use(item.key(), *linear);
  }
}

}  // namespace bitwright::train
