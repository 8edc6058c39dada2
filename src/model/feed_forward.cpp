#include "model/feed_forward.hpp"

#include <algorithm>

#include "base/threads.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/matmul.hpp"

namespace bitwright {
namespace {

constexpr size_t kRowsATask = 16;  // of loops over single tokens

void run(const FeedForward& f, Activation activation, const float* x, size_t tokens, float* out,
         const InputObserver* observer) {
  const size_t width = f.up.weight.rows;
  observe(observer, {f.gate ? &*f.gate : &f.up, &f.up}, x, tokens);
  std::vector<float> up(tokens * width), gate(f.gate ? up.size() : 0);
  apply(f.up, x, tokens, up.data());
  if (f.gate) apply(*f.gate, x, tokens, gate.data());
  std::vector<float>& inner = f.gate ? gate : up;
  parallel_ranges(tokens, kRowsATask, [&](size_t begin, size_t end) {
    active_kernel_level().activate(activation, inner.data() + begin * width,
                                   f.gate ? up.data() + begin * width : nullptr, (end - begin) * width);
  });
  observe(observer, {&f.down}, inner.data(), tokens);
  apply(f.down, inner.data(), tokens, out);
}

struct Assignment {
  size_t token;
  float weight;
};

/// For each expert the tokens that use it, in order. scores: [tokens, experts], overwritten.
/// A token's weights are the softmax of its scores, or of those of the experts it uses.
std::vector<std::vector<Assignment>> assign(std::vector<float>& scores, size_t tokens, size_t experts, size_t used,
                                            bool normalise) {
  std::vector<std::vector<Assignment>> assigned(experts);
  std::vector<size_t> best;
  for (size_t t = 0; t < tokens; ++t) {
    float* const terms = scores.data() + t * experts;
    const float reciprocal = active_kernel_level().softmax_terms(terms, experts, 1);
    best.clear();
    float sum = 0;
    while (best.size() < used) {  // the first of equals; a NaN is never above another
      size_t top = experts;
      for (size_t e = 0; e < experts; ++e)
        if (std::ranges::find(best, e) == best.end() && (top == experts || terms[e] > terms[top])) top = e;
      best.push_back(top);
      sum += terms[top];
    }
    for (const size_t e : best) assigned[e].push_back({t, normalise ? terms[e] / sum : terms[e] * reciprocal});
  }
  return assigned;
}

/// A token's sum runs over its experts by number, whatever tokens it is computed with.
void run(const Experts& experts, const ModelConfig& c, const float* x, size_t tokens, float* out,
         const InputObserver* observer) {
  const auto width = static_cast<size_t>(c.hidden), count = experts.experts.size();
  std::vector<float> scores(tokens * count);
  observe(observer, {&experts.router}, x, tokens);
  apply(experts.router, x, tokens, scores.data());
  const auto assigned = assign(scores, tokens, count, static_cast<size_t>(c.experts_used), c.normalise_experts);
  std::fill_n(out, tokens * width, 0.0f);
  std::vector<float> in, result;
  for (size_t e = 0; e < count; ++e) {
    const std::vector<Assignment>& users = assigned[e];
    if (users.empty()) continue;
    in.resize(users.size() * width);
    result.resize(in.size());
    for (size_t i = 0; i < users.size(); ++i) std::copy_n(x + users[i].token * width, width, in.data() + i * width);
    run(experts.experts[e], c.activation, in.data(), users.size(), result.data(), observer);
    for (size_t i = 0; i < users.size(); ++i) {
      float* const y = out + users[i].token * width;
      for (size_t k = 0; k < width; ++k) y[k] += result[i * width + k] * users[i].weight;
    }
  }
}

/// y += B A x.
void add_low_rank(const Linear::LowRank& adapter, const float* x, size_t tokens, float* y) {
  std::vector<float> inner(tokens * adapter.a.rows), sum(tokens * adapter.b.rows);
  multiply(x, tokens, adapter.a, inner.data());
  multiply(inner.data(), tokens, adapter.b, sum.data());
  parallel_ranges(tokens, kRowsATask, [&](size_t begin, size_t end) {
    const size_t width = adapter.b.rows;
    for (size_t i = begin; i < end; ++i) add({y + i * width, width}, sum.data() + i * width);
  });
}

}  // namespace

void apply(const Linear& linear, const float* x, size_t tokens, float* y) {
  const float* const given = x;
  std::vector<float> quantized;
  if (linear.input) {
    quantized.resize(tokens * linear.weight.columns);
    linear.input->apply(x, tokens, linear.weight.columns, quantized.data());
    x = quantized.data();
  }
  multiply(x, tokens, linear.weight, y);
  const size_t width = linear.weight.rows;
  if (!linear.bias.empty())
    parallel_ranges(tokens, kRowsATask, [&](size_t begin, size_t end) {
      for (size_t i = begin; i < end; ++i) add({y + i * width, width}, linear.bias.data());
    });
  if (linear.output) linear.output->apply(y, tokens, width, y);
  if (linear.adapter) add_low_rank(*linear.adapter, given, tokens, y);
}

void observe(const InputObserver* observer, std::initializer_list<const Linear*> readers, const float* x,
             size_t tokens) {
  if (observer == nullptr) return;
  std::vector<const MatrixName*> names;
  for (const Linear* reader : readers)  // what is cut from one tensor is told of once
    if (std::ranges::none_of(names, [&](const MatrixName* name) { return *name == reader->name; }))
      names.push_back(&reader->name);
  const size_t columns = (*readers.begin())->weight.columns;
  (*observer)(names, {x, tokens * columns}, tokens);
}

void run_feed_forward(const Layer& layer, const ModelConfig& config, const float* x, size_t tokens, float* out,
                      const InputObserver* observer) {
  if (const auto* experts = std::get_if<Experts>(&layer.feed_forward))
    return run(*experts, config, x, tokens, out, observer);
  run(std::get<FeedForward>(layer.feed_forward), config.activation, x, tokens, out, observer);
}

}  // namespace bitwright
