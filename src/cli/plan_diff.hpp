#pragma once

#include "base/json.hpp"

namespace bitwright {

/// Is this what `bitwright plan --json` printed, rather than a configuration?
bool is_plan(const OrderedJson& document);

/// What differs between two results of `plan`: [{path, before, after}], null for what one of them lacks. Arguments go
/// by their flag ("engine.args.--kv-cache-dtype"), tensors by kind ("tensors.self_attn.q_proj"), warnings and errors by
/// code, everything else by its path. Plans of several presets are compared one by one ("plans.0.").
OrderedJson diff_plans(const OrderedJson& before, const OrderedJson& after);

/// The differences for people.
void print_diff(const OrderedJson& diff);

}  // namespace bitwright
