#include "quantize/output_layout.hpp"

#include <fmt/format.h>

#include <set>
#include <utility>

#include "base/error.hpp"

namespace bitwright {
namespace {

void check_fits(const StoredTensor& tensor, const Container& container) {
  const Fit fit = container.fit(tensor.scheme, tensor.shape);
  if (fit.verdict == Verdict::impossible)
    throw Error({.code = "does-not-fit",
                 .what = "cannot quantize",
                 .where = tensor.name,
                 .why = fmt::format("{} cannot hold {}: {}", container.name, describe(tensor.scheme), fit.reason),
                 .fix = fmt::format("choose another scheme or --format, or keep it: --skip-modules {}", tensor.name)});
}

void check_fit_together(std::span<const StoredTensor> tensors, const Container& container) {
  if (container.fit_model == nullptr) return;
  const Fit fit = container.fit_model(tensors);
  if (fit.verdict == Verdict::impossible)
    throw Error({.code = "does-not-fit",
                 .what = "cannot quantize",
                 .where = std::string(container.name),
                 .why = fit.reason,
                 .fix = "change layer_configs, or choose another --format"});
}

[[noreturn]] void name_clash(const std::string& name) {
  throw Error({.code = "name-clash",
               .what = "cannot quantize",
               .where = name,
               .why = "two arrays of the output would have this name",
               .fix = "skip the module"});
}

}  // namespace

std::vector<TensorFacts> facts_of(const Checkpoint& source) {
  std::vector<TensorFacts> facts;
  for (const TensorEntry& entry : source.tensors())
    facts.push_back({.name = entry.name,
                     .shape = entry.shape,
                     .is_float = info(entry.dtype).is_float,
                     .bytes = size_bytes(entry.dtype),
                     .dtype = entry.dtype});
  return facts;
}

StoredTensor stored_tensor(const TensorEntry& entry, const TensorPlan& plan) {
  const DType dtype = size_bytes(entry.dtype) < 2 ? DType::f16 : entry.dtype;  // which has every value of 8 bits
  return {
      .name = entry.name, .shape = entry.shape, .scheme = *plan.scheme, .value_dtype = dtype, .linear = plan.linear};
}

OutputLayout lay_out(const Checkpoint& source, const QuantizationRequest& request, const Container& container,
                     uint64_t max_shard_bytes, const ForeignNames* foreign) {
  std::vector<TensorFacts> facts = facts_of(source);
  if (foreign != nullptr)
    for (TensorFacts& each : facts) {
      each.role = foreign->role;
      each.role.name = std::exchange(each.name, foreign->names.at(each.name));
    }
  OutputLayout layout = {.recipe = resolve(request, facts, &container), .arrays = {}, .shards = {}};
  for (size_t i = 0; i < facts.size(); ++i) layout.recipe.tensors[i].name = source.tensors()[i].name;
  std::set<std::string> names;
  std::vector<StoredTensor> quantized;
  for (size_t i = 0; i < layout.recipe.tensors.size(); ++i) {
    const TensorEntry& entry = source.tensors()[i];
    if (const TensorPlan& plan = layout.recipe.tensors[i]; plan.scheme) {
      quantized.push_back(stored_tensor(entry, plan));
      check_fits(quantized.back(), container);
      layout.arrays.push_back(container.layout(quantized.back()));
    } else {
      layout.arrays.push_back({{entry.name, entry.dtype, entry.shape}});
    }
    for (const ArraySpec& array : layout.arrays.back())
      if (!names.insert(array.name).second) name_clash(array.name);
  }
  check_fit_together(quantized, container);
  layout.shards = plan_shards(layout.arrays, max_shard_bytes, container.weights_format);
  return layout;
}

}  // namespace bitwright
