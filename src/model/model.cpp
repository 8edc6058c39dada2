#include "model/model.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/threads.hpp"
#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/matmul.hpp"
#include "model/feed_forward.hpp"
#include "model/kv_cache.hpp"
#include "model/layer.hpp"

namespace bitwright {
namespace {

constexpr size_t kChunk = 256;     // tokens at a time: bounds the memory for activations
constexpr size_t kRowsATask = 16;  // of loops over single tokens

/// Activations of up to kChunk tokens.
struct Activations {
  Activations(const ModelConfig& c, size_t tokens, const InputObserver* told)
      : observer(told),
        x(tokens * static_cast<size_t>(c.hidden)),
        normed(x.size()),
        branch(x.size()),
        q(tokens * static_cast<size_t>(c.heads * c.head_size)),
        k(tokens * static_cast<size_t>(c.kv_heads * c.head_size)),
        v(k.size()),
        attended(q.size()) {}
  const InputObserver* observer;
  std::vector<float> x, normed, branch, q, k, v, attended;
};

}  // namespace

struct Model::Impl {
  Impl(const Checkpoint& checkpoint, const LoraAdapter* adapter);
  Impl(const Impl&) = delete;  // `tied_head` points into it
  Impl& operator=(const Impl&) = delete;

  ModelConfig config;
  RowSource embedding;
  std::optional<RowSource> positions;
  Norm norm;
  std::vector<Layer> layers;
  std::optional<Linear> head;
  const PackedMatrix* tied_head = nullptr;  ///< the embedding, where there is no head

  size_t width() const { return static_cast<size_t>(config.hidden); }
  void embed(std::span<const int32_t> tokens, size_t first, Activations& a) const;
  void run_layers(std::span<const int32_t> tokens, KvCache::Impl& cache, Activations& a) const;
  void run_layer(const Layer& layer, LayerCache& layer_cache, KvCache::Impl& cache, size_t tokens,
                 Activations& a) const;
  void attention(const Layer& layer, LayerCache& layer_cache, KvCache::Impl& cache, size_t tokens,
                 Activations& a) const;
  void normalise(const float* x, size_t rows, const Norm& with, float* normed) const;
};

Model::Impl::Impl(const Checkpoint& checkpoint, const LoraAdapter* adapter)
    : config(read_model_config(checkpoint.config(), checkpoint.config_path().string())) {
  const TensorPlaces& places = config.places;
  WeightReader reader(checkpoint, places, adapter);
  embedding = reader.rows(places.embedding + ".weight", config.vocabulary, config.hidden);
  if (!places.positions.empty())
    positions = reader.rows(places.positions + ".weight", config.most_positions, config.hidden);
  norm = load_norm(reader, config, "", places.final_norm, config.hidden);
  for (int64_t i = 0; i < config.layers; ++i) layers.push_back(load_layer(reader, config, i));
  head = reader.head(config.vocabulary, config.hidden);
  if (!head && !config.tied_head)
    throw Error({.code = "missing-tensor",
                 .what = "cannot load the model",
                 .where = checkpoint.path().string(),
                 .why = fmt::format("there is no tensor '{}.weight'", places.head),
                 .fix = "if it is the embedding matrix, config.json must say tie_word_embeddings"});
  reader.refuse_unread();
  if (!head) tied_head = &embedding.packed();
}

/// normed[i] = the norm of row i of x; rows have as many numbers as the norm.
void Model::Impl::normalise(const float* x, size_t rows, const Norm& with, float* normed) const {
  const size_t size = with.weight.size();
  parallel_ranges(rows, kRowsATask, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const std::span row(x + i * size, size);
      if (config.norm == NormKind::rms)
        rms_norm(row, with.weight, config.norm_epsilon, normed + i * size);
      else
        layer_norm(row, with.weight, with.bias, config.norm_epsilon, normed + i * size);
    }
  });
}

/// a.branch = what attention adds to a.x, from a.normed.
void Model::Impl::attention(const Layer& layer, LayerCache& layer_cache, KvCache::Impl& cache, size_t tokens,
                            Activations& a) const {
  observe(a.observer, {&layer.q, &layer.k, &layer.v}, a.normed.data(), tokens);
  apply(layer.q, a.normed.data(), tokens, a.q.data());
  apply(layer.k, a.normed.data(), tokens, a.k.data());
  apply(layer.v, a.normed.data(), tokens, a.v.data());
  const auto first = static_cast<size_t>(cache.length), heads = static_cast<size_t>(config.heads);
  const size_t head_size = layer_cache.head_size(), q_width = layer.q.weight.rows, kv_width = layer.k.weight.rows;
  if (!layer.q_norm.empty()) normalise(a.q.data(), tokens * heads, layer.q_norm, a.q.data());
  if (!layer.k_norm.empty()) normalise(a.k.data(), tokens * layer_cache.kv_heads(), layer.k_norm, a.k.data());
  parallel_ranges(tokens, kRowsATask, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      if (!cache.rotations.empty()) {
        const Rotation& rotation = cache.rotations[layer.kind.rope];
        rotation.turn(first + i, a.q.data() + i * q_width, q_width, head_size);
        rotation.turn(first + i, a.k.data() + i * kv_width, kv_width, head_size);
      }
      layer_cache.store(first + i, a.k.data() + i * kv_width, a.v.data() + i * kv_width);
    }
  });
  attend(
      a.q.data(), tokens, first, heads, layer_cache,
      {.scale = config.attention_scale, .cap = config.attention_cap, .window = static_cast<size_t>(layer.kind.window)},
      a.attended.data());
  observe(a.observer, {&layer.o}, a.attended.data(), tokens);
  apply(layer.o, a.attended.data(), tokens, a.branch.data());
}

void Model::Impl::run_layer(const Layer& layer, LayerCache& layer_cache, KvCache::Impl& cache, size_t tokens,
                            Activations& a) const {
  const auto finish = [&](const Norm& post) {
    if (!post.empty()) normalise(a.branch.data(), tokens, post, a.branch.data());
  };
  normalise(a.x.data(), tokens, layer.attention_norm, a.normed.data());
  attention(layer, layer_cache, cache, tokens, a);
  finish(layer.post_attention_norm);
  if (config.parallel) normalise(a.x.data(), tokens, layer.feed_forward_norm, a.normed.data());
  add(a.x, a.branch.data());
  if (!config.parallel) normalise(a.x.data(), tokens, layer.feed_forward_norm, a.normed.data());
  run_feed_forward(layer, config, a.normed.data(), tokens, a.branch.data(), a.observer);
  finish(layer.post_feed_forward_norm);
  add(a.x, a.branch.data());
}

void Model::Impl::embed(std::span<const int32_t> tokens, size_t first, Activations& a) const {
  for (size_t i = 0; i < tokens.size(); ++i) {
    BW_ASSERT(tokens[i] >= 0 && tokens[i] < config.vocabulary);
    embedding.read(static_cast<size_t>(tokens[i]), std::span(a.x).subspan(i * width(), width()));
    if (positions) positions->read(first + i, std::span(a.normed).subspan(i * width(), width()));
  }
  if (config.embedding_scale != 1) scale(a.x, config.embedding_scale);
  if (positions) add(a.x, a.normed.data());
}

/// a.x = what leaves the last layer, one row a token; the cache has them all then.
void Model::Impl::run_layers(std::span<const int32_t> tokens, KvCache::Impl& cache, Activations& a) const {
  const auto first = static_cast<size_t>(cache.length);
  for (Rotation& rotation : cache.rotations) rotation.prepare(first + tokens.size());
  embed(tokens, first, a);
  for (size_t i = 0; i < layers.size(); ++i) run_layer(layers[i], cache.layers[i], cache, tokens.size(), a);
  cache.length += static_cast<int64_t>(tokens.size());
}

Model::Model(const Checkpoint& checkpoint, const LoraAdapter* adapter)
    : impl_(std::make_unique<Impl>(checkpoint, adapter)) {}
Model::~Model() = default;
Model::Model(Model&&) noexcept = default;
uint64_t Model::weight_bytes() const {
  uint64_t sum = impl_->embedding.bytes() + impl_->norm.bytes();
  if (impl_->positions) sum += impl_->positions->bytes();
  if (impl_->head) sum += impl_->head->bytes();
  for (const Layer& layer : impl_->layers) sum += layer.bytes();
  return sum;
}

const ModelConfig& Model::config() const { return impl_->config; }

std::vector<float> Model::forward(std::span<const int32_t> tokens, KvCache& cache, Logits which,
                                  const InputObserver* observer) const {
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
    Activations a(impl_->config, chunk.size(), observer);
    impl_->run_layers(chunk, state, a);
    if (which == Logits::last && begin + chunk.size() < tokens.size()) continue;
    const size_t rows = which == Logits::all ? chunk.size() : 1;
    impl_->normalise(a.x.data() + (chunk.size() - rows) * width, rows, impl_->norm, a.normed.data());
    float* const out = logits.data() + (which == Logits::all ? begin : 0) * vocabulary;
    if (impl_->head)
      apply(*impl_->head, a.normed.data(), rows, out);
    else
      multiply(a.normed.data(), rows, *impl_->tied_head, out);
    if (impl_->config.logit_cap > 0) active_kernel_level().soft_cap(out, rows * vocabulary, 1, impl_->config.logit_cap);
  }
  return logits;
}

}  // namespace bitwright
