#include "train/tensor_types.hpp"

#include <algorithm>
#include <array>

namespace bitwright::train {
namespace {

struct Pair {
  torch::ScalarType torch;
  DType ours;
};
constexpr std::array<Pair, 10> kTypes = {{{torch::kFloat64, DType::f64},
                                          {torch::kFloat32, DType::f32},
                                          {torch::kFloat16, DType::f16},
                                          {torch::kBFloat16, DType::bf16},
                                          {torch::kInt64, DType::i64},
                                          {torch::kInt32, DType::i32},
                                          {torch::kInt16, DType::i16},
                                          {torch::kInt8, DType::i8},
                                          {torch::kUInt8, DType::u8},
                                          {torch::kBool, DType::boolean}}};

}  // namespace

std::optional<DType> stored_dtype(torch::ScalarType type) {
  const auto* const found = std::ranges::find(kTypes, type, &Pair::torch);
  return found == kTypes.end() ? std::nullopt : std::optional(found->ours);
}

std::optional<torch::ScalarType> tensor_type(DType dtype) {
  const auto* const found = std::ranges::find(kTypes, dtype, &Pair::ours);
  return found == kTypes.end() ? std::nullopt : std::optional(found->torch);
}

}  // namespace bitwright::train
