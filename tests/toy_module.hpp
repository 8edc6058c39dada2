#pragma once

#include <torch/torch.h>

#include <functional>
#include <string>

#include "base/error.hpp"

namespace bitwright::test {

/// A user's own module: nested blocks, typed members, a norm and a head. 64 divides no row of `odd_proj`.
struct ToyBlock : torch::nn::Module {
  ToyBlock() {
    q_proj = register_module("q_proj", torch::nn::Linear(128, 128));
    up_proj = register_module("up_proj", torch::nn::Linear(torch::nn::LinearOptions(128, 96).bias(false)));
    odd_proj = register_module("odd_proj", torch::nn::Linear(96, 128));
  }
  torch::Tensor forward(const torch::Tensor& x) { return x + odd_proj(torch::silu(up_proj(q_proj(x)))); }
  torch::nn::Linear q_proj{nullptr}, up_proj{nullptr}, odd_proj{nullptr};
};

struct ToyModule : torch::nn::Module {
  ToyModule() {
    layers = register_module("layers", torch::nn::ModuleList());
    for (int i = 0; i < 2; ++i) layers->push_back(std::make_shared<ToyBlock>());
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({128})));
    lm_head = register_module("lm_head", torch::nn::Linear(128, 256));
  }
  torch::Tensor forward(torch::Tensor x) {
    for (const auto& layer : *layers) x = layer->as<ToyBlock>()->forward(x);
    return lm_head(norm(x));
  }
  torch::nn::ModuleList layers{nullptr};
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear lm_head{nullptr};
};

/// The same weights each time.
inline ToyModule toy_module(uint64_t seed = 1) {
  torch::manual_seed(seed);
  return ToyModule();
}

inline torch::Tensor toy_input(int64_t tokens = 32, uint64_t seed = 2) {
  torch::manual_seed(seed);
  return torch::randn({2, tokens, 128});
}

/// Of the error that comes out of it, or "none".
inline std::string code_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return std::string(error.code());
  }
  return "none";
}

}  // namespace bitwright::test
