// Which modules are fused: llm-compressor (ab1ba3e), observers/helpers.py, FUSED_LAYER_NAMES.
#include "quantize/fused.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <span>
#include <string>
#include <string_view>

#include "base/error.hpp"
#include "base/output.hpp"
#include "base/threads.hpp"
#include "kernels/encode.hpp"
#include "quantize/stream.hpp"

namespace bitwright {
namespace {

constexpr auto kGateUp = std::to_array<std::string_view>({"gate_proj", "up_proj"});
constexpr auto kAttention = std::to_array<std::string_view>({"q_proj", "k_proj", "v_proj"});
constexpr auto kLatent = std::to_array<std::string_view>({"q_a_proj", "kv_a_proj_with_mqa"});
constexpr auto kMixtral = std::to_array<std::string_view>({"w1", "w3"});
constexpr auto kFused = std::to_array<std::span<const std::string_view>>({kGateUp, kAttention, kLatent, kMixtral});

/// Has it one scale for the whole of the tensor, above those of its groups?
bool has_common_scale(const TensorPlan& plan) {
  if (!plan.scheme || !plan.scheme->scale || plan.options.fused == nullptr) return false;
  const Scheme& scales = *plan.scheme->scale->scheme;
  return scales.scale && scales.scale->grouping.kind == Grouping::Kind::tensor;
}

/// The first of those that `name` is fused with, which stands for all; empty: none are.
std::string leader_of(std::string_view name) {
  constexpr std::string_view kEnd = ".weight";
  if (!name.ends_with(kEnd)) return {};
  const std::string_view module = name.substr(0, name.size() - kEnd.size());
  const size_t dot = module.rfind('.') + 1;  // 0 where there is none
  for (const auto& names : kFused)
    if (std::ranges::find(names, module.substr(dot)) != names.end())
      return fmt::format("{}{}", module.substr(0, dot), names.front());
  return {};
}

float largest_of(const Checkpoint& source, const TensorEntry& entry) {
  const size_t size = size_bytes(entry.dtype);
  std::vector<std::byte> bytes;
  std::vector<float> values;
  float largest = 0;
  for (const RowRange range : element_pieces(entry.shape)) {
    throw_if_interrupted();
    values.resize(static_cast<size_t>(range.end - range.begin));
    bytes.resize(values.size() * size);
    source.read_bytes(entry, static_cast<uint64_t>(range.begin) * size, bytes);
    try {
      check_finite({entry.dtype, bytes}, range.begin);
    } catch (const Error& error) {
      throw error.at(fmt::format("tensor '{}'", printable(entry.name)));
    }
    to_f32(entry.dtype, bytes, values);
    for (const float value : values) largest = std::max(largest, std::fabs(value));
  }
  return largest;
}

}  // namespace

std::vector<std::optional<float>> fused_magnitudes(const Checkpoint& source, const Recipe& recipe) {
  std::vector<size_t> members;
  std::vector<std::string> leaders(recipe.tensors.size());
  for (size_t i = 0; i < recipe.tensors.size(); ++i) {
    if (!has_common_scale(recipe.tensors[i])) continue;
    leaders[i] = leader_of(recipe.tensors[i].name);
    if (!leaders[i].empty()) members.push_back(i);
  }
  std::vector<float> own(recipe.tensors.size());
  parallel_for(members.size(), [&](size_t m) { own[members[m]] = largest_of(source, source.tensors()[members[m]]); });
  std::map<std::string_view, float> all;
  for (const size_t i : members) all[leaders[i]] = std::max(all[leaders[i]], own[i]);
  std::vector<std::optional<float>> largest(recipe.tensors.size());
  for (const size_t i : members) largest[i] = all[leaders[i]];
  return largest;
}

}  // namespace bitwright
