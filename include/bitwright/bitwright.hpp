#pragma once

/// Everything that a program which links Bitwright::core may use. JSON values are nlohmann's; what the user can cause
/// is thrown as bitwright::Error. All functions are pure but for those that take a path, and safe in several threads.

#include "bitwright/engine/backends.hpp"
#include "bitwright/engine/detect.hpp"
#include "bitwright/engine/facts.hpp"
#include "bitwright/engine/plan.hpp"
#include "bitwright/engine/precision.hpp"
#include "bitwright/error.hpp"
#include "bitwright/json.hpp"
