#pragma once

#include "base/json.hpp"

namespace bitwright {

/// The readable page of what `bitwright plan --json` says.
void print_plan(const OrderedJson& result);

}  // namespace bitwright
