#include "train/export.hpp"

#include <mutex>

#include "base/error.hpp"
#include "base/output.hpp"
#include "base/threads.hpp"
#include "checkpoint/checkpoint.hpp"
#include "checkpoint/safetensors.hpp"
#include "kernels/decode.hpp"
#include "kernels/encode.hpp"
#include "quantize/model_files.hpp"
#include "quantize/output_layout.hpp"
#include "quantize/verify.hpp"
#include "scheme/transposed.hpp"
#include "train/causal_lm.hpp"
#include "train/linear.hpp"
#include "train/plan.hpp"
#include "train/quantized_linear.hpp"
#include "train/tensor_types.hpp"

namespace bitwright::train {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void not_exportable(const std::string& name, const std::string& why, const std::string& fix) {
  throw Error({.code = "not-exportable", .what = "cannot write the model", .where = name, .why = why, .fix = fix});
}

[[noreturn]] void does_not_fit(const std::string& name, const Container& container, const std::string& why) {
  throw Error({.code = "does-not-fit",
               .what = "cannot write the model",
               .where = name,
               .why = fmt::format("{} cannot hold it: {}", container.name, why),
               .fix = "choose another container, or quantize for this one"});
}

ExportedTensor linear_weight(const std::string& name, const torch::nn::LinearImpl& linear) {
  const std::shared_ptr<LinearBehaviour> behaviour = behaviour_of(linear);
  if (behaviour == nullptr) return {.name = name, .floats = linear.weight};
  const DType value_dtype = dtype_of(linear.weight.scalar_type());
  const auto stores = std::dynamic_pointer_cast<StoresQuantized>(behaviour);
  if (const auto frozen = behaviour_as<QuantizedLinearBehaviour>(linear); frozen != nullptr && stores == nullptr)
    return {.name = name,
            .quantized = {.weight = std::make_shared<QuantizedTensor>(frozen->weight()->unpacked()),
                          .activations = frozen->linear()},
            .value_dtype = value_dtype};
  if (stores == nullptr)
    not_exportable(name, "what computes the layer has no form in a file (an adapter, or quantization that is learned)",
                   "merge or convert the model first");
  ExportedTensor out = {.name = name, .quantized = stores->stored(), .value_dtype = value_dtype};
  if (out.quantized.weight == nullptr) not_exportable(name, "the layer has no quantized weight", "quantize it first");
  return out;
}

/// A tensor in the type and order that the file has.
class Source {
 public:
  Source(const ExportedTensor& tensor, const Container* container, std::optional<DType> floats) : tensor_(tensor) {
    if (tensor.quantized.weight != nullptr)
      prepare_quantized(container, floats);
    else
      prepare_plain(floats);
    plan.name = tensor.name;
    facts.name = tensor.name;
    facts.inputs_first = tensor.transposed;
    facts.is_float = info(facts.dtype).is_float;
    facts.bytes = size_bytes(facts.dtype);
  }

  /// The numbers of what is written as plain ones. Throws Error{"not-finite"}.
  std::vector<std::byte> plain() const {
    torch::Tensor numbers = tensor_.floats;
    if (!numbers.defined()) numbers = decoded();
    numbers = numbers.detach().to(torch::kCPU, tensor_type(facts.dtype).value());
    if (tensor_.transposed) numbers = numbers.t();
    numbers = numbers.contiguous();
    const auto* const data = static_cast<const std::byte*>(numbers.data_ptr());
    std::vector<std::byte> bytes(data, data + numbers.nbytes());
    const auto bad = facts.is_float && facts.dtype != DType::f64 ? find_non_finite({facts.dtype, bytes}) : std::nullopt;
    if (bad)
      throw Error(
          {.code = "not-finite",
           .what = "cannot write the model",
           .where = fmt::format("tensor '{}'", printable(facts.name)),
           .why = fmt::format("element {} would be {} as {}", bad->position, bad->value, info(facts.dtype).name),
           .fix = "training has diverged, or the type is too narrow"});
    return bytes;
  }

  TensorFacts facts{};
  TensorPlan plan{};
  std::shared_ptr<const QuantizedTensor> quantized{};  ///< as the container stores it; null: plain

 private:
  void prepare_quantized(const Container* container, std::optional<DType> floats) {
    facts.shape = tensor_.quantized.weight->shape;
    facts.dtype = floats.value_or(tensor_.value_dtype);
    facts.inputs_first = tensor_.transposed;
    if (tensor_.transposed) std::swap(facts.shape[0], facts.shape[1]);
    // What is frozen in floats of its own type is stored as all floats are.
    if (container == nullptr || tensor_.quantized.weight->scheme.is_plain()) return;
    quantized = tensor_.quantized.weight;
    if (tensor_.transposed && !is_stored_transposed(facts, *container)) {
      if (!can_transpose(quantized->scheme))
        does_not_fit(tensor_.name, *container,
                     "the model's files have this matrix transposed, where its groups are none");
      quantized = std::make_shared<const QuantizedTensor>(transposed(*quantized));
    }
    plan.scheme = quantized->scheme;
    plan.linear = tensor_.quantized.activations;
    if (container->takes != nullptr && container->scheme_for == nullptr && !container->takes(tensor_.name, facts.shape))
      does_not_fit(tensor_.name, *container, "its owner keeps such a matrix in floats");
  }

  void prepare_plain(std::optional<DType> floats) {
    const std::optional<DType> own = stored_dtype(tensor_.floats.scalar_type());
    if (!own) not_exportable(tensor_.name, "no file holds its type", "convert it");
    facts.dtype = info(*own).is_float ? floats.value_or(*own) : *own;
    facts.shape = tensor_.floats.sizes().vec();
    if (tensor_.transposed) std::swap(facts.shape[0], facts.shape[1]);
    plan.reason = facts.shape.size() < 2 ? std::string(kNotMatrix) : "trained in floats";
  }

  torch::Tensor decoded() const {
    std::vector<float> values = decode(*tensor_.quantized.weight);
    return torch::from_blob(values.data(), tensor_.quantized.weight->shape).clone();
  }

  const ExportedTensor& tensor_;
};

/// The one number that all activations share; its shape is each container's own.
bool equal(const std::shared_ptr<const QuantizedTensor>& a, const std::shared_ptr<const QuantizedTensor>& b) {
  return a == nullptr || b == nullptr ? a == b : decode(*a) == decode(*b);
}
/// A container whose owner always rounds activations as they come says so of layers that have nothing of the kind.
bool keeps(const std::optional<ActivationScheme>& written, const std::optional<ActivationScheme>& meant) {
  if (!meant) return true;
  return written && written->scheme == meant->scheme && written->dynamic == meant->dynamic &&
         equal(written->scale, meant->scale) && equal(written->offset, meant->offset);
}

class Exporter {
 public:
  Exporter(const std::vector<ExportedTensor>& tensors, const ExportSource& source, const ExportOptions& options)
      : source_(source), options_(options), container_(options.container) {
    for (const ExportedTensor& tensor : tensors) sources_.emplace_back(tensor, container_, options.floats);
    for (const Source& each : sources_) facts_.push_back(each.facts);
    config_ = source.config.is_null() ? OrderedJson::object() : source.config;
    drop_quantization(config_);
    if (options.floats) say_type(info(*options.floats).name);
    lay_out_arrays();
    metadata(OrderedJson::object());  // what cannot be written is refused before there is any work
  }

  void run() {
    OutputDirectory output(options_.output.output, options_.output.existing);
    const fs::path& staging = output.staging();
    if (!source_.directory.empty()) copy_side_files(source_.directory, true, staging);
    ShardWriter writer(staging, shards_);
    parallel_for(sources_.size(), [&](size_t i) {
      throw_if_interrupted();
      write(i, writer);
    });
    writer.finish();
    write_metadata(staging, OrderedJson::object());  // the written model must open before it can be verified
    verify(staging);
    write_metadata(staging, record(staging));
    output.commit();
  }

  /// All of it in one file, as much in memory.
  void run_in_one_file() {
    std::vector<std::vector<NamedArray>> packed(sources_.size());
    struct Place {
      size_t tensor, array;
    };
    std::vector<Place> order;
    for (size_t i = 0; i < sources_.size(); ++i) {
      if (sources_[i].quantized != nullptr) packed[i] = container_->pack(stored(i), *sources_[i].quantized);
      for (size_t a = 0; a < arrays_[i].size(); ++a) order.push_back({i, a});
    }
    const auto spec = [&](const Place& place) -> const ArraySpec& { return arrays_[place.tensor][place.array]; };
    // Wide numbers first: each begins at a multiple of its size.
    std::ranges::stable_sort(order, std::ranges::greater(),
                             [&](const Place& place) { return size_bytes(spec(place).dtype); });
    std::vector<ArraySpec> specs;
    for (const Place& place : order) specs.push_back(spec(place));
    WholeFile file(options_.output.output, options_.output.existing == Existing::replace);
    SafetensorsWriter writer(file.staging(), std::move(specs), metadata(OrderedJson::object()),
                             container_ == nullptr ? "pt" : container_->weights_format);
    for (const Place& place : order) {
      throw_if_interrupted();
      if (sources_[place.tensor].quantized == nullptr)
        writer.add(sources_[place.tensor].plain());
      else
        writer.add(packed[place.tensor][place.array].data);
    }
    writer.finish();
    file.commit();
  }

 private:
  void say_type(std::string_view name) {
    bool said = false;
    for (const char* key : {"torch_dtype", "dtype"})
      if (config_.contains(key)) {
        config_[key] = name;
        said = true;
      }
    if (!said) config_["torch_dtype"] = name;
  }

  void lay_out_arrays() {
    if (container_ == nullptr) {
      for (const TensorFacts& facts : facts_) arrays_.push_back({{facts.name, facts.dtype, facts.shape}});
      shards_ = plan_shards(arrays_, options_.output.shard_bytes());
      return;
    }
    Recipe recipe;
    for (const Source& each : sources_) recipe.tensors.push_back(each.plan);
    OutputLayout layout = lay_out(facts_, std::move(recipe), *container_, options_.output.shard_bytes());
    recipe_ = std::move(layout.recipe);
    arrays_ = std::move(layout.arrays);
    shards_ = std::move(layout.shards);
    if (find_lengths()) shards_ = plan_shards(arrays_, options_.output.shard_bytes(), container_->weights_format);
  }

  /// Of arrays whose lengths their values decide. Are there any?
  bool find_lengths() {
    bool any = false;
    for (size_t i = 0; i < sources_.size(); ++i) {
      if (std::ranges::none_of(arrays_[i], &ArraySpec::sized_by_value)) continue;
      any = true;
      const std::vector<NamedArray> packed = container_->pack(stored(i), *sources_[i].quantized);
      for (size_t a = 0; a < packed.size(); ++a) arrays_[i][a].shape = packed[a].spec.shape;
    }
    return any;
  }

  StoredTensor stored(size_t i) const { return stored_tensor(facts_[i], recipe_.tensors[i], *container_); }

  void write(size_t i, ShardWriter& writer) const {
    if (sources_[i].quantized == nullptr) return writer.write(i, 0, 0, sources_[i].plain());
    const std::vector<NamedArray> packed = container_->pack(stored(i), *sources_[i].quantized);
    for (size_t a = 0; a < packed.size(); ++a) writer.write(i, a, 0, packed[a].data);
  }

  std::map<std::string, OrderedJson> metadata(const OrderedJson& record) const {
    if (container_ == nullptr) return {{"config.json", config_}};
    return metadata_of(facts_, recipe_, *container_, config_, record);
  }

  void write_metadata(const fs::path& staging, const OrderedJson& record) const {
    for (const auto& [name, json] : metadata(record)) write_text_file(staging / name, json.dump(2) + "\n");
  }

  /// What was written is what was meant, each quantized tensor by its values.
  void verify(const fs::path& staging) const {
    if (container_ == nullptr) return;
    const Checkpoint written(staging, nullptr, Checkpoint::Unfinished::allow);
    for (size_t i = 0; i < sources_.size(); ++i) {
      const std::string& name = facts_[i].name;
      const TensorEntry* const entry = written.find(name);
      if (entry == nullptr || entry->quantized() != (sources_[i].quantized != nullptr))
        verification_failed(name, "missing, or of another kind");
      if (!entry->quantized()) continue;
      if (decode(written.read(*entry)) != decode(*sources_[i].quantized))
        verification_failed(name, "it reads back with other values");
      const QuantizedLinear& linear = recipe_.tensors[i].linear;
      if (!keeps(entry->linear.input, linear.input) || !keeps(entry->linear.output, linear.output))
        does_not_fit(name, *container_, "it does not keep how the layer's activations are quantized");
    }
  }

  OrderedJson record(const fs::path& staging) const {
    OrderedJson out = {{"tool", {{"name", "bitwright"}, {"version", BITWRIGHT_VERSION}}},
                       {"bytes_out", shards_.bytes()},
                       {"layers", OrderedJson::array()}};
    for (size_t i = 0; i < sources_.size(); ++i) {
      if (sources_[i].quantized == nullptr) continue;
      uint64_t bytes = 0;
      for (const ArraySpec& array : arrays_[i]) bytes += array.bytes();
      out["layers"].push_back({{"name", facts_[i].name},
                               {"scheme", describe(sources_[i].quantized->scheme)},
                               {"bits_per_weight", 8.0 * static_cast<double>(bytes) /
                                                       static_cast<double>(element_count(facts_[i].shape))}});
    }
    if (!options_.record.is_null()) out["training"] = options_.record;
    out["files"] = digests_of(staging);
    return out;
  }

  const ExportSource& source_;
  const ExportOptions& options_;
  const Container* container_;
  std::vector<Source> sources_;
  std::vector<TensorFacts> facts_;
  OrderedJson config_;
  Recipe recipe_;
  std::vector<std::vector<ArraySpec>> arrays_;
  ShardPlan shards_;
};

/// A directory that is gone at the end of the scope.
struct Passing {
  fs::path path;
  ~Passing() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
};

/// A file that is a whole model has names and an order of its own: what convert knows.
void export_by_conversion(const std::vector<ExportedTensor>& tensors, const ExportSource& source,
                          const ExportOptions& options) {
  const fs::path& target = options.output.output;
  const Passing native = {target.parent_path() / fmt::format(".{}.native", target.filename().string())};
  ExportOptions first = options;
  first.container = find_container("native");
  first.output.output = native.path;
  first.output.existing = Existing::replace;
  Exporter(tensors, source, first).run();
  std::vector<Warning> warnings;
  convert(Checkpoint(native.path),
          {.output = options.output, .request = {.container = options.container, .exact = true}}, warnings);
}

}  // namespace

std::vector<ExportedTensor> exported_tensors(const torch::nn::Module& module) {
  std::vector<ExportedTensor> out;
  std::set<std::string> linears;  // ends with a dot
  for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl& linear) {
    const std::string base = path.empty() ? "" : path + ".";
    linears.insert(base);
    out.push_back(linear_weight(base + "weight", linear));
    if (linear.bias.defined()) out.push_back({.name = base + "bias", .floats = linear.bias});
  });
  const auto is_of_linear = [&](const std::string& name) {
    return std::ranges::any_of(linears, [&](const std::string& base) { return name.starts_with(base); });
  };
  const auto add = [&](const auto& named) {
    for (const auto& item : named)
      if (!is_of_linear(item.key())) out.push_back({.name = item.key(), .floats = item.value()});
    for (const ExportedTensor& tensor : out)
      if (tensor.floats.defined() && tensor.floats.numel() == 0)
        not_exportable(tensor.name, "it is not kept in floats", "load the model without load_embedding");
  };
  add(module.named_parameters());
  add(module.named_buffers());
  if (const auto* const model = dynamic_cast<const CausalLm*>(&module))
    for (ExportedTensor& tensor : out) tensor.transposed = model->stored_transposed(tensor.name);
  return out;
}

bool has_quantized(const std::vector<ExportedTensor>& tensors) {
  return std::ranges::any_of(tensors, [](const ExportedTensor& tensor) {
    return tensor.quantized.weight != nullptr && !tensor.quantized.weight->scheme.is_plain();
  });
}

ExportSource export_source(const Checkpoint& checkpoint) {
  return {.config = read_config(checkpoint),
          .directory = checkpoint.facts() == nullptr ? model_directory(checkpoint) : fs::path()};
}

void export_model(const std::vector<ExportedTensor>& tensors, const ExportSource& source,
                  const ExportOptions& options) {
  const bool whole_file = options.container != nullptr && !options.container->model_file.empty();
  if (whole_file) return export_by_conversion(tensors, source, options);
  Exporter exporter(tensors, source, options);
  if (options.output.output.extension() == ".safetensors")
    exporter.run_in_one_file();
  else
    exporter.run();
}

}  // namespace bitwright::train
