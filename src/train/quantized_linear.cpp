#include "train/quantized_linear.hpp"

#include <algorithm>
#include <typeinfo>

#include "algorithm/rtn.hpp"
#include "base/error.hpp"
#include "base/threads.hpp"
#include "kernels/decode.hpp"
#include "kernels/dequantize_matmul.hpp"
#include "kernels/row_gradients.hpp"

namespace bitwright::train {
namespace {

using Weight = std::shared_ptr<const CompactTensor>;

DType dtype_of_input(torch::ScalarType type) { return type == torch::kFloat32 ? DType::f32 : DType::bf16; }

/// [..., inner] to [..., outer], both in the type of `input`.
torch::Tensor run(const torch::Tensor& input, const CompactTensor& weight, bool forward) {
  const torch::Tensor in = input.contiguous();
  std::vector<int64_t> sizes = in.sizes().vec();
  const int64_t inner = sizes.back();
  sizes.back() = weight.shape()[forward ? 0 : 1];
  const torch::Tensor out = torch::empty(sizes, in.options().requires_grad(false));
  const DType type = dtype_of_input(in.scalar_type());
  const DequantizeMatmul& way = dequantize_matmul_for(type);
  (forward ? way.forward : way.backward)({.weight = weight,
                                          .type = type,
                                          .tokens = static_cast<size_t>(in.numel() / std::max<int64_t>(inner, 1)),
                                          .in = static_cast<const std::byte*>(in.data_ptr()),
                                          .out = static_cast<std::byte*>(out.data_ptr())});
  return out;
}

/// Keeps a weight for the backward pass.
struct Kept : torch::CustomClassHolder {
  explicit Kept(Weight w) : weight(std::move(w)) {}
  Weight weight;
};

struct Product : torch::autograd::Function<Product> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& input,
                               const Weight& weight) {
    context->saved_data["weight"] = torch::IValue::make_capsule(c10::make_intrusive<Kept>(weight));
    return run(input, *weight, true);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto kept = context->saved_data["weight"].toCapsule();
    return {run(gradients[0], *static_cast<const Kept*>(kept.get())->weight, false), torch::Tensor()};
  }
};

}  // namespace

torch::Tensor multiply_quantized(const torch::Tensor& input, const Weight& weight) {
  TORCH_CHECK(input.dim() > 0 && input.size(-1) == weight->shape().at(1), "a layer of ", weight->shape().at(1),
              " inputs is given ", input.dim() > 0 ? input.size(-1) : 0);
  TORCH_CHECK(input.scalar_type() == torch::kFloat32 || input.scalar_type() == torch::kBFloat16,
              "a quantized layer takes float32 or bfloat16, not ", input.scalar_type());
  return Product::apply(input, weight);
}

QuantizedLinearBehaviour::QuantizedLinearBehaviour(QuantizedTensor weight, QuantizedLinear linear,
                                                   const Container* owner)
    : linear_(std::move(linear)), owner_(owner) {
  set_weight(std::move(weight));
}

void QuantizedLinearBehaviour::set_weight(QuantizedTensor weight) {
  check_sizes(weight, "weight of a linear layer");
  set_weight(std::make_shared<const CompactTensor>(std::move(weight)));
}

void QuantizedLinearBehaviour::set_weight(std::shared_ptr<const CompactTensor> weight) {
  BW_ASSERT(weight->shape().size() == 2 && (weight_ == nullptr || weight_->shape() == weight->shape()));
  weight_ = std::move(weight);
}

QuantizedTensor QuantizedLinearBehaviour::requantized(const torch::Tensor& floats) const {
  const torch::Tensor values = floats.detach().to(torch::kCPU, torch::kFloat32).contiguous();
  const ElementType& element = *scheme().element;
  AlgorithmOptions options;
  if (owner_ != nullptr) options.owner = owner_->encode;
  if (options.owner == nullptr && element.kind == ElementKind::integer && element.bits < 8)
    options.range = RangeRule::mse;
  const std::span<const float> all(values.data_ptr<float>(), static_cast<size_t>(values.numel()));
  return nearest_codes(scheme(), weight_->shape(), {.dtype = DType::f32, .bytes = std::as_bytes(all)}, options);
}

torch::Tensor QuantizedLinearBehaviour::forward(const torch::Tensor& input, const torch::Tensor& bias) {
  const torch::Tensor y = multiply_quantized(prepare(input), weight_);
  return bias.defined() ? y + bias : y;
}

torch::Tensor QuantizedLinearBehaviour::codes() const {
  const std::span<const std::byte> codes = weight_->codes();
  const int64_t bytes = static_cast<int64_t>(codes.size()), rows = weight_->shape()[0];
  // Never written to: a parameter without gradient is nothing that optimizers touch.
  void* const data = const_cast<std::byte*>(codes.data());
  const torch::Tensor all = torch::from_blob(
      data, {bytes}, [kept = weight_](void*) {}, torch::kUInt8);
  return rows > 0 && bytes % rows == 0 ? all.view({rows, bytes / rows}) : all;
}

torch::Tensor QuantizedLinearBehaviour::decoded() const {
  torch::Tensor all = torch::empty(weight_->shape(), torch::kFloat32);
  const CompactDecoder decoder(*weight_);
  const std::span<float> out(all.data_ptr<float>(), static_cast<size_t>(all.numel()));
  parallel_ranges(out.size(), size_t{1} << 16, [&](size_t begin, size_t end) {
    decoder.decode(static_cast<int64_t>(begin), out.subspan(begin, end - begin));
  });
  return all;
}

std::optional<FrozenHead> QuantizedLinearBehaviour::as_head() const {
  if (typeid(*this) != typeid(QuantizedLinearBehaviour)) return std::nullopt;
  const int64_t inputs = weight_->shape()[1];
  const auto decoder = std::make_shared<const CompactDecoder>(*weight_);
  const auto write = [weight = weight_, decoder, inputs](int64_t first, int64_t count, bool bf16, void* out) {
    const auto width = static_cast<size_t>(inputs);
    parallel_ranges(static_cast<size_t>(count), 16, [&](size_t begin, size_t end) {
      std::vector<float> row(bf16 ? width : 0);
      for (size_t i = begin; i < end; ++i) {
        const int64_t at = (first + static_cast<int64_t>(i)) * inputs;
        if (!bf16) {
          decoder->decode(at, {static_cast<float*>(out) + i * width, width});
          continue;
        }
        decoder->decode(at, row);
        round_to_bf16(row.data(), width, static_cast<uint16_t*>(out) + i * width);
      }
    });
  };
  return FrozenHead{.words = weight_->shape()[0], .inputs = inputs, .write = write};
}

torch::Tensor decoded(const QuantizedTensor& tensor) {
  torch::Tensor all = torch::empty(tensor.shape, torch::kFloat32);
  bitwright::decode(tensor, {all.data_ptr<float>(), static_cast<size_t>(all.numel())});
  return all;
}

void attach_quantized(torch::nn::LinearImpl& linear, const std::shared_ptr<QuantizedLinearBehaviour>& behaviour) {
  attach(linear, behaviour, behaviour->codes());
}

}  // namespace bitwright::train
