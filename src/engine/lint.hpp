#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>  // facts of the model
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/plan.hpp"
#include "recipe/recipe.hpp"
#include "scheme/quantized_tensor.hpp"

namespace bitwright {

/// How the weight of a linear layer is stored, as far as engines tell such forms apart.
struct WeightForm {
  std::string type = "int";  ///< int, float, table ("nf4"), block (GGUF's)
  int bits = 4;
  int64_t group = 0;                          ///< inputs that share a scale; -1: all of a row; 0: one scale a matrix
  int64_t block_rows = 0, block_columns = 0;  ///< of two-dimensional blocks, else 0
  bool symmetric = true;
  bool act_order = false;  ///< a column's group is given by an index (GPTQ's desc_act)
  bool operator==(const WeightForm&) const = default;
};
/// None for plain numbers.
std::optional<WeightForm> form_of(const Scheme& scheme);
/// "4-bit int, groups of 128, act-order".
std::string describe(const WeightForm& form);

/// A linear layer of a checkpoint as it is stored, or as a recipe plans it.
struct LinearModule {
  std::string name;                  ///< "model.layers.0.self_attn.q_proj"; stacked experts: "...mlp.experts.up_proj"
  int64_t rows = 0, columns = 0;     ///< outputs and inputs; 0: unknown
  std::optional<WeightForm> form{};  ///< none: kept in floating point
};

/// The tensors that are linear layers' weights: two dimensions or, stacked experts, three; embeddings, norms and
/// routers are none. `scheme` null: kept.
std::optional<LinearModule> linear_module(std::string_view tensor, const Shape& shape, const Scheme* scheme,
                                          const Facts& facts = Facts::standard());

/// The linear layers as a recipe will store them. `tensors`: those the recipe was made from.
std::vector<LinearModule> planned_modules(const Recipe& recipe, std::span<const TensorFacts> tensors,
                                          const Facts& facts = Facts::standard());

/// What the engine of `plan` refuses of these layers, with `lint` of its facts: layers it fuses that are stored in
/// different forms (FUSED_MISMATCH) or of which some are kept (CANNOT_IGNORE), groups and blocks that tensor
/// parallelism would cut (GROUP_CUT), sizes its kernels cannot tile (TILE_SIZE), act-order it has no kernel for
/// (DESC_ACT). One diagnostic for each rule: it names the first layer concerned and counts the others. `request` as for
/// plan_engine.
std::vector<Diagnostic> lint_modules(std::span<const LinearModule> modules, const PlanRequest& request,
                                     const EnginePlan& plan, const Facts& facts = Facts::standard());

/// Adds what else speaks against a plan, and to its outcome what that is worth.
void add_diagnostics(std::vector<Diagnostic> diagnostics, EnginePlan& plan);

}  // namespace bitwright
