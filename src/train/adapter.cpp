#include "bitwright/torch/adapter.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <set>

#include "base/error.hpp"
#include "base/output.hpp"
#include "checkpoint/safetensors.hpp"
#include "engine/backends.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"
#include "train/linear.hpp"
#include "train/quantized_module.hpp"

namespace bitwright {
namespace {

using namespace train;

// ---- Files ----

/// A module's tensors on their way into a file.
struct PackedModule {
  std::vector<NamedArray> arrays;
  std::vector<StoredTensor> quantized;
  std::vector<std::string> kept;  ///< linear layers in floats
};

std::optional<DType> stored_dtype(torch::ScalarType type) {
  constexpr std::array<std::pair<torch::ScalarType, DType>, 9> kTypes = {{{torch::kFloat, DType::f32},
                                                                          {torch::kHalf, DType::f16},
                                                                          {torch::kBFloat16, DType::bf16},
                                                                          {torch::kDouble, DType::f64},
                                                                          {torch::kLong, DType::i64},
                                                                          {torch::kInt, DType::i32},
                                                                          {torch::kChar, DType::i8},
                                                                          {torch::kByte, DType::u8},
                                                                          {torch::kBool, DType::boolean}}};
  const auto* const found = std::ranges::find(kTypes, type, &std::pair<torch::ScalarType, DType>::first);
  return found == kTypes.end() ? std::nullopt : std::optional(found->second);
}

NamedArray plain_array(const std::string& name, const torch::Tensor& tensor) {
  const std::optional<DType> dtype = stored_dtype(tensor.scalar_type());
  if (!dtype)
    throw Error({.code = "not-exportable",
                 .what = "cannot save the model",
                 .where = name,
                 .why = "no file has numbers of its type"});
  const torch::Tensor data = tensor.detach().to(torch::kCPU).contiguous();
  const auto* const bytes = static_cast<const std::byte*>(data.data_ptr());
  return {.spec = {.name = name, .dtype = *dtype, .shape = tensor.sizes().vec()},
          .data = {bytes, bytes + data.nbytes()}};
}

void pack_layer(const std::string& path, const torch::nn::LinearImpl& layer, const Container& container,
                PackedModule& out) {
  const auto quantized = behaviour_as<QuantizedLinearBehaviour>(layer);
  const std::string name = weight_name(path);
  if (quantized == nullptr || quantized->scheme().is_plain()) {
    const torch::Tensor floats = quantized != nullptr ? quantized->decoded() : parameter_of(layer);
    if (!floats.is_floating_point() || floats.sizes() != layer.weight.sizes())
      throw Error({.code = "not-exportable",
                   .what = "cannot save the model",
                   .where = path,
                   .why = "its parameter is no matrix of floats"});
    out.arrays.push_back(plain_array(name, floats));
    out.kept.push_back(path);
    return;
  }
  const StoredTensor stored = {.name = name,
                               .shape = layer.weight.sizes().vec(),
                               .scheme = quantized->scheme(),
                               .value_dtype = train::dtype_of(layer.weight.scalar_type()),
                               .linear = quantized->linear()};
  const Fit fit = container.fit(stored.scheme, stored.shape);
  if (fit.verdict == Verdict::impossible)
    throw Error({.code = "does-not-fit", .what = "cannot save the model", .where = path, .why = fit.reason});
  std::ranges::move(container.pack(stored, quantized->weight()->unpacked()), std::back_inserter(out.arrays));
  out.quantized.push_back(stored);
}

PackedModule pack_module(const torch::nn::Module& module, const Container& container) {
  PackedModule out;
  std::set<std::string> weights;
  for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl& layer) {
    pack_layer(path, layer, container, out);
    weights.insert(weight_name(path));
  });
  const auto add = [&](const auto& named) {
    for (const auto& item : named)
      if (!weights.contains(item.key())) out.arrays.push_back(plain_array(item.key(), item.value()));
  };
  add(module.named_parameters());
  add(module.named_buffers());
  if (container.fit_model != nullptr)
    if (const Fit fit = container.fit_model(out.quantized); fit.verdict == Verdict::impossible)
      throw Error({.code = "does-not-fit", .what = "cannot save the model", .why = fit.reason});
  // Wide numbers first: each begins at a multiple of its size.
  std::ranges::stable_sort(out.arrays, std::ranges::greater(),
                           [](const NamedArray& array) { return size_bytes(array.spec.dtype); });
  return out;
}

/// The JSON files of the model, config.json among them. record: what quantization_metadata.json gets beside the layers.
std::map<std::string, OrderedJson> documents_of(const PackedModule& packed, const Container& container,
                                                const ModelFiles& files, const OrderedJson& record) {
  std::map<std::string, OrderedJson> documents;
  OrderedJson config = files.config;
  drop_quantization(config);
  if (!packed.quantized.empty())
    container.write_metadata({.tensors = packed.quantized, .kept = packed.kept, .record = record},
                             {.config = config, .files = documents});
  documents["config.json"] = std::move(config);
  return documents;
}

void write_weights(const std::filesystem::path& path, const PackedModule& packed, const Container& container,
                   const std::map<std::string, OrderedJson>& documents) {
  std::vector<ArraySpec> specs;
  for (const NamedArray& array : packed.arrays) specs.push_back(array.spec);
  SafetensorsWriter writer(path, std::move(specs), documents, container.weights_format);
  for (const NamedArray& array : packed.arrays) writer.add(array.data);
  writer.finish();
}

const Container& writable(const std::string& format) {
  const Container* const container = find_container(format);
  if (container == nullptr || container->write_metadata == nullptr || !container->model_file.empty())
    throw Error({.code = "unknown-format",
                 .what = "cannot save the model",
                 .where = printable(format),
                 .why = "no modules are saved this way",
                 .fix = "see `bitwright formats`; GGUF is written from a saved model by `bitwright convert`",
                 .status = ExitStatus::usage});
  return *container;
}

// ---- Loading ----

[[noreturn]] void fail(const Checkpoint& checkpoint, const char* code, const std::string& why) {
  throw Error({.code = code, .what = "cannot load the model", .where = checkpoint.path().string(), .why = why});
}

const TensorEntry& require(const Checkpoint& checkpoint, const std::string& name, torch::IntArrayRef shape) {
  const TensorEntry* const entry = checkpoint.find(name);
  if (entry == nullptr) fail(checkpoint, "missing-tensor", fmt::format("there is no tensor '{}'", printable(name)));
  Shape stored = entry->shape;
  if (entry->transposed) std::swap(stored.at(0), stored.at(1));
  if (stored != shape.vec())
    fail(checkpoint, "wrong-shape",
         fmt::format("tensor '{}' has the shape {}, the module asks for {}", printable(name), to_string(stored),
                     to_string(shape.vec())));
  if (entry->transposed) fail(checkpoint, "unsupported-tensor", fmt::format("'{}' is stored transposed", name));
  checkpoint.require_decoded(*entry);
  return *entry;
}

torch::Tensor read_floats(const Checkpoint& checkpoint, const TensorEntry& entry) {
  const std::vector<float> values = checkpoint.read_f32(entry);
  return torch::tensor(values, torch::kFloat).reshape(entry.shape);
}

/// What will be done to the module, made before anything is.
struct Loaded {
  std::vector<std::function<void()>> steps;
  std::set<std::string, std::less<>> used;
};

void load_layer(const Checkpoint& checkpoint, const std::string& path, torch::nn::LinearImpl& layer, Loaded& out) {
  const std::string name = weight_name(path);
  const TensorEntry& entry = require(checkpoint, name, layer.weight.sizes());
  out.used.insert(name);
  if (entry.quantized()) {
    auto quantized = std::make_shared<QuantizedLayer>(checkpoint.read(entry), entry.linear);
    out.steps.push_back([&layer, quantized] { attach_quantized(layer, quantized); });
  } else {
    const torch::Tensor floats = read_floats(checkpoint, entry).to(layer.weight.scalar_type());
    out.steps.push_back([&layer, floats] { detach(layer, floats.clone().requires_grad_()); });
  }
}

void load_others(const Checkpoint& checkpoint, const torch::OrderedDict<std::string, torch::Tensor>& named,
                 bool is_required, Loaded& out) {
  for (const auto& item : named) {
    if (out.used.contains(item.key())) continue;
    if (!is_required && checkpoint.find(item.key()) == nullptr) continue;
    const torch::Tensor to = item.value();
    const TensorEntry& entry = require(checkpoint, item.key(), to.sizes());
    out.used.insert(item.key());
    out.steps.push_back([to, floats = read_floats(checkpoint, entry)] {
      const torch::NoGradGuard no_gradients;
      to.copy_(floats);
    });
  }
}

// ---- Adapters ----

/// A library of the table, whose schemes and files the containers know.
struct Library {
  std::string_view library, adapter;
};
constexpr std::array<Library, 4> kLibraries = {
    {{"bitsandbytes", "BitsAndBytes"}, {"hqq", "HQQ"}, {"mlx", "MLX"}, {"optimum-quanto", "Quanto"}}};
constexpr std::string_view kFallback = "Fallback";

/// Where the library runs its name; else, and for plain floats, "Fallback".
std::string_view adapter_name(const std::string& backend, const std::string& method) {
  if (!backend_runs(backend, method)) return kFallback;
  const std::vector<AdapterMethod> methods = adapter_methods();
  const auto row = std::ranges::find(methods, method, &AdapterMethod::name);
  const auto* const found = std::ranges::find(kLibraries, row->library, &Library::library);
  return found == kLibraries.end() ? kFallback : found->adapter;
}

class ContainerAdapter : public QuantizationAdapter {
 public:
  ContainerAdapter(const std::string& backend, const QuantizationConfig& config)
      : QuantizationAdapter(backend, config), name_(adapter_name(backend, config.method)) {
    issues_ = validate_quantization_config(to_json(config), backend);
    // It runs all the same, by our kernels; what our kernels do not do as asked is said, too.
    for (Diagnostic& issue : issues_) issue.severity = Severity::warning;
    if (config.compute_dtype == "float16")
      issues_.push_back({"COMPUTE_DTYPE", Severity::warning, "float16 products are computed in float32 on the CPU"});
    if (config.storage_dtype != "uint8")
      issues_.push_back({"STORAGE_DTYPE", Severity::warning, "packed codes are stored as uint8"});
  }

  std::string_view name() const override { return name_; }

  torch::nn::Linear create_quantized_linear(int64_t in_features, int64_t out_features, bool bias) override {
    torch::nn::Linear linear(torch::nn::LinearOptions(in_features, out_features).bias(bias));
    if (config().method == "none") return linear;
    QuantizationConfig whole = config();
    whole.skip_modules.clear();
    quantize(*linear, whole);
    return linear;
  }

  QuantizationInfo quantize_model(torch::nn::Module& model) override {
    const std::vector<Warning> warnings = quantize(model, config());
    QuantizationInfo info = get_quantization_info(model);
    for (const Diagnostic& issue : issues_) info.warnings.push_back(fmt::format("{}: {}", issue.code, issue.message));
    for (const Warning& warning : warnings) info.warnings.push_back(warning.message);
    return info;
  }

  void prepare_model_for_training(torch::nn::Module& model) override { bitwright::prepare_model_for_training(model); }

  void save_quantized_model(const torch::nn::Module& model, const std::filesystem::path& path,
                            const ModelFiles& files) override {
    const ContainerRequest request = request_of(config());
    const std::string format(request.container == nullptr ? "native" : request.container->name);
    bitwright::save_quantized_model(model, path, format, files);
  }

  QuantizationInfo load_quantized_model(torch::nn::Module& model, const std::filesystem::path& path) override {
    return bitwright::load_quantized_model(model, path);
  }

 private:
  static std::vector<Warning> quantize(const torch::nn::Module& module, const QuantizationConfig& config) {
    const ContainerRequest request = request_of(config);
    const ModulePlan plan = plan_module(module, request.request, request.container);
    quantize_layers(plan, config.compute_dtype == "bfloat16" ? torch::kBFloat16 : torch::kFloat);
    return plan.warnings;
  }

  std::string_view name_;
};

struct Registered {
  std::mutex mutex;
  std::map<std::string, AdapterFactory> factories;
};
Registered& registered() {
  static Registered all;
  return all;
}

}  // namespace

std::unique_ptr<QuantizationAdapter> create_quantization_adapter(const std::string& backend,
                                                                 const QuantizationConfig& config) {
  AdapterFactory own;
  {
    const std::lock_guard lock(registered().mutex);
    if (const auto found = registered().factories.find(config.method); found != registered().factories.end())
      own = found->second;
  }
  if (own) return own(backend, config);
  return std::make_unique<ContainerAdapter>(backend, config);
}

void register_quantization_adapter(const std::string& method, AdapterFactory factory) {
  const std::lock_guard lock(registered().mutex);
  if (factory)
    registered().factories[method] = std::move(factory);
  else
    registered().factories.erase(method);
}

torch::nn::Linear create_quantized_linear(int64_t in_features, int64_t out_features, bool bias,
                                          const QuantizationConfig& config, const std::string& backend) {
  return create_quantization_adapter(backend, config)->create_quantized_linear(in_features, out_features, bias);
}

QuantizationInfo quantize_model(torch::nn::Module& model, const QuantizationConfig& config,
                                const std::string& backend) {
  return create_quantization_adapter(backend, config)->quantize_model(model);
}

QuantizationInfo replace_linear_with_quantized(torch::nn::Module& model, const QuantizationConfig& config,
                                               const std::string& backend) {
  return quantize_model(model, config, backend);
}

void prepare_model_for_training(torch::nn::Module& model) {
  for (torch::Tensor& parameter : model.parameters()) {
    parameter.requires_grad_(false);
    const torch::ScalarType type = parameter.scalar_type();
    if (parameter.dim() < 2 && (type == torch::kHalf || type == torch::kBFloat16))
      parameter.set_data(parameter.to(torch::kFloat));
  }
}

void save_quantized_model(const torch::nn::Module& model, const std::filesystem::path& path, const std::string& format,
                          const ModelFiles& files) {
  const Container& container = writable(format);
  const PackedModule packed = pack_module(model, container);
  if (path.extension() == ".safetensors") {
    WholeFile file(path, false);
    write_weights(file.staging(), packed, container, documents_of(packed, container, files, OrderedJson::object()));
    return file.commit();
  }
  OutputDirectory directory(path, Existing::refuse);
  write_weights(directory.staging() / "model.safetensors", packed, container, {});
  if (!files.directory.empty()) copy_side_files(Checkpoint(files.directory), directory.staging());
  const OrderedJson record = {{"files", digests_of(directory.staging())}};
  for (const auto& [name, document] : documents_of(packed, container, files, record))
    write_text_file(directory.staging() / name, document.dump(2) + "\n");
  directory.commit();
}

QuantizationInfo load_quantized_model(torch::nn::Module& model, const std::filesystem::path& path) {
  const Checkpoint checkpoint = open_model(path);
  Loaded loaded;
  for_each_linear(model, [&](const std::string& layer_path, torch::nn::LinearImpl& layer) {
    load_layer(checkpoint, layer_path, layer, loaded);
  });
  load_others(checkpoint, model.named_parameters(), true, loaded);
  load_others(checkpoint, model.named_buffers(), false, loaded);
  for (const auto& step : loaded.steps) step();
  QuantizationInfo info = get_quantization_info(model);
  for (const TensorEntry& entry : checkpoint.tensors())
    if (!loaded.used.contains(entry.name))
      info.warnings.push_back(fmt::format("tensor '{}' has no place in the module", printable(entry.name)));
  return info;
}

}  // namespace bitwright
