#include "quantize/output_layout.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <utility>

#include "base/error.hpp"

namespace bitwright {
namespace {

void check_fits(const TensorFacts& facts, const StoredTensor& tensor, const Container& container) {
  const Fit fit = fit_of(facts, tensor, container);
  if (fit.verdict == Verdict::impossible)
    throw Error(
        {.code = "does-not-fit",
         .what = "cannot quantize",
         .where = tensor.name,
         .why = fmt::format("{} cannot hold {}: {}", container.name, describe(tensor.scheme), fit.reason),
         .fix = fmt::format("choose another scheme or --format, or keep it: --skip-modules lm_head,{}", tensor.name)});
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

/// A head that shares the embedding's matrix has no tensor, and yet the owner's loader makes a module of it.
std::vector<std::string> kept_modules(std::span<const TensorFacts> source, const Recipe& recipe,
                                      const OrderedJson& config) {
  constexpr std::string_view kWeight = ".weight";
  std::vector<std::string> kept;
  for (size_t i = 0; i < source.size(); ++i) {
    const std::string& name = source[i].name;
    if (!recipe.tensors[i].scheme && source[i].shape.size() >= 2 && name.ends_with(kWeight))
      kept.push_back(name.substr(0, name.size() - kWeight.size()));
  }
  const bool tied = config.contains("tie_word_embeddings") && config["tie_word_embeddings"] == true;
  if (tied && std::ranges::find(source, "lm_head.weight", &TensorFacts::name) == source.end())
    kept.emplace_back("lm_head");
  return kept;
}

[[noreturn]] void name_clash(const std::string& name) {
  throw Error({.code = "name-clash",
               .what = "cannot quantize",
               .where = name,
               .why = "two arrays of the output would have this name",
               .fix = "skip the module"});
}

}  // namespace

std::vector<TensorFacts> renamed(std::span<const TensorFacts> source, const ForeignNames& foreign) {
  std::vector<TensorFacts> facts(source.begin(), source.end());
  for (TensorFacts& each : facts) {
    each.role = foreign.role;
    each.role.name = std::exchange(each.name, foreign.names.at(each.name));
  }
  return facts;
}

Fit fit_of(const TensorFacts& tensor, const StoredTensor& stored, const Container& container) {
  if (container.inputs_first == InputsFirst::refused && tensor.inputs_first)
    return {Verdict::impossible, "it is stored [inputs, outputs], and its owner knows linear layers alone"};
  return container.fit(stored.scheme, stored.shape);
}

std::vector<TensorFacts> facts_of(const Checkpoint& source) {
  std::vector<TensorFacts> facts;
  for (const TensorEntry& entry : source.tensors()) {
    Shape shape = entry.shape;
    if (entry.transposed) std::swap(shape[0], shape[1]);
    facts.push_back({.name = entry.name,
                     .shape = std::move(shape),
                     .is_float = info(entry.dtype).is_float,
                     .bytes = size_bytes(entry.dtype),
                     .dtype = entry.dtype,
                     .inputs_first = entry.shape.size() == 2 && has_inputs_first(source.config(), entry.name)});
  }
  return facts;
}

bool is_stored_transposed(const TensorFacts& tensor, const Container& container) {
  return container.inputs_first == InputsFirst::transposed && tensor.inputs_first;
}

StoredTensor stored_tensor(const TensorFacts& tensor, const TensorPlan& plan, const Container& container) {
  const DType dtype = size_bytes(tensor.dtype) < 2 ? DType::f16 : tensor.dtype;  // which has every value of 8 bits
  Shape shape = tensor.shape;
  if (is_stored_transposed(tensor, container)) std::swap(shape[0], shape[1]);
  return {.name = tensor.name,
          .shape = std::move(shape),
          .scheme = *plan.scheme,
          .value_dtype = dtype,
          .linear = plan.linear};
}

OutputLayout lay_out(std::span<const TensorFacts> source, const QuantizationRequest& request,
                     const Container& container, uint64_t max_shard_bytes, const ForeignNames* foreign) {
  Recipe recipe = foreign == nullptr ? resolve(request, source, &container)
                                     : resolve(request, renamed(source, *foreign), &container);
  for (size_t i = 0; i < source.size(); ++i) recipe.tensors[i].name = source[i].name;
  return lay_out(source, std::move(recipe), container, max_shard_bytes);
}

OutputLayout lay_out(std::span<const TensorFacts> source, Recipe recipe, const Container& container,
                     uint64_t max_shard_bytes) {
  OutputLayout layout = {.recipe = std::move(recipe), .arrays = {}, .shards = {}};
  std::set<std::string> names;
  std::vector<StoredTensor> quantized;
  for (size_t i = 0; i < source.size(); ++i) {
    if (const TensorPlan& plan = layout.recipe.tensors[i]; plan.scheme) {
      quantized.push_back(stored_tensor(source[i], plan, container));
      check_fits(source[i], quantized.back(), container);
      layout.arrays.push_back(container.layout(quantized.back()));
    } else {
      layout.arrays.push_back({{source[i].name, source[i].dtype, source[i].shape}});
    }
    for (const ArraySpec& array : layout.arrays.back())
      if (!names.insert(array.name).second) name_clash(array.name);
  }
  check_fit_together(quantized, container);
  layout.shards = plan_shards(layout.arrays, max_shard_bytes, container.weights_format);
  return layout;
}

std::vector<Slice> packed_rows(const Container& container, const StoredTensor& whole, std::span<const ArraySpec> specs,
                               RowRange rows, const QuantizedTensor& values) {
  const bool all = rows.begin == 0 && rows.end == row_count(whole.shape);
  std::vector<ArraySpec> before;
  if (!all) before = container.layout(rows_of(whole, 0, rows.begin));
  std::vector<Slice> slices;
  size_t a = 0;
  for (NamedArray& array : container.pack(all ? whole : rows_of(whole, rows.begin, rows.end), values)) {
    Slice slice = {.array = a, .offset = 0, .data = std::move(array.data)};
    if (!all) {
      const Placement at = place(specs[a], before[a], array.spec);
      slice = {slice.array, at.offset, std::move(slice.data), at.runs > 1 ? at.run : 0, at.stride};
    }
    // What does not depend on rows comes with the first of them.
    if (all || rows.begin == 0 || specs[a].row_axis != ArraySpec::kNoRows) slices.push_back(std::move(slice));
    ++a;
  }
  return slices;
}

std::map<std::string, OrderedJson> metadata_of(std::span<const TensorFacts> source, const Recipe& recipe,
                                               const Container& container, OrderedJson config,
                                               const OrderedJson& record) {
  std::vector<StoredTensor> tensors;
  for (size_t i = 0; i < source.size(); ++i)
    if (recipe.tensors[i].scheme) tensors.push_back(stored_tensor(source[i], recipe.tensors[i], container));
  const std::vector<std::string> kept = kept_modules(source, recipe, config);
  std::map<std::string, OrderedJson> files;
  container.write_metadata({.tensors = tensors, .kept = kept, .record = record}, {.config = config, .files = files});
  files["config.json"] = std::move(config);
  return files;
}

}  // namespace bitwright
