#pragma once

#include <map>
#include <nlohmann/json.hpp>  // parameters, facts and engine arguments are JSON values
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bitwright/engine/facts.hpp"
#include "bitwright/json.hpp"

namespace bitwright {

enum class Severity : uint8_t { note, warning, error };
std::string_view severity_name(Severity severity);

/// What the user must know of a plan. The code is stable; `instead` names ways that work.
struct Diagnostic {
  std::string code;
  Severity severity = Severity::error;
  std::string message;
  std::vector<std::string> instead{};
};

/// One argument of the engine, and where it comes from.
struct Argument {
  std::string flag;      ///< as the engine spells it: "--kv-cache-dtype"
  Json value;            ///< text; true: a bare flag; an object: JSON text on the command line
  std::string rule;      ///< "kvcache_dtype fp8", or "given" for the user's own
  std::string source{};  ///< the engine's file that says so
  bool given = false;
  std::string place = "cli";  ///< cli | config (its configuration file) | api (its Python call) | env
};

/// The user's parameter, or a field before an intent, took the place of what a rule would have set.
struct Override {
  std::string flag;
  Json derived, given;
  std::string rule;
  std::string by = "given";  ///< "given": by the user's parameter; else the rule that came first
};

/// What became of a field or an intent. None is ever dropped without a word.
struct Answer {
  std::string field, value;
  std::string outcome;   ///< argument | default | checkpoint | override | diagnostic
  std::string why{};     ///< the flags that were set, the codes that were said, or why nothing was needed
  std::string source{};  ///< the engine's file that says so
};

/// Intent (SPECIFICATION A). weight_only absent: what the method usually means.
struct Intent {
  bool enabled() const { return method != "none" || !backend_method.empty(); }

  std::string method = "none";
  std::optional<bool> weight_only{};
  std::string backend_method{};  ///< the engine's own name; bypasses the mapping
};

struct PlanRequest {
  std::string engine;
  std::string version{};           ///< empty: the one the facts were read from
  Json hardware = Json::object();  ///< vendor, sm, memory_gib ...: a hardware document or a part of one; empty: unknown
  std::string checkpoint{};        ///< the method the checkpoint declares; empty: 16 bits
  Json model = Json::object();     ///< moe, mla, head_dim, scheme, bits, sym, group_size, kv_cache_scheme, entry ...
  std::map<std::string, std::string> fields{};  ///< the four fields; absent: auto
  Intent intent{};
  std::vector<std::pair<std::string, Json>> parameters{};  ///< the user's own, in their order
  std::map<std::string, std::string> environment{};
  std::vector<Argument> derived{};  ///< what was worked out for the engine's own flags (derive_parallel)
};

struct EnginePlan {
  std::string engine, version, entry;
  std::string outcome;  ///< ok | warning | error
  std::vector<Argument> args{};
  std::vector<Argument> settings{};  ///< what stands in environment, config_file and api, each with its rule
  Json environment = Json::object(), config_file = Json::object(), api = Json::object();
  std::vector<Diagnostic> diagnostics{};
  Json resolved = Json::object();  ///< what the engine itself will choose
  std::vector<Override> overrides{};
  std::vector<Answer> answers{};
  int64_t tensor_parallel = 1;  ///< devices that share every layer, from the engine's own argument
};

/// The engine's arguments for a request, each with its rule, and what speaks against them. Pure: no file is read beside
/// the facts, none written; the same request gives the same plan. What an engine or a GPU refuses is in `diagnostics`
/// and makes the outcome "error". Throws Error (exit status 2) for names nobody knows: engine, field or value.
EnginePlan plan_engine(const PlanRequest& request, const Facts& facts = Facts::standard());

/// What may stand in a field besides "auto", and which kinds of weights an intent may ask for.
const std::vector<std::string>& field_values(std::string_view field);
const std::vector<std::string>& field_names();
const std::vector<std::string>& intent_methods();

/// In quotes where a shell needs them.
std::string shell_word(const std::string& text);

/// The words of one argument on the engine's command line. A false is left out, unless the user says it and the engine
/// has a word for it ("--no-enable-prefix-caching").
std::vector<std::string> argument_words(const Argument& argument, const Json& engine);

/// "vllm serve MODEL --kv-cache-dtype fp8", quoted for a shell, environment first; or the Python call, where the engine
/// is one.
std::string engine_command(const EnginePlan& plan, std::string_view model, const Facts& facts = Facts::standard());

/// The plan as JSON: name, version, outcome, args, explained, answers, env, config_file, api, command, resolved,
/// overrides, warnings, errors.
OrderedJson plan_json(const EnginePlan& plan, std::string_view model, const Facts& facts = Facts::standard());

}  // namespace bitwright
