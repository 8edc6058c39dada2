#pragma once

#include <string>
#include <string_view>

#include "base/json.hpp"
#include "engine/facts.hpp"

namespace bitwright {

/// One engine as `bitwright engines NAME` shows it: name, aliases, version, summary, source, entries, entry, fields,
/// flags [{flag, aliases, default, values, since, place, entries, refused, file}], removed_flags, methods [{method,
/// mode, min_sm, max_sm, native_sm, vendors, is, file}], checkpoints [{format, takes, file}], kv_cache [{type, bytes}],
/// conflicts [{code, severity, say, instead, when}]. What the facts do not say is absent.
OrderedJson describe_engine(std::string_view engine, const Facts& facts = Facts::standard());

/// Does an engine load a checkpoint of a method ("gptq", "gguf")?
struct Takes {
  bool taken = false;
  int min_sm = 0;      ///< the least compute capability among known NVIDIA devices that loads it; 0: all do
  std::string code{};  ///< where it is not taken, or with reserve: what a plan says
};
/// As a plan answers, for each compute capability among the known devices.
Takes takes_checkpoint(std::string_view engine, std::string_view method, const Facts& facts = Facts::standard());
/// model: what else is known of the checkpoint (PlanRequest::model).
Takes takes_checkpoint(std::string_view engine, std::string_view method, const Facts& facts, const Json& model);

/// "8.9" for 89.
std::string capability_text(int sm);

}  // namespace bitwright
