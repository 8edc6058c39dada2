#include "model/weights.hpp"

#include <fmt/format.h>

#include "base/error.hpp"
#include "kernels/matmul.hpp"

namespace bitwright {
namespace {

/// The kernels read these as they are.
bool is_direct(const TensorEntry& entry) {
  return !entry.quantized() && (entry.dtype == DType::f32 || entry.dtype == DType::f16 || entry.dtype == DType::bf16);
}

PackedMatrix pack(const Checkpoint& checkpoint, const TensorEntry& entry) {
  const auto rows = static_cast<size_t>(entry.shape[0]), columns = static_cast<size_t>(entry.shape[1]);
  if (is_direct(entry)) return pack_matrix(entry.dtype, checkpoint.plain_bytes(entry), rows, columns);
  return pack_matrix(std::make_shared<QuantizedTensor>(checkpoint.read(entry)));
}

}  // namespace

const TensorEntry& require_tensor(const Checkpoint& checkpoint, const std::string& name, const Shape& shape) {
  const TensorEntry* const entry = checkpoint.find(name);
  ErrorReport report = {.what = "cannot load the model", .where = checkpoint.path().string()};
  if (entry == nullptr) {
    report.code = "missing-tensor";
    report.why = fmt::format("there is no tensor '{}'", name);
    throw Error(report);
  }
  if (entry->shape != shape) {
    report.code = "wrong-shape";
    report.why = fmt::format("tensor '{}' has the shape {} where config.json asks for {}", name,
                             to_string(entry->shape), to_string(shape));
    throw Error(report);
  }
  const ElementType* const element = entry->scheme.element;
  if (element == nullptr || !info(entry->dtype).is_float || element->kind == ElementKind::block_code) {
    report.code = "unsupported-tensor";
    report.why = fmt::format("tensor '{}' holds {}, which this runtime does not decode", name,
                             element != nullptr ? element->name : info(entry->dtype).name);
    throw Error(report);
  }
  return *entry;
}

void refuse_tensor(const Checkpoint& checkpoint, const std::string& name) {
  if (checkpoint.find(name) == nullptr) return;
  throw Error({.code = "unsupported-tensor",
               .what = "cannot load the model",
               .where = checkpoint.path().string(),
               .why = fmt::format("tensor '{}' has no part in this architecture as it is supported", name)});
}

PackedMatrix load_matrix(const Checkpoint& checkpoint, const std::string& name, int64_t rows, int64_t columns) {
  return pack(checkpoint, require_tensor(checkpoint, name, {rows, columns}));
}

std::vector<float> load_vector(const Checkpoint& checkpoint, const std::string& name, int64_t size) {
  return checkpoint.read_f32(require_tensor(checkpoint, name, {size}));
}

RowSource::RowSource(const Checkpoint& checkpoint, const std::string& name, int64_t rows, int64_t columns)
    : rows_(static_cast<size_t>(rows)), columns_(static_cast<size_t>(columns)) {
  const TensorEntry& entry = require_tensor(checkpoint, name, {rows, columns});
  if (is_direct(entry)) {
    dtype_ = entry.dtype;
    bytes_ = checkpoint.plain_bytes(entry);
  } else {
    packed_ = pack(checkpoint, entry);
  }
}

void RowSource::read(size_t row, std::span<float> out) const {
  if (bytes_.empty()) return expand_row(*packed_, row, out);
  const size_t row_bytes = columns_ * size_bytes(dtype_);
  to_f32(dtype_, bytes_.subspan(row * row_bytes, row_bytes), out);
}

const PackedMatrix& RowSource::packed() {
  if (!packed_) packed_ = pack_matrix(dtype_, bytes_, rows_, columns_);
  return *packed_;
}

}  // namespace bitwright
