#include "model/kv_cache.hpp"

#include <cmath>

#include "base/error.hpp"

namespace bitwright {

void KvCache::Impl::prepare_positions(int64_t count) {
  for (size_t position = cosine.size() / half; position < static_cast<size_t>(count); ++position)
    for (size_t i = 0; i < half; ++i) {
      const double frequency = std::pow(theta, -static_cast<double>(i) / static_cast<double>(half));
      cosine.push_back(static_cast<float>(std::cos(static_cast<double>(position) * frequency)));
      sine.push_back(static_cast<float>(std::sin(static_cast<double>(position) * frequency)));
    }
}

KvCache::KvCache(const ModelConfig& config, int64_t capacity) : impl_(std::make_unique<Impl>()) {
  BW_ASSERT(capacity > 0);
  impl_->capacity = capacity;
  impl_->half = static_cast<size_t>(config.head_size) / 2;
  impl_->theta = double{config.rope_theta};
  for (int64_t i = 0; i < config.layers; ++i)
    impl_->layers.emplace_back(static_cast<size_t>(config.kv_heads), static_cast<size_t>(config.head_size),
                               static_cast<size_t>(capacity));
}

KvCache::~KvCache() = default;
KvCache::KvCache(KvCache&&) noexcept = default;
int64_t KvCache::length() const { return impl_->length; }
int64_t KvCache::capacity() const { return impl_->capacity; }
void KvCache::clear() { impl_->length = 0; }
void KvCache::truncate(int64_t length) {
  BW_ASSERT(length >= 0 && length <= impl_->length);
  impl_->length = length;
}

}  // namespace bitwright
