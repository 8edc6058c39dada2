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

Tensor activated(Activation activation, const Tensor& x) {
  switch (activation) {
    case Activation::silu:
      return torch::silu(x);
    case Activation::gelu:
      return torch::gelu(x);
    case Activation::gelu_tanh:
      return torch::gelu(x, "tanh");
  }
  return x;
}

Tensor capped(const Tensor& x, float cap) { return cap > 0 ? torch::tanh(x / cap) * cap : x; }

/// x: [batch, length, heads, head size]; cosine, sine: [length, pairs].
Tensor turned(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  const int64_t pairs = cosine.size(1);
  const Tensor c = cosine.unsqueeze(1), s = sine.unsqueeze(1);
  const Tensor a = x.narrow(-1, 0, pairs), b = x.narrow(-1, pairs, pairs);
  std::vector<Tensor> parts = {a * c - b * s, b * c + a * s};
  if (const int64_t rest = x.size(-1) - 2 * pairs; rest > 0) parts.push_back(x.narrow(-1, 2 * pairs, rest));
  return torch::cat(parts, -1);
}

/// q: [batch, length, heads, head size], k and v with fewer heads; returns q's shape.
Tensor attended(const Tensor& q, const Tensor& k, const Tensor& v, const ModelConfig& c, int64_t window) {
  const int64_t batch = q.size(0), length = q.size(1), group = c.heads / c.kv_heads;
  const Tensor queries = q.view({batch, length, c.kv_heads, group, c.head_size}).permute({0, 2, 3, 1, 4});
  const auto for_group = [](const Tensor& x) { return x.permute({0, 2, 1, 3}).unsqueeze(2); };
  Tensor scores = torch::matmul(queries, for_group(k).transpose(-1, -2)) * c.attention_scale;
  scores = capped(scores, c.attention_cap);
  const Tensor at = torch::arange(length), distance = at.unsqueeze(1) - at.unsqueeze(0);
  Tensor hidden = distance < 0;
  if (window > 0) hidden = hidden | (distance >= window);
  scores = scores.masked_fill(hidden, -std::numeric_limits<float>::infinity());
  const Tensor out = torch::matmul(torch::softmax(scores, -1), for_group(v));
  return out.permute({0, 3, 1, 2, 4}).reshape({batch, length, c.heads * c.head_size});
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

/// Runs as it was run first: random numbers and autocast; what was before is there again afterwards.
class AsBefore {
 public:
  explicit AsBefore(const Recomputed& what) : state_(random_state()), autocast_(at::autocast::is_cpu_enabled()) {
    set_random_state(what.random_state);
    at::autocast::set_cpu_enabled(what.autocast);
  }
  ~AsBefore() {
    set_random_state(state_);
    at::autocast::set_cpu_enabled(autocast_);
  }
  AsBefore(const AsBefore&) = delete;
  AsBefore& operator=(const AsBefore&) = delete;

 private:
  Tensor state_;
  bool autocast_;
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
    Tensor y;
    call(what.hooks.before, what.layer);
    {
      const at::AutoGradMode recorded(true);
      const AsBefore as_before(what);
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
  for (auto& [path, weight] : tables) fill(weight, path + ".weight");
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
  Tensor x = torch::embedding(embedding, tokens).to(torch::kFloat32);
  if (config.embedding_scale != 1) x = x * config.embedding_scale;
  if (positions.defined()) x = x + positions.narrow(0, 0, tokens.size(1)).to(torch::kFloat32);
  return x;
}

Tensor CausalLm::Impl::product(torch::nn::Linear& linear, const Tensor& x) const {
  const Tensor input = x.to(options.compute);
  if (behaviour_of(*linear) != nullptr) return linear->forward(input);
  const Tensor bias = linear->bias.defined() ? linear->bias.to(options.compute) : Tensor();
  return torch::linear(input, linear->weight.to(options.compute), bias);
}

Tensor CausalLm::Impl::normalised(const Tensor& x, const Norm& with) const {
  const Tensor weight = config.norm_offset == 0 ? with.weight : with.weight + config.norm_offset;
  const Tensor in = x.to(torch::kFloat32);
  if (config.norm == NormKind::layer)
    return torch::layer_norm(in, weight.sizes(), weight, with.bias, config.norm_epsilon);
  return in * torch::rsqrt(in.square().mean(-1, /*keepdim=*/true) + config.norm_epsilon) * weight;
}

Tensor CausalLm::Impl::attention(Layer& layer, const Tensor& x) const {
  const TensorPlaces& places = config.places;
  const int64_t batch = x.size(0), length = x.size(1);
  std::map<const torch::nn::LinearImpl*, Tensor> outputs_of;  // of those that are cut from one matrix: once
  const auto heads = [&](torch::nn::Linear& linear, const MatrixPlace& place, int64_t count, const Norm& norm) {
    Tensor& all = outputs_of[linear.get()];
    if (!all.defined()) all = product(linear, x);
    Tensor out = part_of(all, place, count * config.head_size).reshape({batch, length, count, config.head_size});
    return norm.weight.defined() ? normalised(out, norm) : out.to(torch::kFloat32);
  };
  Tensor q = heads(layer.q, places.q, config.heads, layer.q_norm),
         k = heads(layer.k, places.k, config.kv_heads, layer.k_norm);
  const Tensor v = heads(layer.v, places.v, config.kv_heads, {});
  if (!rotations.empty()) {
    const auto& [cosine, sine] = rotations[layer.kind.rope];
    q = turned(q, cosine, sine);
    k = turned(k, cosine, sine);
  }
  return product(layer.o, attended(q, k, v, config, layer.kind.window));
}

Tensor CausalLm::Impl::feed_forward(Layer& layer, const Tensor& x) const {
  const TensorPlaces& places = config.places;
  const Tensor up_output = product(layer.up, x);
  const Tensor up = part_of(up_output, places.up, config.feed_forward);
  if (layer.gate.is_empty()) return product(layer.down, activated(config.activation, up));
  const Tensor gate = part_of(layer.gate.get() == layer.up.get() ? up_output : product(layer.gate, x), places.gate,
                              config.feed_forward);
  return product(layer.down, activated(config.activation, gate) * up);
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
  return capped(impl_->product(impl_->head, hidden).to(torch::kFloat32), impl_->config.logit_cap);
}

Tensor CausalLm::forward(const Tensor& tokens) { return logits(hidden(tokens)); }

Tensor CausalLm::loss(const Tensor& tokens, const Tensor& targets) {
  constexpr int64_t kIgnored = -100;
  const Tensor expected = targets.reshape({-1}).masked_fill(targets.reshape({-1}) < 0, kIgnored);
  return torch::nn::functional::cross_entropy(forward(tokens).flatten(0, 1), expected,
                                              torch::nn::functional::CrossEntropyFuncOptions().ignore_index(kIgnored));
}

const ModelConfig& CausalLm::config() const { return impl_->config; }
const Json& CausalLm::config_json() const { return impl_->json; }
torch::nn::LinearImpl& CausalLm::head() { return *impl_->head; }
bool CausalLm::tied_head() const { return impl_->head->weight.is_same(impl_->embedding); }
CausalLmOptions& CausalLm::options() { return impl_->options; }
std::vector<std::string> CausalLm::layer_paths() const { return impl_->layer_paths; }
bool CausalLm::stored_transposed(const std::string& parameter) const {
  return parameter.ends_with(".weight") && impl_->transposed.contains(parameter.substr(0, parameter.size() - 7));
}

}  // namespace bitwright::train
