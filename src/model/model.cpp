#include "model/model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/matmul.hpp"
#include "model/kv_cache.hpp"
#include "model/weights.hpp"

namespace bitwright {
namespace {

constexpr size_t kChunk = 256;     // tokens at a time: bounds the memory for activations
constexpr size_t kRowsATask = 16;  // of loops over single tokens

struct Layer {
  std::vector<float> attention_norm, feed_forward_norm;
  PackedMatrix q, k, v, o, gate, up, down;
};

Layer load_layer(const Checkpoint& checkpoint, const ModelConfig& c, int64_t index) {
  const std::string prefix = fmt::format("model.layers.{}.", index);
  const int64_t q_width = c.heads * c.head_size, kv_width = c.kv_heads * c.head_size;
  const auto matrix = [&](const char* name, int64_t rows, int64_t columns) {
    refuse_tensor(checkpoint, prefix + name + ".bias");
    return load_matrix(checkpoint, prefix + name + ".weight", rows, columns);
  };
  return {.attention_norm = load_vector(checkpoint, prefix + "input_layernorm.weight", c.hidden),
          .feed_forward_norm = load_vector(checkpoint, prefix + "post_attention_layernorm.weight", c.hidden),
          .q = matrix("self_attn.q_proj", q_width, c.hidden),
          .k = matrix("self_attn.k_proj", kv_width, c.hidden),
          .v = matrix("self_attn.v_proj", kv_width, c.hidden),
          .o = matrix("self_attn.o_proj", c.hidden, q_width),
          .gate = matrix("mlp.gate_proj", c.feed_forward, c.hidden),
          .up = matrix("mlp.up_proj", c.feed_forward, c.hidden),
          .down = matrix("mlp.down_proj", c.hidden, c.feed_forward)};
}

ModelConfig configure(const Checkpoint& checkpoint) {
  const Architecture* const architecture = find_architecture(checkpoint.config());
  if (architecture != nullptr)
    return architecture->configure(checkpoint.config(), (checkpoint.path() / "config.json").string());
  std::string known;
  for (const Architecture* row : all_architectures()) known += (known.empty() ? "" : ", ") + std::string(row->name);
  throw Error({.code = "unknown-architecture",
               .what = "cannot run this model",
               .where = checkpoint.path().string(),
               .why = "config.json names no architecture that is supported (" + known + ")"});
}

/// Activations of up to kChunk tokens.
struct Activations {
  Activations(const ModelConfig& c, size_t tokens)
      : x(tokens * static_cast<size_t>(c.hidden)),
        normed(x.size()),
        q(tokens * static_cast<size_t>(c.heads * c.head_size)),
        k(tokens * static_cast<size_t>(c.kv_heads * c.head_size)),
        v(k.size()),
        attended(q.size()),
        gate(tokens * static_cast<size_t>(c.feed_forward)),
        up(gate.size()) {}
  std::vector<float> x, normed, q, k, v, attended, gate, up;
};

}  // namespace

struct Model::Impl {
  explicit Impl(const Checkpoint& checkpoint)
      : config(configure(checkpoint)),
        embedding(checkpoint, "model.embed_tokens.weight", config.vocabulary, config.hidden),
        norm(load_vector(checkpoint, "model.norm.weight", config.hidden)) {
    for (int64_t i = 0; i < config.layers; ++i) layers.push_back(load_layer(checkpoint, config, i));
    if (!config.tied_head) own_head = load_matrix(checkpoint, "lm_head.weight", config.vocabulary, config.hidden);
    head = own_head ? &*own_head : &embedding.packed();
  }
  Impl(const Impl&) = delete;  // `head` points into it
  Impl& operator=(const Impl&) = delete;

  ModelConfig config;
  RowSource embedding;
  std::vector<float> norm;
  std::vector<Layer> layers;
  std::optional<PackedMatrix> own_head;
  const PackedMatrix* head;

  size_t width() const { return static_cast<size_t>(config.hidden); }
  void run_layers(std::span<const int32_t> tokens, KvCache::Impl& cache, Activations& a) const;
  void attention(const Layer& layer, LayerCache& layer_cache, KvCache::Impl& cache, size_t tokens,
                 Activations& a) const;
  void feed_forward(const Layer& layer, size_t tokens, Activations& a) const;

  /// normed[i] = the norm of x[i], for `tokens` rows of each.
  void normalise(const float* x, size_t tokens, const std::vector<float>& weight, float* normed) const {
    parallel_ranges(tokens, kRowsATask, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i)
        rms_norm(std::span(x + i * width(), width()), weight, config.norm_epsilon, normed + i * width());
    });
  }
};

void Model::Impl::attention(const Layer& layer, LayerCache& layer_cache, KvCache::Impl& cache, size_t tokens,
                            Activations& a) const {
  normalise(a.x.data(), tokens, layer.attention_norm, a.normed.data());
  multiply(a.normed.data(), tokens, layer.q, a.q.data());
  multiply(a.normed.data(), tokens, layer.k, a.k.data());
  multiply(a.normed.data(), tokens, layer.v, a.v.data());
  const auto first = static_cast<size_t>(cache.length);
  const size_t head_size = layer_cache.head_size();
  parallel_ranges(tokens, kRowsATask, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const std::span cosine = std::span(cache.cosine).subspan((first + i) * cache.half, cache.half);
      const float* const sine = cache.sine.data() + (first + i) * cache.half;
      float* const q = a.q.data() + i * layer.q.rows;
      float* const k = a.k.data() + i * layer.k.rows;
      for (size_t at = 0; at < layer.q.rows; at += head_size) rotate_halves(q + at, cosine, sine);
      for (size_t at = 0; at < layer.k.rows; at += head_size) rotate_halves(k + at, cosine, sine);
      layer_cache.store(first + i, k, a.v.data() + i * layer.v.rows);
    }
  });
  attend(a.q.data(), tokens, first, static_cast<size_t>(config.heads), layer_cache, a.attended.data());
  multiply(a.attended.data(), tokens, layer.o, a.normed.data());
  add(a.x, a.normed.data());
}

void Model::Impl::feed_forward(const Layer& layer, size_t tokens, Activations& a) const {
  normalise(a.x.data(), tokens, layer.feed_forward_norm, a.normed.data());
  multiply(a.normed.data(), tokens, layer.gate, a.gate.data());
  multiply(a.normed.data(), tokens, layer.up, a.up.data());
  const size_t columns = layer.gate.rows;
  parallel_ranges(tokens, kRowsATask, [&](size_t begin, size_t end) {
    active_kernel_level().silu_multiply(a.gate.data() + begin * columns, a.up.data() + begin * columns,
                                        (end - begin) * columns);
  });
  multiply(a.gate.data(), tokens, layer.down, a.normed.data());
  add(a.x, a.normed.data());
}

/// a.x = what leaves the last layer, one row a token; the cache has them all then.
void Model::Impl::run_layers(std::span<const int32_t> tokens, KvCache::Impl& cache, Activations& a) const {
  cache.prepare_positions(cache.length + static_cast<int64_t>(tokens.size()));
  for (size_t i = 0; i < tokens.size(); ++i) {
    BW_ASSERT(tokens[i] >= 0 && tokens[i] < config.vocabulary);
    embedding.read(static_cast<size_t>(tokens[i]), std::span(a.x).subspan(i * width(), width()));
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    attention(layers[i], cache.layers[i], cache, tokens.size(), a);
    feed_forward(layers[i], tokens.size(), a);
  }
  cache.length += static_cast<int64_t>(tokens.size());
}

Model::Model(const Checkpoint& checkpoint) : impl_(std::make_unique<Impl>(checkpoint)) {}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
const ModelConfig& Model::config() const { return impl_->config; }

std::vector<float> Model::forward(std::span<const int32_t> tokens, KvCache& cache, Logits which) const {
  KvCache::Impl& state = *cache.impl_;
  BW_ASSERT(state.layers.size() == impl_->layers.size());
  const auto room = static_cast<size_t>(state.capacity - state.length);
  if (tokens.size() > room)
    throw Error(
        {.code = "context-full",
         .what = "cannot go on",
         .why = fmt::format("{} tokens after {} pass the context of {}", tokens.size(), state.length, state.capacity)});
  const auto vocabulary = static_cast<size_t>(impl_->config.vocabulary);
  const size_t width = impl_->width(),
               wanted = which == Logits::all ? tokens.size() : std::min<size_t>(tokens.size(), 1);
  std::vector<float> logits(wanted * vocabulary);
  for (size_t begin = 0; begin < tokens.size(); begin += kChunk) {
    throw_if_interrupted();
    const std::span chunk = tokens.subspan(begin, std::min(kChunk, tokens.size() - begin));
    Activations a(impl_->config, chunk.size());
    impl_->run_layers(chunk, state, a);
    if (which == Logits::last && begin + chunk.size() < tokens.size()) continue;
    const size_t rows = which == Logits::all ? chunk.size() : 1;
    impl_->normalise(a.x.data() + (chunk.size() - rows) * width, rows, impl_->norm, a.normed.data());
    multiply(a.normed.data(), rows, *impl_->head, logits.data() + (which == Logits::all ? begin : 0) * vocabulary);
  }
  return logits;
}

}  // namespace bitwright
