#include "train/keep_frozen.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "base/threads.hpp"
#include "scheme/transposed.hpp"

namespace bitwright::train {
namespace {

/// What was freed on the way to a packed layer goes back to the system: glibc would keep it, and touch ever more pages.
void give_back_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

/// Read, not mapped: the file's pages would stay in memory.
QuantizedTensor read_matrix(const Checkpoint& checkpoint, const TensorEntry& entry) {
  if (entry.quantized()) return checkpoint.read_rows(entry, 0, entry.shape.front());
  const auto bytes = static_cast<size_t>(element_count(entry.shape)) * size_bytes(entry.dtype);
  QuantizedTensor plain = {.scheme = bitwright::plain(entry.dtype), .shape = entry.shape};
  plain.codes.resize(bytes);
  checkpoint.read_bytes(entry, 0, plain.codes);
  return plain;
}

}  // namespace

bool keep_quantized(const std::string& /*path*/, torch::nn::LinearImpl& layer, const Checkpoint& checkpoint,
                    const TensorEntry& entry, bool transposed) {
  if (!entry.quantized() || (transposed && !can_transpose(entry.scheme))) return false;
  QuantizedTensor weight = read_matrix(checkpoint, entry);
  if (transposed) weight = bitwright::transposed(weight);
  attach_quantized(layer,
                   std::make_shared<QuantizedLinearBehaviour>(std::move(weight), entry.linear, checkpoint.container()));
  give_back_memory();
  return true;
}

bool keep_frozen(const std::string& path, torch::nn::LinearImpl& layer, const Checkpoint& checkpoint,
                 const TensorEntry& entry, bool transposed) {
  if (entry.quantized()) return keep_quantized(path, layer, checkpoint, entry, transposed);
  if (transposed || (entry.dtype != DType::f16 && entry.dtype != DType::bf16)) return false;
  attach_quantized(layer, std::make_shared<QuantizedLinearBehaviour>(read_matrix(checkpoint, entry)));
  give_back_memory();
  return true;
}

torch::Tensor decode_rows(const CompactTensor& matrix, const torch::Tensor& indices) {
  const torch::Tensor rows = indices.contiguous();
  std::vector<int64_t> sizes = rows.sizes().vec();
  const int64_t columns = matrix.shape()[1];
  sizes.push_back(columns);
  torch::Tensor out = torch::empty(sizes, torch::kFloat32);
  const CompactDecoder decoder(matrix);
  parallel_for(static_cast<size_t>(rows.numel()), [&](size_t i) {
    const int64_t row = rows.data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(row >= 0 && row < matrix.shape()[0], "row ", row, " of ", matrix.shape()[0]);
    const auto width = static_cast<size_t>(columns);
    decoder.decode(row * columns, {out.data_ptr<float>() + i * width, width});
  });
  return out;
}

TableRows keep_table(const Checkpoint& checkpoint, const TensorEntry& entry) {
  if (entry.transposed || (!entry.quantized() && entry.dtype != DType::f16 && entry.dtype != DType::bf16))
    return nullptr;
  const auto matrix = std::make_shared<const CompactTensor>(read_matrix(checkpoint, entry));
  give_back_memory();
  return [matrix](const torch::Tensor& tokens) { return decode_rows(*matrix, tokens); };
}

}  // namespace bitwright::train
