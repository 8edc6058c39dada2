#include "model/layer.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace bitwright {
namespace {

FeedForward load_feed_forward(WeightReader& reader, const ModelConfig& c, const std::string& base) {
  const TensorPlaces& places = c.places;
  FeedForward f;
  if (!places.gate.name.empty()) f.gate = reader.linear(base, places.gate, c.feed_forward, c.hidden);
  f.up = reader.linear(base, places.up, c.feed_forward, c.hidden);
  f.down = reader.linear(base, places.down, c.hidden, c.feed_forward);
  return f;
}

/// Each expert's matrices are modules of their own.
std::vector<FeedForward> load_modules(WeightReader& reader, const ModelConfig& c, const std::string& base,
                                      const TensorPlaces::Experts& places) {
  std::vector<FeedForward> experts(static_cast<size_t>(c.experts));
  for (size_t i = 0; i < experts.size(); ++i) {
    const auto matrix = [&](const std::string& pattern, int64_t rows, int64_t columns) {
      return reader.linear(base, {.name = fmt::format(fmt::runtime(pattern), i)}, rows, columns);
    };
    experts[i].gate = matrix(places.gate, c.expert_feed_forward, c.hidden);
    experts[i].up = matrix(places.up, c.expert_feed_forward, c.hidden);
    experts[i].down = matrix(places.down, c.hidden, c.expert_feed_forward);
  }
  return experts;
}

/// One tensor after the other, for the reader keeps what it unpacked last.
std::vector<FeedForward> cut_stacks(WeightReader& reader, const ModelConfig& c, const std::string& base,
                                    const TensorPlaces::Experts& places) {
  const int64_t width = c.expert_feed_forward;
  std::vector<FeedForward> experts(static_cast<size_t>(c.experts));
  const auto cut = [&](const std::string& name, size_t expert, int64_t stored, int64_t columns, int64_t first,
                       int64_t rows) {
    const Shape shape = {c.experts, stored, columns};
    return reader.of_stack(base + name, static_cast<int64_t>(expert), shape, first, rows);
  };
  const auto cut_each = [&](const std::string& name, int64_t rows, int64_t columns, auto part) {
    for (size_t i = 0; i < experts.size(); ++i) experts[i].*part = cut(name, i, rows, columns, 0, rows);
  };
  cut_each(places.all_down, c.hidden, width, &FeedForward::down);
  if (places.all_gate_up.empty()) {
    cut_each(places.all_gate, width, c.hidden, &FeedForward::gate);
    cut_each(places.all_up, width, c.hidden, &FeedForward::up);
    return experts;
  }
  for (size_t i = 0; i < experts.size(); ++i) {
    experts[i].gate = cut(places.all_gate_up, i, 2 * width, c.hidden, 0, width);
    experts[i].up = cut(places.all_gate_up, i, 2 * width, c.hidden, width, width);
  }
  return experts;
}

Experts load_experts(WeightReader& reader, const ModelConfig& c, const std::string& base) {
  // As the checkpoint names them; if as none of the known ways, the first one's error says what is missing.
  const auto found = std::ranges::find_if(c.places.experts, [&](const TensorPlaces::Experts& places) {
    return reader.has(
        base + (places.all_down.empty() ? fmt::format(fmt::runtime(places.down), 0) + ".weight" : places.all_down));
  });
  const TensorPlaces::Experts& places = found == c.places.experts.end() ? c.places.experts.front() : *found;
  const auto load = places.all_down.empty() ? load_modules : cut_stacks;
  return {.router = reader.linear(base, {.name = places.router}, c.experts, c.hidden),
          .experts = load(reader, c, base, places)};
}

}  // namespace

uint64_t Experts::bytes() const {
  uint64_t sum = router.bytes();
  for (const FeedForward& expert : experts) sum += expert.bytes();
  return sum;
}

uint64_t Layer::bytes() const {
  uint64_t sum = std::visit([](const auto& part) { return part.bytes(); }, feed_forward);
  for (const Linear* linear : {&q, &k, &v, &o}) sum += linear->bytes();
  for (const Norm* norm :
       {&attention_norm, &post_attention_norm, &feed_forward_norm, &post_feed_forward_norm, &q_norm, &k_norm})
    sum += norm->bytes();
  return sum;
}

Norm load_norm(WeightReader& reader, const ModelConfig& config, const std::string& base, const std::string& name,
               int64_t size) {
  if (name.empty()) return {};
  Norm norm = {.weight = reader.vector(base + name + ".weight", size)};
  for (float& w : norm.weight) w += config.norm_offset;
  if (config.norm == NormKind::layer) norm.bias = reader.vector(base + name + ".bias", size);
  return norm;
}

Layer load_layer(WeightReader& reader, const ModelConfig& c, int64_t index) {
  const TensorPlaces& places = c.places;
  const std::string base = fmt::format("{}.{}.", places.layers, index);
  const int64_t q_width = c.heads * c.head_size, kv_width = c.kv_heads * c.head_size;
  const auto norm = [&](const std::string& name, int64_t size) { return load_norm(reader, c, base, name, size); };
  const LayerKind& kind = c.kinds[static_cast<size_t>(index)];
  Layer layer = {.kind = kind,
                 .attention_norm = norm(places.attention_norm, c.hidden),
                 .post_attention_norm = norm(places.post_attention_norm, c.hidden),
                 .feed_forward_norm = norm(places.feed_forward_norm, c.hidden),
                 .post_feed_forward_norm = norm(places.post_feed_forward_norm, c.hidden),
                 .q_norm = norm(places.q_norm, c.head_size),
                 .k_norm = norm(places.k_norm, c.head_size),
                 .q = reader.linear(base, places.q, q_width, c.hidden),
                 .k = reader.linear(base, places.k, kv_width, c.hidden),
                 .v = reader.linear(base, places.v, kv_width, c.hidden),
                 .o = reader.linear(base, places.o, c.hidden, q_width),
                 .feed_forward = {}};
  if (kind.experts)
    layer.feed_forward = load_experts(reader, c, base);
  else
    layer.feed_forward = load_feed_forward(reader, c, base);
  return layer;
}

}  // namespace bitwright
