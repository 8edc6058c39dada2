#include "model/weights.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/error.hpp"
#include "kernels/matmul.hpp"
#include "scheme/take_rows.hpp"

namespace bitwright {
namespace {

[[noreturn]] void fail(const Checkpoint& checkpoint, const char* code, const std::string& why,
                       const std::string& fix = "") {
  throw Error(
      {.code = code, .what = "cannot load the model", .where = checkpoint.path().string(), .why = why, .fix = fix});
}

/// The kernels read these as they are.
bool is_direct(const TensorEntry& entry) {
  return !entry.quantized() && (entry.dtype == DType::f32 || entry.dtype == DType::f16 || entry.dtype == DType::bf16);
}

bool ends_as_module(std::string_view name, std::string_view end) {
  return name == end || (name.ends_with(end) && name[name.size() - end.size() - 1] == '.');
}

/// The only tensor NAME, or PREFIX.NAME with any prefix; null if there is none.
const TensorEntry* find_by_end(const Checkpoint& checkpoint, const std::string& name) {
  const TensorEntry* found = nullptr;
  for (const TensorEntry& entry : checkpoint.tensors()) {
    if (!ends_as_module(entry.name, name)) continue;
    if (found != nullptr)
      fail(checkpoint, "ambiguous-tensor",
           fmt::format("'{}' and '{}' could both be the model's {}", printable(found->name), printable(entry.name),
                       name));
    found = &entry;
  }
  return found;
}

std::string find_prefix(const Checkpoint& checkpoint, const std::string& embedding) {
  const TensorEntry* const entry = find_by_end(checkpoint, embedding);
  if (entry == nullptr)
    fail(checkpoint, "missing-tensor", fmt::format("there is no tensor '{}', with or without a prefix", embedding));
  return entry->name.substr(0, entry->name.size() - embedding.size());
}

std::optional<ActivationQuantizer> quantizer(const std::optional<ActivationScheme>& activation) {
  if (!activation || !ActivationQuantizer::supports(*activation)) return std::nullopt;
  return ActivationQuantizer(*activation);
}

void add_activations(Linear& linear, const TensorEntry& entry) {
  linear.input = quantizer(entry.linear.input);
  linear.output = quantizer(entry.linear.output);
}

}  // namespace

/// The rows of a matrix within a tensor that is one matrix [.., columns], or [columns, ..] if it is transposed.
struct WeightReader::Cut {
  std::vector<int64_t> rows;
  int64_t stored, columns;  ///< rows and columns the tensor has
  bool transposed = false;
  bool whole() const { return static_cast<int64_t>(rows.size()) == stored; }

  /// `count` rows from `first` on.
  static std::vector<int64_t> range(int64_t first, int64_t count) {
    std::vector<int64_t> rows(static_cast<size_t>(count));
    std::iota(rows.begin(), rows.end(), first);
    return rows;
  }
};

WeightReader::WeightReader(const Checkpoint& checkpoint, const TensorPlaces& places, const LoraAdapter* adapter)
    : checkpoint_(checkpoint),
      places_(places),
      adapter_(adapter),
      prefix_(find_prefix(checkpoint, places.embedding + ".weight")) {}

const TensorEntry& WeightReader::require(const std::string& full_name, const Shape& shape) {
  const TensorEntry* const entry = checkpoint_.find(full_name);
  if (entry == nullptr) fail(checkpoint_, "missing-tensor", fmt::format("there is no tensor '{}'", full_name));
  if (entry->shape != shape)
    fail(checkpoint_, "wrong-shape",
         fmt::format("tensor '{}' has the shape {} where config.json asks for {}", printable(full_name),
                     to_string(entry->shape), to_string(shape)));
  checkpoint_.require_decoded(*entry);
  const ElementType* const element = entry->scheme.element;
  const bool decodable = entry->quantized() ? element->kind != ElementKind::block_code : info(entry->dtype).is_float;
  if (!decodable)
    fail(checkpoint_, "unsupported-tensor",
         fmt::format("tensor '{}' holds {}, which this runtime does not decode", printable(full_name),
                     element != nullptr ? element->name : info(entry->dtype).name));
  read_.insert(entry);
  return *entry;
}

std::shared_ptr<const QuantizedTensor> WeightReader::read(const TensorEntry& entry) {
  if (last_entry_ != &entry) {
    last_ = std::make_shared<const QuantizedTensor>(checkpoint_.read(entry));
    last_entry_ = &entry;
  }
  return last_;
}

/// Copies the numbers that the cut asks for, each as it is stored.
PackedMatrix WeightReader::pack_plain(const TensorEntry& entry, const Cut& cut) const {
  std::vector<std::byte> copy;
  if (entry.rearranged) {
    copy.resize(entry.stored_bytes);
    checkpoint_.read_bytes(entry, 0, copy);
  }
  const std::span<const std::byte> bytes =
      entry.rearranged ? std::span<const std::byte>(copy) : checkpoint_.plain_bytes(entry);
  const auto columns = static_cast<size_t>(cut.columns), stored = static_cast<size_t>(cut.stored);
  const size_t size = size_bytes(entry.dtype), row_bytes = columns * size;
  if (cut.whole() && !cut.transposed) return pack_matrix(entry.dtype, bytes, stored, columns);
  std::vector<std::byte> taken(cut.rows.size() * row_bytes);
  for (size_t i = 0; i < cut.rows.size(); ++i) {
    const auto row = static_cast<size_t>(cut.rows[i]);
    std::byte* const to = taken.data() + i * row_bytes;
    if (!cut.transposed)
      std::memcpy(to, bytes.data() + row * row_bytes, row_bytes);
    else
      for (size_t k = 0; k < columns; ++k) std::memcpy(to + k * size, bytes.data() + (k * stored + row) * size, size);
  }
  return pack_matrix(entry.dtype, taken, cut.rows.size(), columns);
}

/// all: the values of the whole tensor.
PackedMatrix WeightReader::pack_floats(const std::vector<float>& all, const Cut& cut) {
  const auto columns = static_cast<size_t>(cut.columns), stored = static_cast<size_t>(cut.stored);
  std::vector<float> taken;
  taken.reserve(cut.rows.size() * columns);
  for (const int64_t row : cut.rows)
    for (size_t k = 0; k < columns; ++k) {
      const auto r = static_cast<size_t>(row);
      taken.push_back(all[cut.transposed ? k * stored + r : r * columns + k]);
    }
  return pack_matrix(DType::f32, std::as_bytes(std::span(taken)), cut.rows.size(), columns);
}

PackedMatrix WeightReader::pack_quantized(const TensorEntry& entry, const Cut& cut) {
  if (cut.whole() && !cut.transposed && entry.shape.size() == 2)
    return pack_matrix(std::make_shared<const QuantizedTensor>(checkpoint_.read(entry)));
  if (!cut.transposed)
    if (std::optional<QuantizedTensor> taken = take_rows(*read(entry), cut.rows))
      return pack_matrix(std::make_shared<const QuantizedTensor>(*std::move(taken)));
  return pack_floats(decode(*read(entry)), cut);
}

PackedMatrix WeightReader::pack(const TensorEntry& entry, const Cut& cut) {
  if (is_direct(entry)) return pack_plain(entry, cut);
  if (entry.scheme.element != nullptr) return pack_quantized(entry, cut);
  // Wider than f32: rounded to it.
  return pack_floats(checkpoint_.read_f32(entry), cut);
}

/// The module's path as the checkpoint has it, and as the architecture usually does.
void WeightReader::adapt(Linear& linear, const std::string& stored, const std::string& usual, const Cut& cut) {
  if (adapter_ == nullptr) return;
  auto found = adapter_->layers().find(stored);
  if (found == adapter_->layers().end()) found = adapter_->layers().find(usual);
  if (found == adapter_->layers().end()) return;
  const LoraAdapter::Layer& layer = found->second;
  const auto columns = static_cast<size_t>(cut.columns), rows = static_cast<size_t>(cut.stored);
  if (layer.columns != columns || layer.rows != rows)
    fail_bad_adapter(adapter_->path().string(),
                     fmt::format("'{}' is an adapter of [{}, {}], the model's matrix is [{}, {}]",
                                 printable(found->first), layer.rows, layer.columns, rows, columns));
  const std::span b = std::as_bytes(std::span(layer.b));
  const size_t row_bytes = layer.rank * sizeof(float);
  std::vector<std::byte> taken(cut.rows.size() * row_bytes);
  for (size_t i = 0; i < cut.rows.size(); ++i)
    std::memcpy(taken.data() + i * row_bytes, b.data() + static_cast<size_t>(cut.rows[i]) * row_bytes, row_bytes);
  linear.adapter = {.a = pack_matrix(DType::f32, std::as_bytes(std::span(layer.a)), layer.rank, columns),
                    .b = pack_matrix(DType::f32, taken, cut.rows.size(), layer.rank)};
  adapted_.insert(found->first);
}

Linear WeightReader::linear(const std::string& base, const MatrixPlace& place, int64_t rows, int64_t columns) {
  Cut cut = {.rows = Cut::range(0, rows), .stored = place.stored == 0 ? rows : place.stored, .columns = columns};
  if (place.stored != 0)
    for (int64_t& row : cut.rows) row = place.first + row / place.run * place.step + row % place.run;
  const std::string name = prefix_ + base + place.name;
  const TensorEntry* const entry = checkpoint_.find(name + ".weight");
  cut.transposed = place.transposed && (entry == nullptr || !entry->transposed);
  const Shape shape = cut.transposed ? Shape{columns, cut.stored} : Shape{cut.stored, columns};
  const TensorEntry& weight = require(name + ".weight", shape);
  Linear linear = {.weight = pack(weight, cut), .name = {.tensor = weight.name}};
  add_activations(linear, weight);
  adapt(linear, name, places_.prefix + base + place.name, cut);
  if (place.bias) {
    const std::vector<float> all = checkpoint_.read_f32(require(name + ".bias", {cut.stored}));
    for (const int64_t row : cut.rows) linear.bias.push_back(all[static_cast<size_t>(row)]);
  }
  return linear;
}

Linear WeightReader::of_stack(const std::string& name, int64_t index, const Shape& shape, int64_t first, int64_t rows) {
  const std::vector<int64_t> taken = Cut::range(index * shape[1] + first, rows);
  const TensorEntry& entry = require(prefix_ + name, shape);
  Linear linear = {.weight = pack(entry, {.rows = taken, .stored = shape[0] * shape[1], .columns = shape[2]}),
                   .name = {.tensor = entry.name, .index = index}};
  add_activations(linear, entry);
  return linear;
}

std::vector<float> WeightReader::vector(const std::string& name, int64_t size) {
  return checkpoint_.read_f32(require(prefix_ + name, {size}));
}

RowSource WeightReader::rows(const std::string& name, int64_t rows, int64_t columns) {
  const TensorEntry& entry = require(prefix_ + name, {rows, columns});
  RowSource source;
  source.rows_ = static_cast<size_t>(rows);
  source.columns_ = static_cast<size_t>(columns);
  if (is_direct(entry) && !entry.rearranged) {
    source.dtype_ = entry.dtype;
    source.bytes_ = checkpoint_.plain_bytes(entry);
  } else {
    source.packed_ = pack(entry, {.rows = Cut::range(0, rows), .stored = rows, .columns = columns});
  }
  return source;
}

const TensorEntry* WeightReader::find_head() const { return find_by_end(checkpoint_, places_.head + ".weight"); }

std::optional<Linear> WeightReader::head(int64_t rows, int64_t columns) {
  const TensorEntry* const entry = find_head();
  if (entry == nullptr) return std::nullopt;
  const Cut whole = {.rows = Cut::range(0, rows), .stored = rows, .columns = columns};
  Linear head = {.weight = pack(require(entry->name, {rows, columns}), whole), .name = {.tensor = entry->name}};
  add_activations(head, *entry);
  adapt(head, entry->name.substr(0, entry->name.size() - std::string_view(".weight").size()), places_.head, whole);
  return head;
}

void WeightReader::refuse_unread() const {
  const auto is_leftover = [&](const std::string& name) {
    return std::ranges::any_of(places_.leftovers, [&](const std::string& end) { return name.ends_with(end); }) ||
           std::ranges::any_of(places_.other_modules, [&](const std::string& part) {
             return ('.' + name).find('.' + part + '.') != std::string::npos;
           });
  };
  for (const TensorEntry& entry : checkpoint_.tensors())
    if (!read_.contains(&entry) && !is_leftover(entry.name))
      fail(checkpoint_, "unsupported-tensor",
           fmt::format("tensor '{}' has no part in this architecture as it is supported", printable(entry.name)));
  if (adapter_ == nullptr) return;
  for (const auto& [module, layer] : adapter_->layers())
    if (!adapted_.contains(module))
      fail_bad_adapter(adapter_->path().string(), fmt::format("the model has no matrix '{}'", printable(module)),
                       "is it an adapter of this model?");
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
