#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "base/json.hpp"

namespace bitwright {

/// Tensors that are alike: the same modules of every layer, with one scheme.
struct TensorGroup {
  std::vector<std::string> names{};  ///< "q_proj"; "mlp.c_proj" where another module is called c_proj too
  size_t count = 0;                  ///< tensors of each name
  std::string scheme{}, algorithm{}, reason{};
  double bytes = 0;  ///< of all of them
};

/// The tensors of a plan, [{name, scheme, algorithm, bytes, reason}], in the order in which each kind comes first. What
/// is absent or of another type counts as empty.
std::vector<TensorGroup> group_tensors(const OrderedJson& tensors);

/// What each kind of tensor ("self_attn.q_proj") is stored as: "int4 group 64 by rtn x32"; several schemes are joined
/// by ", ".
std::map<std::string, std::string> schemes_by_kind(const OrderedJson& tensors);

/// "model.layers.3.self_attn.q_proj.weight": "self_attn.q_proj", the path below the last number; experts keep the word:
/// "experts.up_proj". Without a number the last word: "embed_tokens".
std::string tensor_kind(const std::string& name);

}  // namespace bitwright
