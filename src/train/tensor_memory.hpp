#pragma once

#include <cstddef>
#include <cstdint>

namespace bitwright::train {

/// Bytes of tensors, by all that were made since use_tensor_memory().
struct TensorMemoryUse {
  int64_t now, most;
};

/// libtorch's tensors on the CPU have their memory from here, from now on to the end of the process: each large one is
/// a mapping of its own, and those that were freed last are kept for the next of the same size. A step allocates the
/// same sizes over and over: it finds pages that are mapped, and no more than `most_kept` bytes are held that nobody
/// uses (with glibc's heap they lie between what is used, and grow to several times that).
void use_tensor_memory(size_t most_kept = size_t{16} << 20);
TensorMemoryUse tensor_memory_use();
/// `most` begins at what is there now.
void forget_most_tensor_memory();

}  // namespace bitwright::train
