#include "train/causal_lm.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>

#include <cmath>
#include <map>

#include "base/error.hpp"
#include "model/kv_cache.hpp"
#include "model/model.hpp"
#include "model/weights.hpp"
#include "train/linear.hpp"
#include "train/ops.hpp"
#include "train/quantized_linear.hpp"

namespace bitwright::train {
namespace {

using torch::Tensor;

constexpr double kDeviation = 0.02;  // of random weights, as GPT-2 and Llama have it

struct Norm {
  Tensor weight{}, bias{};  ///< undefined: there is no such norm, or no bias
};

struct Layer {
  LayerKind kind{};
  Norm attention_norm, post_attention_norm, feed_forward_norm, post_feed_forward_norm, q_norm, k_norm;
  /// Those that are cut from one tensor are one module; null: there is no such matrix.
  torch::nn::Linear q{nullptr}, k{nullptr}, v{nullptr}, o{nullptr}, gate{nullptr}, up{nullptr}, down{nullptr};
};

/// The plain module at `path` below `root`, made where there is none yet.
torch::nn::Module& module_at(torch::nn::Module& root, const std::string& path) {
  torch::nn::Module* at = &root;
  for (size_t begin = 0; begin < path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    const std::string name = path.substr(begin, end - begin);
    const auto children = at->named_children();
    const auto* const found = children.find(name);
    at = found != nullptr ? found->get() : at->register_module(name, std::make_shared<torch::nn::Module>()).get();
    begin = end + 1;
  }
  return *at;
}

/// "model.layers.0" and "self_attn" of "model.layers.0.self_attn".
std::pair<std::string, std::string> parent_and_name(const std::string& path) {
  const size_t dot = path.rfind('.');
  return dot == std::string::npos ? std::pair(std::string(), path)
                                  : std::pair(path.substr(0, dot), path.substr(dot + 1));
}

/// Without libtorch's own random weights, which would be replaced at once.
torch::nn::Linear make_linear(int64_t outputs, int64_t inputs, bool bias, torch::ScalarType type) {
  torch::nn::Linear linear(torch::nn::LinearOptions(1, 1).bias(bias));
  linear->options.in_features(inputs);
  linear->options.out_features(outputs);
  detach(*linear, torch::empty({outputs, inputs}, torch::TensorOptions(torch::kMeta).dtype(type)));
  if (bias) linear->bias.set_data(torch::zeros({outputs}));
  return linear;
}

Tensor from_floats(const std::vector<float>& values, torch::IntArrayRef sizes) {
  return torch::from_blob(const_cast<float*>(values.data()), sizes).clone();
}

/// What of `output` belongs to the matrix at `place`, which has `rows` rows.
Tensor part_of(const Tensor& output, const MatrixPlace& place, int64_t rows) {
  if (place.stored == 0) return output;
  std::vector<int64_t> sizes = output.sizes().vec();
  sizes.back() = rows / place.run;
  sizes.push_back(place.step);
  const Tensor cut = output.view(sizes).narrow(-1, place.first, place.run);
  sizes.pop_back();
  sizes.back() = rows;
  return cut.reshape(sizes);
}

/// A part of the network that is run again in backward().
struct Recomputed : torch::CustomClassHolder {
  std::function<Tensor(const Tensor&)> run;
  LayerHooks hooks;
  size_t layer = 0;
  Tensor random_state;
  bool input_learns = false, autocast = false;
};

void call(const std::function<void(size_t)>& hook, size_t layer) {
  if (hook) hook(layer);
}

Tensor random_state() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard lock(generator.mutex());
  return generator.get_state();
}
void set_random_state(const Tensor& state) {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  const std::lock_guard lock(generator.mutex());
  generator.set_state(state);
}

/// libtorch's autocast of the CPU, by which compute_type() and behaviours go, as it was before at the end of the scope.
class Autocast {
 public:
  explicit Autocast(bool on) : before_(at::autocast::is_cpu_enabled()) { at::autocast::set_cpu_enabled(on); }
  ~Autocast() {
    at::autocast::set_cpu_enabled(before_);
    if (!before_) at::autocast::clear_cache();  // of weights that will change
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  bool before_;
};

/// The random numbers that were drawn first are drawn again; at the end of the scope it goes on as if they were not.
class SameRandomNumbers {
 public:
  explicit SameRandomNumbers(const Tensor& state) : before_(random_state()) { set_random_state(state); }
  ~SameRandomNumbers() { set_random_state(before_); }
  SameRandomNumbers(const SameRandomNumbers&) = delete;
  SameRandomNumbers& operator=(const SameRandomNumbers&) = delete;

 private:
  Tensor before_;
};

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  /// learns: any tensor that requires a gradient, for parameters are not among the arguments.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const Tensor& /*learns*/,
                        const c10::intrusive_ptr<Recomputed>& what) {
    what->random_state = random_state();
    what->autocast = at::autocast::is_cpu_enabled();
    context->save_for_backward({x});
    context->saved_data["what"] = c10::IValue::make_capsule(what);
    call(what->hooks.before, what->layer);
    const Tensor y = what->run(x);
    call(what->hooks.after, what->layer);
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto capsule = context->saved_data["what"].toCapsule();
    auto& what = static_cast<Recomputed&>(*capsule);
    const Tensor x = context->get_saved_variables()[0].detach().requires_grad_(what.input_learns);
    call(what.hooks.before, what.layer);
    Tensor y;
    {
      const at::AutoGradMode recorded(true);
      const SameRandomNumbers random(what.random_state);
      const Autocast autocast(what.autocast);
      y = what.run(x);
    }
    if (y.requires_grad()) torch::autograd::backward({y}, {gradients[0]});
    y.reset();
    call(what.hooks.after_backward, what.layer);
    return {x.grad(), Tensor(), Tensor()};
  }
};

}  // namespace

struct CausalLm::Impl {
  Impl(CausalLm& owner, const Json& description, const std::string& where, CausalLmOptions chosen)
      : module(owner), config(read_model_config(description, where)), json(description), options(std::move(chosen)) {
    for (const LayerKind& kind : config.kinds)
      if (kind.experts)
        throw Error({.code = "unsupported-config",
                     .what = "cannot train this model",
                     .where = where,
                     .why = "layers with routed experts can be run, not trained"});
  }

  /// head: its path; empty: it is the embedding.
  void build(const std::string& prefix, const std::string& head_path);
  void randomise();
  void load(const Checkpoint& checkpoint, WeightReader& reader);

  torch::nn::Linear linear(const std::string& base, const MatrixPlace& place, int64_t rows, int64_t columns);
  Norm norm(const std::string& path, const std::string& name, int64_t size);
  Tensor table(const std::string& path, int64_t rows);
  void load_linear(const Checkpoint& checkpoint, WeightReader& reader, const std::string& path,
                   torch::nn::LinearImpl& linear);

  bool bf16() const {
    return options.compute == torch::kBFloat16 || options.matrices == torch::kBFloat16 ||
           at::autocast::is_cpu_enabled();
  }
  Compute compute() const { return bf16() ? Compute::bf16 : Compute::f32; }
  void prepare_rotations(int64_t length);
  Tensor embed(const Tensor& tokens) const;
  Tensor product(torch::nn::Linear& linear, const Tensor& x) const;
  Tensor normalised(const Tensor& x, const Norm& with) const;
  Tensor attention(Layer& layer, const Tensor& x) const;
  Tensor feed_forward(Layer& layer, const Tensor& x) const;
  Tensor run(Layer& layer, const Tensor& x) const;

  CausalLm& module;
  ModelConfig config;
  Json json;
  CausalLmOptions options;

  std::map<std::string, torch::nn::Linear> linears{};  ///< by path, the head too where it has its own matrix
  std::set<std::string> transposed{};                  ///< paths of those that files have [inputs, outputs]
  Tensor embedding{}, positions{};
  TableRows embedding_rows{};              ///< where the embedding is not kept in floats
  std::map<std::string, Tensor> tables{};  ///< both, by the names of their modules
  std::map<std::string, Tensor> vectors{};
  Norm final_norm{};
  std::vector<Layer> layers{};
  std::vector<std::string> layer_paths{};
  torch::nn::Linear head{nullptr};
  std::set<std::string> outputs{};  ///< paths of the linear layers that write to the residual stream

  int64_t rotated = 0;  ///< length that these are for
  std::vector<std::pair<Tensor, Tensor>> rotations{};
};

torch::nn::Linear CausalLm::Impl::linear(const std::string& base, const MatrixPlace& place, int64_t rows,
                                         int64_t columns) {
  if (place.name.empty()) return nullptr;
  const std::string path = base + place.name;
  const auto known = linears.find(path);
  if (known != linears.end()) return known->second;
  const int64_t stored = place.stored == 0 ? rows : place.stored;
  if (place.transposed) transposed.insert(path);
  const auto [parent, name] = parent_and_name(path);
  torch::nn::Linear made = make_linear(stored, columns, place.bias, options.matrices);
  module_at(module, parent).register_module(name, made);
  return linears.emplace(path, made).first->second;
}

Norm CausalLm::Impl::norm(const std::string& path, const std::string& name, int64_t size) {
  if (name.empty()) return {};
  torch::nn::Module& at = module_at(module, path + name);
  Norm out;
  out.weight = at.register_parameter("weight", torch::full({size}, 1 - config.norm_offset));
  vectors[path + name + ".weight"] = out.weight;
  if (config.norm == NormKind::rms) return out;
  out.bias = at.register_parameter("bias", torch::zeros({size}));
  vectors[path + name + ".bias"] = out.bias;
  return out;
}

Tensor CausalLm::Impl::table(const std::string& path, int64_t rows) {
  const Tensor made = torch::empty({rows, config.hidden}, options.matrices);
  return tables[path] = module_at(module, path).register_parameter("weight", made);
}

void CausalLm::Impl::build(const std::string& prefix, const std::string& head_path) {
  const TensorPlaces& places = config.places;
  const int64_t q_width = config.heads * config.head_size, kv_width = config.kv_heads * config.head_size;
  embedding = table(prefix + places.embedding, config.vocabulary);
  if (!places.positions.empty()) positions = table(prefix + places.positions, config.most_positions);
  for (int64_t i = 0; i < config.layers; ++i) {
    layer_paths.push_back(fmt::format("{}{}.{}", prefix, places.layers, i));
    const std::string base = layer_paths.back() + ".";
    Layer layer;
    layer.kind = config.kinds[static_cast<size_t>(i)];
    layer.attention_norm = norm(base, places.attention_norm, config.hidden);
    layer.q = linear(base, places.q, q_width, config.hidden);
    layer.k = linear(base, places.k, kv_width, config.hidden);
    layer.v = linear(base, places.v, kv_width, config.hidden);
    layer.o = linear(base, places.o, config.hidden, q_width);
    layer.q_norm = norm(base, places.q_norm, config.head_size);
    layer.k_norm = norm(base, places.k_norm, config.head_size);
    layer.post_attention_norm = norm(base, places.post_attention_norm, config.hidden);
    layer.feed_forward_norm = norm(base, places.feed_forward_norm, config.hidden);
    layer.gate = linear(base, places.gate, config.feed_forward, config.hidden);
    layer.up = linear(base, places.up, config.feed_forward, config.hidden);
    layer.down = linear(base, places.down, config.hidden, config.feed_forward);
    layer.post_feed_forward_norm = norm(base, places.post_feed_forward_norm, config.hidden);
    outputs.insert({base + places.o.name, base + places.down.name});
    layers.push_back(std::move(layer));
  }
  final_norm = norm(prefix, places.final_norm, config.hidden);
  if (!head_path.empty()) {
    head = linear("", {.name = head_path}, config.vocabulary, config.hidden);
  } else {
    head = make_linear(config.vocabulary, config.hidden, false, options.matrices);
    detach(*head, embedding);
  }
}

void CausalLm::Impl::randomise() {
  at::Generator generator = at::detail::createCPUGenerator(options.seed);
  const torch::NoGradGuard no_gradients;
  const auto normal = [&](torch::IntArrayRef sizes, double deviation) {
    return torch::randn(sizes, generator, torch::kFloat32).mul_(deviation).to(options.matrices);
  };
  for (auto& [path, weight] : tables) weight.copy_(normal(weight.sizes(), kDeviation));
  const double less = 1 / std::sqrt(2.0 * static_cast<double>(config.layers));
  for (auto& [path, linear] : linears)
    detach(*linear, normal(linear->weight.sizes(), kDeviation * (outputs.contains(path) ? less : 1)).requires_grad_());
}

void CausalLm::Impl::load_linear(const Checkpoint& checkpoint, WeightReader& reader, const std::string& path,
                                 torch::nn::LinearImpl& linear) {
  const std::string name = path + ".weight";
  const TensorEntry* const found = checkpoint.find(name);
  const bool turned = transposed.contains(path) && (found == nullptr || !found->transposed);
  const int64_t outputs_count = linear.weight.size(0), inputs = linear.weight.size(1);
  const TensorEntry& entry = reader.require(name, turned ? Shape{inputs, outputs_count} : Shape{outputs_count, inputs});
  if (linear.bias.defined()) {
    const Tensor bias =
        from_floats(checkpoint.read_f32(reader.require(path + ".bias", {outputs_count})), {outputs_count});
    linear.bias.copy_(bias);
  }
  if (options.load_linear && options.load_linear(path, linear, checkpoint, entry, turned)) return;
  Tensor weight = from_floats(checkpoint.read_f32(entry), entry.shape).to(options.matrices);
  if (turned) weight = weight.t().contiguous();
  detach(linear, weight.requires_grad_());
}

void CausalLm::Impl::load(const Checkpoint& checkpoint, WeightReader& reader) {
  const torch::NoGradGuard no_gradients;
  const auto fill = [&](Tensor& to, const std::string& name) {
    to.copy_(from_floats(checkpoint.read_f32(reader.require(name, to.sizes().vec())), to.sizes()));
  };
  for (auto& [path, weight] : tables) {
    const bool may_stay = weight.is_same(embedding) && !head->weight.is_same(embedding);
    if (options.load_embedding && may_stay)
      embedding_rows = options.load_embedding(checkpoint, reader.require(path + ".weight", weight.sizes().vec()));
    if (weight.is_same(embedding) && embedding_rows)
      weight.set_data(torch::empty({0}, weight.options()));
    else
      fill(weight, path + ".weight");
  }
  for (auto& [name, vector] : vectors) fill(vector, name);
  for (auto& [path, linear] : linears) load_linear(checkpoint, reader, path, *linear);
  reader.refuse_unread();
}

void CausalLm::Impl::prepare_rotations(int64_t length) {
  if (rotated == length) return;
  rotations.clear();
  for (const Rope& rope : config.ropes) {
    Rotation rotation(rope, length);
    rotation.prepare(static_cast<size_t>(length));
    const auto tensor = [&](std::span<const float> values) {
      return from_floats({values.begin(), values.end()}, {length, static_cast<int64_t>(rope.frequencies.size())});
    };
    rotations.emplace_back(tensor(rotation.cosine()), tensor(rotation.sine()));
  }
  rotated = length;
}

Tensor CausalLm::Impl::embed(const Tensor& tokens) const {
  Tensor x = embedding_rows ? embedding_rows(tokens) : torch::embedding(embedding, tokens).to(torch::kFloat32);
  if (config.embedding_scale != 1) x = x * config.embedding_scale;
  if (positions.defined()) x = x + positions.narrow(0, 0, tokens.size(1)).to(torch::kFloat32);
  return x;
}

Tensor CausalLm::Impl::product(torch::nn::Linear& linear, const Tensor& x) const {
  return train::linear(x, linear->weight, linear->bias, compute()).to(torch::kFloat32);
}

Tensor CausalLm::Impl::normalised(const Tensor& x, const Norm& with) const {
  if (config.norm == NormKind::layer) return layer_norm(x, with.weight, with.bias, config.norm_epsilon);
  return rms_norm(x, with.weight, config.norm_epsilon, config.norm_offset);
}

Tensor CausalLm::Impl::attention(Layer& layer, const Tensor& x) const {
  const TensorPlaces& places = config.places;
  std::map<const torch::nn::LinearImpl*, Tensor> products;  // of those that are cut from one matrix: one
  const auto heads = [&](torch::nn::Linear& linear, const MatrixPlace& place, int64_t count, const Norm& norm) {
    Tensor& all = products[linear.get()];
    if (!all.defined()) all = product(linear, x);
    const Tensor out =
        part_of(all, place, count * config.head_size).reshape({x.size(0), x.size(1), count, config.head_size});
    return norm.weight.defined() ? normalised(out, norm) : out;
  };
  Tensor q = heads(layer.q, places.q, config.heads, layer.q_norm),
         k = heads(layer.k, places.k, config.kv_heads, layer.k_norm);
  const Tensor v = heads(layer.v, places.v, config.kv_heads, {});
  if (!rotations.empty()) {
    const auto& [cosine, sine] = rotations[layer.kind.rope];
    q = rotary(q, cosine, sine);
    k = rotary(k, cosine, sine);
  }
  const AttentionRule rule = {
      .scale = config.attention_scale, .cap = config.attention_cap, .window = static_cast<size_t>(layer.kind.window)};
  return product(layer.o, train::attention(q, k, v, rule).flatten(2));
}

Tensor CausalLm::Impl::feed_forward(Layer& layer, const Tensor& x) const {
  const TensorPlaces& places = config.places;
  const Tensor product_up = product(layer.up, x);
  const Tensor up = part_of(product_up, places.up, config.feed_forward);
  if (layer.gate.is_empty()) return product(layer.down, gated(config.activation, up, {}));
  const Tensor product_gate = layer.gate.get() == layer.up.get() ? product_up : product(layer.gate, x);
  return product(layer.down, gated(config.activation, part_of(product_gate, places.gate, config.feed_forward), up));
}

Tensor CausalLm::Impl::run(Layer& layer, const Tensor& x) const {
  const auto finished = [&](const Tensor& branch, const Norm& post) {
    return post.weight.defined() ? normalised(branch, post) : branch;
  };
  const Tensor after = x + finished(attention(layer, normalised(x, layer.attention_norm)), layer.post_attention_norm);
  const Tensor in = normalised(config.parallel ? x : after, layer.feed_forward_norm);
  return after + finished(feed_forward(layer, in), layer.post_feed_forward_norm);
}

CausalLm::CausalLm(const Json& config, const CausalLmOptions& options)
    : impl_(std::make_unique<Impl>(*this, config, "config.json", options)) {
  const TensorPlaces& places = impl_->config.places;
  impl_->build(places.prefix, impl_->config.tied_head ? "" : places.head);
  impl_->randomise();
}

CausalLm::CausalLm(const Checkpoint& checkpoint, const CausalLmOptions& options)
    : impl_(std::make_unique<Impl>(*this, checkpoint.config(), checkpoint.config_path().string(), options)) {
  WeightReader reader(checkpoint, impl_->config.places);
  const TensorEntry* const head = reader.find_head();
  if (head == nullptr && !impl_->config.tied_head) {
    const std::string missing = impl_->config.places.head + ".weight";
    reader.require(missing, {impl_->config.vocabulary, impl_->config.hidden});
  }
  impl_->build(reader.prefix(), head == nullptr ? "" : head->name.substr(0, head->name.size() - 7));
  impl_->load(checkpoint, reader);
}

CausalLm::~CausalLm() = default;

Tensor CausalLm::hidden(const Tensor& tokens) {
  BW_ASSERT(tokens.dim() == 2);
  const int64_t length = tokens.size(1), most = impl_->config.most_positions;
  if (most != 0 && length > most)
    throw Error({.code = "context-full",
                 .what = "cannot run this model",
                 .why = fmt::format("a sequence has {} tokens, the model has positions for {}", length, most),
                 .fix = "use shorter sequences"});
  impl_->prepare_rotations(length);
  const Autocast autocast(impl_->bf16());
  Tensor x = impl_->embed(tokens);
  const LayerHooks& hooks = impl_->options.hooks;
  const bool recompute = (impl_->options.recompute_layers || hooks.before) && at::GradMode::is_enabled();
  const Tensor learns = recompute ? torch::empty({0}).requires_grad_() : Tensor();
  for (size_t i = 0; i < impl_->layers.size(); ++i) {
    Layer& layer = impl_->layers[i];
    if (!recompute) {
      call(hooks.before, i);
      x = impl_->run(layer, x);
      call(hooks.after, i);
      continue;
    }
    const auto what = c10::make_intrusive<Recomputed>();
    what->hooks = hooks;
    what->layer = i;
    what->input_learns = x.requires_grad();
    what->run = [this, &layer](const Tensor& in) { return impl_->run(layer, in); };
    x = Recompute::apply(x, learns, what);
  }
  return impl_->normalised(x, impl_->final_norm);
}

Tensor CausalLm::logits(const Tensor& hidden) {
  const Autocast autocast(impl_->bf16());
  const Tensor out = impl_->product(impl_->head, hidden);
  const float cap = impl_->config.logit_cap;
  return cap > 0 ? torch::tanh(out / cap) * cap : out;
}

Tensor CausalLm::forward(const Tensor& tokens) { return logits(hidden(tokens)); }

Tensor CausalLm::loss(const Tensor& tokens, const Tensor& targets) {
  const Tensor read = hidden(tokens);
  const Tensor expected = targets.masked_fill(targets < 0, kIgnored);
  const Autocast autocast(impl_->bf16());
  const float cap = impl_->config.logit_cap;
  if (!impl_->head->bias.defined()) {
    if (behaviour_of(*impl_->head) == nullptr)
      return linear_cross_entropy(read, impl_->head->weight, expected, cap, impl_->compute());
    const auto quantized = behaviour_as<QuantizedLinearBehaviour>(*impl_->head);
    if (const auto head = quantized ? quantized->as_head() : std::nullopt)
      return linear_cross_entropy(read, *head, expected, cap, impl_->compute());
  }
  return torch::nn::functional::cross_entropy(logits(read).flatten(0, 1), expected.flatten(),
                                              torch::nn::functional::CrossEntropyFuncOptions().ignore_index(kIgnored));
}

const ModelConfig& CausalLm::config() const { return impl_->config; }
const Json& CausalLm::config_json() const { return impl_->json; }
torch::nn::LinearImpl& CausalLm::head() { return *impl_->head; }
bool CausalLm::tied_head() const { return impl_->head->weight.is_same(impl_->embedding); }
std::vector<std::string> CausalLm::layer_paths() const { return impl_->layer_paths; }
CausalLmOptions& CausalLm::options() { return impl_->options; }
bool CausalLm::stored_transposed(const std::string& parameter) const {
  return parameter.ends_with(".weight") && impl_->transposed.contains(parameter.substr(0, parameter.size() - 7));
}

}  // namespace bitwright::train
