#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/elementwise.hpp"

namespace bitwright {

/// Rotary positions: the pair (i, i + n) of each head, n = frequencies.size(), turns by position * frequencies[i].
struct Rope {
  std::vector<double> frequencies{};
  double magnitude = 1;  ///< cosines and sines are multiplied by it
  int64_t reach = 0;     ///< positions it was stretched to; 0: not stretched
  /// Where the frequencies depend on the sequence's length: those of one longer than `trained` tokens. A KvCache's
  /// capacity counts as the length, so that results do not depend on the pieces a text is computed in.
  std::function<std::vector<double>(int64_t length)> stretched{};
  int64_t trained = 0;
};

/// In what layers of one model may differ.
struct LayerKind {
  int64_t window = 0;    ///< positions a query sees, its own included; 0: all before it
  size_t rope = 0;       ///< which of ModelConfig::ropes, where there are any
  bool experts = false;  ///< routed experts in place of one feed-forward network
};

enum class NormKind : uint8_t { rms, layer };

/// One matrix [outputs, inputs] of the model within a stored tensor. All names are below the layer's.
struct MatrixPlace {
  std::string name{};       ///< of the module: NAME.weight; empty: the model has no such matrix
  bool bias = false;        ///< there is a NAME.bias, cut as the rows are
  bool transposed = false;  ///< stored as [inputs, outputs]
  // Where NAME.weight holds more than this matrix: `stored` outputs, of which every `step` from `first` on the next
  // `run` are its own. stored 0: all are.
  int64_t stored = 0, first = 0, run = 0, step = 0;
};

/// Where an architecture's tensors lie, below the prefix that its checkpoint has (`prefix`, another, none …).
/// An empty name: the model has no such part.
struct TensorPlaces {
  std::string prefix = "model.";  ///< what transformers writes; the head has none
  std::string embedding = "embed_tokens", positions{}, final_norm = "norm", head = "lm_head";
  std::string layers = "layers";  ///< layer i is LAYERS.i
  // Names within a layer.
  std::string attention_norm = "input_layernorm", post_attention_norm{};
  std::string feed_forward_norm = "post_attention_layernorm", post_feed_forward_norm{};
  std::string q_norm{}, k_norm{};  ///< of each head by itself
  MatrixPlace q, k, v, o;
  MatrixPlace gate, up, down;
  /// Routed experts: modules, "{}" in whose name stands for the expert's number; or one tensor of three dimensions for
  /// all of them, gate above up or (MLX) each by itself, which is what a checkpoint may have instead.
  struct Experts {
    std::string router{}, gate{}, up{}, down{}, all_gate_up{}, all_gate{}, all_up{}, all_down{};
  };
  std::vector<Experts> experts{};  ///< as different versions of a checkpoint name them

  std::vector<std::string> leftovers = {".rotary_emb.inv_freq"};  ///< ends of names of no consequence
  std::vector<std::string> other_modules{};  ///< parts of names of what belongs to another part of the model
};

/// A decoder-only transformer as data, from config.json: what the forward pass does, and nothing of how it is called.
struct ModelConfig {
  int64_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_size = 0, feed_forward = 0, vocabulary = 0;
  int64_t context = 0;         ///< tokens it is meant for
  int64_t most_positions = 0;  ///< tokens it can take at all; 0: no limit
  bool tied_head = false;      ///< the output matrix is the embedding matrix, unless one is stored

  NormKind norm = NormKind::rms;
  float norm_epsilon = 0;
  float norm_offset = 0;  ///< added to the norms' weights
  float embedding_scale = 1;
  float attention_scale = 0, attention_cap = 0;  ///< as in AttentionRule
  float logit_cap = 0;                           ///< logits become cap * tanh(logit / cap); 0: left as they are
  Activation activation = Activation::silu;      ///< of the gate, or of `up` where there is none
  bool parallel = false;                         ///< attention and feed-forward both read the layer's input

  int64_t experts = 0, experts_used = 0, expert_feed_forward = 0;
  bool normalise_experts = false;  ///< the weights of the experts used sum to 1

  std::vector<Rope> ropes{};
  std::vector<LayerKind> kinds{};  ///< one a layer
  TensorPlaces places{};
};

}  // namespace bitwright
