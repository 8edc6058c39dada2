#include "model/kv_cache.hpp"

#include <fmt/format.h>

#include <cmath>

#include "base/error.hpp"
#include "kernels/elementwise.hpp"

namespace bitwright {

Rotation::Rotation(const Rope& rope, int64_t length)
    : frequencies_(rope.stretched && length > rope.trained ? rope.stretched(length) : rope.frequencies),
      magnitude_(rope.magnitude) {}

void Rotation::prepare(size_t positions) {
  for (size_t position = cosine_.size() / frequencies_.size(); position < positions; ++position)
    for (const double frequency : frequencies_) {
      const double angle = static_cast<double>(position) * frequency;
      cosine_.push_back(static_cast<float>(std::cos(angle) * magnitude_));
      sine_.push_back(static_cast<float>(std::sin(angle) * magnitude_));
    }
}

void Rotation::turn(size_t position, float* x, size_t width, size_t head_size) const {
  const size_t pairs = frequencies_.size();
  const std::span cosine = std::span(cosine_).subspan(position * pairs, pairs);
  for (size_t at = 0; at < width; at += head_size) rotate_halves(x + at, cosine, sine_.data() + position * pairs);
}

KvCache::KvCache(const ModelConfig& config, int64_t capacity) : impl_(std::make_unique<Impl>()) {
  BW_ASSERT(capacity > 0);
  if (config.most_positions != 0 && capacity > config.most_positions)
    throw Error(
        {.code = "context-full",
         .what = "cannot run this model",
         .why = fmt::format("{} tokens are asked for, it has positions for {}", capacity, config.most_positions),
         .fix = "use a shorter context"});
  impl_->capacity = capacity;
  for (const Rope& rope : config.ropes) impl_->rotations.emplace_back(rope, capacity);
  for (int64_t i = 0; i < config.layers; ++i)
    impl_->layers.emplace_back(static_cast<size_t>(config.kv_heads), static_cast<size_t>(config.head_size),
                               static_cast<size_t>(capacity));
}

KvCache::~KvCache() = default;
KvCache::KvCache(KvCache&&) noexcept = default;
int64_t KvCache::length() const { return impl_->length; }
int64_t KvCache::capacity() const { return impl_->capacity; }
uint64_t KvCache::bytes() const {
  uint64_t sum = 0;
  for (const LayerCache& layer : impl_->layers) sum += layer.bytes();
  return sum;
}
void KvCache::clear() { impl_->length = 0; }
void KvCache::truncate(int64_t length) {
  BW_ASSERT(length >= 0 && length <= impl_->length);
  impl_->length = length;
}

}  // namespace bitwright
