#include "bitwright/torch/adapter.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <set>

#include "base/error.hpp"
#include "engine/backends.hpp"
#include "model/open_model.hpp"
#include "scheme/transposed.hpp"
#include "train/export.hpp"
#include "train/linear.hpp"
#include "train/quantized_module.hpp"

namespace bitwright {
namespace {

using namespace train;

// ---- Files ----

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

/// What a model's files have [inputs, outputs] though it is a linear layer's (GPT-2).
void turn_as_in_files(const torch::nn::Module& module, const OrderedJson& config,
                      std::vector<ExportedTensor>& tensors) {
  const Json plain = config;
  std::set<std::string, std::less<>> weights;
  for_each_linear(module, [&](const std::string& path, torch::nn::LinearImpl&) { weights.insert(weight_name(path)); });
  for (ExportedTensor& tensor : tensors)
    if (weights.contains(tensor.name) && has_inputs_first(plain, tensor.name)) tensor.transposed = true;
}

// ---- Loading ----

[[noreturn]] void fail(const Checkpoint& checkpoint, const char* code, const std::string& why) {
  throw Error({.code = code, .what = "cannot load the model", .where = checkpoint.path().string(), .why = why});
}

/// A tensor as the module has it.
struct Found {
  const TensorEntry& entry;
  bool turned;  ///< the file has its transpose
};
/// of_linear: the module has it [outputs, inputs], whatever the model's files have.
Found require(const Checkpoint& checkpoint, const std::string& name, torch::IntArrayRef shape, bool of_linear) {
  const TensorEntry* const entry = checkpoint.find(name);
  if (entry == nullptr) fail(checkpoint, "missing-tensor", fmt::format("there is no tensor '{}'", printable(name)));
  const bool inputs_first = of_linear && has_inputs_first(checkpoint.config(), name);
  Shape stored = entry->shape;
  const bool turned = entry->transposed != inputs_first && stored.size() == 2;
  if (turned) std::swap(stored[0], stored[1]);
  if (stored != shape.vec())
    fail(checkpoint, "wrong-shape",
         fmt::format("tensor '{}' has the shape {}, the module asks for {}", printable(name), to_string(stored),
                     to_string(shape.vec())));
  if (turned && entry->quantized() && !can_transpose(entry->scheme))
    fail(checkpoint, "unsupported-tensor",
         fmt::format("'{}' is stored transposed, in groups that a linear layer's rows have not", printable(name)));
  checkpoint.require_decoded(*entry);
  return {*entry, turned};
}

torch::Tensor read_floats(const Checkpoint& checkpoint, const Found& found) {
  const std::vector<float> values = checkpoint.read_f32(found.entry);
  const torch::Tensor floats = torch::tensor(values, torch::kFloat).reshape(found.entry.shape);
  return found.turned ? floats.t().contiguous() : floats;
}

/// What will be done to the module, made before anything is.
struct Loaded {
  std::vector<std::function<void()>> steps;
  std::set<std::string, std::less<>> used;
};

void load_layer(const Checkpoint& checkpoint, const std::string& path, torch::nn::LinearImpl& layer, Loaded& out) {
  const std::string name = weight_name(path);
  const Found found = require(checkpoint, name, layer.weight.sizes(), true);
  out.used.insert(name);
  if (found.entry.quantized()) {
    QuantizedTensor weight = checkpoint.read(found.entry);
    if (found.turned) weight = transposed(weight);
    auto quantized = std::make_shared<QuantizedLayer>(std::move(weight), found.entry.linear);
    out.steps.push_back([&layer, quantized] { attach_quantized(layer, quantized); });
  } else {
    const torch::Tensor floats = read_floats(checkpoint, found).to(layer.weight.scalar_type());
    out.steps.push_back([&layer, floats] { detach(layer, floats.clone().requires_grad_()); });
  }
}

void load_others(const Checkpoint& checkpoint, const torch::OrderedDict<std::string, torch::Tensor>& named,
                 bool is_required, Loaded& out) {
  for (const auto& item : named) {
    if (out.used.contains(item.key())) continue;
    if (!is_required && checkpoint.find(item.key()) == nullptr) continue;
    const torch::Tensor to = item.value();
    const Found found = require(checkpoint, item.key(), to.sizes(), false);
    out.used.insert(item.key());
    out.steps.push_back([to, floats = read_floats(checkpoint, found)] {
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
  std::vector<ExportedTensor> tensors = exported_tensors(model);
  turn_as_in_files(model, files.config, tensors);
  export_model(
      tensors, {.config = files.config, .directory = files.directory},
      {.output = {.output = path}, .container = has_quantized(tensors) ? &container : nullptr, .floats = std::nullopt});
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
