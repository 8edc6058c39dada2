#include "train/quantized_linear.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "base/threads.hpp"

namespace bitwright::train {
namespace {

constexpr int64_t kTile = int64_t{1} << 18;  ///< elements decoded at a time: they stay in the second-level cache

using Weight = std::shared_ptr<const CompactTensor>;

/// use(begin, rows) for tiles of whole rows, decoded to `type`.
template <class Use>
void for_each_tile(const CompactTensor& weight, torch::ScalarType type, const Use& use) {
  const int64_t rows = weight.shape()[0], columns = weight.shape()[1];
  const int64_t most = std::clamp<int64_t>(kTile / std::max<int64_t>(columns, 1), 1, std::max<int64_t>(rows, 1));
  const CompactDecoder decoder(weight);
  const torch::Tensor floats = torch::empty({most, columns}, torch::kFloat32);
  for (int64_t begin = 0; begin < rows; begin += most) {
    const int64_t count = std::min(most, rows - begin);
    const std::span<float> out(floats.data_ptr<float>(), static_cast<size_t>(count * columns));
    parallel_ranges(out.size(), size_t{1} << 14, [&](size_t first, size_t end) {
      decoder.decode(begin * columns + static_cast<int64_t>(first), out.subspan(first, end - first));
    });
    use(begin, floats.narrow(0, 0, count).to(type));
  }
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
    const int64_t rows = weight->shape()[0], columns = weight->shape()[1];
    const torch::Tensor x = input.reshape({-1, columns});
    std::vector<int64_t> sizes = input.sizes().vec();
    sizes.back() = rows;
    const torch::Tensor result = torch::empty(sizes, x.options());  // no view: libtorch adds a bias in place
    const torch::Tensor y = result.view({-1, rows});
    for_each_tile(*weight, x.scalar_type(), [&](int64_t begin, const torch::Tensor& tile) {
      y.narrow(1, begin, tile.size(0)).copy_(at::mm(x, tile.t()));
    });
    return result;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto kept = context->saved_data["weight"].toCapsule();
    const Weight& weight = static_cast<const Kept*>(kept.get())->weight;
    const int64_t rows = weight->shape()[0], columns = weight->shape()[1];
    const torch::Tensor dy = gradients[0].reshape({-1, rows});
    torch::Tensor dx = torch::zeros({dy.size(0), columns}, dy.options().dtype(torch::kFloat32));
    for_each_tile(*weight, dy.scalar_type(), [&](int64_t begin, const torch::Tensor& tile) {
      dx += at::mm(dy.narrow(1, begin, tile.size(0)), tile);
    });
    std::vector<int64_t> sizes = gradients[0].sizes().vec();
    sizes.back() = columns;
    return {dx.to(dy.scalar_type()).reshape(sizes), torch::Tensor()};
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

QuantizedLinearBehaviour::QuantizedLinearBehaviour(QuantizedTensor weight, QuantizedLinear linear)
    : linear_(std::move(linear)) {
  set_weight(std::move(weight));
}

void QuantizedLinearBehaviour::set_weight(QuantizedTensor weight) {
  check_sizes(weight, "weight of a linear layer");
  BW_ASSERT(weight.shape.size() == 2 && (weight_ == nullptr || weight_->shape() == weight.shape));
  weight_ = std::make_shared<const CompactTensor>(std::move(weight));
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
  for_each_tile(*weight_, torch::kFloat32,
                [&](int64_t begin, const torch::Tensor& tile) { all.narrow(0, begin, tile.size(0)).copy_(tile); });
  return all;
}

void attach_quantized(torch::nn::LinearImpl& linear, const std::shared_ptr<QuantizedLinearBehaviour>& behaviour) {
  attach(linear, behaviour, behaviour->codes());
}

}  // namespace bitwright::train
