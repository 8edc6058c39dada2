#include "train/fake_quantize.hpp"

#include <algorithm>
#include <cmath>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "kernels/decode.hpp"
#include "kernels/fake_quantize.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Type = c10::optional<torch::ScalarType>;

constexpr size_t kGrain = size_t{1} << 16;

/// Of types that the kernels read; others are widened first.
std::optional<DType> kernel_type(torch::ScalarType type) {
  if (type == torch::kFloat) return DType::f32;
  if (type == torch::kBFloat16) return DType::bf16;
  if (type == torch::kHalf) return DType::f16;
  return std::nullopt;
}

Tensor readable(const Tensor& x) { return (kernel_type(x.scalar_type()) ? x : x.to(torch::kFloat)).contiguous(); }

WeightView view(const Tensor& x) {
  return {*kernel_type(x.scalar_type()), {static_cast<const std::byte*>(x.data_ptr()), x.nbytes()}};
}
std::span<const float> floats(const Tensor& x) {
  if (!x.defined()) return {};
  return {x.data_ptr<float>(), static_cast<size_t>(x.numel())};
}
Shape shape_of(const Tensor& x) { return x.sizes().vec(); }

GroupRuns runs_of(const IntegerGrid& grid, const Shape& shape) {
  const auto runs = group_runs(grid.grouping, shape);
  if (!runs)
    throw Error({.code = "bad-scheme",
                 .what = "cannot quantize with given scales",
                 .why = "its groups are not of consecutive elements"});
  return *runs;
}

/// x and gradients are contiguous, of types the kernels read; scale and zero f32 and contiguous.
FakeTensor fake_tensor(const Tensor& x, const Tensor& scale, const Tensor& zero, const IntegerGrid& grid) {
  const GroupRuns runs = runs_of(grid, shape_of(x));
  const auto fits = [&](const Tensor& t) { return !t.defined() || t.numel() == runs.groups; };
  TORCH_CHECK(scale.defined() && fits(scale) && fits(zero), "one scale and zero point for each of ", runs.groups,
              " groups");
  return {.values = view(x),
          .runs = runs,
          .scales = floats(scale),
          .zeros = floats(zero),
          .lowest = grid.lowest,
          .highest = grid.highest};
}

Tensor parameters_of(const Tensor& t) { return t.defined() ? t.to(torch::kFloat).contiguous() : t; }

struct FakeIntegers : Function<FakeIntegers> {
  /// zero: undefined tensors are no arguments of a Function.
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& scale,
                        const c10::optional<Tensor>& zero, const IntegerGrid& grid, double factor,
                        torch::ScalarType type) {
    const Tensor from = readable(x), s = parameters_of(scale), z = parameters_of(zero.value_or(Tensor()));
    context->save_for_backward({from, s, z});
    context->saved_data["axis"] =
        std::vector<int64_t>{static_cast<int64_t>(grid.grouping.kind), grid.grouping.axis, grid.grouping.size};
    context->saved_data["codes"] =
        std::vector<double>{static_cast<double>(grid.lowest), static_cast<double>(grid.highest), factor};
    context->saved_data["types"] =
        std::vector<int64_t>{static_cast<int64_t>(x.scalar_type()), static_cast<int64_t>(scale.scalar_type())};
    const Tensor out = torch::empty(x.sizes(), from.options().dtype(kernel_type(type) ? type : torch::kFloat));
    fake_quantize(fake_tensor(from, s, z, grid), *kernel_type(out.scalar_type()),
                  static_cast<std::byte*>(out.data_ptr()));
    return out.to(type);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const auto axis = context->saved_data["axis"].toIntVector();
    const auto codes = context->saved_data["codes"].toDoubleVector();
    const auto types = context->saved_data["types"].toIntVector();
    const IntegerGrid grid = {
        .grouping = {.kind = static_cast<Grouping::Kind>(axis[0]), .axis = static_cast<int>(axis[1]), .size = axis[2]},
        .lowest = static_cast<float>(codes[0]),
        .highest = static_cast<float>(codes[1])};
    const Tensor gradient = readable(gradients[0]), out = torch::empty_like(saved[0]);
    const FakeGradients sums = fake_quantize_backward(fake_tensor(saved[0], saved[1], saved[2], grid), view(gradient),
                                                      static_cast<std::byte*>(out.data_ptr()));
    const auto learned = [&](const std::vector<float>& sum, const Tensor& like) {
      if (!like.defined()) return Tensor();
      return (torch::tensor(sum) * codes[2]).reshape(like.sizes()).to(static_cast<torch::ScalarType>(types[1]));
    };
    return {out.to(static_cast<torch::ScalarType>(types[0])),
            learned(sums.scale, saved[1]),
            learned(sums.zero, saved[2]),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

/// What is computed of x apart from autograd, with x's gradient, or that times a mask.
struct StraightThrough : Function<StraightThrough> {
  struct Result {
    Tensor value, mask;
  };
  static Tensor forward(AutogradContext* context, const Tensor& x, const Result& result) {
    context->save_for_backward({result.mask});
    context->saved_data["type"] = static_cast<int64_t>(x.scalar_type());
    return result.value;
  }
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor mask = context->get_saved_variables()[0];
    const auto type = static_cast<torch::ScalarType>(context->saved_data["type"].toInt());
    const Tensor gradient = gradients[0].to(type);
    return {mask.defined() ? gradient * mask : gradient, Tensor()};
  }
};

/// Which values of x are within what their groups' codes reach.
Tensor within_range(const Tensor& x, const QuantizedTensor& t) {
  const Tensor wide = x.to(torch::kFloat).contiguous(), mask = torch::empty(x.sizes(), torch::kBool);
  const float* const values = wide.data_ptr<float>();
  bool* const inside = mask.data_ptr<bool>();
  if (!t.scheme.scale) return mask.fill_(true);
  const Decoder decoder(t);
  const GroupMap groups(t.scheme.scale->grouping, t.shape, t.group_index);
  const bool integer = t.scheme.element->kind == ElementKind::integer;
  const bool has_zero = t.scheme.offset_kind == OffsetKind::zero_point;
  parallel_ranges(static_cast<size_t>(x.numel()), kGrain, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end;) {
      const auto at = static_cast<int64_t>(i);
      const auto g = static_cast<size_t>(groups.group_of(at));
      const size_t stop = std::min(end, i + static_cast<size_t>(groups.run_length(at)));
      const float scale = decoder.scales()[g], inverse = scale == 0 ? 0 : 1 / scale;
      const float zero = has_zero ? decoder.offsets()[g] : 0;
      // A float's scale is rounded, so that the largest value may be a little beyond.
      const float slack = integer ? 1.0f : 1 + 0x1p-20f;
      const float lowest = (t.scheme.element->lowest - zero) * slack;
      const float highest = (t.scheme.element->highest - zero) * slack;
      for (; i < stop; ++i) {
        const float code = integer ? std::nearbyint(values[i] * inverse) : values[i] * inverse;
        inside[i] = code >= lowest && code <= highest;
      }
    }
  });
  return mask;
}

/// Floats with a given scale: by the definition, value by value.
Tensor with_fixed_scale(const Tensor& x, const Scheme& scheme, float scale) {
  const Tensor wide = x.to(torch::kFloat).contiguous(), out = torch::empty_like(wide);
  const float* const values = wide.data_ptr<float>();
  float* const to = out.data_ptr<float>();
  const GroupParameters p = {.scale = scale};
  const ElementType& type = *scheme.element;
  parallel_ranges(static_cast<size_t>(x.numel()), kGrain, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i)
      to[i] = decode_value(scheme, p, type.decode(type, encode_value(scheme, p, values[i])));
  });
  return out.to(x.scalar_type());
}

/// Qp: of unsigned codes, half of which stand for negative numbers, that half.
double positive_codes(const IntegerGrid& grid) {
  return static_cast<double>(grid.lowest < 0 ? grid.highest : std::ceil(grid.highest / 2));
}

}  // namespace

std::optional<IntegerGrid> integer_grid(const Scheme& scheme) {
  if (scheme.element == nullptr || scheme.element->kind != ElementKind::integer) return std::nullopt;
  if (!scheme.scale || scheme.scale->divides || scheme.factor != 1) return std::nullopt;
  const Scheme& stored = *scheme.scale->scheme;
  if (!stored.is_plain() || stored.element->kind != ElementKind::floating || stored.element->bits < 16)
    return std::nullopt;
  const bool has_zero = scheme.offset_kind == OffsetKind::zero_point;
  if (!has_zero && scheme.offset_kind != OffsetKind::none) return std::nullopt;
  if (has_zero && (scheme.offset->grouping != scheme.scale->grouping || !scheme.offset->scheme->is_plain() ||
                   scheme.offset->scheme->element->kind != ElementKind::integer))
    return std::nullopt;
  const Grouping& grouping = scheme.scale->grouping;
  if (!group_runs(grouping, {1, 1})) return std::nullopt;
  return IntegerGrid{grouping, scheme.element->lowest, scheme.element->highest};
}

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const Tensor& zero, const IntegerGrid& grid,
                     double gradient_factor, Type type) {
  if (x.numel() == 0) return x;
  const auto points = zero.defined() ? c10::optional<Tensor>(zero) : c10::nullopt;
  return FakeIntegers::apply(x, scale, points, grid, gradient_factor, type.value_or(x.scalar_type()));
}

double lsq_factor(const IntegerGrid& grid, torch::IntArrayRef shape) {
  const GroupRuns runs = runs_of(grid, shape.vec());
  return 1 / std::sqrt(static_cast<double>(std::min(runs.size, runs.line)) * positive_codes(grid));
}

Tensor lsq_scales(const Tensor& x, const IntegerGrid& grid) {
  const Tensor wide = x.detach().to(torch::kFloat).contiguous();
  const GroupRuns runs = runs_of(grid, shape_of(x));
  const float* const values = wide.data_ptr<float>();
  Tensor scales = torch::empty({runs.groups});
  for (int64_t g = 0; g < runs.groups; ++g) {
    double sum = 0;
    for (int64_t i = runs.start(g); i < runs.end_of(g); ++i) sum += std::fabs(static_cast<double>(values[i]));
    const double mean = sum / static_cast<double>(runs.end_of(g) - runs.start(g));
    scales[g] = 2 * mean / std::sqrt(positive_codes(grid));
  }
  return scales;
}

QuantizedTensor quantize_with(const Scheme& scheme, const Tensor& x, const Tensor& scale, const Tensor& zero) {
  const auto grid = integer_grid(scheme);
  BW_ASSERT(grid.has_value());
  QuantizedTensor t = {.scheme = scheme, .shape = shape_of(x)};
  const auto store = [&](const Parameter& p, const Tensor& numbers) {
    const Tensor wide = parameters_of(numbers.detach());
    return std::make_shared<QuantizedTensor>(encode(*p.scheme, parameter_shape(p.grouping, t.shape), floats(wide)));
  };
  t.scale = store(*scheme.scale, scale);
  if (scheme.offset) t.offset = store(*scheme.offset, zero);
  const std::vector<float> scales = decode(*t.scale), zeros = t.offset ? decode(*t.offset) : std::vector<float>();
  const Tensor wide = x.detach().to(torch::kFloat).contiguous();
  const float* const values = wide.data_ptr<float>();
  const GroupRuns runs = runs_of(*grid, t.shape);
  t.codes.resize(static_cast<size_t>(wide.numel()));
  const auto mask = (1u << scheme.element->bits) - 1;
  parallel_ranges(static_cast<size_t>(runs.groups), 64, [&](size_t begin, size_t end) {
    for (size_t g = begin; g < end; ++g) {
      const float inverse = scales[g] == 0 ? 0 : 1 / scales[g], z = zeros.empty() ? 0 : zeros[g];
      for (auto i = runs.start(static_cast<int64_t>(g)); i < runs.end_of(static_cast<int64_t>(g)); ++i) {
        const float rounded = std::nearbyint(values[i] * inverse);
        const float code = std::min(std::max(grid->lowest - z, rounded), grid->highest - z) + z;
        t.codes[static_cast<size_t>(i)] = static_cast<std::byte>(static_cast<uint32_t>(static_cast<int>(code)) & mask);
      }
    }
  });
  return t;
}

Tensor stored_scale(const Tensor& scale, DType type) {
  const bool half = type == DType::f16;
  const Tensor positive = scale.detach().to(torch::kFloat).clamp_min(half ? 0x1p-24 : 0x1p-126);
  const auto narrow = half ? torch::kHalf : type == DType::bf16 ? torch::kBFloat16 : torch::kFloat;
  const Tensor stored = positive.clamp_max(half ? 65504.0 : 3e38).to(narrow).to(torch::kFloat);
  return StraightThrough::apply(scale, StraightThrough::Result{stored, {}});
}

Tensor stored_zero(const Tensor& zero, const IntegerGrid& grid) {
  const Tensor stored = zero.detach().to(torch::kFloat).round().clamp(grid.lowest, grid.highest);
  return StraightThrough::apply(zero, StraightThrough::Result{stored, {}});
}

Tensor fake_quantize(const Tensor& x, const Quantize& quantize, bool clips, Type type) {
  if (x.numel() == 0) return x;
  const Tensor from = readable(x.detach()), wide = torch::empty(x.sizes(), torch::kFloat);
  const QuantizedTensor t = quantize(from);
  decode(t, std::span(wide.data_ptr<float>(), static_cast<size_t>(wide.numel())));
  StraightThrough::Result result = {wide.to(type.value_or(x.scalar_type())), {}};
  if (clips && x.requires_grad() && torch::GradMode::is_enabled()) result.mask = within_range(from, t);
  return StraightThrough::apply(x, result);
}

Quantize quantizer(const Scheme& scheme, RangeRule rule) {
  return [scheme, rule](const Tensor& x) { return encode(scheme, shape_of(x), view(x), rule); };
}

Tensor fake_quantize_activation(const Tensor& x, const ActivationScheme& activation) {
  if (x.numel() == 0) return x;
  const Tensor rows = x.reshape({-1, x.size(-1)});
  if (activation.dynamic) return fake_quantize(rows, quantizer(activation.scheme)).reshape(x.sizes());
  const float scale = decode(*activation.scale).at(0);
  const auto grid = integer_grid(activation.scheme);
  if (!grid) {
    const float most = activation.scheme.element->highest * scale;
    StraightThrough::Result result = {with_fixed_scale(rows.detach(), activation.scheme, scale), {}};
    result.mask = rows.detach().abs() <= most;
    return StraightThrough::apply(rows, result).reshape(x.sizes());
  }
  const Tensor zero = activation.offset ? torch::tensor(decode(*activation.offset)) : Tensor();
  return fake_quantize(rows, torch::tensor({scale}), zero, *grid).reshape(x.sizes());
}

ActivationScheme fixed_activation(const Scheme& scheme, Range range) {
  const ChosenParameters chosen = encode_parameters(scheme, {1, 1}, std::span(&range, 1));
  return {.scheme = scheme, .dynamic = false, .scale = chosen.scale, .offset = chosen.offset};
}

}  // namespace bitwright::train
