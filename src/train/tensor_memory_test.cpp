#include "train/tensor_memory.hpp"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <thread>

namespace bitwright::train {
namespace {

/// libtorch's allocator is the usual one again at the end of the scope.
class UsualAllocator {
 public:
  UsualAllocator() = default;
  ~UsualAllocator() { c10::SetAllocator(at::kCPU, usual_, /*priority=*/100); }
  UsualAllocator(const UsualAllocator&) = delete;
  UsualAllocator& operator=(const UsualAllocator&) = delete;

 private:
  c10::Allocator* usual_ = c10::GetAllocator(at::kCPU);
};

TEST(TensorMemory, KeepsLargeBlocksForTheNextOfTheirSize) {
  const UsualAllocator usual;
  constexpr int64_t kMany = 1 << 20;  // bytes
  use_tensor_memory(3 * kMany);
  const int64_t before = tensor_memory_use().now;
  void* first = nullptr;
  {
    const torch::Tensor a = torch::ones({kMany}, torch::kUInt8), small = torch::ones({100}, torch::kUInt8);
    first = a.data_ptr();
    EXPECT_EQ(tensor_memory_use().now - before, kMany + 100);
  }
  EXPECT_EQ(tensor_memory_use().now, before);
  {
    const torch::Tensor other = torch::ones({kMany + 1}, torch::kUInt8), same = torch::ones({kMany}, torch::kUInt8);
    EXPECT_NE(other.data_ptr(), first);
    EXPECT_EQ(same.data_ptr(), first);
    EXPECT_EQ(tensor_memory_use().now - before, 2 * kMany + 4096);  // whole pages
  }
  // What is more than is kept goes back, the oldest first: the pages can be read no more.
  std::vector<torch::Tensor> more(4);
  for (torch::Tensor& tensor : more) tensor = torch::ones({kMany}, torch::kUInt8);
  forget_most_tensor_memory();
  EXPECT_EQ(tensor_memory_use().most, tensor_memory_use().now);
  void* const oldest = more[0].data_ptr();
  more.clear();
  std::vector<torch::Tensor> again(3);
  for (torch::Tensor& tensor : again) {
    tensor = torch::ones({kMany}, torch::kUInt8);
    EXPECT_NE(tensor.data_ptr(), oldest);
  }
}

TEST(TensorMemory, TensorsOutliveThreadsAndTheAllocator) {
  torch::Tensor old = torch::full({1 << 18}, 3.0f), late;
  {
    const UsualAllocator usual;
    use_tensor_memory(1 << 20);
    old = torch::Tensor();  // of the usual one, freed by it
    std::vector<std::thread> threads;
    std::vector<torch::Tensor> made(4);
    for (size_t t = 0; t < made.size(); ++t)
      threads.emplace_back([&made, t] {
        for (int i = 0; i < 200; ++i) made[t] = torch::full({70000 + i % 3 * 2048}, static_cast<float>(t));
      });
    for (std::thread& thread : threads) thread.join();
    for (size_t t = 0; t < made.size(); ++t) EXPECT_TRUE(made[t].eq(static_cast<float>(t)).all().item<bool>());
    late = made[2];
  }
  EXPECT_TRUE(late.eq(2.0f).all().item<bool>());
}

}  // namespace
}  // namespace bitwright::train
