#include "train/tensor_memory.hpp"

#include <sys/mman.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace bitwright::train {
namespace {

constexpr size_t kLarge = size_t{256} << 10;
constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 64;  // what libtorch's own allocator gives

class TensorMemory {
 public:
  void keep_at_most(size_t bytes) {
    const std::lock_guard lock(mutex_);
    most_kept_ = bytes;
    shrink();
  }

  void* allocate(size_t bytes) {
    if (bytes == 0) return nullptr;
    const size_t size = bytes < kLarge ? bytes : (bytes + kPage - 1) / kPage * kPage;
    const std::lock_guard lock(mutex_);
    void* const data = size < kLarge ? from_heap(size) : mapped(size);
    sizes_[data] = size;
    use_.now += static_cast<int64_t>(size);
    use_.most = std::max(use_.most, use_.now);
    return data;
  }

  void free(void* data) {
    if (data == nullptr) return;
    const std::lock_guard lock(mutex_);
    const auto found = sizes_.find(data);
    const size_t size = found->second;
    sizes_.erase(found);
    use_.now -= static_cast<int64_t>(size);
    if (size < kLarge) return std::free(data);
    kept_.push_back({data, size});
    kept_bytes_ += size;
    shrink();
  }

  TensorMemoryUse use() {
    const std::lock_guard lock(mutex_);
    return use_;
  }
  void forget_most() {
    const std::lock_guard lock(mutex_);
    use_.most = use_.now;
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };

  static void* from_heap(size_t size) {
    void* data = nullptr;
    if (posix_memalign(&data, kAlignment, size) != 0) throw std::bad_alloc();
    return data;
  }

  void* mapped(size_t size) {
    // Newest first: its pages may still be in a cache. There are few.
    const auto found =
        std::find_if(kept_.rbegin(), kept_.rend(), [&](const Block& block) { return block.size == size; });
    if (found != kept_.rend()) {
      void* const data = found->data;
      kept_bytes_ -= size;
      kept_.erase(std::prev(found.base()));
      return data;
    }
    void* const data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    return data;
  }

  void shrink() {
    while (kept_bytes_ > most_kept_) {
      ::munmap(kept_.front().data, kept_.front().size);
      kept_bytes_ -= kept_.front().size;
      kept_.pop_front();
    }
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> sizes_;  ///< of what is in use
  std::list<Block> kept_;                    ///< freed, oldest first
  size_t kept_bytes_ = 0, most_kept_ = 0;
  TensorMemoryUse use_ = {0, 0};
};

/// Never destroyed: tensors of static duration are freed later.
TensorMemory& memory() {
  static auto& only = *new TensorMemory;
  return only;
}

void free_tensor(void* data) { memory().free(data); }

struct Allocator : at::Allocator {
  static at::DataPtr make(size_t bytes) {
    void* const data = memory().allocate(bytes);
    return {data, data, &free_tensor, at::Device(at::kCPU)};
  }
#if TORCH_VERSION_MAJOR >= 2 && TORCH_VERSION_MINOR >= 3
  at::DataPtr allocate(size_t bytes) override { return make(bytes); }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }
#else
  at::DataPtr allocate(size_t bytes) const override { return make(bytes); }
#endif
  at::DeleterFnPtr raw_deleter() const override { return &free_tensor; }
};

}  // namespace

void use_tensor_memory(size_t most_kept) {
  memory().keep_at_most(most_kept);
  static auto& allocator = *new Allocator;
  c10::SetAllocator(at::kCPU, &allocator, /*priority=*/100);
}

TensorMemoryUse tensor_memory_use() { return memory().use(); }
void forget_most_tensor_memory() { memory().forget_most(); }

}  // namespace bitwright::train
